"""STC-Pruner: the most novel tokens of each frame, against that frame and all before."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.errors import PreconditionError
from vlmopt.passes.frames import novelty
from vlmopt.passes.frames.base import FrameDrop
from vlmopt.passes.tokens import select
from vlmopt.pipeline.options import option, override
from vlmopt.program import Modality, Port, Program, Role
from vlmopt.rewrite.values import CutValues


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
    reads = ("stays",)
    compact = False

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

    carry: bool = option(
        False, "remember from prompt to prompt, as streams need: a state that the stage gives back"
    )

    def quotas(self, program: Program, counts: Sequence[int], keep: float | int) -> list[int]:
        if self.carry and len(counts) > 1:
            raise PreconditionError(
                f"{self.name} with carry: a batch of {len(counts)} prompts is no stream",
                hint="capture a batch of one",
            )
        return super().quotas(program, counts, keep)

    def read(self, values: CutValues, name: str) -> fx.Node:
        hidden, stage = values["hidden"], values.stage
        empty = vars(self._empty(hidden.meta["val"].shape[-1])) if self.carry else {}
        ports = [Port(f"memory_{name}", Role.STREAM_MEMORY) for name in empty]
        before = [
            stage.add_input(port, *value.shape, dtype=value.dtype)
            for port, value in zip(ports, empty.values(), strict=True)
        ]
        watch = partial(self._watch, count=max(values.visual))
        stays, *after = values.emit.trace(watch, hidden, values.modality, *before)
        for port, node in zip(ports, after, strict=True):
            stage.add_output(port, node)
        return stays  # type: ignore[no-any-return]

    def score(self, stays: Tensor) -> Tensor:  # type: ignore[override]
        """1 for the tokens that stay, float32 ``[batch, tokens]``; see :meth:`choose`."""
        return stays

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

    def _watch(
        self, hidden: Tensor, modality: Tensor, *state: Tensor, count: int
    ) -> tuple[Tensor, ...]:
        """What stays of the visual tokens of each prompt, and with ``state`` what it is then."""
        visual = modality == Modality.VISION
        slots, _ = select.visual_slots(visual, count)
        memory = novelty.Memory(*state) if state else self._empty(hidden.shape[-1], hidden.device)
        streams = self.by_frame(select.take(hidden, slots))
        found = [self.choose(frames, memory) for frames in streams.unbind(0)]
        stays = torch.stack([chosen.flatten() for chosen, _ in found])
        after = vars(found[0][1]).values() if state else ()
        return select.put(stays, slots, visual), *after

    def _empty(self, width: int, device: Any = None) -> novelty.Memory:
        return novelty.Memory.empty(width, ratio=self.channels, window=self.window, device=device)
