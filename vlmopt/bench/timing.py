"""Timing functions against each other in one run, and what may be said of the times."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

NOISY = 0.15
"""A median this far above the minimum tells that other work shared the machine."""


def interleave(
    functions: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    wait: Callable[[], None] = lambda: None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, list[float]]:
    """Run every function once per round, each round starting with another one.

    Whatever slows the machine down for a while hits all of them. One round before the first is
    not counted.

    Args:
        wait: returns when the device has finished what it was given.
        progress: is told the number of finished rounds.

    Returns:
        Seconds per function, one number per round.
    """
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    enabled = gc.isenabled()
    gc.disable()
    try:
        for turn in range(-1, rounds):
            start = turn % len(names)
            for name in names[start:] + names[:start]:
                wait()
                begun = time.perf_counter()
                functions[name]()
                wait()
                if turn >= 0:
                    seconds[name].append(time.perf_counter() - begun)
            gc.collect()
            progress(turn + 1)
    finally:
        if enabled:
            gc.enable()
    return seconds


def finishing(device: str) -> Callable[[], None]:
    """What returns when a device has finished what it was given, for :func:`interleave`."""
    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


@dataclass(frozen=True)
class Ratio:
    """How many times faster one function is than another.

    Attributes:
        value: ratio of the medians.
        low, high: 90 % bootstrap interval of it, over rounds.
    """

    value: float
    low: float
    high: float

    def text(self, *, noisy: bool) -> str:
        """The ratio with its interval, and whether to trust it."""
        return f"{self.value:.2f} ({self.low:.2f}-{self.high:.2f})" + (" noisy" if noisy else "")

    @classmethod
    def of(cls, slow: Sequence[float], fast: Sequence[float]) -> Ratio:
        """Of the times of two functions in the same rounds."""
        pairs = np.array([slow, fast])
        picks = np.random.default_rng(0).integers(pairs.shape[1], size=(2000, pairs.shape[1]))
        over, under = np.median(pairs[:, picks], axis=-1)
        low, high = np.quantile(over / under, [0.05, 0.95])
        over, under = np.median(pairs, axis=-1)
        return cls(float(over / under), float(low), float(high))


def is_noisy(seconds: Sequence[float]) -> bool:
    """Whether the machine did other work too: see :data:`NOISY`."""
    return float(np.median(seconds)) > (1 + NOISY) * min(seconds)
