"""What all methods that merge tokens inside a vision transformer share.

A method states how many tokens go in each block, and which become one there; rewriting the graph
is up to :mod:`vlmopt.rewrite.merging`.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

import vlmopt.ops  # noqa: F401 - registers vlmopt::attention_rows
from vlmopt.analysis.encoder import Encoder, encoder_stage, find_encoder
from vlmopt.errors import ArtifactError, OptionError, PreconditionError
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.passes.tokens.merge import Match, merge_mean, merge_sum, places
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Program
from vlmopt.rewrite.exits import require_untouched
from vlmopt.rewrite.merging import BlockMerging
from vlmopt.rewrite.tokens import remove_unused


@dataclass(frozen=True)
class MergePoint:
    """What a method may read between the attention and the feed-forward network of a block.

    Attributes:
        tokens: residual stream after attention, ``[batch, tokens, width]``.
        query, key: of the block's attention, ``[batch, heads, tokens, size]``.
        scale: of their products, ``None`` for ``size ** -0.5``.
        size: patches that each token stands for, float32 ``[batch, tokens]``.
        bias: log of ``size`` where attention is in proportion to it, else ``None``.
        carried: what :meth:`TokenMerge.initial` gave, merged as tokens were, float32 ``[batch,
            tokens]``.
        count: tokens to merge.
        special: tokens at the front that are never merged; the class token comes first.
    """

    tokens: Tensor
    query: Tensor
    key: Tensor
    scale: float | None
    size: Tensor
    bias: Tensor | None
    carried: Tensor | None
    count: int
    special: int

    def attention(self) -> Tensor:
        """Attention of the class token to the patches, mean over heads.

        Where there is none, that of all patches, on average.

        Returns:
            float32 ``[batch, patches]``, without gradient.
        """
        query, key = self.query.detach(), self.key.detach()
        mask = None if self.bias is None else self.bias[:, None, None]
        if self.special:
            first = query[:, :, :1]
            rows = torch.ops.vlmopt.attention_rows(first, key, mask, None, self.scale)
        else:
            share = torch.full_like(self.size[:, None], 1 / self.size.shape[1])
            given = (query, key, share, mask, False, self.scale)
            rows = torch.ops.vlmopt.attention_mass(*given)
        mean: Tensor = rows.mean(1)[:, 0, self.special :]
        return mean


@dataclass(frozen=True, kw_only=True)
class TokenMerge(Pass):
    """Base of the methods that merge similar patches of a vision transformer, block by block.

    Learned tokens in front of the patches (class token, registers) are found in the graph and
    never merged.
    """

    family = "tokens"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    in_encoder = True

    keep: float | int = option(
        0,
        "patches left after the last block: a share (up to 1), or a count (2 and up); 0: as many "
        "as the other options leave",
        ge=0,
    )
    prop_attn: bool = option(
        True, "tokens are attended to in proportion to the patches that they stand for"
    )
    restore: str = option(
        "auto",
        "give each patch a row again, that of the token it became part of: true, false, or auto: "
        "wherever more is read behind the blocks than the class token",
        choices=("auto", "true", "false"),
    )

    @abstractmethod
    def blocks(self, depth: int) -> Sequence[int]:
        """Blocks that merge, in order, of so many."""

    @abstractmethod
    def wanted(self, patches: int, blocks: int) -> list[int]:
        """Tokens to merge in each of so many blocks, where ``keep`` does not say."""

    @abstractmethod
    def match(self, at: MergePoint) -> tuple[Match, Tensor]:
        """Which tokens become one, and their weights therein: float32 ``[batch, tokens]``.

        Afterwards tokens stand in the order of ``kept``, the special ones at the front.
        """

    def most(self, patches: int) -> int:
        """How many of so many patches can be merged in one block."""
        return patches - 1

    def initial(self) -> Tensor | None:
        """A value for each patch that is merged along with the tokens, float32 ``[patches]``."""
        return None

    def counts(self, encoder: Encoder) -> dict[int, int]:
        """Tokens to merge in each block, by number of the block."""
        depth, patches = len(encoder.layers), encoder.patches
        blocks = self.blocks(depth)
        if not blocks or blocks[-1] >= depth:
            raise PreconditionError(
                f"{self.name} cannot merge in block {blocks[-1] if blocks else depth}: stage "
                f"{encoder.stage.name} has blocks 0 to {depth - 1}"
            )
        wanted = self.wanted(patches, len(blocks))
        left = patches
        if self.keep:
            left = int(self.keep) if self.keep > 1 else round(patches * Fraction(str(self.keep)))
            left = max(1, min(left, patches))
            wanted = evenly(patches, Fraction(patches - left, len(blocks)), len(blocks))
        counts = {}
        for block, count in zip(blocks, wanted, strict=True):
            counts[block] = min(count, self.most(patches))
            patches -= counts[block]
        if self.keep and patches > left:
            raise OptionError(
                f"{self.name}: {len(blocks)} block{'s' if len(blocks) != 1 else ''} cannot leave "
                f"{left} of {encoder.patches} patches: each merges at most "
                f"{self.most(encoder.patches)}",
                hint="keep more, or merge in more blocks",
            )
        return counts

    def requires(self, program: Program) -> None:
        stage = encoder_stage(program)
        require_untouched(
            stage, f"{self.name} cannot merge", hint="merge in each encoder with one pass"
        )
        encoder = encoder_of(program)
        self.counts(encoder)
        initial = self.initial()
        if initial is not None and len(initial) != encoder.patches:
            raise ArtifactError(
                f"{self.name} was calibrated on images of {len(initial)} patches, these have "
                f"{encoder.patches}",
                hint="calibrate with images of this size",
            )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = encoder_stage(program)
        wanted = self.counts(encoder_of(program))
        counts = {block: count for block, count in wanted.items() if count}
        if not counts:
            ctx.remark("no token is to be merged in any block", stage=stage.name)
            return PassResult(False, len(wanted), {"tokens_merged": 0})
        drop_constant_masks(stage.graph)
        encoder = find_encoder(stage)
        merging = BlockMerging(
            encoder, ctx, prefix=self.name, first=min(counts), restore=self.restore
        )
        for block, count in counts.items():
            merging.merge(block, count, partial(self._step, count, encoder.special))
        if self.prop_attn:
            merging.bias_attention()
        merging.bring_back()
        remove_unused(stage)
        stage.facts["merges"] = merging.merges
        merged = sum(counts.values())
        ctx.remark(f"{encoder.tokens} tokens, {encoder.tokens - merged} after the last block")
        return PassResult(True, len(counts), {"tokens_merged": merged})

    def _step(
        self,
        count: int,
        special: int,
        tokens: Tensor,
        query: Tensor,
        key: Tensor,
        scale: float | None,
        state: dict[str, Tensor],
    ) -> dict[str, Tensor]:
        """One block, see :meth:`BlockMerging.merge`."""
        batch, present, _ = tokens.shape
        size = state.get("size")
        bias = size.log() if size is not None and self.prop_attn else None
        if size is None:
            size = torch.ones(batch, present, device=tokens.device)
        carried, initial = state.get("carried"), self.initial()
        if carried is None and initial is not None:
            row = torch.cat([torch.zeros(special), initial]).to(tokens.device)
            carried = row.expand(batch, -1)
        point = MergePoint(tokens, query, key, scale, size, bias, carried, count, special)
        match, weights = self.match(point)
        place = places(match)
        after = {
            "tokens": merge_mean(tokens, weights, match, place),
            "slots": match.kept,
            "size": merge_sum(size, match, place),
            "places": place.gather(1, state["places"]) if state else place,
        }
        if carried is not None:
            after["carried"] = merge_mean(carried[..., None], weights, match, place)[..., 0]
        return after


def evenly(patches: int, share: Fraction, blocks: int) -> list[int]:
    """Tokens to merge in each block so that after ``n`` blocks ``n * share`` are gone, rounded."""
    left = [round(patches - share * done) for done in range(blocks + 1)]
    return [before - after for before, after in pairwise(left)]


def encoder_of(program: Program) -> Encoder:
    """What is known of a program's vision encoder; the program stays as it is.

    Raises:
        PreconditionError: it has none in which all patches of an image attend to all.
    """
    stage = encoder_stage(program).clone()
    drop_constant_masks(stage.graph)
    return find_encoder(stage)
