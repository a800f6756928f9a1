"""Merging: which rows become one, and what becomes of them.

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


def places(match: Match) -> Tensor:
    """The place among those that stay of what becomes of each row.

    Returns:
        int64 ``[batch, tokens]``; rows taken from there give every row what it became part of.
    """
    batch, kept = match.kept.shape
    number = torch.arange(kept, device=match.kept.device).expand(batch, -1)
    stays = number.new_zeros(batch, kept + match.sources.shape[1]).scatter(1, match.kept, number)
    return stays.scatter(1, match.sources, stays.gather(1, match.destinations))


def merge_sum(values: Tensor, match: Match, place: Tensor) -> Tensor:
    """Each row that stays plus those that join it.

    Args:
        values: ``[batch, tokens, ...]``.
        place: of each row, see :func:`places`.

    Returns:
        ``[batch, kept, ...]``, in the order of ``match.kept``.
    """
    moved = take(values, match.sources)
    joined = place.gather(1, match.sources)
    index = joined.reshape(*joined.shape, *[1] * (values.ndim - 2)).expand_as(moved)
    return take(values, match.kept).scatter_add(1, index, moved)


def merge_mean(values: Tensor, weights: Tensor, match: Match, place: Tensor) -> Tensor:
    """As :func:`merge_sum`, the weighted mean.

    Args:
        weights: float32 ``[batch, tokens]``, above 0. With the number of original rows that each
            row stands for, the result is the mean of these: ToMe, arXiv 2210.09461.
    """
    weighted = merge_sum(values.float() * weights[..., None], match, place)
    return (weighted / merge_sum(weights, match, place)[..., None]).to(values.dtype)


def _unit(metric: Tensor) -> Tensor:
    return torch.nn.functional.normalize(metric.float(), dim=-1, eps=1e-12)
