"""Greedy selections: as many dependent steps as tokens are picked, each in one operator.

Everything is computed in float32, ties go to the lower index, and no pick repeats. Tokens that are
not valid are picked only when no valid one is left.
"""

from __future__ import annotations

import torch
from torch import Tensor

METRICS = ("cosine", "euclidean", "squared")

_BLOCK = 1 << 20
"""Distances held at a time while the most isolated row is looked for."""


@torch.library.custom_op("vlmopt::farthest_point", mutates_args=())
def farthest_point(
    features: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    start: Tensor | None,
    count: int,
    metric: str,
) -> Tensor:
    """Pick, again and again, the token farthest from those picked (times its weight).

    Greedy k-center, max-min diversity, farthest-point sampling are its names.

    Args:
        features: ``[batch, tokens, width]``.
        valid: bool ``[batch, tokens]``.
        weight: float32 ``[batch, tokens]``, at least 0; ``None`` for all the same.
        start: first picks, int64 ``[batch]``; ``None`` for the most isolated token: the one whose
            nearest neighbour is farthest away.
        count: picks per sample, at most the number of tokens.
        metric: ``cosine`` (1 - cosine similarity), ``euclidean`` or ``squared`` (Euclidean).

    Returns:
        int64 ``[batch, count]``, in the order of picking.
    """
    return farthest_point_steps(features, valid, weight, start, count, metric)


def farthest_point_steps(
    features: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    start: Tensor | None,
    count: int,
    metric: str,
) -> Tensor:
    """:func:`farthest_point` in operators of torch, nothing written in place."""
    rows = _prepare(features, metric)
    place = torch.arange(rows.shape[1], device=rows.device)
    pick = _most_isolated(rows, valid, metric) if start is None else start
    # below every score: what is not valid, and what is picked already
    open_ = torch.ones_like(valid)
    nearest: Tensor | None = None
    picks = [pick]
    for _ in range(1, count):
        open_ = open_ & (place != pick[:, None])
        distance = _distances(_row(rows, pick), rows, metric)[:, 0]
        nearest = distance if nearest is None else torch.minimum(nearest, distance)
        score = nearest if weight is None else nearest * weight.float()
        score = torch.where(open_, torch.where(valid, score, -1.0), -2.0)
        pick = score.argmax(-1)
        picks.append(pick)
    return torch.stack(picks, dim=1)


def _row(rows: Tensor, pick: Tensor) -> Tensor:
    """Row ``pick[b]`` of each sample, ``[batch, 1, width]``."""
    return rows.gather(1, pick[:, None, None].expand(-1, 1, rows.shape[2]))


@farthest_point.register_fake
def _(
    features: Tensor,
    valid: Tensor,
    weight: Tensor | None,
    start: Tensor | None,
    count: int,
    metric: str,
) -> Tensor:
    return features.new_empty(features.shape[0], count, dtype=torch.int64)


def _prepare(features: Tensor, metric: str) -> Tensor:
    rows = features.float()
    if metric not in METRICS:
        raise ValueError(f"metric {metric!r} is none of {', '.join(METRICS)}")
    return torch.nn.functional.normalize(rows, dim=-1, eps=1e-12) if metric == "cosine" else rows


def _distances(some: Tensor, rows: Tensor, metric: str) -> Tensor:
    """``[batch, some, tokens]``, never negative."""
    if metric == "cosine":
        return (1 - some @ rows.transpose(1, 2)).clamp(min=0)
    squared = (some[:, :, None] - rows[:, None]).square().sum(-1)
    return squared.sqrt() if metric == "euclidean" else squared


