"""What passes have in common that let a denoising loop follow a plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmopt.analysis.branches import BranchSite, find_branches
from vlmopt.denoising.following import LOOP, denoiser_stage, follow_plan
from vlmopt.denoising.plan import Plan
from vlmopt.errors import OptionError
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Stepwise(Pass):
    """A pass that makes stages for the steps of a denoising loop."""

    family = "denoise"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    needs_capture = "it makes stages for the steps of a loop, which one graph does not show"
    needs_vision = False

    steps: int = option(0, "of the loop; 0: those it was captured in", ge=0)

    def number_of_steps(self, program: Program) -> int:
        """Steps of the loop.

        Raises:
            OptionError: nobody said how many.
        """
        steps = self.steps or program.metadata.get(LOOP, {}).get("steps", 0)
        if not steps:
            raise OptionError(
                f"{self.name}: nothing tells how many steps the loop has",
                hint="give option steps, or capture with vlmopt.denoising.pipelines"
                ".capture_pipeline",
            )
        return int(steps)


@dataclass(frozen=True, kw_only=True)
class Planned(Stepwise):
    """A pass that makes a plan; each kind of step of it becomes a stage of its own."""

    @abstractmethod
    def plan(self, program: Program, sites: tuple[BranchSite, ...]) -> Plan:
        """What each step does.

        Args:
            sites: the branches of the captured step.
        """

    def conditions(self, program: Program) -> Mapping[str, Any] | None:
        """What the plan was made for; ``None``: the loop that the program was captured in."""
        return None

    def requires(self, program: Program) -> None:
        self.plan(program, find_branches(denoiser_stage(program)))

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = denoiser_stage(program)
        sites = find_branches(stage)
        plan = self.plan(program, sites)
        follow_plan(program, plan, ctx, conditions=self.conditions(program))
        ctx.remark(
            f"{len(plan.anchors)} of {len(plan.steps)} steps compute everything; "
            f"{len(plan.graphs)} kinds of steps differ",
            stage=stage.name,
        )
        figures = {"anchors": len(plan.anchors), "stages": len(plan.graphs)}
        # where every step computes everything, the captured one is all there is
        return PassResult(len(plan.graphs) > 1, len(sites), figures)
