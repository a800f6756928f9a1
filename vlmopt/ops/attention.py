"""Attention scores without the full matrix (first version: rows only; to be completed)."""

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
