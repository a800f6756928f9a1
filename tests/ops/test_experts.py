"""Sorted rows: products against one per row, with groups that are empty; what is put back."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from vlmopt.ops.experts import (
    best_tile,
    computed_rows,
    grouped_mm,
    grouped_mm_reference,
    grouped_mm_tiles,
    only_computed_rows,
    packed_grouped_mm,
    restored_rows,
    summed_rows,
    summed_rows_reference,
    tile_count,
)
from vlmopt.ops.packed import is_available

ENDS = [[2, 5, 5, 7], [0, 0, 7, 7], [7, 7, 7, 7], [1, 2, 3, 5]]


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 5, generator=generator, dtype=dtype)
    return rows, torch.randn(4, 5, 3, generator=generator, dtype=dtype)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize(
    "function",
    [
        grouped_mm,
        grouped_mm_reference,
        grouped_mm_tiles,
        *(partial(grouped_mm_tiles, tile=tile) for tile in (2, 3, 8)),
    ],
)
def test_every_row_meets_the_matrix_of_its_group(function: object, ends: list[int]) -> None:
    rows, weights = tensors()
    found = function(rows, weights, torch.tensor(ends, dtype=torch.int32))  # type: ignore[operator]
    for place, row in enumerate(rows):
        group = sum(place >= end for end in ends)
        wanted = row @ weights[group] if group < len(ends) else torch.zeros(3)
        torch.testing.assert_close(found[place], wanted)


@pytest.mark.parametrize("tile", [1, 2])
def test_no_number_of_other_groups_spreads(tile: int) -> None:
    """Not even where rows are that no group computes: matrices of experts left out may be any."""
    rows, weights = tensors()
    weights[3] = float("nan")
    rows[5:] = float("nan")
    found = grouped_mm_tiles(rows, weights, torch.tensor([2, 4, 5, 5]), tile=tile)
    assert found.isfinite().all()
    assert (found[5:] == 0).all()


@pytest.mark.parametrize("tile", [1, 2, 3, 4])
def test_as_many_tiles_as_the_worst_groups_need(tile: int) -> None:
    for rows, groups in itertools.product(range(9), (1, 2, 3)):
        worst = max(
            sum(-(-size // tile) for size in sizes)
            for sizes in itertools.product(range(rows + 1), repeat=groups)
            if sum(sizes) == rows
        )
        assert tile_count(rows, groups, tile) == worst


def test_tiles_grow_with_the_rows_of_a_group() -> None:
    assert best_tile(8, 128) == 1  # decoding: a copy for each row
    sizes = [best_tile(rows, 16) for rows in (64, 512, 4096)]
    assert sizes == sorted(set(sizes))
    # memory: not many more copies than there are matrices
    assert tile_count(8192, 128, best_tile(8192, 128)) <= 2 * 128


@pytest.mark.parametrize("ends", ENDS)
def test_the_operator_is_sound_for_the_compiler(ends: list[int]) -> None:
    rows, weights = tensors(torch.float64)
    arguments = (rows.requires_grad_(), weights.requires_grad_(), torch.tensor(ends))
    torch.library.opcheck(torch.ops.vlmopt.grouped_mm.default, arguments)
    assert torch.autograd.gradcheck(lambda r, w: grouped_mm(r, w, arguments[2]), arguments[:2])


@pytest.mark.skipif(not is_available(), reason="this PyTorch has no oneDNN")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("ends", ENDS)
def test_packed_matrices(ends: list[int], transposed: bool, dtype: torch.dtype) -> None:
    rows, weights = (value.to(dtype) for value in tensors())
    kept = weights.transpose(1, 2).contiguous() if transposed else weights
    groups = torch.tensor(ends, dtype=torch.int32)
    found = packed_grouped_mm(rows, kept, transposed, groups)
    exact = grouped_mm_reference(rows.double(), weights.double(), groups)
    assert found.dtype == dtype
    limit = {torch.float32: 1e-5, torch.bfloat16: 3e-2}[dtype]
    assert (found - exact).abs().max() <= limit
    kept.mul_(2)  # seen, though what was packed is kept
    again = packed_grouped_mm(rows, kept, transposed, groups)
    assert (again - 2 * exact).abs().max() <= 2 * limit


PLACES = torch.tensor([4, 1, 0, 5, 3, 2])
"""Three tokens of two rows each, in the order of their groups."""


def put_back(computed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows, where they go, and ends; rows that are not computed are no numbers."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    rows[computed:] = float("nan")
    return rows, PLACES.argsort(), torch.tensor([0, computed], dtype=torch.int32)


@pytest.mark.parametrize("computed", [0, 1, 4, 6])
def test_computed_rows_go_back_to_their_places(computed: int) -> None:
    rows, back, ends = put_back(computed)
    wanted = torch.zeros(6, 5, dtype=torch.float64)
    for row in range(computed):
        wanted[PLACES[row]] = rows[row]
    assert torch.equal(restored_rows(rows, back, ends), wanted)
    assert torch.equal(summed_rows_reference(rows, back, ends, 2), wanted.view(3, 2, 5).sum(1))
    torch.testing.assert_close(summed_rows(rows, back, ends, 2), wanted.view(3, 2, 5).sum(1))
    # rows that are not computed need not be there
    few = rows[: max(computed, 1)]
    assert torch.equal(restored_rows(few, back, ends), wanted)
    torch.testing.assert_close(summed_rows(few, back, ends, 2), wanted.view(3, 2, 5).sum(1))


@pytest.mark.parametrize("computed", [0, 1, 4, 6])
def test_rows_that_are_computed_are_those_before_the_last_end(computed: int) -> None:
    ends = torch.tensor([0, computed])
    assert torch.equal(computed_rows(PLACES, ends), PLACES)
    assert torch.equal(only_computed_rows(PLACES, ends), PLACES[: max(computed, 1)])


@pytest.mark.parametrize("computed", [0, 4, 6])
def test_putting_back_is_sound_for_the_compiler(computed: int) -> None:
    _, back, ends = put_back(computed)
    rows = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(torch.ops.vlmopt.restored_rows.default, (rows, back, ends))
    torch.library.opcheck(torch.ops.vlmopt.summed_rows.default, (rows, back, ends, 2))
    torch.library.opcheck(torch.ops.vlmopt.computed_rows.default, (PLACES, ends))
    assert torch.autograd.gradcheck(lambda r: restored_rows(r, back, ends), (rows,))
    assert torch.autograd.gradcheck(lambda r: summed_rows(r, back, ends, 2), (rows,))
