"""Fixed intervals: every few steps everything is computed, and reused in between."""

from __future__ import annotations

from dataclasses import dataclass

from vlmopt.analysis.branches import BranchSite
from vlmopt.denoising.plan import Action, Choice, Plan
from vlmopt.passes.denoise.base import Planned
from vlmopt.passes.denoise.intervals import plan_at_intervals
from vlmopt.pipeline.options import option
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class FixedInterval(Planned):
    """Compute every ``interval``-th step, and reuse what all branches gave at the others.

    Reference: "FORA: Fast-Forward Caching in Diffusion Transformer Acceleration", arXiv 2407.01425.
    """

    name = "fixed-interval"
    example = "fixed-interval{interval=3}"
    reference = "arXiv 2407.01425"

    interval: int = option(2, "steps from one computed in full to the next", ge=1)

    def plan(self, program: Program, sites: tuple[BranchSite, ...]) -> Plan:
        steps = self.number_of_steps(program)
        return plan_at_intervals(sites, steps, self.interval, Choice(Action.REUSE))
