"""``vlmopt.export`` composes capture, passes and ONNX."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo

import vlmopt
from tests.toys import Decoder
from vlmopt.errors import OptionError


def test_a_model_is_captured_rewritten_and_exported(tmp_path: Path) -> None:
    report = vlmopt.export(
        zoo.build("llava"),
        tmp_path / "onnx",
        "v2drop{layers=2 keep=0.5}",
        inputs=zoo.inputs("llava"),
    )
    assert [stage.name for stage in report.stages][-3:] == ["language_model", "lm_head", "decode"]
    prefill = next(stage for stage in report.stages if stage.name == "language_model")
    assert prefill.operators["TopK"] > 0
    assert max(prefill.errors.values()) <= 1e-4


def test_a_program_is_left_as_it_is(tmp_path: Path) -> None:
    program = vlmopt.capture(Decoder(), (torch.randn(1, 6, 16),))
    before = str(program["model"].graph)
    report = vlmopt.export(program, tmp_path / "onnx", "fold-constants")
    assert str(program["model"].graph) == before
    assert program.passes == ()
    assert (tmp_path / "onnx" / "model.onnx").stat().st_size == report.sizes["model"]


def test_inputs_belong_to_models(tmp_path: Path) -> None:
    model, inputs = Decoder(), (torch.randn(1, 6, 16),)
    with pytest.raises(OptionError, match="to export a Decoder, example inputs are needed"):
        vlmopt.export(model, tmp_path / "onnx")
    with pytest.raises(OptionError, match="for the inputs that it was captured with"):
        vlmopt.export(vlmopt.capture(model, inputs), tmp_path / "onnx", inputs=inputs)
    assert list(tmp_path.iterdir()) == []
