"""The benchmark of whole models on a clip, but for the clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vlmopt.bench import watching
from vlmopt.bench.models import Shape

pytest.importorskip("sklearn")

SHAPE = Shape(2, 64, heads=1, visual=16, vision_layers=2, vision_width=64)
PIPELINE = "stc-cacher{interval=4 ratio=0.5} | v2drop{layers=1 keep=0.5}"


def test_a_clip_is_watched_and_asked_about(monkeypatch: pytest.MonkeyPatch) -> None:
    def uncompiled(function: Any, **options: Any) -> Any:
        return function

    monkeypatch.setattr(torch, "compile", uncompiled)
    (found,) = watching.measure([PIPELINE], shape=SHAPE, rounds=2, streams=1)
    assert {len(times) for times in found.seconds.values()} == {2}
    assert found.asked == 12
    assert 0 < found.right <= 12
    assert found.full >= 11  # the bundled model is right 97 times of 100
    assert 1 < found.ideal < 4
    document = json.loads(json.dumps(found.to_json()))
    assert document["speedup"]["value"] == found.speedup.value
    row = watching.table([found]).splitlines()[-1]
    assert r"ratio=0.5} \| v2drop" in row
    assert f"{found.ideal:.2f}" in row


def test_more_rows_computed_are_more_right_answers() -> None:
    """Of scenes half of which changes, a tenth of the rows is too few and three quarters enough."""
    few, many = (
        watching.answers(f"stc-cacher{{interval=4 ratio={ratio}}}", static=0.5, streams=2)
        for ratio in (0.1, 0.75)
    )
    assert few[0] < many[0]
    assert many[0] >= 23
