"""Ranking visual tokens by the attention that their patches get in the vision encoder."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Groups(NamedTuple):
    """What becomes of the visual tokens; bool ``[batch, visual tokens]`` each.

    Attributes:
        dominant: stay as they are.
        anchors: stay, and take in others.
        members: are merged into an anchor. The rest is dropped.
    """

    dominant: Tensor
    anchors: Tensor
    members: Tensor


def rank(score: Tensor, valid: Tensor) -> Tensor:
    """Place of each token by falling score, ties in order; int64, others last."""
    order = torch.sort(
        score.float().masked_fill(~valid, float("-inf")), dim=-1, descending=True, stable=True
    ).indices
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, place)


def spread(number: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Every ``n``-th of some tokens, ``count`` per sample: bool, like ``among``.

    Args:
        number: int64 ``[batch, tokens]``, of the tokens ``among``, from 0.
        among: bool ``[batch, tokens]``.
        count: int64 ``[batch, 1]``.
    """
    step = torch.div(among.sum(-1, keepdim=True), count.clamp(min=1), rounding_mode="floor")
    step = step.clamp(min=1)
    times = torch.div(number, step, rounding_mode="floor")
    return among & (number % step == 0) & (times < count)
