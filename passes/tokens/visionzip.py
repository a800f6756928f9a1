"""VisionZip: keep what the vision encoder attends to, merge the rest into a few tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.ranked import Groups, RankedMerge, rank, spread
from vlmopt.pipeline.options import option, override


@dataclass(frozen=True, kw_only=True)
class VisionZip(RankedMerge):
    """Keep the dominant visual tokens, and some that each take in the others most similar to it.

    Dominant are the tokens that get most attention in the vision encoder: from its class token, or
    from all patches where there is none. Of the others every n-th stays, and to each of these the
    mean of the rest most similar to it by keys is added. All images of a sample share one budget.

    Reference: "VisionZip: Longer is Better but Not Necessary in Vision Language Models",
    arXiv 2412.04467.
    """

    name = "visionzip"
    example = "visionzip{keep=64}"
    reference = "arXiv 2412.04467"

    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.11,))
    positions: str = override(TokenDrop, "positions", "auto")
    context: float = option(0.16, "share of the tokens that stay which take in others", ge=0, le=1)

    def groups(self, attention: Tensor, valid: Tensor, present: Tensor) -> Groups:
        quota = self._quotas(present, self.keep[0])
        anchors = torch.floor(quota * self.context + 0.5).long()
        dominant = valid & (rank(attention, valid) < quota - anchors)
        others = valid & ~dominant
        taking = spread(select.ordinal(others), others, anchors)
        return Groups(dominant, taking, others & ~taking)
