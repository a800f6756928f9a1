"""DUET-VLM: merge by attention in the vision encoder, then drop in the language model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import OptionError
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.ranked import Groups, RankedMerge, rank, spread
from vlmopt.pipeline.options import option, override
from vlmopt.pipeline.passes import PassContext, PassResult
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class DuetEncoder(RankedMerge):
    """First stage: dominant tokens, and anchors among those that come next by attention.

    ``keep`` holds two shares or counts: of dominant tokens, and of anchors. The next ``width``
    times as many tokens as there are anchors form the pool; every n-th of them by rank is an
    anchor, the others are its members, and what is not in the pool is dropped.
    """

    name = "duet-vlm"

    width: int = 4

    def cuts(self) -> list[tuple[int, float | int]]:
        return [(0, self.keep[0])]

    def quota(self, count: int, keep: float | int) -> int:
        dominant, anchors = (super(DuetEncoder, self).quota(count, share) for share in self.keep)
        return min(dominant + anchors, count)

    def _quotas(self, count: Tensor, keep: float | int) -> Tensor:
        dominant, anchors = (super(DuetEncoder, self)._quotas(count, share) for share in self.keep)
        return torch.minimum(dominant + anchors, count)

    def groups(self, attention: Tensor, valid: Tensor, present: Tensor) -> Groups:
        dominant = super()._quotas(present, self.keep[0])
        anchors = self._quotas(present, 0) - dominant
        place = rank(attention, valid)
        number = place - dominant
        size = torch.minimum((self.width * anchors).clamp(min=1), present - dominant)
        pool = valid & (number >= 0) & (number < size)
        taking = spread(number, pool, anchors)
        return Groups(valid & (number < 0), taking, pool & ~taking)

    def order(self, attention: Tensor, valid: Tensor) -> Tensor:
        return rank(attention, valid)


@dataclass(frozen=True, kw_only=True)
class DuetVlm(TokenDrop):
    """Merge visual tokens by attention in the encoder, then drop by that of the instruction.

    First stage, where ``dominant`` is above 0: the tokens that get most attention in the vision
    encoder stay, and ``context`` further ones take in those that come next. Second stage: at the
    entry of each chosen layer ``k``, a token's score is the attention that it would get in
    layer ``k`` from the text after the image, mean over heads and over that text. Its shares are of
    the visual tokens that the first stage leaves, and 0 drops all. Positions are renumbered, as in
    the official LLaVA code, except where they have several axes.

    Reference: "DUET-VLM: Dual stage Unified Efficient Token reduction for VLM Training and
    Inference", arXiv 2602.18846.
    """

    name = "duet-vlm"
    example = "duet-vlm{dominant=0.65 context=0.05 layers=16,24 keep=0.5,0}"
    reference = "arXiv 2602.18846"
    reads = ("instruction_attention_ahead",)
    least = 0

    layers: tuple[int, ...] = override(TokenDrop, "layers", (16, 24))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.5, 0.0))
    of: str = override(TokenDrop, "of", "original")
    positions: str = override(TokenDrop, "positions", "auto")
    dominant: float | int = option(
        0, "first stage: tokens that stay as they are, a share or a count; 0: no first stage", ge=0
    )
    context: float | int = option(
        0.05, "first stage: tokens that take in others, a share or a count", ge=0
    )
    width: int = option(4, "first stage: tokens of the pool for each that takes in others", ge=1)

    contexts: str = override(RankedMerge, "contexts", "own")

    @property
    def encoder(self) -> DuetEncoder:
        """The first stage."""
        return DuetEncoder(
            keep=(self.dominant, self.context),
            width=self.width,
            positions=self.positions,
            contexts=self.contexts,
        )

    def requires(self, program: Program) -> None:
        if self.dominant:
            if 0 in self.layers:
                raise OptionError(
                    f"{self.name}: both stages would cut at layer 0",
                    hint="choose layers from 1 on, or dominant=0",
                )
            self.encoder.requires(program)
        super().requires(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        first = self.encoder.run(program, ctx) if self.dominant else PassResult(False, 0, {})
        second = super().run(program, ctx)
        counted = {
            key: value + first.statistics.get(key, 0) for key, value in second.statistics.items()
        }
        return PassResult(first.changed or second.changed, first.matches + second.matches, counted)

    def quota(self, count: int, keep: float | int) -> int:
        entering = self.encoder.quota(count, 0) if self.dominant else count
        return super().quota(entering, keep)

    def _quotas(self, count: Tensor, keep: float | int) -> Tensor:
        entering = self.encoder._quotas(count, 0) if self.dominant else count
        return super()._quotas(entering, keep)

    @staticmethod
    def score(instruction_attention_ahead: Tensor) -> Tensor:  # type: ignore[override]
        """The attention itself.

        Args:
            instruction_attention_ahead: float32 ``[batch, tokens]``.
        """
        return instruction_attention_ahead
