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
