"""TaylorSeer: branches are forecast from how they changed between the steps that compute them."""

from __future__ import annotations

from dataclasses import dataclass

from vlmopt.analysis.branches import BranchSite
from vlmopt.denoising.plan import Action, Choice, Plan
from vlmopt.passes.denoise.base import Planned
from vlmopt.passes.denoise.intervals import plan_at_intervals
from vlmopt.pipeline.options import option
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class TaylorSeer(Planned):
    """Compute every ``interval``-th step, and forecast all branches at the others.

    A branch is followed by a Taylor series whose derivatives are differences between what it was
    at the last steps that computed it. Before there are as many of them as ``order`` asks for,
    fewer terms are taken; 0 is plain reuse.

    Reference: "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", arXiv
    2503.06923.
    """

    name = "taylorseer"
    example = "taylorseer{interval=3 order=1}"
    reference = "arXiv 2503.06923"

    interval: int = option(3, "steps from one computed in full to the next", ge=1)
    order: int = option(1, "of the series", ge=0, le=4)

    def plan(self, program: Program, sites: tuple[BranchSite, ...]) -> Plan:
        steps = self.number_of_steps(program)
        choice = Choice(Action.FORECAST, order=self.order)
        return plan_at_intervals(sites, steps, self.interval, choice)
