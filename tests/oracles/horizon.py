"""The probe of the information horizon once more: the eager model, blind from a layer on."""

from __future__ import annotations

import math
from typing import Any

import torch

from oracles.methods import stride_drop
from oracles.reduced import ReducedOracle


def withdrawal_curve(
    model: Any, samples: list[dict[str, torch.Tensor]], visual: list[torch.Tensor]
) -> list[float]:
    """How much of the answer is left without vision from layer 0, 1, ... on.

    The mean over samples of ``exp(-divergence)``, and of a batch the mean divergence in nats of
    the token that follows its prompts.
    """
    curve = []
    for layer in range(len(model.get_decoder().layers)):
        kept = []
        for inputs, seen in zip(samples, visual, strict=True):
            whole = _next_token(ReducedOracle(model, inputs, seen, []))
            without = ReducedOracle(model, inputs, seen, [(layer, stride_drop(lambda *_: 0))])
            apart = [
                sum(p * math.log(p / q) for p, q in zip(before, after, strict=True))
                for before, after in zip(whole, _next_token(without), strict=True)
            ]
            kept.append(math.exp(-sum(apart) / len(apart)))
        curve.append(sum(kept) / len(kept))
    return curve


def horizon_of(curve: list[float], tolerance: float) -> int | None:
    """The first layer from which on the curve stays at the top."""
    for layer in range(len(curve)):
        if all(value >= 1 - tolerance for value in curve[layer:]):
            return layer
    return None


def _next_token(oracle: ReducedOracle) -> list[list[float]]:
    chances: list[list[float]] = oracle.logits[:, -1].double().softmax(-1).tolist()
    return chances
