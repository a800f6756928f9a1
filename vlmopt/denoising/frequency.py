"""Of two images that show the same, the low frequencies of one and the high ones of the other.

The frequency-domain update of "PS-SR: Pseudo-Single-Step Video Super-Resolution via Speculative
Diffusion" (CVPR 2026), after the official code (HiDream-ai/PS-SR, Apache-2.0), of which nothing was
copied. Pure functions of tensors in float32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

GRIDS = ("linspace", "fftfreq")
"""Where frequencies lie: from -.5 to .5 with both ends, as in the official code, by which the
filter of an even size has no gain of 1 and no symmetry; or where a Fourier transform has them."""
TRANSFORMS = ("fft", "matmul")
"""How the filter is applied: by fast Fourier transforms, or by products with matrices of cosines
and sines, which every runtime has."""

_TO_YUV = (
    (0.299, 0.587, 0.114),
    (-0.14713, -0.28886, 0.436),
    (0.615, -0.51499, -0.10001),
)
_TO_RGB = ((1.0, 0.0, 1.13983), (1.0, -0.39465, -0.5806), (1.0, 2.03211, 0.0))


def _mix_channels(images: Tensor, rows: tuple[tuple[float, ...], ...]) -> Tensor:
    matrix = torch.tensor(rows, dtype=torch.float32, device=images.device)
    return torch.einsum("oc,bchw->bohw", matrix, images)


def to_yuv(rgb: Tensor) -> Tensor:
    """Luminance and two colour differences: float32 ``[B, 3, H, W]`` to the same."""
    return _mix_channels(rgb, _TO_YUV)


def to_rgb(yuv: Tensor) -> Tensor:
    """Back from :func:`to_yuv`, up to the rounding of its coefficients (about 2e-5)."""
    return _mix_channels(yuv, _TO_RGB)


def butterworth(
    height: int, width: int, *, cutoff: float = 0.2, order: int = 2, grid: str = "linspace"
) -> Tensor:
    """Gain of a low-pass filter at each frequency, zero frequency in the middle.

    Args:
        cutoff: frequency of half the gain, in cycles per pixel.
        order: steepness.
        grid: one of :data:`GRIDS`.

    Returns:
        float32 ``[height, width]``, 0 to 1.
    """

    def axis(size: int) -> Tensor:
        if grid == "linspace":
            return torch.linspace(-0.5, 0.5, size)
        return torch.fft.fftshift(torch.fft.fftfreq(size))

    radius = (axis(height)[:, None].square() + axis(width).square()).sqrt()
    return 1 / (1 + (radius / cutoff) ** (2 * order))


def low_pass(plane: Tensor, gain: Tensor, *, transform: str = "fft") -> Tensor:
    """What a filter leaves of an image; the imaginary part, of an asymmetric one, is dropped.

    Args:
        plane: ``[..., H, W]``.
        gain: see :func:`butterworth`.
        transform: one of :data:`TRANSFORMS`.

    Returns:
        float32 ``[..., H, W]``.
    """
    plane = plane.float()
    gain = torch.fft.ifftshift(gain.to(plane.device))
    if transform == "fft":
        return torch.fft.ifft2(torch.fft.fft2(plane, norm="ortho") * gain, norm="ortho").real
    return _by_matrices(plane, gain)


def _by_matrices(plane: Tensor, gain: Tensor) -> Tensor:
    """The same without complex numbers: both axes there, the gain, both axes back."""
    down, across = (_waves(size, plane.device) for size in gain.shape)

    def product(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        (a, b), (c, d) = left, right
        return a @ c - b @ d, a @ d + b @ c

    def back(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return pair[0], -pair[1]

    there = product((down[0] @ plane, down[1] @ plane), across)
    kept = there[0] * gain, there[1] * gain
    return product(product(back(down), kept), back(across))[0]


def _waves(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Real and imaginary part of the matrix of an orthonormal Fourier transform."""
    places = torch.arange(size, dtype=torch.float64)
    # angles within one turn: whole multiples of it would cost digits
    turns = torch.outer(places, places) % size / size
    angle = -2 * math.pi * turns
    scale = size**-0.5
    real, imaginary = (scale * part(angle) for part in (torch.cos, torch.sin))
    return real.float().to(device), imaginary.float().to(device)


def fuse(
    consistent: Tensor,
    sharp: Tensor,
    *,
    alpha: float = 0.6,
    cutoff: float = 0.2,
    order: int = 2,
    border: int = 2,
    eps: float = 1e-6,
    grid: str = "linspace",
    transform: str = "fft",
) -> Tensor:
    """Colours and low frequencies of ``consistent``, high frequencies of whichever has more.

    Args:
        consistent, sharp: RGB, ``[B, 3, H, W]``, 0 to 1.
        alpha: weight of the high frequencies; 1 in the official code's defaults, .6 in the paper.
        cutoff, order, grid: see :func:`butterworth`.
        border: pixels along each edge that keep the luminance of ``consistent``.
        eps: keeps the weights finite where neither has high frequencies.
        transform: see :func:`low_pass`.

    Returns:
        float32 ``[B, 3, H, W]``, 0 to 1.
    """
    calm, sharp = to_yuv(consistent.float()), to_yuv(sharp.float())
    base, detailed = calm[:, :1], sharp[:, :1]
    gain = butterworth(*base.shape[-2:], cutoff=cutoff, order=order, grid=grid)
    low = low_pass(base, gain, transform=transform)
    high = base - low
    other = detailed - low_pass(detailed, gain, transform=transform)
    share = other.abs() / (other.abs() + high.abs() + eps)
    fused = low + alpha * (share * other + (1 - share) * high)
    inner = _within(base.shape[-2], base.shape[-1], border).to(base.device)
    luminance = torch.where(inner, fused, base)
    return to_rgb(torch.cat([luminance, calm[:, 1:]], 1)).clamp(0, 1)


def _within(height: int, width: int, border: int) -> Tensor:
    """Which pixels lie further than ``border`` from all edges: bool ``[height, width]``."""

    def axis(size: int) -> Tensor:
        places = torch.arange(size)
        return (places >= border) & (places < size - border)

    return axis(height)[:, None] & axis(width)
