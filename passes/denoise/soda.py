"""SODA: anchors and partial recomputation by how sensitive each step and branch is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from vlmopt.analysis.branches import BranchSite
from vlmopt.denoising.plan import Plan, Site
from vlmopt.errors import OptionError
from vlmopt.passes.denoise import mixing, tables
from vlmopt.passes.denoise.anchors import find_anchors
from vlmopt.passes.denoise.base import Planned
from vlmopt.passes.denoise.sensitivity import METRICS, Errors
from vlmopt.pipeline.options import option
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Soda(Planned):
    """Compute the steps that matter most in full, and of the others what reuse would harm most.

    A calibration measures how far what each branch gives is from what it gave some steps before,
    and from that with some rows recomputed. Steps that compute everything are chosen by dynamic
    programming, so that reuse between them does least harm. Between them a branch reuses its
    output, or recomputes ``lambda * error + beta`` of its rows, those that are largest on average;
    ``beta`` is found for a budget.

    Reference: "SODA: Sensitivity-Oriented Dynamic Acceleration for Diffusion Transformer", arXiv
    2603.07057.
    """

    name = "soda"
    example = "soda{anchors=8 artifact=soda.safetensors}"
    reference = "arXiv 2603.07057"

    artifact: str = option("", "file of a calibration, with tables and a plan")
    anchors: int = option(0, "steps that compute everything; 0: the plan of the artifact", ge=0)
    rows: float = option(
        0.1, "share of the rows between anchors to recompute, mean over branches", ge=0, le=1
    )
    sensitivity: float = option(1.0, "of the share of rows to the error of reuse (lambda)", ge=0)
    alpha_means: str = option(
        "recompute", "alpha is the share to recompute, or to prune", choices=mixing.MEANINGS
    )
    stretches: int = option(
        4,
        "parts of the loop, in each of which steps equally far from their anchors decide alike, "
        "for fewer stages; 0: each step on its own",
        ge=0,
    )
    interval: int = option(6, "greatest distance from an anchor to the next", ge=2)
    exact: bool = option(
        False,
        "for calibration: compute some rows of attention as the loop does, with keys of the step "
        "before; ten times the time",
    )
    metric: str = option("cosine", "for calibration: how outputs are compared", choices=METRICS)

    def plan(self, program: Program, sites: tuple[BranchSite, ...]) -> Plan:
        found = self._read(program)
        known = tuple(one.site for one in sites)
        tables.require_sites(self.artifact, found.plan.sites, known)
        tables.require_conditions(self.artifact, found.conditions, tables.loop_now(program))
        if self.steps not in (0, len(found.plan.steps)):
            raise OptionError(
                f"{self.name}: {self.artifact} is for {len(found.plan.steps)} steps, not "
                f"{self.steps}",
                hint="leave option steps out, or calibrate with as many",
            )
        if not self.anchors:
            return found.plan
        return self.make_plan(found.errors, known, tuple(one.tokens for one in sites))

    def conditions(self, program: Program) -> Mapping[str, Any]:
        return self._read(program).conditions

    def _read(self, program: Program) -> tables.Found:
        if not self.artifact:
            raise OptionError(
                f"{self.name} needs tables of a calibration",
                hint="make them: vlmopt calibrate MODEL -p 'soda{anchors=8}' --steps 20 -o FILE, "
                "and give option artifact",
            )
        return tables.read(self.artifact, self.name, program)

    def make_plan(self, errors: Errors, sites: tuple[Site, ...], rows: tuple[int, ...]) -> Plan:
        """The plan for tables.

        Args:
            sites: the branches.
            rows: of each.

        Raises:
            OptionError: as many anchors do not fit, or the budget of rows.
        """
        mean = errors.reuse.double().mean(1)
        chosen = find_anchors(mean.tolist(), self.anchors, self.interval)
        between = mixing.between(errors, chosen.anchors, self.stretches)
        base = mixing.base_for(between, self.rows, self.sensitivity, self.alpha_means)
        rate = mixing.rates(between.reuse, self.sensitivity, base, self.alpha_means)
        eighths = mixing.decide(between, rate)
        return mixing.plan_of(sites, rows, len(errors.reuse), between, eighths)
