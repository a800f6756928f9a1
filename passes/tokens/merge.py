"""Merging: which row joins which, what becomes of both, and the way back to all rows.

Pure tensor functions, shared by all methods. Everything is computed in float32 and handed back in
the dtype that came in; ties go to the lower index, so that eager, Inductor and ONNX Runtime merge
the same rows. Sizes are static. Gradients flow to rows and weights, not to the choice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.passes.tokens.select import take


class Match(NamedTuple):
    """Which rows are merged into which.

    Attributes:
        sources: int64 ``[batch, merged]``, rows that leave, the most similar pair first.
        destinations: int64 ``[batch, merged]``, the row that each of them joins; it stays.
        kept: int64 ``[batch, tokens - merged]``, rows that stay, ascending.
    """

    sources: Tensor
    destinations: Tensor
    kept: Tensor


def assigned_merge(rows: Tensor, target: Tensor, weight: Tensor, mode: str = "mean") -> Tensor:
    """Merge each row into the one it is assigned to.

    A row that stays is its own target; rows that leave, and those of total weight 0, are returned
    as they came. With ``mean`` a row becomes the weighted mean of itself and of those that join
    it (ToMe's size-weighted merge, the anchors of ApET). With ``sum`` the weighted mean of those
    that join is added to it, its own weight aside (VisionZip, DUET-VLM).

    Args:
        rows: ``[batch, tokens, width]``.
        target: int64 ``[batch, tokens]``. What joins a row that itself leaves is lost.
        weight: ``[batch, tokens]``, at least 0.
        mode: ``mean`` or ``sum``.

    Returns:
        Like ``rows``.

    Raises:
        ValueError: for any other mode.
    """
    if mode not in ("mean", "sum"):
        raise ValueError(f"mode {mode!r} is neither mean nor sum")
    place = torch.arange(rows.shape[1], device=rows.device)
    stays = target == place
    values, share = rows.float(), weight.float()
    if mode == "sum":
        share = torch.where(stays, 0.0, share)
    index = target[..., None].expand_as(values)
    total = torch.zeros_like(share).scatter_add(1, target, share)
    gathered = torch.zeros_like(values).scatter_add(1, index, values * share[..., None])
    changed = stays & (total > 0)
    mean = gathered / torch.where(changed, total, 1.0)[..., None]
    merged = values + mean if mode == "sum" else mean
    return torch.where(changed[..., None], merged, values).to(rows.dtype)


def bipartite_match(metric: Tensor, merged: int, protected: Tensor | None = None) -> Match:
    """Pair the ``merged`` even rows that resemble an odd row most with it.

    Each even row proposes the odd row of largest cosine similarity, of equal ones the first; the
    best proposals win, so that several even rows may join one odd row. Bipartite soft matching:
    "Token Merging: Your ViT But Faster", arXiv 2210.09461.

    Args:
        metric: ``[batch, tokens, width]``; ToMe takes the mean of the keys over heads.
        merged: rows that leave, at most half of them.
        protected: bool ``[batch, tokens]``, rows that neither leave nor are joined, such as class
            tokens; there must be ``merged`` even ones besides them, and an odd one.

    Raises:
        PreconditionError: more than half of the rows are to leave.
    """
    tokens = metric.shape[1]
    if not 0 <= merged <= tokens // 2:
        raise PreconditionError(
            f"{merged} of {tokens} tokens cannot be merged in one bipartite matching, since only "
            "half of them may leave",
            hint=f"merge at most {tokens // 2}, and the others in a later layer",
        )
    unit = _unit(metric)
    similarity = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    if protected is not None:
        closed = protected[:, ::2, None] | protected[:, None, 1::2]
        similarity = similarity.masked_fill(closed, float("-inf"))
    partner = similarity.argmax(-1)
    best = similarity.gather(2, partner[..., None])[..., 0]
    order = torch.sort(best, dim=-1, descending=True, stable=True).indices[:, :merged]
    sources, destinations = 2 * order, 2 * partner.gather(1, order) + 1
    leaves = torch.zeros_like(metric[..., 0], dtype=torch.int64).scatter(1, sources, 1)
    stay = torch.sort(leaves, dim=-1, stable=True).indices
    return Match(sources, destinations, stay[:, : tokens - merged])


def targets(match: Match) -> Tensor:
    """The row that each row of a match ends up in, itself for those that stay.

    Returns:
        int64 ``[batch, tokens]``, as :func:`assigned_merge` takes it.
    """
    batch, merged = match.sources.shape
    place = torch.arange(merged + match.kept.shape[1], device=match.kept.device)
    return place.expand(batch, -1).scatter(1, match.sources, match.destinations)


def merge_sizes(rows: Tensor, sizes: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Carry out a match, each row weighing as much as the number of rows that it stands for.

    For proportional attention add ``sizes.log()`` to the logits of the keys. arXiv 2210.09461.

    Args:
        rows: ``[batch, tokens, width]``.
        sizes: ``[batch, tokens]``, above 0; ones in the first layer.

    Returns:
        Rows ``[batch, kept, width]`` and sizes ``[batch, kept]``, in the order of ``match.kept``.
    """
    target = targets(match)
    merged = assigned_merge(rows, target, sizes)
    total = torch.zeros_like(sizes).scatter_add(1, target, sizes)
    return take(merged, match.kept), total.gather(1, match.kept)


def source_map(target: Tensor, kept: Tensor) -> Tensor:
    """For each row, the number among the kept ones of the row that it was merged into.

    Args:
        target: int64 ``[batch, tokens]``, pointing at kept rows.
        kept: int64 ``[batch, kept]``.

    Returns:
        int64 ``[batch, tokens]``, as :func:`unmerge` takes it.
    """
    number = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    return torch.zeros_like(target).scatter(1, kept, number).gather(1, target)


def unmerge(rows: Tensor, source: Tensor) -> Tensor:
    """Give every original row what became of it.

    Args:
        rows: ``[batch, kept, ...]``.
        source: int64 ``[batch, tokens]``, rows of ``rows``; see :func:`source_map`.

    Returns:
        ``[batch, tokens, ...]``.
    """
    return take(rows, source)


def restore(
    rows: Tensor, slots: Tensor, length: int | torch.SymInt, fill: Tensor | float = 0.0
) -> Tensor:
    """Put rows back at the slots that they were taken from.

    Args:
        rows: ``[batch, kept, width]``.
        slots: int64 ``[batch, kept]``, each at most once per sample; rows at -1 are left out.
        length: rows that come back.
        fill: the others: a number, or values that broadcast to ``[batch, length, width]``.

    Returns:
        ``[batch, length, width]``, of the dtype of ``rows``.
    """
    batch, _, width = rows.shape
    base = torch.as_tensor(fill, dtype=rows.dtype, device=rows.device)
    # one row more takes what has no slot
    base = torch.nn.functional.pad(base.expand(batch, length, width), (0, 0, 0, 1))
    index = torch.where(slots < 0, length, slots)  # type: ignore[arg-type]
    index = index[..., None].expand_as(rows)
    return base.scatter(1, index, rows)[:, :length]


def nearest(metric: Tensor, anchors: Tensor) -> Tensor:
    """The anchor most similar to each row, by cosine.

    Args:
        metric: ``[batch, tokens, width]``.
        anchors: rows that may be chosen: bool ``[batch, tokens]``, or int64 ``[batch, anchors]``.
            Of equally similar ones the first in this order is taken.

    Returns:
        int64 ``[batch, tokens]``: rows, not numbers of anchors. An anchor is its own; without any
        anchor in a sample, every row is.
    """
    unit = _unit(metric)
    place = torch.arange(metric.shape[1], device=metric.device).expand(metric.shape[:2])
    if anchors.dtype is torch.bool:
        similarity = unit @ unit.transpose(1, 2)
        chosen = similarity.masked_fill(~anchors[:, None], float("-inf")).argmax(-1)
        own = anchors | ~anchors.any(-1, keepdim=True)
    else:
        similarity = unit @ take(unit, anchors).transpose(1, 2)
        chosen = anchors.gather(1, similarity.argmax(-1))
        own = torch.zeros_like(place, dtype=torch.bool).scatter(1, anchors, True)
    return torch.where(own, place, chosen)


def dpc_knn(metric: Tensor, clusters: int, neighbours: int, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Cluster rows around those that are dense and far from anything denser.

    Density of a row is ``exp(-m)``, with ``m`` the mean squared distance (per channel) to the
    nearest rows, itself among them; its isolation is the distance to the nearest denser row. Rows
    of largest density times isolation are the centers. Density-peak clustering (Rodriguez and
    Laio, Science 344, 2014) with k nearest neighbours (Du et al., Knowledge-Based Systems 99,
    2016), as tokens are clustered in "Not All Tokens Are Equal", arXiv 2204.08680; instead of
    random noise the lower index breaks ties.

    Args:
        metric: ``[batch, tokens, width]``.
        clusters: at most the number of tokens.
        neighbours: the nearest rows that density looks at, at most the number of tokens.
        valid: bool ``[batch, tokens]``. Others become centers only when no valid one is left, and
            no valid row joins them.

    Returns:
        Centers int64 ``[batch, clusters]``, the strongest first, and the number of its cluster for
        each row, int64 ``[batch, tokens]``. ``centers.gather(1, assignment)`` is a target for
        :func:`assigned_merge`.

    Raises:
        PreconditionError: there are fewer tokens than clusters or neighbours.
    """
    tokens = metric.shape[1]
    if not (1 <= clusters <= tokens and 1 <= neighbours <= tokens):
        raise PreconditionError(
            f"{tokens} tokens have no {clusters} clusters with {neighbours} nearest neighbours",
            hint=f"ask for 1 to {tokens} of both",
        )
    squared = _squared_distances(metric, valid)
    place = torch.arange(tokens, device=metric.device)
    apart = squared.masked_fill(~valid[:, None], float("inf"))
    around = torch.sort(apart, dim=-1, stable=True).values[..., :neighbours]
    there = around < float("inf")
    spread = torch.where(there, around, 0.0).sum(-1) / there.sum(-1).clamp(min=1)
    # of two equal densities the lower index counts as denser: duplicates have one peak
    denser = spread[:, None] < spread[..., None]
    first = (spread[:, None] == spread[..., None]) & (place < place[:, None])
    isolation = squared.masked_fill(~(valid[:, None] & (denser | first)), float("inf")).amin(-1)
    reach = squared.masked_fill(~valid[:, None], 0.0).amax(-1)  # for the densest row of all
    isolation = torch.where(isolation < float("inf"), isolation, reach)
    # the logarithm of density times distance: densities themselves underflow
    worth = torch.where(isolation > 0, 0.5 * isolation.log() - spread, -1e38)
    worth = worth.masked_fill(~valid, float("-inf"))
    centers = torch.sort(worth, dim=-1, descending=True, stable=True).indices[:, :clusters]
    away = squared.gather(2, centers[:, None].expand(-1, tokens, -1))
    away = away.masked_fill(~valid.gather(1, centers)[:, None], float("inf"))
    assignment = away.argmin(-1)
    number = torch.arange(clusters, device=metric.device).expand_as(centers)
    return centers, assignment.scatter(1, centers, number)


def _unit(metric: Tensor) -> Tensor:
    return torch.nn.functional.normalize(metric.float(), dim=-1, eps=1e-12)


def _squared_distances(metric: Tensor, valid: Tensor) -> Tensor:
    """Mean squared difference per channel, ``[batch, tokens, tokens]``; 0 for equal rows."""
    rows = metric.float()
    weight = valid.float()[..., None]
    # distances are differences of products: centred rows lose less of them to rounding
    rows = rows - (rows * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
    gram = rows @ rows.transpose(1, 2)
    square = rows.square().sum(-1)
    both = square[..., None] + square[:, None]
    squared = both - 2 * gram
    return torch.where(squared > 4e-6 * both, squared, 0.0) / metric.shape[2]
