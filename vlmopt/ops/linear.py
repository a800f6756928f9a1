"""Linear algebra in operators that ONNX has, for matrices of a few rows."""

from __future__ import annotations

import torch
from torch import Tensor


def solve_small(matrix: Tensor, right: Tensor) -> Tensor:
    """``matrix^-1 right`` for positive definite matrices, by elimination.

    Unrolled, so that the graph grows with the number of rows: ``linalg.solve`` has no counterpart
    in ONNX.

    Args:
        matrix: float32 ``[batch, rows, rows]``.
        right: float32 ``[batch, rows, columns]``.

    Returns:
        Like ``right``.
    """
    size = matrix.shape[-1]
    system = torch.cat([matrix, right], dim=-1)
    for at in range(size):
        pivot = system[:, at : at + 1] / system[:, at : at + 1, at : at + 1]
        factors = system[:, :, at : at + 1]
        unit = torch.arange(size, device=matrix.device)[:, None] == at
        system = torch.where(unit, pivot, system - factors * pivot)
    return system[..., size:]
