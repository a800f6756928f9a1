"""``vlmopt calibrate`` on a tiny model of one's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlmopt.cli import main

FACTORIES = """
import zoo

def model():
    return zoo.build("llava", layers=2)

def prompts():
    return [zoo.inputs("llava", batch=1, seed=seed) for seed in range(2)]

def number():
    return 7
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "calibrated_models.py").write_text(FACTORIES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_an_artifact_is_made_and_used(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["calibrate", "calibrated_models:model", "-p", "hawk"]
    command += ["--data", "calibrated_models:prompts", "-o", "hawk.json", "--format", "json"]
    assert main(command) == 0
    printed = capsys.readouterr()
    values = json.loads(printed.out)
    assert len(values["weights"]) == 4
    assert values["samples"] == 2
    assert "wrote hawk.json" in printed.err
    assert json.loads((folder / "hawk.json").read_text())["weights"] == values["weights"]
    assert main(command) == 2  # nothing is overwritten without --force
    assert "hawk.json exists; --force overwrites it" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["digits", "-p", "v2drop", "--data", "digits"], 2, "v2drop needs no calibration"),
        (["digits", "-p", "hawk | hawk", "--data", "digits"], 2, "is not one pass"),
        (
            ["nowhere.vlm", "-p", "hawk", "--data", "digits"],
            4,
            "neither pkg.mod:factory nor digits",
        ),
        (["digits", "-p", "hawk", "--data", "x.csv"], 4, "neither pkg.mod:factory nor digits"),
        (
            ["calibrated_models:number", "-p", "hawk", "--data", "digits"],
            4,
            "calibrated_models:number returned int, not a model",
        ),
    ],
)
def test_mistakes(
    arguments: list[str], code: int, message: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["calibrate", *arguments, "-o", "out.json"]) == code
    assert message in capsys.readouterr().err
    assert not (folder / "out.json").exists()
