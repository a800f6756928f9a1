"""Attention scores without the full matrix: a few rows, or sums over columns.

Everything is computed in float32 whatever the inputs are. They serve selection only: no gradient
flows through them.
"""

from __future__ import annotations

import torch
from torch import Tensor


def attention_rows_reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`attention_rows` in operators of torch."""
    query, key = query.float(), key.float()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, float("-inf"))
            if mask.dtype == torch.bool
            else logits + mask.float()
        )
    if positions is not None:
        place = torch.arange(key.shape[2], device=key.device)
        logits = logits.masked_fill(place > positions[:, None, :, None], float("-inf"))
    return torch.softmax(logits, -1).nan_to_num(0.0)


@torch.library.custom_op("vlmopt::attention_rows", mutates_args=())
def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of a few rows: ``softmax(query key^T)``.

    Args:
        query: ``[batch, heads, rows, size]``.
        key: ``[batch, key heads, keys, size]``; query head ``h`` uses key head
            ``h // (heads / key heads)``.
        mask: bool (True: may attend) or float (added), broadcastable to the result.
        positions: int64 ``[batch, rows]``: the slot of each row; it sees keys up to there.
        scale: of the products, ``size ** -0.5`` by default.

    Returns:
        float32 ``[batch, heads, rows, keys]``; zeros for a row that sees nothing.
    """
    return attention_rows_reference(query, key, mask, positions, scale)


@attention_rows.register_fake
def _(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)


def attention_mass_reference(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """:func:`attention_mass` by the full matrix."""
    positions = None
    if causal:
        offset = key.shape[2] - query.shape[2]
        positions = torch.arange(offset, key.shape[2], device=key.device)
        positions = positions.expand(query.shape[0], -1)
    rows = attention_rows_reference(query, key, mask, positions, scale)
    return torch.einsum("bgq,bhqt->bhgt", weights.float(), rows)


_ROWS = 128


@torch.library.custom_op("vlmopt::attention_mass", mutates_args=())
def attention_mass(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Weighted column sums of ``softmax(query key^T)``, a block of rows at a time.

    Args:
        query: ``[batch, heads, queries, size]``.
        key: ``[batch, key heads, keys, size]``.
        weights: float32 ``[batch, groups, queries]``.
        mask: bool (True: may attend) or float (added), broadcastable to ``[batch, heads, queries,
            keys]``.
        causal: key ``t`` is seen by query ``q`` if ``t <= q + keys - queries``.
        scale: of the products, ``size ** -0.5`` by default.

    Returns:
        float32 ``[batch, heads, groups, keys]``.
    """
    queries, keys = query.shape[2], key.shape[2]
    total = query.new_zeros(
        query.shape[0], query.shape[1], weights.shape[1], keys, dtype=torch.float32
    )
    for at in range(0, queries, _ROWS):
        end = min(at + _ROWS, queries)
        positions = None
        if causal:
            positions = torch.arange(at, end, device=key.device) + keys - queries
            positions = positions.expand(query.shape[0], -1)
        part = mask
        if mask is not None and mask.shape[-2] != 1:
            part = mask[..., at:end, :]
        rows = attention_rows_reference(query[:, :, at:end], key, part, positions, scale)
        total += torch.einsum("bgq,bhqt->bhgt", weights[:, :, at:end].float(), rows)
    return total


@attention_mass.register_fake
def _(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    return query.new_empty(
        query.shape[0], query.shape[1], weights.shape[1], key.shape[2], dtype=torch.float32
    )
