from __future__ import annotations

import pytest

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
