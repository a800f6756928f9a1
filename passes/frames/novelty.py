"""Which tokens of a frame are new to a stream: scores against a frame's mean and a memory.

Pure functions of "Accelerating Streaming Video Large Language Models via Hierarchical Token
Compression", arXiv 2512.00891. The official code keeps a growing list of chunk means; their sum and
number say the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

STRATEGIES = ("gaussian", "dual_anchor")

_SCALES = (0.125, 0.25, 0.5, 1.0, 2.0)
"""Variances of the Gaussian kernels whose sum is a similarity."""


@dataclass(frozen=True)
class Memory:
    """What one stream has shown so far. Its size does not grow.

    Attributes:
        channels: int64 ``[kept]``, the channels that tokens are compared on.
        total: float32 ``[kept]``, sum of the means of all chunks.
        chunks: int64 scalar, number of chunks.
        recent: float32 ``[window, kept]``, means of the last frames, the latest last.
        frames: int64 scalar, number of frames, of which ``recent`` holds the last ones.
    """

    channels: Tensor
    total: Tensor
    chunks: Tensor
    recent: Tensor
    frames: Tensor

    @classmethod
    def empty(
        cls, width: int, *, ratio: float = 0.5, window: int = 8, device: Any = None
    ) -> Memory:
        """What a stream remembers before its first chunk.

        Args:
            width: channels of a token.
            ratio: share of them that is compared.
            window: frames whose means ``recent`` holds.
        """
        kept = max(1, math.floor(width * Fraction(str(ratio))))
        zeros = torch.zeros(kept, device=device)
        none = torch.zeros((), dtype=torch.int64, device=device)
        return cls(zeros.long(), zeros, none, zeros.expand(window, kept), none)


def steady_channels(features: Tensor, count: int) -> Tensor:
    """The channels of lowest variance (population) over all tokens of a chunk, lowest first.

    Args:
        features: ``[frames, tokens, width]``.

    Returns:
        int64 ``[count]``; of equal ones, those in front.
    """
    variance = features.float().flatten(0, -2).var(0, correction=0)
    return variance.sort(stable=True).indices[:count]


def started(memory: Memory, features: Tensor) -> Memory:
    """The memory, with channels chosen by the first chunk of a stream, if this is it.

    Args:
        features: ``[frames, tokens, width]``, the next chunk.
    """
    steady = steady_channels(features, len(memory.channels))
    return replace(memory, channels=torch.where(memory.chunks == 0, steady, memory.channels))


def remember(memory: Memory, features: Tensor, *, strict_original: bool = False) -> Memory:
    """The memory with one more chunk.

    Args:
        memory: :func:`started`.
        features: ``[frames, tokens, width]``.
        strict_original: choose channels anew for each chunk, as the official code does: means of
            different channels are then added up.
    """
    channels = memory.channels
    if strict_original:
        channels = steady_channels(features, len(channels))
    means = features[..., channels].float().mean(1)
    recent = torch.cat([memory.recent, means])[-len(memory.recent) :]
    return replace(
        memory,
        channels=channels,
        total=memory.total + means.mean(0),
        chunks=memory.chunks + 1,
        recent=recent,
        frames=memory.frames + len(means),
    )


def gaussian_similarity(features: Tensor, memory: Memory) -> Tensor:
    """How much tokens resemble the memory and the mean of their frame.

    Args:
        features: ``[frames, tokens, width]``, whose chunk ``memory`` holds already.

    Returns:
        float32 ``[frames, tokens]``, low for what is new.
    """
    rows = F.normalize(features[..., memory.channels].float(), dim=-1)
    frame = rows.mean(1, keepdim=True)  # not scaled to length one again
    past = F.normalize(memory.total / memory.chunks, dim=-1)
    return _kernels(rows, past) + _kernels(rows, frame)


def dual_anchor_novelty(features: Tensor, memory: Memory, alpha: float) -> Tensor:
    """How far tokens are from the last frames' mean and from that of their own frame.

    Args:
        features: ``[frames, tokens, width]``, whose chunk ``memory`` holds already.
        alpha: weight of the last frames, from 0 to 1.

    Returns:
        float32 ``[frames, tokens]``, high for what is new.
    """
    rows = features[..., memory.channels].float()
    present = memory.frames.clamp(max=len(memory.recent))
    past = memory.recent.sum(0) / present
    far = 1 - F.cosine_similarity(rows, past, dim=-1)
    different = 1 - F.cosine_similarity(rows, rows.mean(1, keepdim=True), dim=-1)
    return alpha * far + (1 - alpha) * different


def newest(
    features: Tensor, memory: Memory, count: int, *, strategy: str, alpha: float = 0.5
) -> Tensor:
    """The ``count`` tokens of each frame that are most novel; of equal ones, those in front.

    Args:
        features: ``[frames, tokens, width]``, whose chunk ``memory`` holds already.
        strategy: one of :data:`STRATEGIES`.

    Returns:
        int64 ``[frames, count]``, ascending.
    """
    if strategy == "gaussian":
        order = gaussian_similarity(features, memory).sort(dim=-1, stable=True).indices
    else:
        novelty = dual_anchor_novelty(features, memory, alpha)
        order = novelty.sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(dim=-1).values


def _kernels(rows: Tensor, anchor: Tensor) -> Tensor:
    distance = (rows - anchor).square().sum(-1)
    return torch.stack([torch.exp(-distance / (2 * scale)) for scale in _SCALES]).sum(0)
