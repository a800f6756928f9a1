"""Triton kernels of ``vlmopt::attention_rows`` and ``vlmopt::attention_mass``.

No kernel holds more of ``softmax(query key^T)`` than one tile, and none adds with atomics: sums run
in a fixed order, so that the same inputs keep the same tokens. Products accumulate in float32,
those of float32 inputs without TF32. A row that sees nothing, or whose sum is not a number, is all
zeros, as in the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

_KEYS = 64
"""Keys of a tile. Tiles are chosen to fit every GPU that Triton supports, and are not tuned."""

_SIZES = {True: 64, False: 32}
"""Most elements of a head in a tile, in 16 bits and in 32; longer heads are added up in pieces."""

_GROUPS = 2
"""Most groups of weights that one program sums; each holds a tile in registers."""


@triton.jit
def _logits(
    query,
    key,
    mask,
    rows_there,
    columns,
    limits,
    keys,
    mask_column,
    scale,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SAME: tl.constexpr,
    BOOL: tl.constexpr,
):
    """One tile of masked logits.

    ``query``, ``key`` and ``mask`` point to the first element of each row; ``limits`` are the last
    keys that the rows see. ``SAME``: both are of one type of 16 bits, multiplied as they are.
    """
    columns_there = columns < keys
    products = tl.zeros([BLOCK_ROWS, BLOCK_KEYS], dtype=tl.float32)
    for start in range(0, SIZE, BLOCK_SIZE):
        place = start + tl.arange(0, BLOCK_SIZE)
        left = tl.load(
            query[:, None] + place[None, :],
            mask=rows_there[:, None] & (place < SIZE)[None, :],
            other=0.0,
        )
        right = tl.load(
            key[None, :] + place[:, None],
            mask=columns_there[None, :] & (place < SIZE)[:, None],
            other=0.0,
        )
        if not SAME:
            left = left.to(tl.float32)
            right = right.to(tl.float32)
        products = tl.dot(left, right, products, input_precision="ieee")
    logits = products * scale
    seen = columns_there[None, :] & (columns[None, :] <= limits[:, None])
    if mask is not None:
        given = tl.load(
            mask[:, None] + columns[None, :] * mask_column,
            mask=rows_there[:, None] & columns_there[None, :],
            other=0,
        )
        if BOOL:
            seen = seen & (given != 0)
        else:
            logits += given.to(tl.float32)
    return tl.where(seen, logits, float("-inf"))


@triton.jit
def _shift(top):
    """What to subtract before the exponential: the largest logit, 0 where nothing is seen."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def _share(part, total):
    """``part / total``, 0 where the total is 0 or not a number."""
    there = total > 0
    return tl.where(there, part / tl.where(there, total, 1.0), 0.0)


@triton.jit
def _rows_kernel(
    query,
    key,
    mask,
    positions,
    logits_out,
    tops,
    totals,
    heads,
    key_heads,
    rows,
    keys,
    blocks,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    positions_batch,
    positions_row,
    scale,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SAME: tl.constexpr,
    BOOL: tl.constexpr,
):
    """Logits of one block of keys, with the largest and the sum of exponentials of each row.

    The rows of all query heads that share a key head form one block, so that keys are read once.
    """
    block = tl.program_id(0)
    batch = (tl.program_id(2) // key_heads).to(tl.int64)
    shared = (tl.program_id(2) % key_heads).to(tl.int64)
    groups = heads // key_heads
    packed = tl.program_id(1) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    there = packed < groups * rows
    head = shared * groups + packed // rows
    row = (packed % rows).to(tl.int64)
    columns = (block * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)).to(tl.int64)
    limits = tl.zeros([BLOCK_ROWS], dtype=tl.int64) + keys
    if positions is not None:
        limits = tl.load(
            positions + batch * positions_batch + row * positions_row, mask=there, other=0
        )
    mask_rows = None
    if mask is not None:
        mask_rows = mask + batch * mask_batch + head * mask_head + row * mask_row
    logits = _logits(
        query + batch * query_batch + head * query_head + row * query_row,
        key + batch * key_batch + shared * key_head + columns * key_row,
        mask_rows,
        there,
        columns,
        limits,
        keys,
        mask_column,
        scale,
        SIZE,
        BLOCK_SIZE,
        BLOCK_ROWS,
        BLOCK_KEYS,
        SAME,
        BOOL,
    )
    top = tl.max(logits, 1)
    total = tl.sum(tl.exp(logits - _shift(top)[:, None]), 1)
    place = (batch * heads + head) * rows + row
    tl.store(tops + place * blocks + block, top, mask=there)
    tl.store(totals + place * blocks + block, total, mask=there)
    tl.store(
        logits_out + place[:, None] * keys + columns[None, :],
        logits,
        mask=there[:, None] & (columns < keys)[None, :],
    )


