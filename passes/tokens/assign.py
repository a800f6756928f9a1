"""Assigning rows to others, alone or in clusters, and what becomes of those assigned to.

Pure tensor functions, shared by all methods. Everything is computed in float32 and handed back in
the dtype that came in; ties go to the lower index. Gradients flow to rows and weights, not to the
choice.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.passes.tokens.select import take


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


def absorbed(rows: Tensor, target: Tensor, weight: Tensor, own: float) -> Tensor:
    """Rows of which a share gives way to the weighted mean of those that join them.

    Args:
        rows: float32 ``[batch, tokens, width]``.
        target: int64 ``[batch, tokens]``, the row that each one joins.
        weight: ``[batch, tokens]``, of any sign; 0 for rows that join none. Where the weights that
            a row gets do not sum to more than 0, it stays as it is.
        own: what stays of a row that others join.

    Returns:
        Like ``rows``.
    """
    total = torch.zeros_like(weight).scatter_add(1, target, weight)
    share = weight / total.clamp(min=1e-8).gather(1, target)
    index = target[..., None].expand_as(rows)
    mean = torch.zeros_like(rows).scatter_add(1, index, rows * share[..., None])
    received = torch.zeros_like(share).scatter_add(1, target, share) > 0
    return torch.where(received[..., None], own * rows + (1 - own) * mean, rows)


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
