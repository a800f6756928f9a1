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
    rows = _prepare(features, metric)
    batch, tokens, _ = rows.shape
    first = _most_isolated(rows, valid, metric) if start is None else start
    sample = torch.arange(batch, device=rows.device)
    weight = torch.ones_like(valid, dtype=torch.float32) if weight is None else weight.float()
    # two tiers below every score: what is not valid, and what is picked already
    nearest = torch.full((batch, tokens), float("inf"), device=rows.device)
    open_ = torch.ones_like(valid)
    picks = torch.empty(batch, count, dtype=torch.int64, device=rows.device)
    pick = first
    for step in range(count):
        if step:
            score = torch.where(valid, nearest * weight, -1.0).masked_fill(~open_, -2.0)
            pick = score.argmax(-1)
        picks[:, step] = pick
        open_[sample, pick] = False
        distance = _distances(rows[sample, pick][:, None], rows, metric)[:, 0]
        nearest = torch.minimum(nearest, distance)
    return picks


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
    rows = features.float()
    batch, tokens, _ = rows.shape
    sample = torch.arange(batch, device=rows.device)
    squares = rows.square().sum(-1)
    mean = (squares * valid).sum(-1) / valid.sum(-1).clamp(min=1)
    floor = (ridge * mean).clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    rest = squares + floor
    factors = rows.new_zeros(batch, count, tokens)
    open_ = torch.ones_like(valid)
    picks = torch.empty(batch, count, dtype=torch.int64, device=rows.device)
    bounds: tuple[Tensor, Tensor] | None = None
    for step in range(count):
        gain = rest.clamp(min=floor).log()
        if bounds is None or per_step:
            among = valid & open_
            low = gain.masked_fill(~among, float("inf")).amin(-1, keepdim=True)
            high = gain.masked_fill(~among, float("-inf")).amax(-1, keepdim=True)
            bounds = low, high - low
        low, spread = bounds
        scaled = torch.where(spread > 0, (gain - low) / spread, 0.0)
        score = (1 - alpha) * bonus.float() + alpha * scaled
        score = score.masked_fill(~valid, float("-inf"))
        # argmax over a row of equal -inf gives a picked one again: rank the open ones apart
        score = torch.where(open_, score.clamp(min=-1e30), float("-inf"))
        pick = score.argmax(-1)
        picks[:, step] = pick
        open_[sample, pick] = False
        own = factors[sample, :, pick]
        product = (rows @ rows[sample, pick][..., None])[..., 0]
        known = (own[:, None] @ factors)[:, 0]
        column = (product - known) / rest[sample, pick].clamp(min=floor[:, 0]).sqrt()[:, None]
        column = torch.where(open_, column, 0.0)
        factors[:, step] = column
        rest = torch.maximum(rest - column.square(), floor)
    return picks


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
