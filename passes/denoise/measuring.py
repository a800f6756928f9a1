"""Calibration of a denoising loop: generations are watched, step by step."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmopt import artifacts
from vlmopt.analysis.branches import BranchSite, find_branches
from vlmopt.denoising.following import LOOP, denoiser_stage
from vlmopt.denoising.pipelines import capture_pipeline
from vlmopt.denoising.plan import Plan
from vlmopt.denoising.standing_in import StandsIn
from vlmopt.errors import ArtifactError, PlanMismatchError
from vlmopt.partial import PartialState
from vlmopt.passes.denoise import tables
from vlmopt.passes.denoise.anchors import find_anchors
from vlmopt.passes.denoise.sensitivity import SHARES, Sensitivity, rows_of
from vlmopt.passes.denoise.soda import Soda
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Port, Program, Role, Stage
from vlmopt.rewrite.branches import NEW, PARTIAL, branch_name, observe_step

Call = Mapping[str, Any]
"""Keyword arguments of a call of a pipeline."""


def calibrate(
    pipe: Any,
    calls: Sequence[Call],
    one: Soda,
    path: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> tuple[Plan, tuple[int, ...]]:
    """Measure how sensitive a pipeline's transformer is, and write tables and a plan.

    What is done is kept in ``PATH.partial``: called again after an interruption, it goes on from
    there, and deletes that file in the end.

    Args:
        pipe: has a ``transformer`` and a ``scheduler``; left as it was.
        calls: generations, always in the same order, of one shape and loop.
        one: the pass with its options, ``anchors`` among them.
        path: file to write, ``.safetensors``.
        progress: called with the generations done, and how many there are.

    Returns:
        The plan, and the rows of each of its branches.

    Raises:
        ArtifactError: the file exists and ``overwrite`` is false, or its name does not fit; there
            are no calls; the partial file is of another calibration.
        OptionError: the options make no plan.
        PlanMismatchError: a generation has another number of steps.
        VlmoptError: see :func:`~vlmopt.denoising.pipelines.capture_pipeline`.
    """
    path = Path(path)
    artifacts.require_writable(path, True, overwrite=overwrite)
    if not calls:
        raise ArtifactError("there is nothing to calibrate on", hint="give at least one generation")
    program = capture_pipeline(pipe, **_again(calls[0]))
    watcher = _Watcher(program, one)
    # raises now what it would after hours
    find_anchors([[0.0] * one.interval] * watcher.steps, one.anchors, one.interval)
    loop = tables.loop_now(program)
    options = f"{one} {loop}"
    done = PartialState(path.with_name(path.name + ".partial"), options, watcher.total.state)
    if done.tensors:
        watcher.total.restore(done.tensors)
    model = pipe.transformer
    pipe.transformer = watcher.module(model)
    try:
        for count, call in enumerate(calls, start=1):
            if count > len(done.rows):
                done.add(watcher.generation(partial(pipe, **call)))
            if progress is not None:
                progress(count, len(calls))
    finally:
        pipe.transformer = model
    errors = watcher.total.errors()
    rows = tuple(site.tokens for site in watcher.sites)
    plan = one.make_plan(errors, tuple(site.site for site in watcher.sites), rows)
    conditions = {**loop, "timesteps": done.rows[-1]["timesteps"]}
    values = {"options": str(one), "generations": len(done.rows), "samples": watcher.total.samples}
    found = tables.Found(errors, plan, conditions)
    tables.write(path, one.name, program, found, values, overwrite=overwrite)
    done.remove()
    return plan, rows


def _again(call: Call) -> dict[str, Any]:
    """A call with generators of its own, so that those of ``call`` stay where they are."""

    def fresh(value: Any) -> Any:
        if isinstance(value, list):
            return [fresh(one) for one in value]
        return value.clone_state() if isinstance(value, torch.Generator) else value

    return {name: fresh(value) for name, value in call.items()}


class _Watcher(StandsIn):
    """A twin of a transformer that measures what its branches give.

    Attributes:
        sites: its branches.
        total: what finished generations have shown.
    """

    def __init__(self, program: Program, one: Soda) -> None:
        super().__init__()
        self.stage = denoiser_stage(program).clone()
        self.sites = find_branches(self.stage)
        self.steps = int(program.metadata[LOOP]["steps"])
        self._longest, self._metric = one.interval, one.metric
        self.total = self._table()
        self._outputs = [port.name for port in self.stage.outputs]
        self._inputs = [port.name for port in self.stage.inputs]
        (time,) = (port.name for port in self.stage.inputs if port.role is Role.TIMESTEP)
        self._time = time
        self._partly = self._computing_rows() if one.exact else []
        self._widths = [self._watch(site, at) for at, site in enumerate(self.sites)]
        self._kept: dict[str | None, dict[str, Tensor]] = {}
        self._streams: dict[str | None, Sensitivity] = {}
        self._times: list[float] = []

    def _table(self) -> Sensitivity:
        return Sensitivity(self.steps, len(self.sites), self._longest, self._metric)

    def _computing_rows(self) -> list[Stage]:
        """Steps that give each branch with 1, 2, ... eighths of its rows computed anew."""
        stages = []
        for eighths in range(1, SHARES):
            stages.append(self.stage.clone())
            rows = [rows_of(site.tokens, eighths) for site in self.sites]
            observe_step(stages[-1], rows, PassContext("soda"))
        return stages

    def _watch(self, site: BranchSite, at: int) -> int:
        """Make outputs of what a site gives and is given; returns how many branches it has."""
        for index, branch in enumerate(site.rows):
            for name, value in (
                ("gives", branch.value),
                ("given", branch.reads or branch.stream),
            ):
                self.stage.add_output(Port(f"{name}_{at}_{index}"), value)
        return len(site.rows)

    def generation(self, run: Callable[[], Any]) -> dict[str, Any]:
        """Watch one generation; returns what is to be remembered of it.

        Raises:
            PlanMismatchError: it had another number of steps than the first.
        """
        for stream in self._streams.values():
            stream.begin()
        self._times, self._kept = [], {}
        run()
        for stream in self._streams.values():
            if stream.unfinished:
                raise PlanMismatchError(
                    f"a generation took {stream.unfinished} steps, and the first one {self.steps}",
                    hint="calibrate with generations of one loop",
                )
            self.total.absorb(stream)
        return {"timesteps": self._times[:: max(len(self._streams), 1)]}

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            results = self.stage.graph_module(*(values[name] for name in self._inputs))
        gives, given, at = [], [], len(self._outputs)
        for width in self._widths:
            gives.append(torch.cat(results[at : at + 2 * width : 2], -1))
            given.append(torch.cat(results[at + 1 : at + 2 * width : 2], -1))
            at += 2 * width
        stream = self._streams.setdefault(self._context, self._table())
        self._times.append(float(values[self._time].flatten()[0]))
        partly = self._with_rows(values)
        stream.step(gives, given, partly)
        return dict(zip(self._outputs, results, strict=False))

    def _with_rows(self, values: Mapping[str, Tensor]) -> list[list[Tensor]]:
        """Branches of which some rows are computed, by eighths; the others are of the last step."""
        found = []
        named = {**values, **self._kept.get(self._context, {})}
        for stage in self._partly:
            given = [
                # nothing is measured of rows in the first step
                named[port.name] if port.name in named else stage.zeros(port)
                for port in stage.inputs
            ]
            with torch.no_grad():
                results = stage.graph_module(*given)
            new = dict(zip((port.name for port in stage.outputs), results, strict=True))
            found.append(
                [
                    torch.cat(
                        [
                            new[branch_name(site.site, index) + PARTIAL]
                            for index, branch in enumerate(site.branches)
                            if branch in site.rows
                        ],
                        -1,
                    )
                    for site in self.sites
                ]
            )
        if self._partly:
            self._kept[self._context] = {
                name.removesuffix(NEW): value for name, value in new.items() if name.endswith(NEW)
            }
        return found
