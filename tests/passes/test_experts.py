"""Skipping experts on real architectures, against a dense mask in the untouched eager model."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import zoo
from oracles.experts import ExpertOracle, Rule
from oracles.masked import MaskOracle

import vlmopt
from vlmopt.passes.experts.expert_topk import ExpertTopK
from vlmopt.passes.experts.modes import MoDES
from vlmopt.passes.experts.naee import Naee
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Modality

FAMILIES = ["qwen3_vl_moe", "glm4v_moe", "ernie4_5_vl_moe", "aria", "kimi_k25"]
SPECIAL = (1, 6, 7)


def spread(model: Any) -> Any:
    """The model with routers that tell experts apart: tiny random ones weigh all alike."""
    for name, weight in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            weight.data *= 20
    return model


def build(family: str, layers: int = 3) -> Any:
    return spread(zoo.build(family, layers=layers))


def modes(text: float, vision: float) -> Rule:
    thresholds = {"text": text, "vision": vision}
    return lambda layer, weights, kind: [weight >= thresholds[kind] for weight in weights]


def marked(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.isin(inputs["input_ids"], torch.tensor(SPECIAL))


def agrees(model: Any, inputs: dict[str, Any], text: str, oracle: ExpertOracle) -> Any:
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    wanted = oracle.logits(inputs)
    real = inputs["attention_mask"].bool()
    assert 0 < oracle.skipped < oracle.total
    assert (out.logits - wanted)[real].abs().max() <= 1e-5
    generated = optimized.generate(**inputs, do_sample=False, max_new_tokens=32, eos_token_id=None)
    assert generated.tolist() == oracle.generate(inputs, 32).tolist()
    return optimized


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_equals_masking(family: str, batch: int) -> None:
    inputs = zoo.inputs(family, batch=batch)
    oracle = ExpertOracle(build(family), zoo.visual(inputs), modes(0.45, 0.55), marked(inputs))
    agrees(build(family), inputs, "modes{text=0.45 vision=0.55 special=1,6,7}", oracle)
