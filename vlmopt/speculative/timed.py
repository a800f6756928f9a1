"""Compiled stages whose time is taken, so that what a loop spends outside of them is known."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vlmopt.program import Stage
from vlmopt.runtime.buffered import BufferedStage


class Clock:
    """Seconds within compiled stages."""

    def __init__(self) -> None:
        self.seconds = 0.0


class TimedStage(BufferedStage):
    """A compiled stage, timed; on an accelerator the work may go on behind the call."""

    def __init__(self, stage: Stage, backend: str, clock: Clock) -> None:
        super().__init__(stage, backend)
        self._clock = clock

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        start = time.perf_counter()
        results = super().__call__(values)
        self._clock.seconds += time.perf_counter() - start
        return results
