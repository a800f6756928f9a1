"""Greedy selections: as many dependent steps as tokens are picked, each in one operator.

Everything is computed in float32, ties go to the lower index, and no pick repeats. Tokens that are
not valid are picked only when no valid one is left.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

METRICS = ("cosine", "euclidean", "squared")

_BLOCK = 1 << 20
"""Distances held at a time while the most isolated row is looked for."""

_FLAT = 1e-5
"""Logarithms of volumes that differ by less are the same but for rounding."""

_GRID = 2.0**12
"""Cosines count in units of 1 / this: sums of up to 4096 are exact, so that equal gains are equal
in whatever order they are added."""


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
    if features.device.type != "cpu":
        return farthest_point_steps(features, valid, weight, start, count, metric)
    rows = _prepare(features, metric)
    weights = None if weight is None else weight.float().numpy()
    picks = np.empty((len(rows), count), dtype=np.int64)
    # small steps on one row: a third of the time that they take in torch
    for sample in range(len(rows)):
        own = rows[sample : sample + 1]
        whole = _distances(own, own, metric)[0].numpy() if _fits(own, metric) else None
        if start is not None:
            pick = int(start[sample])
        elif whole is not None:
            pick = _most_isolated_of(whole, valid[sample].numpy())
        else:
            pick = int(_most_isolated(own, valid[sample : sample + 1], metric))
        cap = np.where(valid[sample].numpy(), np.float32(np.inf), np.float32(-1))
        nearest = np.full(rows.shape[1], np.inf, dtype=np.float32)
        score = np.empty_like(nearest)
        picks[sample, 0] = pick
        for step in range(1, count):
            cap[pick] = -2
            far = whole[pick] if whole is not None else _one_row(own, pick, metric)
            np.minimum(nearest, far, out=nearest)
            np.multiply(nearest, 1 if weights is None else weights[sample], out=score)
            np.minimum(score, cap, out=score)
            pick = int(score.argmax())
            picks[sample, step] = pick
    return torch.from_numpy(picks)


def _fits(rows: Tensor, metric: str) -> bool:
    """Whether all distances may be held at once."""
    size = rows.shape[1] ** 2
    return size * (1 if metric == "cosine" else rows.shape[2]) <= 16 * _BLOCK


def _one_row(rows: Tensor, pick: int, metric: str) -> Any:
    return _distances(rows[:, pick : pick + 1], rows, metric)[0, 0].numpy()


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


def _most_isolated_of(distances: Any, valid: Any) -> int:
    """:func:`_most_isolated` of one sample whose distances are known, ``[tokens, tokens]``."""
    own = distances.diagonal().copy()
    np.fill_diagonal(distances, np.inf)
    isolation = distances[:, valid].min(axis=1, initial=np.inf)
    np.fill_diagonal(distances, own)
    return int(np.where(valid, isolation, -1).argmax())


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
    if features.device.type != "cpu":
        return greedy_log_det_steps(features, valid, bonus, alpha, ridge, count, per_step)
    picks = np.empty((len(features), count), dtype=np.int64)
    for sample in range(len(features)):
        rows, there = features[sample].float(), valid[sample]
        gram = (rows @ rows.T).numpy()
        squares = rows.square().sum(-1)
        mean = float((squares * there).sum() / there.sum().clamp(min=1))
        floor = np.float32(max(ridge * mean, float(np.finfo(np.float32).tiny)))
        rest = squares.numpy() + floor
        worth = np.float32(1 - alpha) * bonus[sample].float().numpy()
        factors = np.empty((count, len(rows)), dtype=np.float32)
        valid_here, open_ = there.numpy(), np.ones(len(rows), dtype=bool)
        low = spread = np.float32(0)
        for step in range(count):
            gain = np.log(np.maximum(rest, floor))
            if step == 0 or per_step:
                among = gain[valid_here & open_]
                low = among.min() if len(among) else np.float32(0)
                spread = among.max() - low if len(among) else np.float32(0)
            scaled = (gain - low) / spread if spread > _FLAT else np.zeros_like(gain)
            score = np.where(valid_here, worth + np.float32(alpha) * scaled, np.float32(-1e30))
            score[~open_] = -np.inf
            pick = int(score.argmax())
            picks[sample, step] = pick
            open_[pick] = False
            known = factors[:step]
            column = (gram[pick] - known[:, pick] @ known) / np.sqrt(max(rest[pick], floor))
            column[~open_] = 0
            factors[step] = column
            rest = np.maximum(rest - column * column, floor)
    return torch.from_numpy(picks)


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
        scaled = torch.where(spread > _FLAT, (gain - low) / spread, 0.0)
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


@torch.library.custom_op("vlmopt::facility_location", mutates_args=())
def facility_location(features: Tensor, valid: Tensor, count: int) -> Tensor:
    """Pick, again and again, the token that makes the picks resemble all tokens most.

    Grows the sum, over the valid tokens, of their cosine with the pick most similar to them, where
    that is above 0. Greedy maximisation reaches at least 1 - 1/e of the best sum: Nemhauser,
    Wolsey and Fisher, Mathematical Programming 14, 1978.

    Args:
        features: ``[batch, tokens, width]``.
        valid: bool ``[batch, tokens]``.
        count: picks per sample, at most the number of tokens.

    Returns:
        int64 ``[batch, count]``, in the order of picking.
    """
    if features.device.type != "cpu":
        return facility_location_steps(features, valid, count)
    rows = _prepare(features, "cosine")
    picks = np.empty((len(rows), count), dtype=np.int64)
    for sample in range(len(rows)):
        there = torch.nonzero(valid[sample])[:, 0]
        chosen = _cover(rows[sample, there], min(count, len(there)))
        rest = torch.nonzero(~valid[sample])[:, 0][: count - len(chosen)]
        picks[sample] = torch.cat([there[chosen], rest]).numpy()
    return torch.from_numpy(picks)


def _cover(rows: Tensor, count: int) -> list[int]:
    """:func:`facility_location` of one sample, all rows valid.

    Lazy: a gain never grows, so a gain of an earlier step is a bound, and few are computed again.
    Minoux, Optimization Techniques, 1978.
    """
    whole = _on_grid(rows @ rows.T).numpy() if _fits(rows[None], "cosine") else None

    def similar(pick: int) -> Any:
        return whole[pick] if whole is not None else _on_grid(rows @ rows[pick]).numpy()

    block = max(1, _BLOCK // max(1, len(rows)))
    gains = [
        _on_grid(rows[at : at + block] @ rows.T).clamp(min=0).sum(-1)
        for at in range(0, len(rows), block)
    ]
    bound = torch.cat(gains).numpy() if gains else np.empty(0, dtype=np.float32)
    covered = np.zeros(len(rows), dtype=np.float32)
    computed = np.full(len(rows), -1)
    picks: list[int] = []
    for step in range(count):
        while computed[pick := int(bound.argmax())] < step:
            bound[pick] = np.maximum(similar(pick) - covered, 0).sum()
            computed[pick] = step
        np.maximum(covered, similar(pick), out=covered)
        bound[pick] = -1
        computed[pick] = count
        picks.append(pick)
    return picks


def _on_grid(cosines: Tensor) -> Tensor:
    return (cosines * _GRID).round() / _GRID


def facility_location_steps(features: Tensor, valid: Tensor, count: int) -> Tensor:
    """:func:`facility_location` in operators of torch, nothing written in place."""
    rows = _prepare(features, "cosine")
    place = torch.arange(rows.shape[1], device=rows.device)
    # row j: how far token j resembles each of those that count
    similar = _on_grid(rows @ rows.transpose(1, 2)).masked_fill(~valid[:, None], 0.0)
    covered = torch.zeros_like(rows[..., 0])
    open_ = torch.ones_like(valid)
    picks: list[Tensor] = []
    for _ in range(count):
        gain = (similar - covered[:, None]).clamp(min=0).sum(-1)
        # below every gain: what is not valid, and what is picked already
        gain = torch.where(open_, torch.where(valid, gain, -1.0), -2.0)
        pick = gain.argmax(-1)
        picks.append(pick)
        open_ = open_ & (place != pick[:, None])
        covered = torch.maximum(covered, _row(similar, pick)[:, 0])
    return torch.stack(picks, dim=1)


@facility_location.register_fake
def _(features: Tensor, valid: Tensor, count: int) -> Tensor:
    return features.new_empty(features.shape[0], count, dtype=torch.int64)


@torch.library.custom_op("vlmopt::centrifugal", mutates_args=())
def centrifugal(
    hidden: Tensor,
    keys: Tensor,
    places: Tensor,
    valid: Tensor,
    quota: Tensor,
    count: int,
    pivots: int,
    channels: int,
    spatial: float,
    threshold: float,
    step: float,
    batch: int,
    diagonal: float,
    fill: bool,
) -> Tensor:
    """Grow a set outwards from pivots, near and different tokens first.

    A candidate is redundant as far as it resembles a pick, the more so the farther away from all
    picks it lies. In rounds, those below a threshold join, a batch at a time; each round raises
    the threshold. VLM-Pruner, arXiv 2512.02700.

    Args:
        hidden: ``[batch, tokens, width]``; similarity is that of the ``channels`` of largest
            variance.
        keys: ``[batch, tokens, any]``; pivots lie far apart in them.
        places: float32 ``[tokens, 2]``, on the grid of the image; ``diagonal`` is its length.
        valid: bool ``[batch, tokens]``.
        quota: int64 ``[batch, 1]``, picks per sample, at most ``count``.
        spatial: how much distance adds to redundancy.
        threshold, step: of the first round, and per round.
        batch: candidates that are looked at together.
        fill: go on with the least redundant ones where the rounds pick too few.

    Returns:
        int64 ``[batch, count]``, in the order of picking; -1 behind the last one.
    """
    picks = hidden.new_full((hidden.shape[0], count), -1, dtype=torch.int64)
    for sample in range(hidden.shape[0]):
        there = torch.nonzero(valid[sample])[:, 0]
        grown = _Growth(  # hundreds of tiny steps, each read by the next: on the CPU
            hidden[sample, there].float().cpu(),
            keys[sample, there].float().cpu(),
            (places[there].float() / diagonal).cpu(),
            min(int(quota[sample]), len(there)),
            channels,
            spatial,
        )
        grown.start(pivots)
        grown.rounds(threshold, step, batch)
        if fill:
            grown.fill()
        picks[sample, : len(grown.picks)] = there[torch.tensor(grown.picks, dtype=torch.int64)]
    return picks


@centrifugal.register_fake
def _(
    hidden: Tensor,
    keys: Tensor,
    places: Tensor,
    valid: Tensor,
    quota: Tensor,
    count: int,
    pivots: int,
    channels: int,
    spatial: float,
    threshold: float,
    step: float,
    batch: int,
    diagonal: float,
    fill: bool,
) -> Tensor:
    return hidden.new_empty(hidden.shape[0], count, dtype=torch.int64)


def similarity(hidden: Tensor, channels: int, valid: Tensor | None = None) -> Tensor:
    """Cosine similarity on the channels of largest variance, ``[..., tokens, tokens]``.

    Args:
        hidden: ``[..., tokens, width]``.
        valid: bool ``[..., tokens]``, the tokens whose variance counts; ``None`` for all.
    """
    if valid is None:
        # a tenth of the time of var() over rows
        difference = hidden - hidden.mean(-2, keepdim=True)
        spread = difference.square().sum(-2) / max(1, hidden.shape[-2] - 1)
    else:
        there = valid[..., None].to(hidden.dtype)
        count = there.sum(-2, keepdim=True)
        mean = (hidden * there).sum(-2, keepdim=True) / count.clamp(min=1)
        squares = ((hidden - mean).square() * there).sum(-2)
        spread = squares / (count[..., 0, :] - 1).clamp(min=1)
    varying = spread.sort(dim=-1, descending=True, stable=True).indices[..., :channels]
    index = varying[..., None, :].expand(*hidden.shape[:-1], varying.shape[-1])
    rows = hidden.gather(-1, index)
    rows = rows / rows.norm(dim=-1, keepdim=True).clamp(min=1e-8)
    return rows @ rows.transpose(-1, -2)


class _Growth:
    """The picks of one sample so far, and how redundant the others are."""

    def __init__(
        self,
        hidden: Tensor,
        keys: Tensor,
        places: Tensor,
        quota: int,
        channels: int,
        spatial: float,
    ) -> None:
        self.keys, self.places, self.quota, self.spatial = keys, places.numpy(), quota, spatial
        self.alike = similarity(hidden, channels).numpy()
        self.picks: list[int] = []
        self.resemblance = np.full(len(hidden), -np.inf, dtype=np.float32)
        self.distance = np.full(len(hidden), np.inf, dtype=np.float32)
        self.open = np.ones(len(hidden), dtype=bool)

    def redundancy(self) -> Any:
        return self.resemblance * (1 + np.float32(self.spatial) * self.distance)

    def add(self, tokens: list[int]) -> None:
        for token in tokens:
            self.picks.append(token)
            self.open[token] = False
            np.maximum(self.resemblance, self.alike[token], out=self.resemblance)
            across, along = (self.places - self.places[token]).T
            np.minimum(self.distance, np.hypot(across, along), out=self.distance)

    def start(self, pivots: int) -> None:
        pick = int(self.keys.abs().sum(-1).argmax())
        nearest = np.full(len(self.keys), np.inf, dtype=np.float32)
        for _ in range(min(pivots, self.quota)):
            self.add([pick])
            away = (self.keys - self.keys[pick]).norm(dim=-1).numpy()
            np.minimum(nearest, away, out=nearest)
            pick = int(np.where(self.open, nearest, -1).argmax())

    def ranked(self) -> list[int]:
        """Open tokens, the least redundant first."""
        candidates = np.flatnonzero(self.open)
        order = np.argsort(self.redundancy()[candidates], kind="stable")
        ranked: list[int] = candidates[order].tolist()
        return ranked

    def rounds(self, threshold: float, step: float, batch: int) -> None:
        number = 0
        while len(self.picks) < self.quota:
            before = len(self.picks)
            self.round(threshold + step * number, batch)
            if len(self.picks) == before:
                return
            number += 1

    def round(self, threshold: float, batch: int) -> None:
        ranked = self.ranked()
        start = len(self.picks)
        for at in range(0, len(ranked), batch):
            part = ranked[at : at + batch]
            redundancy = self.redundancy()
            fresh = [token for token in part if float(redundancy[token]) < threshold]
            room = self.quota - len(self.picks)
            if len(fresh) > room:
                fresh = sorted(part, key=redundancy.__getitem__)[:room]
            self.add(fresh)
            if len(self.picks) == self.quota or (at == 0 and len(self.picks) == start):
                return

    def fill(self) -> None:
        self.add(self.ranked()[: self.quota - len(self.picks)])
