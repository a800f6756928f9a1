"""Calibration: the curve of a model whose late layers are blind, resuming, artifacts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

import vlmopt
from vlmopt import artifacts
from vlmopt.calibration import calibrate
from vlmopt.errors import ArtifactError, OptionError, PreconditionError
from vlmopt.passes.tokens.hawk import Hawk
from vlmopt.passes.tokens.information_horizon import InformationHorizon
from vlmopt.passes.tokens.v2drop import V2Drop
from vlmopt.pipeline.manager import run_pipeline


@pytest.fixture(scope="module")
def model() -> Any:
    """Layers from 2 on add no attention: nothing of the image can reach the answer there."""
    made = zoo.build("llava", layers=4)
    for layer in made.get_decoder().layers[2:]:
        torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
    return made


def samples(count: int) -> list[dict[str, Any]]:
    return [zoo.inputs("llava", batch=1, seed=seed) for seed in range(count)]


def test_the_horizon_is_where_vision_stops_to_matter(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "horizon.json"
    values = calibrate(model, samples(3), InformationHorizon(), path)
    assert values["curve"][2:] == [1.0, 1.0]
    assert max(values["curve"][:2]) < 0.99995
    strict = InformationHorizon(tolerance=1e-9).conclude(-torch.tensor([values["curve"]]).log())
    assert strict["horizon"] == 2
    assert json.loads(path.read_text())["model_type"] == "llava"
    program = vlmopt.capture(model, samples(1)[0])
    content = json.loads(path.read_text()) | {"horizon": 2}
    path.write_text(json.dumps(content))
    run_pipeline(program, f"information-horizon{{artifact={path} layers=1,3 keep=0.5,0}}")
    cuts = program["language_model"].cuts
    assert [(cut.layer, cut.visual[0]) for cut in cuts] == [(1, (16, 8)), (2, (8, 0))]


def test_it_goes_on_where_it_was_interrupted(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "horizon.json"
    whole = calibrate(model, samples(3), InformationHorizon(), tmp_path / "whole.json")

    def stop(done: int, total: int | None) -> None:
        assert total == 3
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples(3), InformationHorizon(), path, progress=stop)
    partial = tmp_path / "horizon.json.partial"
    assert len(partial.read_text().splitlines()) == 3
    seen: list[int] = []
    values = calibrate(
        model, samples(3), InformationHorizon(), path, progress=lambda done, _: seen.append(done)
    )
    assert values == whole
    assert not partial.exists()
    partial.write_text('{"options": "hawk"}\n')
    with pytest.raises(ArtifactError, match="left of another calibration"):
        calibrate(model, samples(1), InformationHorizon(), path, overwrite=True)


def test_heads_weigh_what_their_absence_changes(tmp_path: Path) -> None:
    made = zoo.build("llava", layers=2)
    projection = made.get_decoder().layers[0].self_attn.o_proj.weight
    size = projection.shape[1] // 4
    torch.nn.init.zeros_(projection[:, size : 2 * size])  # head 1 says nothing
    values = calibrate(made, samples(2), Hawk(), tmp_path / "hawk.json")
    assert values["weights"][1] == 0
    assert sum(values["weights"]) == pytest.approx(1, abs=1e-5)
    program = vlmopt.capture(made, samples(1)[0])
    run_pipeline(program, f"hawk{{keep=0.5 weights={tmp_path / 'hawk.json'}}}")
    assert program["language_model"].cuts[0].visual == ((16, 8),)


def test_shares_of_the_card() -> None:
    """dS = 2, -1, 0 on one benchmark: 3, 0, 1 of 4."""
    concluded = Hawk().conclude(torch.tensor([[2.0, -1.0, 0.0]], dtype=torch.float64))
    assert concluded["weights"] == [0.75, 0, 0.25]


def test_a_curve_that_never_settles_has_no_horizon(tmp_path: Path) -> None:
    values = InformationHorizon().conclude(torch.tensor([[0.0, 0.0, 1.0]]))
    assert values["horizon"] is None
    program = vlmopt.capture(zoo.build("llava"), samples(1)[0])
    path = tmp_path / "horizon.json"
    artifacts.write(path, "information-horizon", program, values)
    with pytest.raises(OptionError, match="found no layer past which"):
        run_pipeline(program, f"information-horizon{{artifact={path}}}")


def test_only_calibrated_passes_are(model: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="v2drop needs no calibration"):
        calibrate(model, samples(1), V2Drop(), tmp_path / "x.json")
    with pytest.raises(ArtifactError, match="no samples"):
        calibrate(model, [], Hawk(), tmp_path / "x.json")
    assert list(tmp_path.iterdir()) == []


def test_artifacts_are_checked(tmp_path: Path) -> None:
    llava = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    qwen = vlmopt.capture(zoo.build("qwen2_vl"), zoo.inputs("qwen2_vl"))
    path = tmp_path / "hawk.json"
    artifacts.write(path, "hawk", llava, {"weights": [1, 0, 0, 0]})
    assert artifacts.read(path, "hawk", llava)["weights"] == [1, 0, 0, 0]
    encoded_before = {k: v for k, v in zoo.inputs("llava").items() if k != "pixel_values"}
    assert artifacts.read(path, "hawk", vlmopt.capture(zoo.build("llava"), encoded_before))
    rewritten = llava.clone()
    run_pipeline(rewritten, "alvts{layers=1 rank=4}")  # adds weights of its own
    assert artifacts.read(path, "hawk", rewritten)["weights"] == [1, 0, 0, 0]
    with pytest.raises(ArtifactError, match="exists already"):
        artifacts.write(path, "hawk", llava, {})
    with pytest.raises(ArtifactError, match=r"made with another model \(llava, fingerprint"):
        artifacts.read(path, "hawk", qwen)
    with pytest.raises(ArtifactError, match="is for hawk, not for alvts"):
        artifacts.read(path, "alvts")
    with pytest.raises(ArtifactError, match="cannot be read: No such file"):
        run_pipeline(llava, "hawk{weights=nowhere.json}")
    path.write_text("[")
    with pytest.raises(ArtifactError, match="is not JSON"):
        artifacts.read(path, "hawk")
    path.write_text("{}")
    with pytest.raises(ArtifactError, match="is not an artifact"):
        artifacts.read(path, "hawk")
    path.write_text('{"schema": 99}')
    with pytest.raises(ArtifactError, match="has schema 99, this vlmopt reads 1"):
        artifacts.read(path, "hawk")


@pytest.mark.parametrize("text", ["stride-drop{layers=1 %s}", "random-drop{layers=0,2 %s}"])
def test_a_blind_choice_can_be_made_beforehand(text: str) -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2, text=(6, 6))
    logits = []
    for fixed in ("", "fixed"):
        optimized = vlmopt.optimize(model, inputs, text % fixed, backend="eager")
        with torch.no_grad():
            logits.append(optimized(**inputs).logits)
    assert torch.equal(*logits)
    stage = optimized.vlmopt.program["language_model"]
    called = {getattr(node.target, "_opname", "") for node in stage.graph.nodes}
    assert not called & {"gather", "sort"}
    with torch.no_grad():  # a prompt of another layout is captured anew
        moved = {**inputs, "input_ids": inputs["input_ids"].roll(1, dims=1)}
        moved["input_ids"][:, 0] = 1
        optimized(**moved)
    assert len(optimized.vlmopt.specialisations) == 2
    uneven = zoo.inputs("llava", batch=2)
    with pytest.raises(PreconditionError, match="differ in layout"):
        vlmopt.optimize(model, uneven, text % "fixed", backend="eager")
