"""Passes that let a denoising loop follow a plan: from calibration to samples."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import denoisers
import pytest
import torch
from torch import Tensor

from vlmopt.analysis.branches import find_branches
from vlmopt.denoising.picture import plan_svg, plan_text
from vlmopt.denoising.pipelines import capture_pipeline
from vlmopt.denoising.plan import Action, Choice, Plan, Site
from vlmopt.denoising.session import DenoiseSession
from vlmopt.errors import ArtifactError, OptionError, PlanMismatchError
from vlmopt.passes.denoise import tables
from vlmopt.passes.denoise.fixed_interval import FixedInterval
from vlmopt.passes.denoise.measuring import calibrate
from vlmopt.passes.denoise.sensitivity import cosine_error
from vlmopt.passes.denoise.soda import Soda
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program

STEPS = 6


def pipeline(name: str) -> Any:
    return denoisers.pipeline(name, denoisers.build(name))


@functools.cache
def captured(name: str = "dit") -> Program:
    return capture_pipeline(pipeline(name), **denoisers.call(name, guided=True, steps=STEPS))


def calls(name: str = "dit", count: int = 2) -> list[dict[str, Any]]:
    return [denoisers.call(name, guided=True, steps=STEPS, seed=seed) for seed in range(count)]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("soda") / "soda.safetensors"
    calibrate(pipeline("dit"), calls(), Soda(anchors=3, interval=4), path)
    return path


@pytest.mark.parametrize(
    ("text", "choice"),
    [
        ("fixed-interval{interval=2}", Choice(Action.REUSE)),
        ("taylorseer{interval=2 order=2}", Choice(Action.FORECAST, order=2)),
    ],
)
def test_fixed_intervals(text: str, choice: Choice) -> None:
    program = captured().clone()
    run_pipeline(program, text)
    plan = DenoiseSession(program, backend="eager").plan
    assert plan.anchors == (0, 2, 4)
    assert set(plan.steps[1]) == {choice}


def test_steps_must_be_known() -> None:
    program = captured().clone()
    del program.metadata["loop"]
    with pytest.raises(OptionError, match="how many steps"):
        run_pipeline(program, "fixed-interval{interval=2}")
    run_pipeline(program, "fixed-interval{interval=2 steps=3}")
    assert len(DenoiseSession(program, backend="eager").plan.steps) == 3


@pytest.mark.parametrize("name", ["dit", "wan"])
def test_a_calibration_leaves_samples_as_they_were(name: str, tmp_path: Path) -> None:
    """Wan calls its transformer once for each half of guidance."""
    pipe = pipeline(name)
    model = pipe.transformer
    wanted = denoisers.sample(pipe, name, guided=True, steps=STEPS)
    calibrate(pipe, calls(name, 1), Soda(anchors=2, interval=4), tmp_path / "one.safetensors")
    assert pipe.transformer is model
    assert denoisers.sample(pipe, name, guided=True, steps=STEPS).equal(wanted)
    found = tables.read(tmp_path / "one.safetensors", "soda")
    assert found.errors.reuse.shape == (STEPS, len(found.plan.sites), 3)
    assert found.conditions["steps"] == STEPS
    assert len(found.conditions["timesteps"]) == STEPS
    # a DiT pipeline does not tell
    assert found.conditions["guidance"] == (None if name == "dit" else 4.0)


def test_tables_are_what_hooks_see(artifact: Path) -> None:
    """Of the networks, which diffusers leaves as modules of their own."""
    found = tables.read(artifact, "soda")
    pipe = pipeline("dit")
    outputs: list[list[Tensor]] = []
    handle = pipe.transformer.transformer_blocks[1].ff.register_forward_hook(
        lambda _, args, result: outputs[-1].append(result)
    )
    for call in calls():
        outputs.append([])
        pipe(**call)
    handle.remove()
    at = found.plan.sites.index(Site(1, "mlp"))
    for step in range(1, STEPS):
        for age in range(1, min(step, 3) + 1):
            each = [cosine_error(one[step], one[step - age]) for one in outputs]
            wanted = torch.cat(each).mean()
            torch.testing.assert_close(
                found.errors.reuse[step, at, age - 1], wanted, atol=1e-5, rtol=1e-4
            )


def test_rows_of_attention_are_measured_as_the_loop_computes_them(
    artifact: Path, tmp_path: Path
) -> None:
    """Rows of networks do not read each other; those of attention read keys of the step before."""
    path = tmp_path / "exact.safetensors"
    calibrate(pipeline("dit"), calls(), Soda(anchors=3, interval=4, exact=True), path)
    exact, quick = (tables.read(one, "soda") for one in (path, artifact))
    assert exact.errors.reuse.nan_to_num().equal(quick.errors.reuse.nan_to_num())
    for at, site in enumerate(exact.plan.sites):
        found, wanted = (one.errors.partial[1:, at] for one in (exact, quick))
        same = torch.isclose(found, wanted, atol=1e-6, rtol=1e-3)
        assert bool(same.all()) == (site.module == "mlp")
        assert found.isfinite().all()


def test_an_interrupted_calibration_goes_on(
    tmp_path: Path, artifact: Path, monkeypatch: Any
) -> None:
    monkeypatch.setattr("vlmopt.partial.SAVE_EVERY", 1)
    path = tmp_path / "again.safetensors"

    def stop(done: int, total: int | None) -> None:
        assert total == 2
        raise KeyboardInterrupt

    one = Soda(anchors=3, interval=4)
    with pytest.raises(KeyboardInterrupt):
        calibrate(pipeline("dit"), calls(), one, path, progress=stop)
    runs: list[int] = []
    pipe = pipeline("dit")
    monkeypatch.setattr(type(pipe), "progress_bar", _counting(type(pipe).progress_bar, runs))
    calibrate(pipe, calls(), one, path)
    assert len(runs) == 2  # once for the capture
    first, second = tables.read(artifact, "soda"), tables.read(path, "soda")
    assert first.plan == second.plan
    assert first.errors.reuse.nan_to_num().equal(second.errors.reuse.nan_to_num())
    assert not list(tmp_path.glob("*.partial"))


def _counting(method: Any, runs: list[int]) -> Any:
    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        runs.append(1)
        return method(self, *args, **kwargs)

    return counted


def test_soda_from_calibration_to_samples(artifact: Path) -> None:
    program = captured().clone()
    run_pipeline(program, [Soda(artifact=str(artifact), anchors=3, interval=4, rows=0.0)])
    session = DenoiseSession(program, backend="eager")
    assert len(session.plan.anchors) == 3
    assert len(session.graphs) == 2
    pipe = pipeline("dit")
    wanted = denoisers.sample(pipe, "dit", guided=True, steps=STEPS)
    session.install(pipe)
    found = denoisers.sample(pipe, "dit", guided=True, steps=STEPS)
    assert found.isfinite().all()
    assert not found.equal(wanted)


def test_without_anchors_the_plan_of_the_artifact_is_followed(artifact: Path) -> None:
    one = Soda(artifact=str(artifact))
    program = captured()
    plan = one.plan(program, find_branches(program["denoiser"]))
    assert plan == tables.read(artifact, "soda").plan
    assert len(plan.anchors) == 3


def test_as_many_anchors_as_steps_change_nothing(artifact: Path) -> None:
    program = captured().clone()
    run_pipeline(program, [Soda(artifact=str(artifact), anchors=STEPS, interval=4)])
    pipe = pipeline("dit")
    wanted = denoisers.sample(pipe, "dit", guided=True, steps=STEPS)
    DenoiseSession(program, backend="eager").install(pipe)
    assert denoisers.sample(pipe, "dit", guided=True, steps=STEPS).equal(wanted)


def test_tables_of_another_model(artifact: Path) -> None:
    with pytest.raises(ArtifactError, match="another model"):
        run_pipeline(captured("wan").clone(), [Soda(artifact=str(artifact))])
    with pytest.raises(OptionError, match="needs tables"):
        run_pipeline(captured().clone(), "soda{anchors=3}")
    with pytest.raises(ArtifactError, match=r"without 1\.mlp; with 2\.mlp"):
        tables.require_sites("x", (Site(2, "mlp"),), (Site(1, "mlp"),))


def test_every_difference_between_loops_is_named() -> None:
    made = {"scheduler": "DDIMScheduler", "steps": 20, "guidance": None, "shape": [2, 1, 16, 16]}
    tables.require_conditions("x", made, {**made, "guidance": 3.0})
    now = {"scheduler": "DPMSolverMultistepScheduler", "steps": 25, "guidance": 2.0, "shape": [4]}
    with pytest.raises(PlanMismatchError) as error:
        tables.require_conditions("x", made, now)
    for text in ("DDIMScheduler", "DPMSolver", "steps 20", "25", "[2, 1, 16, 16]", "[4]"):
        assert text in str(error.value)


def test_tables_of_another_loop(artifact: Path) -> None:
    program = captured().clone()
    program.metadata["loop"] = {**program.metadata["loop"], "scheduler": "PNDMScheduler"}
    with pytest.raises(PlanMismatchError, match="DDIMScheduler, and the loop has PNDMScheduler"):
        run_pipeline(program, [Soda(artifact=str(artifact))])


def example_plan() -> Plan:
    compute, reuse = Choice(Action.COMPUTE), Choice(Action.REUSE)
    sites = (Site(0, "attention"), Site(0, "mlp"))
    rows = (
        (compute, compute),
        (reuse, Choice(Action.PARTIAL, 4)),
        (Choice(Action.FORECAST, order=2), reuse),
    )
    return Plan(sites, rows)


def test_plans_survive_as_json() -> None:
    plan = example_plan()
    values = plan.to_json()
    assert Plan.from_json(values) == plan
    for broken in ({}, {**values, "rows": [[[9, 0]]]}, {**values, "steps": [7]}):
        with pytest.raises(ArtifactError, match="a plan is none"):
            Plan.from_json(broken)


def test_plan_and_tables_of_an_artifact_fit(artifact: Path, tmp_path: Path) -> None:
    found = tables.read(artifact, "soda")
    path = tmp_path / "other.safetensors"
    tables.write(path, "soda", captured(), replace(found, plan=example_plan()), {})
    with pytest.raises(ArtifactError, match="a plan for 3 steps and 2 branches"):
        tables.read(path, "soda")


def test_a_picture_of_a_plan() -> None:
    lines = plan_text(example_plan(), (16, 16)).split("\n")
    assert lines[0].endswith("▼  ")
    assert lines[1] == "0.attention  █·~"
    assert lines[2] == "0.mlp        █▂·"
    assert "1 of 3 steps" in lines[3]
    svg = plan_svg(example_plan(), (16, 16))
    # 6 squares, one of which is filled by a quarter; the background; 4 in the legend
    assert svg.count("<rect") == 6 + 1 + 1 + 4


def test_options() -> None:
    assert str(FixedInterval(interval=3)) == "fixed-interval{interval=3}"
    with pytest.raises(OptionError):
        Soda(rows=1.5)
