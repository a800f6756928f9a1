"""``vlmopt calibrate`` of denoising loops."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmopt.cli import main
from vlmopt.denoising.plan import Plan
from vlmopt.passes.denoise import tables

pytest.importorskip("diffusers")

FACTORIES = """
import denoisers

def pair():
    model = denoisers.build("dit")
    calls = (denoisers.call("dit", guided=True, steps=4, seed=seed) for seed in range(2))
    return denoisers.pipeline("dit", model), calls

def number():
    return 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "calibrated_loops.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_a_plan_is_made_and_shown(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", "calibrated_loops:pair", "-p", "soda{anchors=2 interval=3 rows=0.5}"]
    assert main([*command, "-o", "soda.safetensors"]) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert lines[1].startswith("0.attention  █")
    assert "2 of 4 steps" in lines[-1]
    assert "wrote soda.safetensors" in printed.err
    plan = tables.read("soda.safetensors", "soda").plan
    assert len(plan.anchors) == 2
    assert main([*command, "-o", "two.safetensors", "--format", "json"]) == 0
    assert Plan.from_json(json.loads(capsys.readouterr().out)["plan"]) == plan


def test_the_bundled_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", "digits-dit", "-p", "soda{anchors=1 interval=2}", "--steps", "2"]
    command += ["--generations", "1", "--scheduler", "DPMSolverMultistepScheduler"]
    assert main([*command, "-o", "soda.safetensors"]) == 0
    assert "7.mlp" in capsys.readouterr().out
    conditions = tables.read("soda.safetensors", "soda").conditions
    assert conditions["scheduler"] == "DPMSolverMultistepScheduler"
    assert conditions["guidance"] == 1.5
    assert conditions["shape"] == [1, 16, 16]


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digits-dit", "-p", "fixed-interval"], 2, "needs no calibration"),
        (["digits-dit", "-p", "soda", "--steps", "4"], 2, "0 anchors cannot be chosen"),
        (["digits", "-p", "hawk"], 2, "--data SAMPLES"),
        (["digits", "-p", "soda{anchors=2}"], 4, "neither pkg.mod:factory nor digits-dit"),
        (["calibrated_loops:number", "-p", "soda{anchors=2}"], 4, "not (pipeline, calls)"),
        (
            ["digits-dit", "-p", "soda{anchors=2}", "--scheduler", "ddim"],
            2,
            "no scheduler 'ddim'",
        ),
    ],
)
def test_what_cannot_be_calibrated(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    assert main(["calibrate", *arguments, "-o", "x.safetensors"]) == code
    assert message in capsys.readouterr().err
    assert not (folder / "x.safetensors").exists()
