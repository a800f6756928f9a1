"""First-block cache: all other blocks are reused while the first one changes little."""

from __future__ import annotations

from dataclasses import dataclass

from vlmopt.analysis.branches import find_ends
from vlmopt.denoising.following import decide_by_first_block, denoiser_stage
from vlmopt.passes.denoise.base import Stepwise
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import PassContext, PassResult
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class FirstBlockCache(Stepwise):
    """Run the first block at each step, and the others only if what it adds has changed.

    Where what the first block adds differs from what it added at the last step in full by no more
    than ``threshold``, as a share of mean magnitudes, all other blocks are skipped, and what they
    added together then is added again. Which steps are in full thus depends on the sample: it is
    decided on the host, between two graphs.

    Reference: ParaAttention, github.com/chengzeyi/ParaAttention; after TeaCache, arXiv 2411.19108.
    """

    name = "first-block-cache"
    example = "first-block-cache{threshold=0.1}"
    reference = "arXiv 2411.19108"

    threshold: float = option(0.1, "change of the first block up to which others are reused", ge=0)

    def requires(self, program: Program) -> None:
        find_ends(denoiser_stage(program))
        self.number_of_steps(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        decide_by_first_block(program, self.number_of_steps(program), self.threshold, ctx)
        return PassResult(True, 1)
