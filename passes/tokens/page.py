"""What pixels and retrieval say about the patches of a page: maths that methods share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import torch
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
"""By which processors of CLIP and Qwen2-VL normalise red, green and blue."""


def to_gray(pixels: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """Gray values of normalised pixels by ITU-R BT.601: int64 from 0 to 255.

    Args:
        pixels: ``[..., values of a patch]``, red first, then green, then blue.
        mean, std: by which the processor normalised values from 0 to 1.
    """
    colours = pixels.float().unflatten(-1, (3, -1))
    scale, shift = (torch.tensor(of, device=pixels.device)[:, None] for of in (std, mean))
    values = torch.round((colours * scale + shift) * 255).clamp(0, 255).long()
    red, green, blue = values.unbind(-2)
    # whole numbers: the same wherever it runs
    return torch.div(299 * red + 587 * green + 114 * blue + 500, 1000, rounding_mode="floor")


def background(gray: Tensor, tau_e: float) -> Tensor:
    """How many pixels of each patch have the page's commonest gray value, nearly.

    Args:
        gray: int64 ``[pages, ..., pixels of a patch]``, from 0 to 255.
        tau_e: a pixel counts if it is less than this away.

    Returns:
        int64 ``[pages, ...]``. Of values that are equally common the smallest is the page's.
    """
    flat = gray.flatten(1)
    counts = torch.zeros(flat.shape[0], 256, dtype=torch.int64, device=gray.device)
    counts = counts.scatter_add(1, flat, torch.ones_like(flat))
    value = torch.arange(256, device=gray.device)
    mode = (counts * 256 + 255 - value).argmax(-1)
    away = (gray - mode.view(-1, *[1] * (gray.ndim - 1))).abs()
    return (away < tau_e).sum(-1)


def foreground(gray: Tensor, tau_e: float, tau_bg: float) -> tuple[Tensor, Tensor]:
    """How much of each patch is no background, and whether enough of it.

    Args:
        gray, tau_e: as for :func:`background`.
        tau_bg: share of background that a patch may have.

    Returns:
        float32 and bool, ``[pages, ...]``.
    """
    count, pixels = background(gray, tau_e), gray.shape[-1]
    limit = math.floor(Fraction(str(tau_bg)) * pixels)  # shares as whole numbers: exact
    return (pixels - count).float(), count <= limit


def similarity(pages: Tensor, questions: Tensor) -> Tensor:
    """Cosine of each patch with each token of the question, summed over these.

    Args:
        pages: ``[pages, patches, width]``.
        questions: ``[pages, tokens, width]``, zeros behind a shorter one.

    Returns:
        float32 ``[pages, patches]``; twice as much for a question said twice.
    """
    unit = torch.nn.functional.normalize
    whole = unit(questions.float(), dim=-1).sum(1, keepdim=True)
    return (unit(pages.float(), dim=-1) * whole).sum(-1)


def resized(values: Tensor, rows: int, columns: int, sigma: float) -> Tensor:
    """A map of the page on another grid: bilinear, then smoothed.

    Args:
        values: float32 ``[pages, rows, columns]``.
        sigma: of the Gaussian, in patches; 0 for none. It ends three away, and goes on with the
            outermost values beyond the border.

    Returns:
        float32 ``[pages, rows, columns]`` of the other grid.
    """
    sizes = zip(values.shape[1:], (rows, columns), strict=True)
    down, across = (
        torch.tensor(_resizing(have, want, sigma), device=values.device) for have, want in sizes
    )
    return down @ values @ across.T


_RADIUS = 3


def _resizing(have: int, want: int, sigma: float) -> list[list[float]]:
    """:func:`resized` of one direction as a matrix, of numbers alone: ``[want][have]``."""
    linear = [[0.0] * have for _ in range(want)]
    for at in range(want):
        place = min(max((at + 0.5) * have / want - 0.5, 0.0), have - 1.0)
        low = int(place)
        linear[at][low] += 1 - (place - low)
        linear[at][min(low + 1, have - 1)] += place - low
    if not sigma:
        return linear
    steps = range(-_RADIUS, _RADIUS + 1)
    weight = [math.exp(-0.5 * (step / sigma) ** 2) for step in steps]
    smooth = [[0.0] * have for _ in range(want)]
    for at in range(want):
        for step, share in zip(steps, weight, strict=True):
            source = linear[min(max(at + step, 0), want - 1)]
            for column, value in enumerate(source):
                smooth[at][column] += share / sum(weight) * value
    return smooth


def by_token(values: Tensor, side: int) -> Tensor:
    """A map of patches by token: ``[pages, tokens, side * side]``, both row by row.

    Args:
        values: ``[pages, rows, columns]``.
        side: patches of a token in each direction.
    """
    pages, rows, columns = values.shape
    squares = values.view(pages, rows // side, side, columns // side, side)
    return squares.transpose(2, 3).reshape(pages, -1, side * side)
