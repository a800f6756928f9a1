"""Kernels of ``vlmopt::grouped_mm`` and ``vlmopt::summed_rows`` for the CPU.

Each returns nothing where the kernel does not take what is given, or cannot be compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmopt.lowering.cpp import load


def grouped_mm(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor | None:
    """:func:`vlmopt.ops.experts.grouped_mm` on matrices that lie transposed in memory.

    That is how models store the weights of experts, as those of linear layers.

    Raises:
        ValueError: shapes or dtypes do not fit, and the kernel would read what is not theirs.
        RuntimeError: ``ends`` do not ascend from 0 to the number of rows.
    """
    types = *["scalar_t*"] * 2, "int64_t*", "scalar_t*", *["int64_t"] * 7
    of_group, of_element, of_column = weights.stride()
    same = rows.dtype == weights.dtype and rows.shape[1] == weights.shape[1]
    if not same or ends.shape != weights.shape[:1]:
        raise ValueError(
            f"rows {list(rows.shape)} of {rows.dtype}, weights {list(weights.shape)} of "
            f"{weights.dtype} and ends {list(ends.shape)} do not fit"
        )
    if of_element != 1 or (kernel := load("grouped_mm", rows.dtype, *types)) is None:
        return None
    (count, width), (groups, _, columns) = rows.shape, weights.shape
    result = rows.new_empty(count, columns)
    sizes = count, groups, width, columns, of_group, of_column, torch.get_num_threads()
    kernel(rows.contiguous(), weights, ends.long().contiguous(), result, *sizes)
    return result


def summed_rows(rows: Tensor, back: Tensor, ends: Tensor, k: int) -> Tensor | None:
    """:func:`vlmopt.ops.experts.summed_rows`; sums in float32, in the order of places."""
    types = "scalar_t*", "int64_t*", "scalar_t*", *["int64_t"] * 5
    computed = int(ends[-1])
    if computed > len(rows) or (kernel := load("summed_rows", rows.dtype, *types)) is None:
        return None
    tokens, width = len(back) // k, rows.shape[1]
    result = rows.new_empty(tokens, width)
    sizes = computed, tokens, k, width, torch.get_num_threads()
    kernel(rows.contiguous(), back.contiguous(), result, *sizes)
    return result
