"""STC-Cacher: rows of a frame that look like those of a reference frame are not computed again."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmopt.analysis.blocks import EncoderBlock, find_blocks
from vlmopt.analysis.encoder import encoder_stage
from vlmopt.errors import PreconditionError
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.passes.frames import reuse
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Program, Stage
from vlmopt.rewrite.exits import require_untouched
from vlmopt.rewrite.reuse import REUSE, STATE, give_state, reuse_rows

SELECTIVE = "_selective"
"""What the name of the stage that reuses rows ends with."""


@dataclass(frozen=True, kw_only=True)
class StcCacher(Pass):
    """Compute a frame of a video in full now and then, and of those between only what changed.

    The vision encoder becomes two stages with the same weights. The first computes frames in full,
    and gives keys, values and what attention and the feed-forward network added in each block of
    the last one: the reference frame. The second, named ``..._selective``, takes them. In each
    block it computes the keys of all rows, compares them with those of the reference, and computes
    queries, values, attention and the network for the least similar rows only; to the residual
    stream of the other rows it adds what the reference frame got. Several images given at once are
    frames of one stream, one after the other.

    With ``lossless`` rows that changed at all, by more than rounding, come first, and a frame of
    which more rows change than ``ratio`` allows is computed in full. Then whatever works on each
    row on its own is exact: a row that is reused is one that a full pass would compute from the
    same numbers. Attention is not: reused rows do not see that others changed.

    Which stage runs is up to :class:`vlmopt.streaming.FrameEncoder`, by ``interval``.

    Reference: "Accelerating Streaming Video Large Language Models via Hierarchical Token
    Compression", CVPR 2026, arXiv 2512.00891.
    """

    name = "stc-cacher"
    family = "frames"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    needs_capture = "it makes two stages of the encoder, which take turns"
    example = "stc-cacher{interval=4 ratio=0.25}"
    reference = "arXiv 2512.00891"

    interval: int = option(2, "chunks of frames from one computed in full to the next", ge=1)
    ratio: float = option(0.25, "share of the rows of a frame computed anew", gt=0, le=1)
    metric: str = option("cosine", "how rows of keys are compared", choices=reuse.METRICS)
    lossless: bool = option(
        False, "leave out no row that changed at all; frames of which more change run in full"
    )

    def requires(self, program: Program) -> None:
        stage = encoder_stage(program)
        require_untouched(
            stage, f"{self.name} cannot reuse rows", hint="reduce tokens behind the encoder"
        )
        if stage.find_outputs(STATE[0]):
            raise PreconditionError(
                f"{self.name} cannot reuse rows in stage {stage.name}: "
                f"{stage.facts[REUSE]['by']} does so already",
                hint="leave out one of the two",
            )
        _blocks(stage.clone())

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = encoder_stage(program)
        name = stage.name + SELECTIVE
        selective = replace(stage.clone(), name=name)
        blocks = _blocks(selective)
        count = reuse.rows_to_update(blocks[0].tokens, self.ratio)
        reuse_rows(selective, blocks, self._choose, ctx)
        give_state(stage, _blocks(stage), ctx)
        for one in (stage, selective):
            one.facts[REUSE] = {
                "interval": self.interval,
                "frames": blocks[0].images,
                "rows": count,
                "stages": [stage.name, name],
                "by": ctx.spec,
            }
        stages = list(program.stages.items())
        at = 1 + next(i for i, (_, one) in enumerate(stages) if one is stage)
        program.stages = dict([*stages[:at], (name, selective), *stages[at:]])
        ctx.remark(f"{count} of {blocks[0].tokens} rows of a frame are computed", stage=name)
        reused = (blocks[0].tokens - count) * len(blocks)
        return PassResult(True, len(blocks), {"rows_reused": reused})

    def _choose(self, key: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        similar = reuse.similarity(key, reference, self.metric)
        count = reuse.rows_to_update(key.shape[1], self.ratio)
        if not self.lossless:
            return reuse.least_similar(similar, count), similar.mean(-1), None
        changed = reuse.differ(key, reference)
        first = torch.where(changed, similar, float("inf"))
        return reuse.least_similar(first, count), similar.mean(-1), changed.sum(-1)


def _blocks(stage: Stage) -> tuple[EncoderBlock, ...]:
    drop_constant_masks(stage.graph)
    return find_blocks(stage)
