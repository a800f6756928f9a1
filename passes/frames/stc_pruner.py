"""STC-Pruner: the most novel tokens of each frame, against that frame and all before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.passes.frames import novelty
from vlmopt.passes.frames.base import FrameDrop
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

    def score(self, hidden: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """1 for the tokens that stay.

        Args:
            hidden: ``[batch, visual tokens, width]``.
            valid: bool ``[batch, visual tokens]``.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        each = self.quota(hidden.shape[1], self.keep[0]) // self.frames
        streams = self.by_frame(hidden).unbind(0)
        return torch.stack([self._of_stream(frames, each) for frames in streams])

    def _of_stream(self, frames: Tensor, each: int) -> Tensor:
        memory = None
        found = []
        for frame in frames.split(1):
            memory = novelty.remember(
                memory,
                frame,
                ratio=self.channels,
                window=self.window,
                strict_original=self.strict_original,
            )
            chosen = novelty.newest(frame, memory, each, strategy=self.strategy, alpha=self.alpha)
            zeros = torch.zeros(frame.shape[:2], device=frame.device)
            found.append(zeros.scatter(1, chosen, 1.0))
        return torch.cat(found).flatten()
