"""A program whose stages follow a plan: one stage for each kind of step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from vlmopt.analysis.branches import find_branches
from vlmopt.denoising.plan import Action, Choice, Plan, Site, StepPlan
from vlmopt.errors import PreconditionError
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Program, Stage
from vlmopt.rewrite.branches import Kept, drop_unread, states_given, states_read, write_step
from vlmopt.rewrite.first_block import split_first_block

DENOISER = "denoiser"
"""Name of the stage that is one step, and of the stage of first steps where a plan is followed."""

LOOP = "loop"
"""Among the metadata of a captured denoiser: what is known of the loop it was captured in; see
:func:`~vlmopt.denoising.pipelines.loop_of`."""

DENOISING = "denoising"
"""Among the metadata of a program: the plan that it follows, by which pass, and under which
conditions; see :func:`follow_plan`."""


@dataclass(frozen=True)
class Followed:
    """A plan that a program follows.

    Attributes:
        stages: name of the stage of each step.
        by: text of the pass.
        conditions: what the plan holds for; see :func:`follow_plan`.
        threshold: change of the first block up to which a step reuses the others, where that is
            decided while the loop runs; the plan is then what a step computes at most.
    """

    plan: Plan
    stages: tuple[str, ...]
    by: str
    conditions: Mapping[str, Any]
    threshold: float | None = None

    @property
    def graphs(self) -> tuple[str, ...]:
        """Names of the stages that run."""
        if self.threshold is not None:
            return (DENOISER, f"{DENOISER}_others", f"{DENOISER}_reused")
        return tuple(dict.fromkeys(self.stages))


def denoiser_stage(program: Program) -> Stage:
    """The captured step of a program that follows no plan yet.

    Raises:
        PreconditionError: there is none.
    """
    if DENOISER not in program:
        raise PreconditionError(
            f"this {program.model_type} program has no stage {DENOISER}",
            hint="capture a diffusion transformer: vlmopt.capture(pipe.transformer, inputs)",
        )
    if DENOISING in program.metadata:
        raise PreconditionError(
            f"this program follows a plan of {program.metadata[DENOISING]['by']} already",
            hint="capture the model anew, and run one pass of this family",
        )
    return program[DENOISER]


def follow_plan(
    program: Program,
    plan: Plan,
    ctx: PassContext,
    *,
    conditions: Mapping[str, Any] | None = None,
) -> None:
    """Replace the one step of a program by the kinds of steps of a plan, in place.

    Weights are shared by all. Steps that do the same share a stage.

    Args:
        conditions: JSON values that the plan was made for, where they are known: ``scheduler``, the
            name of a class of diffusers; ``guidance``; ``timesteps``, one for each step. Left out,
            they are those of the loop that the program was captured in, if it was.

    Raises:
        PreconditionError: the plan is of another model, or the program follows one already.
        BlockMismatchError: the model is built otherwise.
    """
    stage = denoiser_stage(program)
    sites = tuple(one.site for one in find_branches(stage))
    if sites != plan.sites:
        raise PreconditionError(
            f"the plan is for {_some(plan.sites)}, and this model has {_some(sites)}",
            hint="make the plan for this model",
        )
    loop = _loop(program, len(plan.steps))
    rows, keep, orders = plan.graphs, states_kept(plan), orders_of(plan)
    names = [DENOISER, *(f"{DENOISER}_{at}" for at in range(1, len(rows)))]
    for row, name in zip(rows, names, strict=True):
        step = replace(stage.clone(), name=name)
        write_step(step, row, keep[row], ctx, orders=orders)
        program.stages[name] = step
    drop_unread(program[name] for name in names)
    program.metadata[DENOISING] = {
        "by": ctx.spec,
        "plan": plan.to_json(),
        "conditions": dict(loop if conditions is None else conditions),
    }


def decide_by_first_block(program: Program, steps: int, threshold: float, ctx: PassContext) -> None:
    """Split the one step of a program behind its first block, in place.

    Args:
        steps: of the loop.
        threshold: change of what the first block adds, up to which other blocks are reused; see
            :data:`~vlmopt.rewrite.first_block.CHANGE`.

    Raises:
        PreconditionError: the program was captured in a loop of other length, or split already.
        BlockMismatchError: the model is built otherwise.
    """
    stage = denoiser_stage(program)
    loop = _loop(program, steps)
    sites = tuple(one.site for one in find_branches(stage))
    everything = tuple(Choice(Action.COMPUTE) for _ in sites)
    for part in split_first_block(stage, ctx):
        program.stages[part.name] = part
    program.metadata[DENOISING] = {
        "by": ctx.spec,
        "plan": Plan(sites, (everything,) * steps).to_json(),
        "conditions": loop,
        "threshold": threshold,
    }


def _loop(program: Program, steps: int) -> dict[str, Any]:
    """The loop that a program was captured in, if it was, which has so many steps."""
    loop = dict(program.metadata.get(LOOP, {}))
    if loop.get("steps", steps) != steps:
        raise PreconditionError(
            f"the plan is for {steps} steps, and the denoiser was captured in a loop of "
            f"{loop['steps']}",
            hint=f"make a plan for {loop['steps']} steps",
        )
    return loop


def plan_followed(program: Program) -> Followed:
    """The plan that a program follows.

    Raises:
        PreconditionError: it follows none.
    """
    found = program.metadata.get(DENOISING)
    if found is None:
        raise PreconditionError(
            f"this {program.model_type} program follows no plan for the steps of denoising",
            hint="run a pass first: vlmopt.run_pipeline(program, 'fixed-interval{interval=2}')",
        )
    plan = Plan.from_json(found["plan"])
    names = {row: f"{DENOISER}_{at}" if at else DENOISER for at, row in enumerate(plan.graphs)}
    stages = tuple(names[row] for row in plan.steps)
    threshold = found.get("threshold")
    return Followed(plan, stages, found["by"], found["conditions"], threshold)


def states_kept(plan: Plan) -> dict[StepPlan, set[Kept]]:
    """For each kind of step, the states that some step of the kind leaves to a later one."""
    keep: dict[StepPlan, set[Kept]] = {row: set() for row in plan.steps}
    wanted: set[Kept] = set()
    for row in reversed(plan.steps):
        for site, choice in zip(plan.sites, row, strict=True):
            given = {(site, role) for role in states_given(choice)} & wanted
            keep[row] |= given
            read = states_read(choice, [role for _, role in given])
            wanted = (wanted - given) | {(site, role) for role in read}
    return keep


def orders_of(plan: Plan) -> list[int]:
    """Order of the series that forecasts each branch; 0 where none does.

    Raises:
        PreconditionError: a branch is forecast that some step computes in part.
    """
    orders = []
    for at, site in enumerate(plan.sites):
        choices = [row[at] for row in plan.steps]
        orders.append(max(choice.order for choice in choices))
        if orders[-1] and any(choice.action is Action.PARTIAL for choice in choices):
            raise PreconditionError(
                f"the plan forecasts {site}, and computes some of its rows at other steps: a "
                "series goes through what was computed in full",
                hint="do one of the two about a branch",
            )
    return orders


def distances(plan: Plan) -> list[list[list[float]]]:
    """For each step, what :attr:`~vlmopt.program.Role.BRANCH_DISTANCE` holds."""
    orders = orders_of(plan)
    computed: list[list[int]] = [[] for _ in plan.sites]
    found = []
    for step, row in enumerate(plan.steps):
        here = []
        for choice, before in zip(row, computed, strict=True):
            since = [step - before[-1] if before else math.inf] * max([1, *orders])
            if choice.action is Action.COMPUTE:
                since = [gap if len(before) > at else math.inf for at, gap in enumerate(since)]
                before.append(step)
            here.append([float(gap) for gap in since])
        found.append(here)
    return found


def _some(sites: Sequence[Site]) -> str:
    names = ", ".join(map(str, sites[:4]))
    return f"{len(sites)} branches ({names}{', ...' if len(sites) > 4 else ''})"
