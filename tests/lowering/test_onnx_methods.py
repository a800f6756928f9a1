"""Every method that drops tokens goes out as standard ONNX operators, and keeps the same tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import zoo

import vlmopt
from vlmopt.errors import LoweringError
from vlmopt.lowering.onnx import export_program
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program

PIPELINES = (
    "fastv{layers=1 keep=0.5} | duet-vlm{layers=3 keep=0}",
    "transprune{layers=1,2 keep=0.75,0.25 scored=2}",
    "hawk{keep=0.5} | pyramid-drop{layers=2 keep=0.25}",
    "hawk{keep=0.5 markers=60,61}",
    "divprune{keep=0.5}",
    "coin{keep=0.5}",
    "apet{layers=1 keep=0.5 basis=3}",
    "alvts{layers=1,2 keep=0.5 rank=8}",
    "alvts{layers=1 keep=0.5 rank=8 per_head}",
    "embedlens{anchors=11,23 keep=0.5} | sublayer-skip{skip=1,1.5 attention=zero,vt}",
    "vision-entry{layer=2} | sublayer-skip{skip=2.5,3 attention=vv}",
    "blink{layers=1,2 expand=0.25 drop=0.2} | stride-drop{layers=3 keep=0.25}",
    "information-horizon{layers=1,3 keep=0.5,0 fixed}",
    "comprehension-prune{layers=1 keep=0.5 tau_att=1}",
    "hilo-prune{layers=1 keep=0.25 top=2}",
)


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    return {}


def captured(programs: dict[str, Any], family: str) -> Program:
    if family not in programs:
        inputs = zoo.inputs(family, batch=2, text=(6, 6))
        programs[family] = vlmopt.capture(zoo.build(family), inputs)
    return programs[family].clone()


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_a_method_in_onnx_runtime(pipeline: str, programs: Any, tmp_path: Path) -> None:
    family = "qwen2_5_vl" if pipeline.startswith("hawk") else "llava"
    program = captured(programs, family)
    run_pipeline(program, pipeline)
    report = export_program(program, tmp_path / "out", stages=["language_model", "decode"])
    assert report.examples == 4  # kept slots equal, floats within 1e-4: else it raises
    kept = [name for name in report.errors["language_model"] if name.startswith("kept")]
    assert len(kept) == len(program["language_model"].cuts)


@pytest.mark.parametrize(
    ("family", "giving"), [("qwen2_5_vl", "vision_encoder"), ("aya_vision", "projector")]
)
def test_rows_of_a_merger_in_onnx_runtime(
    family: str, giving: str, programs: Any, tmp_path: Path
) -> None:
    """The stage that merges patches gives them, the language model takes derivatives."""
    program = captured(programs, family)
    run_pipeline(program, "zoo-prune{keep=0.5 directions=6}")
    report = export_program(program, tmp_path / "out", stages=[giving, "language_model"])
    assert report.errors[giving]["encoded_rows"] <= 1e-5
    assert report.errors["language_model"]["kept_1"] == 0


def test_a_long_greedy_selection_is_refused(tmp_path: Path) -> None:
    model = zoo.build("llava", layers=2)
    inputs = zoo.inputs("llava", batch=1)
    program = vlmopt.capture(model, inputs)
    run_pipeline(program, "divprune{keep=0.5}")
    stage = program["language_model"]
    (node,) = [n for n in stage.graph.nodes if "farthest_point" in str(n.target)]
    node.update_arg(4, 300)
    with pytest.raises(LoweringError, match="picks 300 tokens one after the other"):
        export_program(program, tmp_path / "out", stages=["language_model"])
