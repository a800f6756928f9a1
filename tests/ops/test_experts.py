"""Sorted rows: products against one per row, with groups that are empty; what is put back."""

from __future__ import annotations

import itertools
import shutil
from functools import partial

import pytest
import torch
from torch._inductor.codecache import CppPythonBindingsCodeCache
from torch._inductor.exc import InvalidCxxCompiler

from vlmopt.lowering.cpp import experts as cpu
from vlmopt.lowering.cpp import load
from vlmopt.ops.experts import (
    best_tile,
    computed_rows,
    grouped_mm,
    grouped_mm_reference,
    grouped_mm_tiles,
    only_computed_rows,
    restored_rows,
    summed_rows,
    summed_rows_reference,
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


KINDS = (torch.int32, torch.int64)


def uneven(dtype: torch.dtype, width: int, columns: int) -> tuple[torch.Tensor, ...]:
    """Rows, matrices that lie transposed, and ends; the last rows meet no group."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(33, width, generator=generator).to(dtype)
    stacked = torch.randn(6, columns, width, generator=generator).to(dtype)
    rows[30:] = float("nan")
    stacked[1] = float("nan")  # of an empty group
    return rows, stacked.transpose(1, 2), torch.tensor([1, 1, 3, 20, 30, 30])


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(5, 3), (35, 67), (160, 64)])
def test_the_kernel_of_the_cpu(dtype: torch.dtype, size: tuple[int, int]) -> None:
    rows, weights, ends = uneven(dtype, *size)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found += [cpu.grouped_mm(rows, weights, ends.to(kind)) for kind in KINDS]
    finally:
        torch.set_num_threads(threads)
    first = found[0]
    assert first is not None
    assert all(other is not None and torch.equal(first, other) for other in found)
    exact = grouped_mm_reference(rows.nan_to_num().double(), weights.double(), ends)
    assert (first[30:] == 0).all()
    limit = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}[dtype]
    assert (first - exact).norm() <= limit * exact.norm()
    # whatever rows are beside it, a row has the same result
    alone = cpu.grouped_mm(rows[7:8], weights, torch.tensor([0, 0, 0, 1, 1, 1]))
    assert alone is not None and torch.equal(alone, first[7:8])


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_the_kernel_reads_no_rows_that_are_not_there() -> None:
    rows, weights, _ = uneven(torch.float32, 5, 3)
    for ends in ([1, 1, 3, 2, 5, 5], [1, 1, 3, 4, 5, 34], [-1, 1, 1, 1, 1, 1]):
        with pytest.raises(RuntimeError, match="do not ascend from 0 to the number of rows"):
            grouped_mm(rows, weights, torch.tensor(ends))
    for one in (rows[:, 1:], rows.bfloat16()):
        with pytest.raises(ValueError, match="do not fit"):
            grouped_mm(one, weights, torch.tensor([1, 1, 3, 4, 5, 5]))


def test_without_a_compiler_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*args: object) -> None:
        raise InvalidCxxCompiler

    load.cache_clear()
    monkeypatch.setattr(CppPythonBindingsCodeCache, "load_pybinding", fails)
    rows, weights, ends = uneven(torch.float32, 5, 3)
    with caplog.at_level("WARNING", "vlmopt"):
        found = [grouped_mm(rows, weights, ends) for _ in range(2)]
    load.cache_clear()
    exact = grouped_mm_reference(rows.nan_to_num().double(), weights.double(), ends)
    for one in found:
        assert (one - exact).abs().max() <= 1e-5
    (record,) = caplog.records  # and says it once
    assert "grouped_mm runs without its kernel for torch.float32" in record.getMessage()
    assert "compiler" in record.getMessage()


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
    for dtype, limit in ((torch.float32, 1e-6), (torch.bfloat16, 3e-2)):
        found = summed_rows(few.to(dtype), back, ends, 2)
        assert found.dtype == dtype
        assert (found - wanted.view(3, 2, 5).sum(1)).abs().max() <= limit
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
