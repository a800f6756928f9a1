"""EVS: tokens of a video that differ from what stood at their place one frame before."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmopt.passes.frames.base import FrameDrop, Memory
from vlmopt.pipeline.options import override

_GOLDEN = 0.6180339887498949
"""Steps of this length around a circle come near none of the points before."""


@dataclass(frozen=True, kw_only=True)
class EfficientVideoSampling(FrameDrop):
    """Keep the first frame, and of the others the tokens that changed most since the frame before.

    Change is the cosine distance of embeddings to the token at the same place one frame earlier;
    all frames of a prompt compete. Never fewer tokens stay than a frame has. With ``carry`` the
    first frame of a prompt is compared with the last one of the prompt before, and ``keep`` alone
    says how many stay: of the first frame of a stream, where it does not fit, tokens far apart.

    Reference: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM
    Inference", arXiv 2510.14624. The paper compares pixels; inference engines that ship the method
    compare embeddings, as here.
    """

    name = "evs"
    example = "evs{frames=8 keep=0.25}"
    reference = "arXiv 2510.14624"

    keep: tuple[float | int, ...] = override(FrameDrop, "keep", (0.25,))

    def quota(self, count: int, keep: float | int) -> int:
        wanted = super().quota(count, keep)
        return wanted if self.carry else max(count // self.frames, wanted)

    def empty(self, size: int, width: int) -> Memory:
        return {
            "frame": torch.zeros(size, width),
            "frames": torch.zeros((), dtype=torch.int64),
        }

    def watch(self, frames: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Change since the frame before; more than any change in the first frame."""
        rows = F.normalize(frames.float(), dim=-1)
        change = 1 - (rows[:, 1:] * rows[:, :-1]).sum(-1)
        place = torch.arange(rows.shape[2], device=rows.device)
        first = (3 + (place * _GOLDEN).frac()).expand_as(rows[:, :1, :, 0])
        if memory is None:
            return torch.cat([first, change], dim=1), {}
        since = 1 - (rows[:, :1] * memory["frame"]).sum(-1)
        first = torch.where(memory["frames"] > 0, since, first)
        after = {"frame": rows[0, -1], "frames": memory["frames"] + self.frames}
        return torch.cat([first, change], dim=1), after
