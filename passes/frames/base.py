"""What methods share that keep tokens of a prompt's frames."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor, fx

from vlmopt.errors import PreconditionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.program import Modality, Port, Program, Role
from vlmopt.rewrite.values import CutValues

Memory = Mapping[str, Tensor]
"""What a stream remembers, by name. Its size does not grow."""


@dataclass(frozen=True, kw_only=True)
class FrameDrop(TokenDrop):
    """Base of the methods for prompts whose visual tokens are frames, one after the other.

    A frame is what ``frames`` divides the visual tokens into: an image, or a step in time of a
    video, which in some models holds two pictures.
    """

    family = "frames"
    reads: ClassVar[tuple[str, ...]] = ("watched",)

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    frames: int = option(1, "frames of a prompt, with equally many visual tokens", ge=1)
    carry: bool = option(
        False, "remember from prompt to prompt, as streams need: a state that the stage gives back"
    )

    @abstractmethod
    def empty(self, size: int, width: int) -> Memory:
        """What a stream remembers before its first frame: zeros.

        Args:
            size: tokens of a frame; ``width``: of each.
        """

    @abstractmethod
    def watch(self, frames: Tensor, memory: Memory | None) -> tuple[Tensor, Memory]:
        """Which tokens of the next frames stay.

        Args:
            frames: ``[batch, frames, tokens of a frame, width]``, a stream each.
            memory: of what came before, if anything did; of a batch of one.

        Returns:
            Scores, float32 ``[batch, frames, tokens of a frame]``: the highest stay; and the memory
            of the first stream then.
        """

    def quotas(self, program: Program, counts: Sequence[int], keep: float | int) -> list[int]:
        if self.carry and len(counts) > 1:
            raise PreconditionError(
                f"{self.name} with carry: a batch of {len(counts)} prompts is no stream",
                hint="capture a batch of one",
            )
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

    @staticmethod
    def score(watched: Tensor) -> Tensor:  # type: ignore[override]
        """What :meth:`watch` said, float32 ``[batch, tokens]``."""
        return watched

    def read(self, values: CutValues, name: str) -> fx.Node:
        hidden, stage = values["hidden"], values.stage
        count = max(values.visual)
        empty = self.empty(count // self.frames, hidden.meta["val"].shape[-1]) if self.carry else {}
        ports = [Port(f"memory_{name}", Role.STREAM_MEMORY) for name in empty]
        before = [
            stage.add_input(port, *value.shape, dtype=value.dtype)
            for port, value in zip(ports, empty.values(), strict=True)
        ]
        watch = partial(self._watch, names=tuple(empty), count=count)
        scores, *after = values.emit.trace(watch, hidden, values.modality, *before)
        for port, node in zip(ports, after, strict=True):
            stage.add_output(port, node)
        return scores  # type: ignore[no-any-return]

    def _watch(
        self,
        hidden: Tensor,
        modality: Tensor,
        *state: Tensor,
        names: tuple[str, ...],
        count: int,
    ) -> tuple[Tensor, ...]:
        """The score of each token of a prompt, and with ``state`` what it is then."""
        visual = modality == Modality.VISION
        slots, _ = select.visual_slots(visual, count)
        memory = dict(zip(names, state, strict=True)) if state else None
        scores, after = self.watch(self.by_frame(select.take(hidden, slots)), memory)
        return select.put(scores.flatten(1), slots, visual), *(after[name] for name in names)
