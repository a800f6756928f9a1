"""Rows sorted by expert: which are computed, and their products with the matrix of their expert."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vlmopt.ops.attention import uses_kernels
from vlmopt.ops.packed import is_available, linear


@torch.library.custom_op("vlmopt::computed_rows", mutates_args=())
def computed_rows(places: Tensor, ends: Tensor) -> Tensor:
    """Mark the rows that are computed: the first ``ends[-1]``, and no fewer than one.

    The others may be left out from here on; as it stands, this operator leaves them in, so that
    shapes are known beforehand. :func:`only_computed_rows` takes its place where shapes may depend
    on data.

    Args:
        places: of the rows, in order of their groups, int64 ``[rows]``.
        ends: where each group ends, int32 or int64 ``[groups]``, ascending.

    Returns:
        ``places``.
    """
    return places.clone()


@computed_rows.register_fake
def _(places: Tensor, ends: Tensor) -> Tensor:
    return torch.empty_like(places)


@torch.library.custom_op("vlmopt::only_computed_rows", mutates_args=())
def only_computed_rows(places: Tensor, ends: Tensor) -> Tensor:
    """What :func:`computed_rows` marks, and no more: ``[max(ends[-1], 1)]``."""
    return places[: max(int(ends[-1]), 1)].clone()


@only_computed_rows.register_fake
def _(places: Tensor, ends: Tensor) -> Tensor:
    return places.new_empty(torch.library.get_ctx().new_dynamic_size(min=1))


def restored_rows_reference(rows: Tensor, back: Tensor, ends: Tensor) -> Tensor:
    """:func:`restored_rows` in operators of torch."""
    computed = back < ends[-1]
    found = rows[torch.where(computed, back, 0)]
    # what stands in rows that are not computed is no number: 0 * NaN is NaN
    return torch.where(computed[:, None], found, torch.zeros_like(found))


@torch.library.custom_op("vlmopt::restored_rows", mutates_args=())
def restored_rows(rows: Tensor, back: Tensor, ends: Tensor) -> Tensor:
    """Rows that are computed, put back in place among zeros.

    Args:
        rows: one for each place that :func:`computed_rows` returned, ``[rows, width]``.
        back: for each place the number of its row, int64 ``[places]``.
        ends: where each group of rows ends; from the last end on, rows are not read.

    Returns:
        ``[places, width]``.
    """
    return restored_rows_reference(rows, back, ends)


@restored_rows.register_fake
def _(rows: Tensor, back: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(back.shape[0], rows.shape[1])


def summed_rows_reference(rows: Tensor, back: Tensor, ends: Tensor, k: int) -> Tensor:
    """:func:`summed_rows` in operators of torch."""
    return restored_rows_reference(rows, back, ends).view(-1, k, rows.shape[1]).sum(1)


@torch.library.custom_op("vlmopt::summed_rows", mutates_args=())
def summed_rows(rows: Tensor, back: Tensor, ends: Tensor, k: int) -> Tensor:
    """Sum the computed rows of each token; zeros where there are none.

    Args:
        rows, back, ends: as for :func:`restored_rows`.
        k: places of each token, one after the other.

    Returns:
        ``[places / k, width]``.
    """
    if rows.device.type != "cpu":
        return summed_rows_reference(rows, back, ends, k)
    from vlmopt.lowering.cpp import experts as cpu

    if (found := cpu.summed_rows(rows, back, ends, k)) is not None:
        return found
    computed = back < ends[-1]
    counts = computed.view(-1, k).sum(1)
    # reads and adds the computed rows alone, with all vector units
    return embedding_bag(back[computed], rows, counts.cumsum(0) - counts, mode="sum")


@summed_rows.register_fake
def _(rows: Tensor, back: Tensor, ends: Tensor, k: int) -> Tensor:
    return rows.new_empty(back.shape[0] // k, rows.shape[1])


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


KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernel of :func:`grouped_mm` multiplies."""


def uses_kernel(rows: Tensor) -> bool:
    """Whether :func:`grouped_mm` runs as a Triton kernel: on CUDA, where Triton is installed."""
    return uses_kernels(rows) and rows.dtype in KERNEL_TYPES


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
    if uses_kernel(rows):
        from vlmopt.lowering.triton import experts as kernels

        with torch.cuda.device_of(rows):
            return kernels.grouped_mm(rows, weights, ends)
    if rows.device.type == "cpu":
        from vlmopt.lowering.cpp import experts as cpu

        if (found := cpu.grouped_mm(rows, weights, ends)) is not None:
            return found
        if rows.dtype == torch.float32 and is_available():
            return _by_onednn(rows, weights, ends)
    bounds, sizes = _groups(ends)
    result = rows.new_empty(len(rows), weights.shape[2])
    inside = bounds[-1]
    parts = rows[:inside].split(sizes), weights.unbind(0), result[:inside].split(sizes)
    for own, matrix, place in zip(*parts, strict=True):
        if len(own):
            torch.mm(own, matrix, out=place)
    result[inside:] = 0
    return result


@grouped_mm.register_fake
def _(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weights.shape[2])


def _groups(ends: Tensor) -> tuple[list[int], list[int]]:
    """Where groups start and end, and how long they are."""
    bounds = [0, *ends.tolist()]
    return bounds, [end - start for start, end in itertools.pairwise(bounds)]


def _by_onednn(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """:func:`grouped_mm`; MKL takes twice as long where the processor is not its vendor's."""
    bounds, sizes = _groups(ends)
    pairs = zip(rows[: bounds[-1]].split(sizes), weights.unbind(0), strict=True)
    found = [linear(own, matrix.t()) for own, matrix in pairs if len(own)]
    return torch.cat([*found, rows.new_zeros(len(rows) - bounds[-1], weights.shape[2])])


@torch.library.custom_op("vlmopt::grouped_outer", mutates_args=())
def grouped_outer(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    """Sum of the outer products of the rows of each group.

    Args:
        left, right: ``[rows, width]`` and ``[rows, other width]``, one group after the other.
        ends: as for :func:`grouped_mm`.

    Returns:
        ``[groups, width, other width]``.
    """
    bounds, sizes = _groups(ends)
    parts = [side[: bounds[-1]].split(sizes) for side in (left, right)]
    return torch.stack([one.t() @ other for one, other in zip(*parts, strict=True)])


@grouped_outer.register_fake
def _(left: Tensor, right: Tensor, ends: Tensor) -> Tensor:
    return left.new_empty(ends.shape[0], left.shape[1], right.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))
    ctx.k = inputs[-1]


def _products_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows, weights, ends = ctx.saved_tensors
    of_rows = grouped_mm(gradient, weights.transpose(1, 2), ends)
    return of_rows, grouped_outer(rows, gradient, ends), None


def _restored_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    rows, back, ends = ctx.saved_tensors
    computed = back < ends[-1]
    return torch.zeros_like(rows).index_put((back[computed],), gradient[computed]), None, None


def _summed_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
    return *_restored_backward(ctx, gradient.repeat_interleave(ctx.k, 0)), None


grouped_mm.register_autograd(_products_backward, setup_context=_save)
restored_rows.register_autograd(_restored_backward, setup_context=_save)
summed_rows.register_autograd(_summed_backward, setup_context=_save)
