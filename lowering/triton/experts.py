"""Triton kernel of ``vlmopt::grouped_mm``.

Groups are of any size, and only the device knows which: as many programs start as there may be
tiles, and each finds its own among the ends of the groups, so that the host never waits. Rows
behind the last group are not read. Products accumulate in float32 in a fixed order, those of
float32 inputs without TF32.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmopt.ops.experts import KERNEL_TYPES

_COLUMNS = 64
"""Columns of a tile. Tiles are chosen to fit every GPU that Triton supports, and are not tuned."""

_DEPTHS = {True: 64, False: 32}
"""Elements of a row that are multiplied at once, in 16 bits and in 32."""


@triton.jit
def _grouped_mm_kernel(
    left,
    weights,
    ends,
    result,
    rows,
    groups,
    width,
    columns,
    left_row,
    left_element,
    weights_group,
    weights_element,
    weights_column,
    BLOCK_GROUPS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    BLOCK_DEPTH: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """One tile of the rows of one group; those behind all groups form one more, of zeros."""
    tile = tl.program_id(0)
    place = tl.arange(0, BLOCK_GROUPS)
    end = tl.load(ends + place, mask=place < groups, other=rows).to(tl.int32)
    start = tl.load(ends + place - 1, mask=(place > 0) & (place <= groups), other=0).to(tl.int32)
    start = tl.where(place <= groups, start, rows)
    end, start = tl.minimum(end, rows), tl.minimum(start, rows)
    tiles = (end - start + BLOCK_ROWS - 1) // BLOCK_ROWS
    before = tl.cumsum(tiles, 0) - tiles
    own = (before <= tile) & (tile < before + tiles)
    # no group has this tile: nothing is own, and the tile is empty
    group = tl.sum(tl.where(own, place, 0), 0)
    finish = tl.sum(tl.where(own, end, 0), 0)
    begin = tl.sum(tl.where(own, start + (tile - before) * BLOCK_ROWS, 0), 0)

    row = (begin + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    there = row < finish
    column = (tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    inside = column < columns
    left += row[:, None] * left_row
    weights += group.to(tl.int64) * weights_group + column[None, :] * weights_column
    products = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], dtype=tl.float32)
    depth = tl.where((group < groups) & (begin < finish), width, 0)
    for first in range(0, depth, BLOCK_DEPTH):
        element = (first + tl.arange(0, BLOCK_DEPTH)).to(tl.int64)
        within = element < width
        part = tl.load(
            left + element[None, :] * left_element,
            mask=there[:, None] & within[None, :],
            other=0.0,
        )
        matrix = tl.load(
            weights + element[:, None] * weights_element,
            mask=within[:, None] & inside[None, :],
            other=0.0,
        )
        if WIDEN:
            part = part.to(tl.float32)
            matrix = matrix.to(tl.float32)
        products = tl.dot(part, matrix, products, input_precision="ieee")
    tl.store(
        result + row[:, None] * columns + column[None, :],
        products.to(result.dtype.element_ty),
        mask=there[:, None] & inside[None, :],
    )


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """:func:`vlmopt.ops.experts.grouped_mm` by a kernel; all operands may lie in any way.

    Raises:
        ValueError: their shapes or dtypes do not fit, and the kernel would read what is not theirs.
    """
    _check(rows, weights, ends)
    (count, width), (groups, _, columns) = rows.shape, weights.shape
    block_rows = 16 if count <= 16 * groups else 64
    result = rows.new_empty(count, columns)
    # each group, and what is behind them, may leave one tile almost empty
    tiles = (count + min(count, groups + 1) * (block_rows - 1)) // block_rows
    _grouped_mm_kernel[(tiles, triton.cdiv(columns, _COLUMNS))](
        rows,
        weights,
        ends.contiguous(),
        result,
        count,
        groups,
        width,
        columns,
        *rows.stride(),
        *weights.stride(),
        BLOCK_GROUPS=triton.next_power_of_2(groups + 1),
        BLOCK_ROWS=block_rows,
        **_constants(rows),
    )
    return result


def _check(rows: Tensor, weights: Tensor, ends: Tensor) -> None:
    if ends.shape != weights.shape[:1] or rows.shape[1] != weights.shape[1]:
        raise ValueError(
            f"rows {list(rows.shape)}, weights {list(weights.shape)} and ends {list(ends.shape)} "
            "do not fit"
        )
    if rows.dtype != weights.dtype or rows.dtype not in KERNEL_TYPES:
        raise ValueError(f"rows of {rows.dtype} and weights of {weights.dtype} do not fit")


def _constants(rows: Tensor) -> dict[str, Any]:
    # Triton's interpreter, on the CPU, multiplies the bits of bfloat16
    widen = rows.dtype == torch.bfloat16 and rows.device.type == "cpu"
    halves = rows.dtype != torch.float32 and not widen
    return {"BLOCK_COLUMNS": _COLUMNS, "BLOCK_DEPTH": _DEPTHS[halves], "WIDEN": widen}
