"""VisionZip: keep what the vision encoder attends to, merge the rest into a few tokens."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.merge import assigned_merge, nearest
from vlmopt.passes.tokens.ranked import Groups, rank, spread
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program
from vlmopt.rewrite.projector import Projector, projector_before


@dataclass(frozen=True, kw_only=True)
class VisionZip(TokenDrop):
    """Keep the dominant visual tokens, and a few that each take in those similar to it.

    Dominant are the tokens that get most attention in the vision encoder (from its class token, or
    from all patches where there is none). Of the others every n-th stays, and the mean of the rest
    most similar to it by keys is added to it, before the projector where that makes one token of
    each row, else behind it. All images of a sample share one budget. The official code hands the
    class token on as one more visual token; prompts have no place for it, so it is left out.

    Reference: "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    arXiv 2412.04467.
    """

    name = "visionzip"
    example = "visionzip{keep=64}"
    reference = "arXiv 2412.04467"
    reads: tuple[str, ...] = ("encoded_attention", "encoded_keys", "valid", "quota")
    compact = True
    merges = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.11,))
    context: float = option(0.16, "share of the tokens that stay which take in others", ge=0, le=1)

    def projector(self, program: Program, entry: fx.Node) -> Projector | None:
        return projector_before(program, entry)

    def score(self, attention: Tensor, keys: Tensor, valid: Tensor, quota: Tensor) -> Tensor:  # type: ignore[override]
        """2 for dominant tokens, 1 for those that take in others, else 0.

        Args:
            attention: float32 ``[batch, visual tokens]``.
            keys: ``[batch, visual tokens, width]``.
            valid: bool ``[batch, visual tokens]``.
            quota: tokens that stay, int64 ``[batch, 1]``.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        groups = self.groups(attention, valid, quota)
        return 2.0 * groups.dominant + 1.0 * groups.anchors

    def groups(self, attention: Tensor, valid: Tensor, quota: Tensor) -> Groups:
        """Who stays, who takes in others, who is taken in."""
        anchors = self.anchors(quota)
        dominant = valid & (rank(attention, valid) < quota - anchors)
        others = valid & ~dominant
        taking = spread(select.ordinal(others), others, anchors)
        return Groups(dominant, taking, others & ~taking)

    def anchors(self, quota: Tensor) -> Tensor:
        """How many of the tokens that stay take in others, half of one rounded down."""
        share = Fraction(str(self.context))
        top, bottom = share.numerator, share.denominator
        return torch.div(2 * quota * top + bottom - 1, 2 * bottom, rounding_mode="floor")

    def merge(self, tokens: Tensor, score: Tensor, kept: Tensor, *values: Any) -> Tensor:
        """Add to each anchor the mean of its members.

        Args:
            tokens: features, ``[batch, visual tokens, width]``.
            score, kept: of each token.
            values: those of :meth:`score`.
        """
        attention, keys, valid, quota = values
        groups = self.groups(attention, valid, quota)
        target = nearest(keys, groups.anchors)
        place = torch.arange(target.shape[1], device=target.device)
        target = torch.where(groups.members, target, place)
        return assigned_merge(tokens, target, torch.ones_like(attention), "sum")
