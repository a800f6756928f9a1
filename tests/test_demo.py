from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vlmopt import demo
from vlmopt.bench import prefill
from vlmopt.bench.models import parse_shape
from vlmopt.cli import main


def test_the_demo_tells_what_it_finds(capsys: pytest.CaptureFixture[str]) -> None:
    # speed is not measured: a test must not depend on it
    assert main(["demo", "--questions", "6", "--rounds", "0"]) == 0
    told = capsys.readouterr()
    parts = (
        "@@ language_model  layers.4  [v2drop #1]",
        "  KV cache, 1 sequence",
        "(6 held-out questions)",
        "visual tokens from layer 4 on: 64 -> 16",
        "decode.onnx",
        "checked in ONNX Runtime",
    )
    places = [told.out.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    steps = [line.split("]")[0] for line in told.err.splitlines() if line.startswith("[")]
    assert steps == ["[1/4", "[2/4", "[3/4", "[4/4"]


def test_a_mistake_is_told_before_anything_is_captured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "-q", "-p", "v2drp"]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.startswith("error: ") and "v2drop" in told.err


def test_speed_is_that_of_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    """From times as the benchmark keeps them, by the text of what was timed."""
    pipeline = "v2drop{layers=2 keep=192}"
    cut = prefill.Cut("v2drop", 192, pipeline, 2.0, 1.0, 1e-6)
    seconds = {"hf": [0.4] * 5, pipeline: [0.25] * 5}
    result = prefill.Prefill(parse_shape("2x64"), "float32", "inductor", (cut,), seconds, {})
    monkeypatch.setattr(prefill, "measure", lambda *args, **kwargs: [result])
    steps: Any = SimpleNamespace(detail=lambda text: None)
    told = demo._speed(5, steps)
    assert "1.60 times as fast" in told or "C++ compiler" in told
