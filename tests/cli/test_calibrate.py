"""``vlmopt calibrate`` on a tiny model of one's own."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from vlmopt.cli import main
from vlmopt.partial import PartialRows

FACTORIES = """
import zoo
from tests.mixtures import spread

def model():
    return zoo.build("llava", layers=2)

def prompts():
    return [zoo.inputs("llava", batch=1, seed=seed) for seed in range(2)]

def experts():
    return spread(zoo.build("qwen3_vl_moe", layers=2))

def expert_prompts():
    return [zoo.inputs("qwen3_vl_moe")]

def mixture():
    return experts(), zoo.inputs("qwen3_vl_moe")

def other():
    return zoo.build("kimi_k25", layers=2), zoo.inputs("kimi_k25")

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


def test_thresholds_of_experts(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in the search, called again, and used; not by another model."""
    command = ["calibrate", "calibrated_models:experts", "-p", "modes{rho=0.3 grid=3 linear=true}"]
    command += ["--data", "calibrated_models:expert_prompts", "-o", "modes.json"]
    add = PartialRows.add
    added: list[object] = []

    def interrupted(self: PartialRows, row: object) -> None:
        add(self, row)
        added.append(row)
        if len(added) == 2:  # a sample, a setting
            raise KeyboardInterrupt

    monkeypatch.setattr(PartialRows, "add", interrupted)
    assert main(command) == 130
    assert len((folder / "modes.json.partial").read_text().splitlines()) == 2
    assert len((folder / "modes.json.trials.partial").read_text().splitlines()) == 2
    assert not (folder / "modes.json").exists()
    capsys.readouterr()
    assert main(command) == 0
    printed = capsys.readouterr()
    values = json.loads((folder / "modes.json").read_text())
    assert f"thresholds.text: {values['thresholds']['text']}\n" in printed.out
    assert len(added) == 1 + values["trials"]  # nothing was measured twice
    assert re.search(r"samples .* 1/1 ", printed.err)
    assert re.search(rf"settings .* {values['trials']}/\? ", printed.err)
    assert (values["pass"], values["samples"], values["rho"]) == ("modes", 1, 0.3)
    assert values["skipped"] >= 0.3
    shares = values["skipped_by_layer"]
    assert [len(shares[kind]) for kind in ("text", "vision")] == [2, 2]
    assert 0 < max(*shares["text"], *shares["vision"]) <= 1
    assert sorted(path.name for path in folder.glob("modes.json*")) == ["modes.json"]
    assert main(command) == 2
    assert "modes.json exists; --force overwrites it" in capsys.readouterr().err

    use = ["-p", "modes{artifact=modes.json}"]
    assert main(["run", "calibrated_models:mixture", *use]) == 0
    assert "pairs of token and expert are skipped as in calibration" in capsys.readouterr().out
    assert main(["run", "calibrated_models:other", *use]) == 4
    refusal = capsys.readouterr().err
    made_with = f"another model (qwen3_vl_moe, fingerprint {values['model']}; this is kimi_k25, "
    assert f"modes.json was made with {made_with}" in refusal
    assert "vlmopt calibrate MODEL -p modes" in refusal


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
