"""Grouped products: against one product per row, with groups that are empty, and gradients."""

from __future__ import annotations

import pytest
import torch

from vlmopt.ops.experts import grouped_mm, grouped_mm_reference

ENDS = [[2, 5, 5, 7], [0, 0, 7, 7], [7, 7, 7, 7], [1, 2, 3, 5]]


def tensors(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(7, 5, generator=generator, dtype=dtype)
    return rows, torch.randn(4, 5, 3, generator=generator, dtype=dtype)


@pytest.mark.parametrize("ends", ENDS)
@pytest.mark.parametrize("function", [grouped_mm, grouped_mm_reference])
def test_every_row_meets_the_matrix_of_its_group(function: object, ends: list[int]) -> None:
    rows, weights = tensors()
    found = function(rows, weights, torch.tensor(ends, dtype=torch.int32))  # type: ignore[operator]
    for place, row in enumerate(rows):
        group = sum(place >= end for end in ends)
        wanted = row @ weights[group] if group < len(ends) else torch.zeros(3)
        torch.testing.assert_close(found[place], wanted)


@pytest.mark.parametrize("ends", ENDS)
def test_the_operator_is_sound_for_the_compiler(ends: list[int]) -> None:
    rows, weights = tensors(torch.float64)
    arguments = (rows.requires_grad_(), weights.requires_grad_(), torch.tensor(ends))
    torch.library.opcheck(torch.ops.vlmopt.grouped_mm.default, arguments)
    assert torch.autograd.gradcheck(lambda r, w: grouped_mm(r, w, arguments[2]), arguments[:2])
