"""The grid that an image's tokens form, its patches, and a finer grid over a patch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmopt.errors import OptionError


def rows_and_columns(
    name: str, grid: tuple[int, ...], tokens: int, *, images: bool = False
) -> tuple[int, int]:
    """Rows and columns of a grid of ``tokens``.

    Args:
        name: of the method that asks, for errors.
        grid: as an option gives it; empty for a square.
        images: the tokens may be those of several images, one grid below the other.

    Raises:
        OptionError: they do not fill it.
    """
    rows, columns = grid or (math.isqrt(tokens),) * 2
    size = rows * columns
    if size == 0 or (tokens % size if images else tokens != size):
        raise OptionError(
            f"{name}: {tokens} visual tokens are no grid of {rows} by {columns}",
            hint="give the rows and columns of an image, such as grid=12,16",
        )
    return rows, columns


def patches(tokens: int, columns: int, side: int) -> Tensor:
    """Numbers of the tokens in each patch, row by row: int64 ``[patches, side * side]``."""
    numbers = torch.arange(tokens).view(tokens // columns // side, side, columns // side, side)
    return numbers.transpose(1, 2).reshape(-1, side * side)


def bilinear(side: int, up: int) -> Tensor:
    """Weights of a patch's tokens in a grid ``up`` times as fine.

    Returns:
        float32 ``[(side * up) ** 2, side * side]``; rows sum to 1.
    """
    units = torch.eye(side * side).view(1, side * side, side, side)
    finer = torch.nn.functional.interpolate(
        units, scale_factor=up, mode="bilinear", align_corners=False
    )
    return finer.flatten(2)[0].T.contiguous()


def parents(side: int, up: int) -> Tensor:
    """The token of a patch on which each one of the finer grid lies: int64, one for each."""
    line = torch.arange(side * up) // up
    return (line[:, None] * side + line).flatten()
