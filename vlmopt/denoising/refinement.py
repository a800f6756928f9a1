"""One step of a strong flow model, and a few of a cheap draft that is fed the first one's features.

The loop of "PS-SR: Pseudo-Single-Step Video Super-Resolution via Speculative Diffusion" (CVPR
2026). Nothing is verified: the base never checks what the draft made of its step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from vlmopt.denoising.frequency import fuse
from vlmopt.errors import OptionError

Base = Callable[[Tensor, Tensor], tuple[Tensor, Sequence[Tensor]]]
"""``(latents [B, channels, ...], timesteps [B]) -> (velocity, features)``."""
Drafted = Callable[[Tensor, Tensor, Sequence[Tensor]], Tensor]
"""``(latents, timesteps, features) -> velocity``."""
Sigma = Callable[[float], float]
"""Noise level of a timestep, 0 to 1."""


@dataclass(frozen=True)
class Call:
    """One call of a model.

    Attributes:
        model: which.
        at, to: timesteps before and after; 0 is clean.
    """

    model: Literal["base", "draft"]
    at: float
    to: float


PS_SR = (
    Call("base", 699, 599),
    Call("draft", 599, 499),
    Call("draft", 499, 399),
    Call("draft", 399, 0),
)
"""The published schedule."""


def table_sigma(steps: int = 1000, shift: float = 1.0) -> Sigma:
    """Of the nearest entry of a flow's table of timesteps; 0 at timestep 0.

    Args:
        steps: of the table, from noise level 1 on down.
        shift: of the flow; 1 for none.
    """
    levels = torch.linspace(1, 0, steps + 1, dtype=torch.float64)[:-1]
    levels = shift * levels / (1 + (shift - 1) * levels)

    def sigma(timestep: float) -> float:
        if not timestep:
            return 0.0
        return float(levels[(levels * steps - timestep).abs().argmin()])

    return sigma


def clean_estimate(latents: Tensor, velocity: Tensor, sigma: float) -> Tensor:
    """Where a straight flow from here ends."""
    return latents - sigma * velocity


def moved(latents: Tensor, velocity: Tensor, sigma: float, following: float) -> Tensor:
    """Along a straight flow, from one noise level to the following one."""
    return latents - (sigma - following) * velocity


@torch.no_grad()
def clean_estimates(
    base: Base,
    draft: Drafted,
    start: Tensor,
    *,
    schedule: Sequence[Call] = PS_SR,
    sigma: Sigma | None = None,
) -> list[Tensor]:
    """What each call says the clean latents are.

    Models see the current latents and those of the start, side by side. Features are those of the
    last call of the base.

    Args:
        start: latents of the degraded images, ``[B, channels, ...]``.
        sigma: by default :func:`table_sigma`.

    Returns:
        As many tensors as calls, like ``start``.

    Raises:
        OptionError: the draft is called before the base, or a call does not begin where the one
            before it ended.
    """
    sigma = table_sigma() if sigma is None else sigma
    _check(schedule)
    latents, found = start, []
    features: Sequence[Tensor] = ()
    for call in schedule:
        given = torch.cat([latents, start], 1)
        timesteps = torch.full((len(start),), float(call.at), device=start.device)
        if call.model == "base":
            velocity, features = base(given, timesteps)
        else:
            velocity = draft(given, timesteps, features)
        level = sigma(call.at)
        found.append(clean_estimate(latents, velocity, level))
        latents = moved(latents, velocity, level, sigma(call.to))
    return found


def _check(schedule: Sequence[Call]) -> None:
    if not schedule or schedule[0].model != "base":
        raise OptionError("a schedule begins with the base: drafts need its features")
    for before, after in pairwise(schedule):
        if before.to != after.at:
            raise OptionError(
                f"a call ends at timestep {before.to}, and the next begins at {after.at}"
            )


def fuse_estimates(
    schedule: Sequence[Call],
    estimates: Sequence[Tensor],
    decode: Callable[[Tensor], Tensor],
    *,
    fdu: Literal["once", "each"] = "once",
    alpha: float = 0.6,
) -> Tensor:
    """Images of the base with high frequencies of the draft.

    Args:
        estimates: see :func:`clean_estimates`.
        decode: latents to RGB, ``[B, 3, H, W]`` or ``[B, 3, frames, H, W]``, 0 to 1; with ``once``
            called for the last call of each model only.
        fdu: ``once``, as in the official code: of the last call of the base and that of the draft.
            ``each``, as in the paper: after every call of the draft, on what was made so far.
        alpha: see :func:`~vlmopt.denoising.frequency.fuse`.

    Returns:
        float32, like the decoded images.

    Raises:
        OptionError: another ``fdu``; no call of the draft.
    """
    if fdu not in ("once", "each"):
        raise OptionError(f"fdu is once or each, not {fdu}")
    at = max(place for place, call in enumerate(schedule) if call.model == "base")
    drafted = estimates[at + 1 :]
    if not drafted:
        raise OptionError("no call of the draft follows that of the base: nothing can be fused")
    images = decode(estimates[at]).float()
    for estimate in drafted if fdu == "each" else drafted[-1:]:
        sharp = decode(estimate).float()
        images = _unfold(fuse(_fold(images), _fold(sharp), alpha=alpha), images)
    return images


def _fold(images: Tensor) -> Tensor:
    """Frames of videos become images."""
    return images if images.ndim == 4 else images.transpose(1, 2).flatten(0, 1)


def _unfold(images: Tensor, like: Tensor) -> Tensor:
    if like.ndim == 4:
        return images
    return images.unflatten(0, (like.shape[0], like.shape[2])).transpose(1, 2)
