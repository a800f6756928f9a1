"""Which rows of a frame are computed anew, and when a frame becomes the reference.

Pure functions of "Accelerating Streaming Video Large Language Models via Hierarchical Token
Compression", arXiv 2512.00891.
"""

from __future__ import annotations

import math
from fractions import Fraction

import torch
from torch import Tensor

METRICS = ("cosine", "l1", "l2", "dot")

_EPS = 1e-8

_SAME = 1e-6
"""Rows that differ by rounding alone count as equal: else rounding would choose among all rows of
what stands still, and another kernel would choose others. Of a cosine this much below 1; of the
length of a row ten times as much."""


def rows_to_update(tokens: int, ratio: float) -> int:
    """Rows of a frame that are computed anew: ``ratio`` of them rounded down, at least one."""
    return min(max(math.floor(tokens * Fraction(str(ratio))), 1), tokens)


def is_reference(chunk: int, interval: int) -> bool:
    """Whether a chunk is computed in full: every ``interval``-th one, from chunk 0 on."""
    return chunk % interval == 0


def similarity(key: Tensor, reference: Tensor, metric: str) -> Tensor:
    """How near each row is to the row of the reference frame at its place.

    Args:
        key: ``[frames, tokens, width]``, of all heads side by side.
        reference: ``[tokens, width]``.
        metric: one of :data:`METRICS`; distances count negatively.

    Returns:
        float32 ``[frames, tokens]``, high for rows that hardly changed.
    """
    key, reference = key.float(), reference.float()

    def length(rows: Tensor) -> Tensor:
        return rows.abs().sum(-1) if metric == "l1" else rows.square().sum(-1).sqrt()

    if metric in ("l1", "l2"):
        distance = length(key - reference)
        return -torch.where(distance > 10 * _SAME * length(reference), distance, 0.0)
    product = (key * reference).sum(-1)
    if metric == "dot":
        return product
    cosine = product / (length(key) * length(reference)).clamp(min=_EPS)
    return torch.where(cosine < 1 - _SAME, cosine, 1.0)


def differ(key: Tensor, reference: Tensor) -> Tensor:
    """Which rows differ from those of the reference frame, by more than rounding.

    Returns:
        bool ``[frames, tokens]``; see :func:`similarity`.
    """
    return similarity(key, reference, "l2") < 0


def least_similar(similar: Tensor, count: int) -> Tensor:
    """The ``count`` rows of lowest similarity of each frame; of equal ones, those in front.

    Args:
        similar: float32 ``[frames, tokens]``.

    Returns:
        int64 ``[frames, count]``, ascending.
    """
    order = similar.sort(dim=-1, stable=True).indices
    return order[:, :count].sort(dim=-1).values


def choose(key: Tensor, reference: Tensor, ratio: float, metric: str) -> Tensor:
    """Rows of each frame that are computed anew; see :func:`similarity`.

    Returns:
        int64 ``[frames, rows]``, ascending.
    """
    count = rows_to_update(key.shape[-2], ratio)
    return least_similar(similarity(key, reference, metric), count)
