"""Products of rows sorted by expert, each group of rows with the matrix of its expert."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmopt.ops.attention import uses_kernels


def grouped_mm_reference(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """:func:`grouped_mm` in operators of torch, with a copy of its matrix for each row."""
    place = torch.arange(rows.shape[0], device=rows.device)
    group = (place[:, None] >= ends).sum(1)
    inside = group < weights.shape[0]
    chosen = weights.index_select(0, group.clamp(max=weights.shape[0] - 1))
    return torch.bmm(rows[:, None], chosen)[:, 0] * inside[:, None].to(rows.dtype)


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


KERNEL_TYPES = (torch.float16, torch.bfloat16, torch.float32)
"""What the kernel of :func:`grouped_mm` multiplies."""


def uses_kernel(rows: Tensor) -> bool:
    """Whether :func:`grouped_mm` runs as a Triton kernel: on CUDA, where Triton is installed."""
    return uses_kernels(rows) and rows.dtype in KERNEL_TYPES


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
