"""The information horizon from the probe to the drop, against the eager model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles.agreement import check
from oracles.horizon import horizon_of, withdrawal_curve
from oracles.methods import stride_drop
from oracles.plans import half, none
from oracles.reduced import ReducedOracle

from vlmopt.calibration import calibrate
from vlmopt.passes.tokens.information_horizon import InformationHorizon

FAMILIES = ("llava", "qwen2_5_vl")


def decided(family: str, blind: int) -> Any:
    """A model that answers decidedly, and reads nothing from layer ``blind`` on."""
    model = zoo.build(family)
    with torch.no_grad():
        model.lm_head.weight *= 100
        for layer in model.get_decoder().layers[blind:]:
            layer.self_attn.o_proj.weight.zero_()
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blind", [2, 4])
def test_the_probe_equals_runs_without_vision(family: str, blind: int, tmp_path: Path) -> None:
    model = decided(family, blind)
    samples = [zoo.inputs(family, batch=2, seed=1), zoo.inputs(family, seed=2)]
    curve = withdrawal_curve(model, samples, [zoo.visual(sample) for sample in samples])
    found = calibrate(model, samples, InformationHorizon(), tmp_path / "horizon.json")
    assert found["curve"] == pytest.approx(curve, abs=1e-4)
    assert found["horizon"] == horizon_of(curve, 0.005) == (2 if blind == 2 else None)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_probe_finds_is_what_is_dropped(family: str, tmp_path: Path) -> None:
    """At the layers before the horizon half of the tokens go, at the horizon all."""
    model, path = decided(family, 3), tmp_path / "horizon.json"
    found = calibrate(model, [zoo.inputs(family, seed=3)], InformationHorizon(), path)
    assert found["horizon"] == 3
    inputs = zoo.inputs(family, batch=3)
    plan = [(1, stride_drop(half)), (3, stride_drop(none))]
    oracle = ReducedOracle(model, inputs, zoo.visual(inputs), plan)
    check(model, inputs, f"information-horizon{{layers=1,3 keep=0.5,0 artifact={path}}}", oracle)