def _most_isolated(rows: Tensor, valid: Tensor, metric: str) -> Tensor:
    batch, tokens, width = rows.shape
    cost = tokens if metric == "cosine" else tokens * width
    block = max(1, _BLOCK // max(1, batch * cost))
    isolation = []
    place = torch.arange(tokens, device=rows.device)
    for at in range(0, tokens, block):
        distance = _distances(rows[:, at : at + block], rows, metric)
        itself = place[at : at + block, None] == place
        isolation.append(distance.masked_fill(itself | ~valid[:, None], float("inf")).amin(-1))
    return torch.cat(isolation, 1).masked_fill(~valid, -1.0).argmax(-1)


@torch.library.custom_op("vlmopt::greedy_log_det", mutates_args=())
def greedy_log_det(
    features: Tensor,
    valid: Tensor,
    bonus: Tensor,
    alpha: float,
    ridge: float,
    count: int,
    per_step: bool,
) -> Tensor:
    """Pick, again and again, what adds most to a bonus and to the volume that the picks span.

    The volume is the determinant of the Gram matrix of the picks; its logarithm grows by ``log r``,
    where ``r`` is the squared length of what a row adds to the span (pivoted Cholesky).

    Args:
        features: ``[batch, tokens, width]``.
        valid: bool ``[batch, tokens]``.
        bonus: float32 ``[batch, tokens]``, from 0 to 1.
        alpha: weight of the volume against the bonus, from 0 to 1.
        ridge: added to the diagonal, as a share of the mean squared length of the valid rows.
        count: picks per sample, at most the number of tokens.
        per_step: scale the gains of each step to 0 .. 1; else all by those of the first step.

    Returns:
        int64 ``[batch, count]``, in the order of picking.
    """
    return greedy_log_det_steps(features, valid, bonus, alpha, ridge, count, per_step)


def greedy_log_det_steps(
    features: Tensor,
    valid: Tensor,
    bonus: Tensor,
    alpha: float,
    ridge: float,
    count: int,
    per_step: bool,
) -> Tensor:
    """:func:`greedy_log_det` in operators of torch, nothing written in place."""
    rows = features.float()
    place = torch.arange(rows.shape[1], device=rows.device)
    squares = rows.square().sum(-1)
    mean = (squares * valid).sum(-1) / valid.sum(-1).clamp(min=1)
    floor = (ridge * mean).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    rest = squares + floor
    open_ = torch.ones_like(valid)
    picks: list[Tensor] = []
    factors: list[Tensor] = []
    bounds: tuple[Tensor, Tensor] | None = None
    for _ in range(count):
        gain = torch.maximum(rest, floor).log()
        if bounds is None or per_step:
            among = valid & open_
            low = gain.masked_fill(~among, float("inf")).amin(-1, keepdim=True)
            high = gain.masked_fill(~among, float("-inf")).amax(-1, keepdim=True)
            bounds = low, high - low
        low, spread = bounds
        scaled = torch.where(spread > 0, (gain - low) / spread, 0.0)
        score = (1 - alpha) * bonus.float() + alpha * scaled
        # below every score: what is not valid, and what is picked already
        score = torch.where(open_, torch.where(valid, score, -1e30), float("-inf"))
        pick = score.argmax(-1)
        picks.append(pick)
        open_ = open_ & (place != pick[:, None])
        column = (rows @ _row(rows, pick).transpose(1, 2))[..., 0]
        if factors:
            known = torch.stack(factors, dim=1)
            own = known.gather(2, pick[:, None, None].expand(-1, len(factors), 1))
            column = column - (own * known).sum(1)
        pivot = torch.maximum(rest.gather(1, pick[:, None]), floor)
        column = torch.where(open_, column / pivot.sqrt(), 0.0)
        factors.append(column)
        rest = torch.maximum(rest - column.square(), floor)
    return torch.stack(picks, dim=1)


@greedy_log_det.register_fake
def _(
    features: Tensor,
    valid: Tensor,
    bonus: Tensor,
    alpha: float,
    ridge: float,
    count: int,
    per_step: bool,
) -> Tensor:
    return features.new_empty(features.shape[0], count, dtype=torch.int64)
