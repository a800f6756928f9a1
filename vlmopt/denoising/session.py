"""A denoising loop that follows a plan: which stage a step runs, and what it leaves to later ones.

:class:`DenoiseSession` stands behind the ``transformer`` of a diffusers pipeline, whose call stays
as it is::

    session = DenoiseSession(program)
    session.install(pipe)
    pipe(class_labels=[3], num_inference_steps=20)

It counts the calls, knows by the timesteps when a generation begins, and refuses loops that the
plan is not for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmopt.denoising.following import Followed, distances, follow_plan, plan_followed
from vlmopt.denoising.pipelines import loop_of
from vlmopt.denoising.plan import Plan
from vlmopt.denoising.standing_in import StandsIn
from vlmopt.errors import PlanMismatchError
from vlmopt.lowering.onnx import OnnxStage
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Program, Role, Stage
from vlmopt.rewrite.branches import DISTANCE, NEW, STATE
from vlmopt.rewrite.first_block import CHANGE, FIRST, STREAM
from vlmopt.runtime.model import compile_stage, require_backend

Run = Callable[..., tuple[Tensor, ...]]
"""``(*inputs) -> outputs`` of a stage."""

_CLOSE = 1e-4
"""Timesteps that differ by this share or less are the same."""


class DenoiseSession(StandsIn):
    """The stages of a program that follows a plan, compiled, and the state of its loop.

    Calls are told apart by the name of diffusers' ``cache_context``, as a pipeline gives it that
    calls once for each half of classifier-free guidance: each name has its own state.

    Attributes:
        plan: what is done at each step.
        conditions: what the plan holds for, see
            :func:`~vlmopt.denoising.following.follow_plan`.
        graphs: names of the stages that run.
        computed: steps that ran in full so far, of all streams, where that is decided while the
            loop runs.

    Args:
        program: one that follows a plan; or a captured step, with ``plan``.
        plan: what to follow, for a program that follows no plan. It is left as it is.
        backend: see :func:`vlmopt.optimize`; or a function from a stage to what runs it, such as
            :func:`in_onnx_runtime` gives.

    Raises:
        OptionError: unknown backend.
        PreconditionError: the program follows no plan, or ``plan`` is not for it.
    """

    def __init__(
        self,
        program: Program,
        plan: Plan | None = None,
        *,
        backend: str | Callable[[Stage], Run] = "inductor",
    ) -> None:
        super().__init__()
        if isinstance(backend, str):
            require_backend(backend)
        if plan is not None:
            program = program.clone()
            follow_plan(program, plan, PassContext("plan"))
        self.followed: Followed = plan_followed(program)
        self.plan = self.followed.plan
        self.conditions = self.followed.conditions
        self.graphs = self.followed.graphs
        self.stages = {name: program[name] for name in self.graphs}
        first = self.stages[self.graphs[0]]
        known = STATE | {Role.BRANCH_DISTANCE}
        self.inputs = tuple(port for port in first.inputs if port.role not in known)
        self._examples = {p.name: first.placeholder(p).meta["val"] for p in self.inputs}
        whole = self.stages[self.graphs[0 if self.followed.threshold is None else 1]]
        self.outputs = tuple(port for port in whole.outputs if port.role not in STATE)
        self._steps = {name: _GraphStep(stage, backend) for name, stage in self.stages.items()}
        device = next(iter(self._examples.values())).device
        self._distances = [torch.tensor(found, device=device) for found in distances(self.plan)]
        self._streams: dict[str | None, _Stream] = {}
        self.computed = 0
        self._pipe: Any = None

    @property
    def nbytes(self) -> int:
        """Memory of the states of one stream of calls; it never grows."""
        return sum(
            math.prod(val.shape) * val.dtype.itemsize for val in self._state_examples().values()
        )

    def reset(self) -> None:
        """Forget the generation that is under way: the next call is a first step."""
        for stream in self._streams.values():
            stream.step = 0

    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next step.

        Args:
            values: inputs of the model, by the names of the program's ports.

        Returns:
            The model's outputs by name.

        Raises:
            PlanMismatchError: the loop is not the one that the plan is for.
        """
        given = self._given(values)
        stream = self._stream()
        if stream.step in (0, len(self.plan.steps)):
            self._require_pipeline()
        step = stream.advance(self._timestep(values))
        states = stream.states | {DISTANCE: self._distances[step]}
        with torch.no_grad():
            if self.followed.threshold is None:
                results = self._steps[self.followed.stages[step]](given, states)
            else:
                results = self._decide(step, given, states)
        return dict(zip((port.name for port in self.outputs), results, strict=True))

    def _decide(
        self, step: int, given: Sequence[Tensor], states: dict[str, Tensor]
    ) -> tuple[Tensor, ...]:
        """The first block, then the others unless it changed too little."""
        first, others, reused = (self._steps[name] for name in self.graphs)
        *streams, change, added = first(given, states)
        states |= {f"{STREAM}_{at}": stream for at, stream in enumerate(streams)}
        assert self.followed.threshold is not None
        if step and float(change) <= self.followed.threshold:
            return reused(given, states)
        self.computed += 1
        states[FIRST].copy_(added)
        return others(given, states)

    # in place of a model ----------------------------------------------------------------------

    def install(self, pipe: Any) -> None:
        """Let a diffusers pipeline run this loop, and check before each generation that it may.

        Args:
            pipe: its ``transformer`` is the model that was captured; a twin takes its place.
        """
        pipe.transformer = self.module(pipe.transformer)
        self._pipe = pipe

    # what is checked --------------------------------------------------------------------------

    def _given(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        unknown = sorted(values.keys() - self._examples.keys())
        if unknown:
            raise PlanMismatchError(
                f"the denoiser was captured without {', '.join(unknown)}",
                hint="capture it with the inputs that the pipeline gives",
            )
        for name, example in self._examples.items():
            found = values.get(name)
            if found is None or found.shape != example.shape or found.dtype != example.dtype:
                raise PlanMismatchError(
                    f"the plan is for {name} {list(example.shape)} of {_dtype(example)}, and the "
                    "loop has "
                    + (f"{list(found.shape)} of {_dtype(found)}" if found is not None else "none"),
                    hint="use the resolution, the batch and the guidance that the denoiser was "
                    "captured with, or capture it anew and make a plan for these",
                )
        return [values[name] for name in self._examples]

    def _timestep(self, values: Mapping[str, Tensor]) -> float:
        (port,) = (port for port in self.inputs if port.role is Role.TIMESTEP)
        return float(values[port.name].flatten()[0])

    def _stream(self) -> _Stream:
        if self._context not in self._streams:
            self._streams[self._context] = _Stream(self)
        return self._streams[self._context]

    def _state_examples(self) -> dict[str, Tensor]:
        return {
            port.name: stage.placeholder(port).meta["val"]
            for stage in self.stages.values()
            for port in stage.inputs
            if port.role in STATE
        }

    def _require_pipeline(self) -> None:
        """What a pipeline tells of its loop is what the plan is for."""
        if self._pipe is None:
            return
        found = loop_of(self._pipe)
        for name in ("scheduler", "guidance"):
            wanted, value = self.conditions.get(name), found[name]
            if wanted is not None and value is not None and value != wanted:
                raise PlanMismatchError(
                    f"the plan is for {name} {wanted}, and the pipeline has {value}",
                    hint=f"use {name} {wanted}, or make a plan for {value}",
                )
        wanted, value = len(self.plan.steps), found["steps"]
        if value != wanted:
            raise PlanMismatchError(
                f"the plan is for {wanted} steps, and the pipeline takes {value}",
                hint=f"give num_inference_steps={wanted}, or make a plan for {value}",
            )


def in_onnx_runtime(folder: Path) -> Callable[[Stage], Run]:
    """A backend: the stages of a program as ``vlmopt.export`` wrote them into a folder."""

    def load(stage: Stage) -> Run:
        exported = OnnxStage(folder / f"{stage.name}.onnx")

        def run(*given: Tensor) -> tuple[Tensor, ...]:
            found = exported(**dict(zip((port.name for port in stage.inputs), given, strict=True)))
            return tuple(found[port.name] for port in stage.outputs)

        return run

    return load


class _GraphStep:
    """A stage that takes its states from buffers, and writes those it leaves into them."""

    def __init__(self, stage: Stage, backend: str | Callable[[Stage], Run]) -> None:
        known = STATE | {Role.BRANCH_DISTANCE}
        self._reads = [
            port.name for port in stage.inputs if port.role in known or port.name.startswith(STREAM)
        ]
        decides = any(port.name == CHANGE for port in stage.outputs)
        # what the first block adds is kept only if other blocks run
        kept = () if decides else stage.outputs
        self._writes = [p.name.removesuffix(NEW) for p in kept if p.role in STATE]
        self._returned = len(stage.outputs) - len(self._writes)
        self._run = None if isinstance(backend, str) else backend(stage)
        if isinstance(backend, str):
            last = range(self._returned, len(stage.outputs))
            writes = dict(zip(last, self._writes, strict=True))
            self._run_in_place = compile_stage(stage, backend, writes=writes)

    def __call__(self, given: Sequence[Tensor], states: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        read = [states[name] for name in self._reads]
        if self._run is None:
            only_written = [states[name] for name in self._writes if name not in self._reads]
            return self._run_in_place(*given, *read, *only_written)
        results = self._run(*given, *read)
        for name, value in zip(self._writes, results[self._returned :], strict=True):
            states[name].copy_(value)
        return results[: self._returned]


class _Stream:
    """One loop: what its steps keep, in buffers that stay where they are, and how far it is.

    Attributes:
        step: how many steps have run.
    """

    def __init__(self, session: DenoiseSession) -> None:
        self.session = session
        self.step = 0
        self.states = {
            name: torch.zeros(val.shape, dtype=val.dtype, device=val.device)
            for name, val in session._state_examples().items()
        }
        self._times: list[float] = []
        known = session.conditions.get("timesteps")
        self._known: Sequence[float] | None = known

    def advance(self, time: float) -> int:
        """The number of the step at this timestep.

        Raises:
            PlanMismatchError: no step of the plan is at this timestep.
        """
        steps = len(self.session.plan.steps)
        step = 0 if self.step == steps else self.step
        if self._known is not None:
            if not _close(time, self._known[step]) and _close(time, self._known[0]):
                step = 0  # the generation before was given up
            if not _close(time, self._known[step]):
                raise PlanMismatchError(
                    f"the plan is for {steps} steps, of which step {step} is at timestep "
                    f"{self._known[step]:g}, and the loop is at {time:g}",
                    hint="use the scheduler and the number of steps of the plan, or make a plan "
                    "for these",
                )
        else:
            self._require_progress(step, time)
            if step == 0:
                self._times = []
            self._times.append(time)
            if len(self._times) == steps:
                self._known = list(self._times)
        self.step = step + 1
        return step

    def _require_progress(self, step: int, time: float) -> None:
        """Timesteps go one way, once for each step."""
        steps, times = len(self.session.plan.steps), self._times[:step]
        if times and _close(time, times[-1]):
            raise PlanMismatchError(
                f"two calls in a row are at timestep {time:g}: the loop calls the denoiser more "
                "than once for a step, and the plan is for one call",
                hint="call it within session.cache_context(name), with a name for each of the two",
            )
        if len(times) > 1 and (time > times[-1]) != (times[1] > times[0]):
            raise PlanMismatchError(
                f"the plan is for {steps} steps, and a new generation begins at timestep {time:g} "
                f"after {step}",
                hint=f"take {steps} steps; after a generation that was given up, call "
                "session.reset()",
            )


def _close(one: float, two: float) -> bool:
    return math.isclose(one, two, rel_tol=_CLOSE, abs_tol=1e-6)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix("torch.")
