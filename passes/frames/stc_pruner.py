"""STC-Pruner: the most novel tokens of each frame, against that frame and all before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmopt.passes.frames import novelty
from vlmopt.passes.frames.base import FrameDrop, Memory
from vlmopt.pipeline.options import option, override


@dataclass(frozen=True, kw_only=True)
class StcPruner(FrameDrop):
    """Keep of each frame the tokens that are most novel to the frame and to what came before.

    What came before is the mean of the frames' means, of channels that vary little; the frames of a
    prompt are one stream, each a chunk of its own. No frame looks ahead, and all keep as many
    tokens.

    Reference: "Accelerating Streaming Video Large Language Models via Hierarchical Token
    Compression", CVPR 2026, arXiv 2512.00891.
    """

    name = "stc-pruner"
    example = "stc-pruner{frames=8 keep=0.3}"
    reference = "arXiv 2512.00891"

    keep: tuple[float | int, ...] = override(FrameDrop, "keep", (0.3,))
    positions: str = override(FrameDrop, "positions", "auto")
    strategy: str = option(
        "gaussian",
        "novelty by Gaussian kernels, as in the official code, or by cosine, as in the paper",
        choices=novelty.STRATEGIES,
    )
    alpha: float = option(0.5, "of dual_anchor: weight of the past against the frame", ge=0, le=1)
    window: int = option(8, "of dual_anchor: frames that are the past, this one included", ge=1)
    channels: float = option(0.5, "share of the channels that are compared", gt=0, le=1)
    strict_original: bool = option(
        False, "choose channels anew for each frame, and add up means of different ones"
    )

    def quota(self, count: int, keep: float | int) -> int:
        size = count // self.frames
        each = super().quota(size, keep) if keep <= 1 else min(int(keep) // self.frames, size)
        return self.frames * max(each, 1)

    def empty(self, size: int, width: int) -> Memory:
        return vars(self._empty(width))

    def watch(self, frames: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """1 for the tokens that stay; see :meth:`choose`."""
        before = self._empty(frames.shape[-1], frames.device)
        if memory is not None:
            before = novelty.Memory(**memory)
        found = [self.choose(stream, before) for stream in frames.unbind(0)]
        return torch.stack([stays for stays, _ in found]), vars(found[0][1])

    def choose(self, frames: Tensor, memory: novelty.Memory) -> tuple[Tensor, novelty.Memory]:
        """The tokens that stay of a stream's next frames, one after the other.

        Args:
            frames: ``[frames, tokens of a frame, width]``.
            memory: of what came before.

        Returns:
            float32 ``[frames, tokens of a frame]``, 1 for those that stay; the memory then.
        """
        each = self.quota(frames.shape[0] * frames.shape[1], self.keep[0]) // self.frames
        memory = novelty.started(memory, frames[:1])
        found = []
        for frame in frames.split(1):
            memory = novelty.remember(memory, frame, strict_original=self.strict_original)
            chosen = novelty.newest(frame, memory, each, strategy=self.strategy, alpha=self.alpha)
            zeros = torch.zeros(frame.shape[:2], device=frame.device)
            found.append(zeros.scatter(1, chosen, 1.0))
        return torch.cat(found), memory

    def _empty(self, width: int, device: Any = None) -> novelty.Memory:
        return novelty.Memory.empty(width, ratio=self.channels, window=self.window, device=device)
