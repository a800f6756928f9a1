"""Products of rows sorted by expert, each group of rows with the matrix of its expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def grouped_mm_reference(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """:func:`grouped_mm` in operators of torch, with a copy of its matrix for each row."""
    place = torch.arange(rows.shape[0], device=rows.device)
    group = (place[:, None] >= ends).sum(1)
    inside = group < weights.shape[0]
    chosen = weights.index_select(0, group.clamp(max=weights.shape[0] - 1))
    product = torch.bmm(rows[:, None], chosen)[:, 0]
    # not times zero: the matrix of a row that meets none may hold anything
    return torch.where(inside[:, None], product, torch.zeros_like(product))


def grouped_mm_tiles(
    rows: Tensor, weights: Tensor, ends: Tensor, *, tile: int | None = None
) -> Tensor:
    """:func:`grouped_mm` in operators of torch with static shapes, for compilers that know no loop.

    Each group is cut into tiles of ``tile`` rows, the last filled up; each tile takes one copy of
    its group's matrix. There is room for as many tiles as the worst distribution of rows needs
    (:func:`tile_count`), so no row is ever left out.

    Args:
        tile: rows in a tile; by default what :func:`best_tile` says.
    """
    count, groups = rows.shape[0], weights.shape[0]
    size = best_tile(count, groups) if tile is None else tile
    if size == 1:
        return grouped_mm_reference(rows, weights, ends)
    tiles = tile_count(count, groups, size)
    ends = ends.long()
    starts = torch.nn.functional.pad(ends[:-1], (1, 0))
    tile_ends = ((ends - starts + (size - 1)) // size).cumsum(0)
    tile_starts = torch.nn.functional.pad(tile_ends[:-1], (1, 0))

    number = torch.arange(tiles, device=rows.device)
    of_tile = (number[:, None] >= tile_ends).sum(1).clamp(max=groups - 1)
    first = starts[of_tile] + (number - tile_starts[of_tile]) * size
    within = torch.arange(size, device=rows.device)
    # tiles are filled up with rows that nobody reads
    taken = (first[:, None] + within).clamp(max=count - 1)
    filled = rows.index_select(0, taken.reshape(-1)).view(tiles, size, rows.shape[1])
    products = torch.bmm(filled, weights.index_select(0, of_tile))

    place = torch.arange(count, device=rows.device)
    group = (place[:, None] >= ends).sum(1)
    known = group.clamp(max=groups - 1)
    offset = place - starts[known]
    found = tile_starts[known] * size + offset  # tiles of a group lie one after the other
    inside = group < groups
    found = torch.where(inside, found, torch.zeros_like(found))
    product = products.view(tiles * size, weights.shape[2]).index_select(0, found)
    return torch.where(inside[:, None], product, torch.zeros_like(product))


def tile_count(rows: int, groups: int, tile: int) -> int:
    """Tiles that hold ``rows`` rows however they are spread over ``groups`` groups."""
    # each group that has a row at all wastes up to a tile less one row
    used = min(rows, groups)
    return used + (rows - used) // tile


COPY = 96
"""What a copy of a matrix costs, in rows multiplied by it: as measured in ONNX Runtime on one core,
and a little more, as copies take memory too."""


def best_tile(rows: int, groups: int) -> int:
    """Rows in a tile so that copies of matrices and products together cost least, a power of two.

    With few rows, as in decoding, it is 1: each row takes the matrix of its expert.
    """
    sizes = [2**power for power in range(max(rows, 1).bit_length())]
    return min(sizes, key=lambda size: tile_count(rows, groups, size) * (size + COPY))


@torch.library.custom_op("vlmopt::grouped_mm", mutates_args=())
def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows of each group by the matrix of that group.

    Args:
        rows: ``[rows, width]``, one group after the other.
        weights: ``[groups, width, result width]``, dtype of ``rows``.
        ends: where each group ends, int32 or int64 ``[groups]``, ascending.

    Returns:
        ``[rows, result width]``; zeros for rows behind the last group.
    """
    result = rows.new_empty(rows.shape[0], weights.shape[2])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            torch.mm(rows[start:end], weights[group], out=result[start:end])
        start = end
    result[start:] = 0
    return result


@grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


@torch.library.custom_op("vlmopt::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Sum of the outer products of the rows of each group.

    Args:
        left, right: ``[rows, width]`` and ``[rows, other width]``, one group after the other.
        ends: as for :func:`grouped_mm`.

    Returns:
        ``[groups, width, other width]``.
    """
    result = left.new_zeros(ends.shape[0], left.shape[1], right.shape[1])
    start = 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            result[group] = left[start:end].t() @ right[start:end]
        start = end
    return result


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    of_rows = grouped_mm(gradient, weights.transpose(1, 2), ends)
    return of_rows, grouped_outer(rows, gradient, ends), None


grouped_mm.register_autograd(_gradients, setup_context=_save)
