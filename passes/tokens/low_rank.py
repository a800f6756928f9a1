"""Attention of a layer by copies of its projections: of low rank, without positions and heads."""

from __future__ import annotations

import torch
from torch import Tensor

import vlmopt.ops  # noqa: F401 - registers vlmopt::attention_mass
from vlmopt.program import Modality


def selectors(query: Tensor, key: Tensor, heads: int, rank: int) -> tuple[Tensor, Tensor]:
    """``(left, right)`` with ``x left (y right)^T`` close to the summed products of all heads.

    Args:
        query: weight of the query projection, ``[heads * size, width]``.
        key: of the key projection, ``[key heads * size, width]``.

    Returns:
        float32 ``[width, rank]`` twice.
    """
    size = query.shape[0] // heads
    groups = heads // (key.shape[0] // size)
    repeated = key.float().unflatten(0, (-1, size)).repeat_interleave(groups, dim=0).flatten(0, 1)
    query_up, query_down = _factors(query.float(), rank)
    key_up, key_down = _factors(repeated, rank)
    return query_down.T @ (query_up.T @ key_up), key_down.T


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``weight`` as a product over ``rank`` dimensions, singular values shared between the two."""
    up, values, down = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return up[:, :rank] * root, root[:, None] * down[:rank]


def selector_mass(
    rows: Tensor,
    modality: Tensor,
    mask: Tensor | None,
    causal: bool,
    left: Tensor,
    right: Tensor,
    scale: float,
) -> Tensor:
    """Mean attention that each token gets from visual tokens, and from text.

    Args:
        rows: input of the projections, ``[batch, tokens, width]``.
        modality: int64 ``[batch, tokens]``.
        mask: attention mask of the layer.

    Returns:
        float32 ``[batch, tokens, 2]``.
    """
    rows = rows.float()
    groups = torch.stack([modality == kind for kind in (Modality.VISION, Modality.TEXT)], 1)
    weights = groups.float() / groups.sum(-1, keepdim=True).clamp(min=1)
    query, key = (rows @ left)[:, None], (rows @ right)[:, None]
    mass = torch.ops.vlmopt.attention_mass(query, key, weights, mask, causal, scale)
    return mass[:, 0].transpose(1, 2)
