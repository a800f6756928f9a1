"""Grouped products: against one product per row, with groups that are empty, and gradients."""

from __future__ import annotations

import itertools
from functools import partial

import pytest
import torch

from vlmopt.ops.experts import (
    best_tile,
    grouped_mm,
    grouped_mm_reference,
    grouped_mm_tiles,
    tile_count,
)

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
