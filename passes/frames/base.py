"""What methods share that keep tokens of a prompt's frames."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class FrameDrop(TokenDrop):
    """Base of the methods for prompts whose visual tokens are frames, one after the other.

    A frame is what ``frames`` divides the visual tokens into: an image, or a step in time of a
    video, which in some models holds two pictures.
    """

    family = "frames"
    reads: ClassVar[tuple[str, ...]] = ("hidden", "valid")
    compact = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    frames: int = option(1, "frames of a prompt, with equally many visual tokens", ge=1)

    def quotas(self, program: Program, counts: Sequence[int], keep: float | int) -> list[int]:
        if len(set(counts)) > 1:
            raise PreconditionError(
                f"{self.name}: the prompts of this batch have {', '.join(map(str, counts))} visual "
                "tokens, which are not as many frames each",
                hint="batch prompts with equally many frames",
            )
        if counts[0] % self.frames:
            raise PreconditionError(
                f"{self.name}: {counts[0]} visual tokens are not {self.frames} frames of the same "
                "size",
                hint="set frames to the images, or the steps in time of the video, of a prompt",
            )
        return super().quotas(program, counts, keep)

    def by_frame(self, hidden: Tensor) -> Tensor:
        """``[batch, visual tokens, width]`` as ``[batch, frames, tokens of a frame, width]``."""
        return hidden.unflatten(1, (self.frames, -1))