@triton.jit
def _normalize_kernel(
    logits,
    tops,
    totals,
    keys,
    blocks,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):
    """Softmax in place, from the parts of :func:`_rows_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    top = tl.full([1], float("-inf"), dtype=tl.float32)
    total = tl.zeros([1], dtype=tl.float32)
    for start in range(0, blocks, BLOCK_PARTS):
        part = start + tl.arange(0, BLOCK_PARTS)
        there = part < blocks
        part_top = tl.load(tops + row * blocks + part, mask=there, other=float("-inf"))
        part_total = tl.load(totals + row * blocks + part, mask=there, other=0.0)
        higher = tl.maximum(top, tl.max(part_top, 0))
        total = total * tl.exp(top - _shift(higher)) + tl.sum(
            part_total * tl.exp(part_top - _shift(higher)), 0
        )
        top = higher
    columns = tl.program_id(1) * BLOCK_KEYS + tl.arange(0, BLOCK_KEYS)
    place = logits + row * keys + columns
    values = tl.load(place, mask=columns < keys, other=float("-inf"))
    tl.store(place, _share(tl.exp(values - _shift(top)), total), mask=columns < keys)


@triton.jit
def _statistics_kernel(
    query,
    key,
    mask,
    tops,
    totals,
    heads,
    groups,
    queries,
    keys,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    scale,
    CAUSAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    SAME: tl.constexpr,
    BOOL: tl.constexpr,
):
    """Largest logit (0 where nothing is seen) and sum of exponentials of each row."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first = tl.program_id(0) * BLOCK_ROWS
    row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    there = row < queries
    limits = tl.zeros([BLOCK_ROWS], dtype=tl.int64) + keys
    end = keys
    if CAUSAL:
        limits = row + keys - queries
        end = tl.minimum(keys, first + BLOCK_ROWS + keys - queries)
    mask_rows = None
    if mask is not None:
        mask_rows = mask + batch * mask_batch + head * mask_head + row * mask_row
    top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    for start in range(0, end, BLOCK_KEYS):
        columns = (start + tl.arange(0, BLOCK_KEYS)).to(tl.int64)
        logits = _logits(
            query + batch * query_batch + head * query_head + row * query_row,
            key + batch * key_batch + (head // groups) * key_head + columns * key_row,
            mask_rows,
            there,
            columns,
            limits,
            keys,
            mask_column,
            scale,
            SIZE,
            BLOCK_SIZE,
            BLOCK_ROWS,
            BLOCK_KEYS,
            SAME,
            BOOL,
        )
        higher = tl.maximum(top, tl.max(logits, 1))
        shift = _shift(higher)
        total = total * tl.exp(top - shift) + tl.sum(tl.exp(logits - shift[:, None]), 1)
        top = higher
    place = (batch * heads + head) * queries + row
    tl.store(tops + place, _shift(top), mask=there)
    tl.store(totals + place, total, mask=there)


@triton.jit
def _column_sums_kernel(
    query,
    key,
    mask,
    weights,
    tops,
    totals,
    sums,
    heads,
    groups,
    weighings,
    queries,
    keys,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    scale,
    CAUSAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WEIGHINGS: tl.constexpr,
    SAME: tl.constexpr,
    BOOL: tl.constexpr,
):
    """Sums over all rows, a block of keys per program, the rows in order."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first = tl.program_id(0) * BLOCK_KEYS
    columns = (first + tl.arange(0, BLOCK_KEYS)).to(tl.int64)
    weighing = (tl.program_id(2) * BLOCK_WEIGHINGS + tl.arange(0, BLOCK_WEIGHINGS)).to(tl.int64)
    begin = 0
    if CAUSAL:  # rows further up see none of these keys
        begin = tl.maximum(0, (first + queries - keys) // BLOCK_ROWS * BLOCK_ROWS)
    result = tl.zeros([BLOCK_WEIGHINGS, BLOCK_KEYS], dtype=tl.float32)
    for start in range(begin, queries, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
        there = row < queries
        limits = tl.zeros([BLOCK_ROWS], dtype=tl.int64) + keys
        if CAUSAL:
            limits = row + keys - queries
        mask_rows = None
        if mask is not None:
            mask_rows = mask + batch * mask_batch + head * mask_head + row * mask_row
        logits = _logits(
            query + batch * query_batch + head * query_head + row * query_row,
            key + batch * key_batch + (head // groups) * key_head + columns * key_row,
            mask_rows,
            there,
            columns,
            limits,
            keys,
            mask_column,
            scale,
            SIZE,
            BLOCK_SIZE,
            BLOCK_ROWS,
            BLOCK_KEYS,
            SAME,
            BOOL,
        )
        place = (batch * heads + head) * queries + row
        top = tl.load(tops + place, mask=there, other=0.0)
        total = tl.load(totals + place, mask=there, other=0.0)
        shares = _share(tl.exp(logits - top[:, None]), total[:, None])
        weight = tl.load(
            weights + (batch * weighings + weighing[:, None]) * queries + row[None, :],
            mask=(weighing < weighings)[:, None] & there[None, :],
            other=0.0,
        )
        result += tl.sum(weight[:, :, None] * shares[None, :, :], 1)
    tl.store(
        sums + ((batch * heads + head) * weighings + weighing[:, None]) * keys + columns[None, :],
        result,
        mask=(weighing < weighings)[:, None] & (columns < keys)[None, :],
    )


@triton.jit
def _row_sums_kernel(
    query,
    key,
    mask,
    weights,
    sums,
    heads,
    groups,
    weighings,
    queries,
    keys,
    query_batch,
    query_head,
    query_row,
    key_batch,
    key_head,
    key_row,
    mask_batch,
    mask_head,
    mask_row,
    mask_column,
    scale,
    CAUSAL: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_WEIGHINGS: tl.constexpr,
    SAME: tl.constexpr,
    BOOL: tl.constexpr,
):
    """Sums over all keys, a block of rows per program, in one pass."""
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    first = tl.program_id(0) * BLOCK_ROWS
    row = (first + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    there = row < queries
    weighing = (tl.program_id(2) * BLOCK_WEIGHINGS + tl.arange(0, BLOCK_WEIGHINGS)).to(tl.int64)
    limits = tl.zeros([BLOCK_ROWS], dtype=tl.int64) + keys
    end = keys
    if CAUSAL:
        limits = row + keys - queries
        end = tl.minimum(keys, first + BLOCK_ROWS + keys - queries)
    mask_rows = None
    if mask is not None:
        mask_rows = mask + batch * mask_batch + head * mask_head + row * mask_row
    top = tl.full([BLOCK_ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_ROWS], dtype=tl.float32)
    result = tl.zeros([BLOCK_WEIGHINGS, BLOCK_ROWS], dtype=tl.float32)
    for start in range(0, end, BLOCK_KEYS):
        columns = (start + tl.arange(0, BLOCK_KEYS)).to(tl.int64)
        logits = _logits(
            query + batch * query_batch + head * query_head + row * query_row,
            key + batch * key_batch + (head // groups) * key_head + columns * key_row,
            mask_rows,
            there,
            columns,
            limits,
            keys,
            mask_column,
            scale,
            SIZE,
            BLOCK_SIZE,
            BLOCK_ROWS,
            BLOCK_KEYS,
            SAME,
            BOOL,
        )
        higher = tl.maximum(top, tl.max(logits, 1))
        shift = _shift(higher)
        shares = tl.exp(logits - shift[:, None])
        fade = tl.exp(top - shift)
        weight = tl.load(
            weights + (batch * weighings + weighing[:, None]) * keys + columns[None, :],
            mask=(weighing < weighings)[:, None] & (columns < keys)[None, :],
            other=0.0,
        )
        total = total * fade + tl.sum(shares, 1)
        result = result * fade[None, :] + tl.sum(weight[:, None, :] * shares[None, :, :], 2)
        top = higher
    tl.store(
        sums + ((batch * heads + head) * weighings + weighing[:, None]) * queries + row[None, :],
        _share(result, total[None, :]),
        mask=(weighing < weighings)[:, None] & there[None, :],
    )


def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    positions: Tensor | None,
    scale: float | None,
) -> Tensor:
    """:func:`vlmopt.ops.attention.attention_rows` by kernels: two passes over what is returned."""
    query, key = _fitting(query, key)
    batch, heads, rows, size = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    groups = heads // key_heads
    block_rows = 16 if groups * rows <= 16 else 64
    blocks = triton.cdiv(keys, _KEYS)
    result = query.new_empty(batch, heads, rows, keys, dtype=torch.float32)
    tops = query.new_empty(batch * heads * rows * blocks, dtype=torch.float32)
    totals = torch.empty_like(tops)
    mask, mask_strides = _expanded(mask, result.shape)
    if positions is not None:
        positions = positions.expand(batch, rows)
    _rows_kernel[(blocks, triton.cdiv(groups * rows, block_rows), batch * key_heads)](
        query,
        key,
        mask,
        positions,
        result,
        tops,
        totals,
        heads,
        key_heads,
        rows,
        keys,
        blocks,
        *query.stride()[:3],
        *key.stride()[:3],
        *mask_strides,
        *(positions.stride() if positions is not None else (0, 0)),
        size**-0.5 if scale is None else scale,
        BLOCK_ROWS=block_rows,
        **_constants(query, key, mask),
    )
    _normalize_kernel[(batch * heads * rows, triton.cdiv(keys, 1024))](
        result, tops, totals, keys, blocks, BLOCK_PARTS=64, BLOCK_KEYS=1024
    )
    return result


def attention_mass(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    over: str,
) -> Tensor:
    """:func:`vlmopt.ops.attention.attention_mass` by kernels.

    Sums over queries take two passes (each row's largest logit and sum of exponentials, then the
    sums), those over keys one. Beside the result, 8 bytes per row and head are held.
    """
    query, key = _fitting(query, key)
    batch, heads, queries, size = query.shape
    key_heads, keys = key.shape[1], key.shape[2]
    weighings = weights.shape[1]
    length = queries if over == "queries" else keys
    weights = weights.float().expand(batch, weighings, length).contiguous()
    block_rows = 16 if queries <= 16 else 64
    block_weighings = min(_GROUPS, triton.next_power_of_2(weighings))
    mask, mask_strides = _expanded(mask, (batch, heads, queries, keys))
    sizes = (queries, keys)
    strides = (*query.stride()[:3], *key.stride()[:3], *mask_strides)
    scale = size**-0.5 if scale is None else scale
    constants = {"CAUSAL": causal, "BLOCK_ROWS": block_rows, **_constants(query, key, mask)}
    row_blocks = triton.cdiv(queries, block_rows)
    others = (batch * heads, triton.cdiv(weighings, block_weighings))
    grouping = (heads, heads // key_heads)
    if over == "keys":
        sums = query.new_empty(batch, heads, weighings, queries, dtype=torch.float32)
        _row_sums_kernel[(row_blocks, *others)](
            query,
            key,
            mask,
            weights,
            sums,
            *grouping,
            weighings,
            *sizes,
            *strides,
            scale,
            BLOCK_WEIGHINGS=block_weighings,
            **constants,
        )
        return sums
    tops = query.new_empty(batch, heads, queries, dtype=torch.float32)
    totals = torch.empty_like(tops)
    _statistics_kernel[(row_blocks, batch * heads)](
        query, key, mask, tops, totals, *grouping, *sizes, *strides, scale, **constants
    )
    sums = query.new_empty(batch, heads, weighings, keys, dtype=torch.float32)
    _column_sums_kernel[(triton.cdiv(keys, _KEYS), *others)](
        query,
        key,
        mask,
        weights,
        tops,
        totals,
        sums,
        *grouping,
        weighings,
        *sizes,
        *strides,
        scale,
        BLOCK_WEIGHINGS=block_weighings,
        **constants,
    )
    return sums


def _fitting(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Both with the elements of a head next to each other; other dimensions may lie in any way.

    Raises:
        ValueError: their shapes do not fit, and kernels would read what is not theirs.
    """
    batch, heads, _, size = query.shape
    if (key.shape[0], key.shape[3]) != (batch, size) or heads % key.shape[1]:
        raise ValueError(f"query {list(query.shape)} and key {list(key.shape)} do not fit")
    return (
        query if query.stride(-1) == 1 else query.contiguous(),
        key if key.stride(-1) == 1 else key.contiguous(),
    )


def _expanded(
    mask: Tensor | None, shape: Sequence[int]
) -> tuple[Tensor | None, tuple[int, int, int, int]]:
    """The mask and its strides, 0 where it is broadcast."""
    if mask is None:
        return None, (0, 0, 0, 0)
    mask = mask.expand(shape)
    return mask, mask.stride()  # type: ignore[return-value] # four of them


def _constants(query: Tensor, key: Tensor, mask: Tensor | None) -> dict[str, Any]:
    size = query.shape[-1]
    halves: tuple[torch.dtype, ...] = (torch.float16, torch.bfloat16)
    if query.device.type == "cpu":  # Triton's interpreter multiplies the bits of bfloat16
        halves = (torch.float16,)
    same = query.dtype == key.dtype and query.dtype in halves
    return {
        "SIZE": size,
        "BLOCK_SIZE": max(16, min(_SIZES[same], triton.next_power_of_2(size))),
        "BLOCK_KEYS": _KEYS,
        "SAME": same,
        "BOOL": mask is not None and mask.dtype == torch.bool,
    }
