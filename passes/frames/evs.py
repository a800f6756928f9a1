"""EVS: tokens of a video that differ from what stood at their place one frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmopt.passes.frames.base import FrameDrop
from vlmopt.pipeline.options import override


@dataclass(frozen=True, kw_only=True)
class EfficientVideoSampling(FrameDrop):
    """Keep the first frame, and of the others the tokens that changed most since the frame before.

    Change is the cosine distance of embeddings to the token at the same place one frame earlier;
    all frames compete. Never fewer tokens stay than a frame has.

    Reference: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM
    Inference", arXiv 2510.14624. The paper compares pixels; inference engines that ship the method
    compare embeddings, as here.
    """

    name = "evs"
    example = "evs{frames=8 keep=0.25}"
    reference = "arXiv 2510.14624"

    keep: tuple[float | int, ...] = override(FrameDrop, "keep", (0.25,))

    def quota(self, count: int, keep: float | int) -> int:
        return max(count // self.frames, super().quota(count, keep))

    def score(self, hidden: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """Change since the frame before, infinite in the first frame.

        Args:
            hidden: ``[batch, visual tokens, width]``.
            valid: bool ``[batch, visual tokens]``.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        rows = F.normalize(self.by_frame(hidden).float(), dim=-1)
        change = 1 - (rows[:, 1:] * rows[:, :-1]).sum(-1)
        first = torch.full_like(rows[:, :1, :, 0], float("inf"))
        return torch.cat([first, change], dim=1).flatten(1)
