"""Clips of real pictures in motion, of whose patches a known share stands still.

The pictures are photographs that scikit-image and scikit-learn ship. In a clip some patches show
one of them panned, zoomed, or with another one passing in front; all others show it as it is, and
are the same in each frame.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vlmopt.errors import OptionError, PreconditionError

Motion = Literal["move", "scale", "occlude"]
MOTIONS: tuple[Motion, ...] = get_args(Motion)
"""The picture moves; it comes nearer and goes away again, from side to side; or it moves, and a
second one passes in front of it."""

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9)
"""Shares of patches that stand still, to measure with."""

SCIKIT_LEARN = ("china", "flower")
SCIKIT_IMAGE = ("astronaut", "chelsea", "coffee", "rocket")
PHOTOGRAPHS = SCIKIT_LEARN + SCIKIT_IMAGE
"""Names of photographs, all in colour; see :func:`photograph`."""

MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
"""Of each colour, as CLIP's processor has them."""


@dataclass(frozen=True, eq=False)
class Clip:
    """Frames of which the same patches stand still throughout.

    Attributes:
        frames: uint8 ``[frames, 3, size, size]``.
        moving: bool ``[rows, columns]``, the patches that differ in any two consecutive frames.
        patch: side of a patch in pixels.
    """

    frames: Tensor
    moving: Tensor
    patch: int

    @property
    def static(self) -> Fraction:
        """Share of patches that are the same in all frames."""
        return 1 - Fraction(int(self.moving.sum()), self.moving.numel())

    def pixels(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The frames as an encoder takes them, see :func:`normalised`."""
        return normalised(self.frames, dtype)


def normalised(frames: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels 0 to 255 as what CLIP's processor makes of them, ``[..., 3, height, width]``."""
    mean, std = (torch.tensor(value)[:, None, None] for value in (MEAN, STD))
    return ((frames.float() / 255 - mean) / std).to(dtype)


def photograph(name: str) -> Tensor:
    """One of :data:`PHOTOGRAPHS`, uint8 ``[3, height, width]``; nothing is downloaded.

    Raises:
        OptionError: there is none of that name.
        PreconditionError: the package that ships it is not installed.
    """
    if name not in PHOTOGRAPHS:
        raise OptionError(
            f"there is no photograph {name!r}", hint=f"choose one of {', '.join(PHOTOGRAPHS)}"
        )
    package = "scikit-learn" if name in SCIKIT_LEARN else "scikit-image"
    try:
        found = _of_scikit_learn(name) if name in SCIKIT_LEARN else _of_scikit_image(name)
    except ImportError as error:
        raise PreconditionError(
            f"the photograph {name!r} comes with {package}, which cannot be imported: {error}",
            hint=f"pip install {package}, or 'vlmopt[photographs]' for all of them",
        ) from error
    return torch.from_numpy(np.array(found)).permute(2, 0, 1).contiguous()


def _of_scikit_learn(name: str) -> Any:
    from sklearn.datasets import load_sample_image

    return load_sample_image(f"{name}.jpg")


def _of_scikit_image(name: str) -> Any:
    from skimage import data

    return getattr(data, name)()


def make_clip(
    count: int,
    *,
    size: int = 224,
    patch: int = 14,
    static: float = 0.5,
    motion: Motion = "move",
    photographs: Sequence[str] = SCIKIT_LEARN,
    seed: int = 0,
) -> Clip:
    """A clip of a photograph in motion.

    Args:
        count: frames.
        size: height and width in pixels, a multiple of ``patch``.
        static: share of patches that stand still; the nearest number of patches is taken. The
            others are those nearest to some point.
        motion: of :data:`MOTIONS`.
        photographs: the one that is seen, and the one that passes in front.
        seed: of where things move, and how; the same seed gives the same clip.

    Raises:
        OptionError: sizes or shares that cannot be.
        PreconditionError: see :func:`photograph`; or part of a photograph is so even that one
            cannot see it move.
    """
    if size % patch or not 0 <= static <= 1 or motion not in MOTIONS or count < 1:
        raise OptionError(
            f"no clip has {count} frames of {size} pixels in patches of {patch}, {static} of them "
            f"static, and motion {motion!r}",
            hint=f"the size is a multiple of patch, static 0 to 1, motion of {', '.join(MOTIONS)}",
        )
    generator = torch.Generator().manual_seed(seed)
    behind, before = (_at_least(photograph(photographs[at]), 2 * size) for at in (0, -1))
    moving = _moving_patches(size // patch, static, generator)
    mask = moving.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
    start = float(torch.rand((), generator=generator)) * math.tau
    still = _crop(behind, size, (0.5, 0.5))
    frames = [
        torch.where(mask, _moved(behind, before, size, motion, start + at * _TURN), still)
        for at in range(count)
    ]
    clip = Clip(torch.stack(frames), moving, patch)
    for at, (one, other) in enumerate(itertools.pairwise(frames)):
        if not same_patches(one, other, patch).logical_not().equal(moving):
            raise PreconditionError(
                f"frames {at} and {at + 1} do not differ in all patches that move: the photograph "
                f"{photographs[0]!r} is too even there",
                hint="choose another seed, larger patches, or another photograph",
            )
    return clip


def same_patches(one: Tensor, other: Tensor, patch: int) -> Tensor:
    """Which patches of two frames ``[3, height, width]`` hold the same pixels.

    Returns:
        bool ``[rows, columns]``.
    """
    differ = (one != other).any(0)
    return ~differ.unfold(0, patch, patch).unfold(1, patch, patch).flatten(2).any(-1)


_TURN = math.tau / 64
"""Motion goes in circles, by so much from frame to frame: it never stops, and never leaves the
photograph."""


def _moving_patches(side: int, static: float, generator: torch.Generator) -> Tensor:
    count = side**2 - round(static * side**2)
    centre = torch.rand(2, generator=generator) * side
    place = torch.arange(side) + 0.5
    distance = (place[:, None] - centre[0]) ** 2 + (place - centre[1]) ** 2
    nearest = distance.flatten().sort(stable=True).indices[:count]
    moving = torch.zeros(side**2, dtype=torch.bool)
    moving[nearest] = True
    return moving.view(side, side)


def _moved(behind: Tensor, before: Tensor, size: int, motion: Motion, turn: float) -> Tensor:
    """The picture at one moment, uint8 ``[3, size, size]``."""
    way = 0.5 + 0.5 * math.sin(turn), 0.5 + 0.5 * math.cos(turn)
    if motion == "scale":
        side = round(size * (1.4 + 0.5 * math.sin(turn)))
        return _resized(_crop(behind, side, (0.5, way[1])), size)
    picture = _crop(behind, size, way)
    if motion == "occlude":
        part = size // 2
        top, left = (round((size - part) * (1 - at)) for at in way)
        picture = picture.clone()
        picture[:, top : top + part, left : left + part] = _resized(
            _crop(before, size, (0.5, 0.5)), part
        )
    return picture


def _crop(picture: Tensor, size: int, way: tuple[float, float]) -> Tensor:
    """A square of it, ``way`` along what there is to go down and to the right."""
    top, left = (
        round((length - size) * part) for length, part in zip(picture.shape[1:], way, strict=True)
    )
    return picture[:, top : top + size, left : left + size]


def _at_least(picture: Tensor, size: int) -> Tensor:
    """The picture, enlarged or reduced so that its shorter side has ``size`` pixels."""
    factor = size / min(picture.shape[1:])
    height, width = (max(size, round(length * factor)) for length in picture.shape[1:])
    return _interpolated(picture, (height, width))


def _resized(picture: Tensor, size: int) -> Tensor:
    return _interpolated(picture, (size, size))


def _interpolated(picture: Tensor, shape: tuple[int, int]) -> Tensor:
    made = F.interpolate(
        picture[None].float(), size=shape, mode="bilinear", align_corners=False, antialias=True
    )[0]
    return made.round().clamp(0, 255).to(torch.uint8)
