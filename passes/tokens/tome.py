"""ToMe: merge the most similar tokens of two alternating sets, in every block of an encoder."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import OptionError
from vlmopt.passes.tokens.merge import Match, bipartite_match
from vlmopt.passes.tokens.vit import MergePoint, TokenMerge
from vlmopt.pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class ToMe(TokenMerge):
    """Merge the ``r`` most similar pairs of tokens in each block of a vision transformer.

    Tokens at even places are compared with those at odd ones, by the cosine of their keys (mean
    over heads); each merged token is the mean of the patches that it stands for. Never more than
    half of the tokens go in one block. The order of tokens is that of the official code where an
    encoder has a class token, with or without one: even ones left, then odd ones.

    Reference: "Token Merging: Your ViT But Faster", arXiv 2210.09461.
    """

    name = "tome"
    example = "tome{r=8}"
    reference = "arXiv 2210.09461"

    r: tuple[int, ...] = option(
        (8,), "tokens merged in a block: one number, or one for each block", ge=0, min_items=1
    )
    inflect: float = option(
        0.0,
        "how r changes: -1 falls from 2r to 0 over the blocks, 1 rises so, 0 is constant",
        ge=-1,
        le=1,
    )
    layers: tuple[int, ...] = option(
        (), "blocks that merge, counted from 0; empty for all", ge=0, increasing=True
    )

    def blocks(self, depth: int) -> tuple[int, ...]:
        return self.layers or tuple(range(depth))

    def most(self, patches: int) -> int:
        return patches // 2

    def wanted(self, patches: int, blocks: int) -> list[int]:
        if len(self.r) == blocks and blocks > 1:
            return list(self.r)
        if len(self.r) != 1:
            raise OptionError(
                f"{self.name}: option r has {len(self.r)} values for {blocks} blocks",
                hint="give one value, or one per block",
            )
        first = int(self.r[0] * (1.0 - self.inflect))
        step = (2 * self.r[0] - 2 * first) / max(1, blocks - 1)
        return [int(first + step * at) for at in range(blocks)]

    def match(self, at: MergePoint) -> tuple[Match, Tensor]:
        place = torch.arange(at.tokens.shape[1], device=at.tokens.device)
        special = (place < at.special).expand(at.size.shape)
        match = bipartite_match(at.key.float().mean(1), at.count, special)
        # the even ones left, then the odd ones: the next block pairs them by place
        group = torch.where(match.kept < at.special, 0, 1 + match.kept % 2)
        order = torch.sort(group, dim=-1, stable=True).indices
        return match._replace(kept=match.kept.gather(1, order)), at.size
