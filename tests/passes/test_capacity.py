"""Experts with a fixed number of pairs, against a dense mask in the untouched eager model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles.experts import ExpertOracle, Rule
from torch import Tensor

import vlmopt
from tests import mixtures
from vlmopt import artifacts
from vlmopt.errors import UnsupportedOperatorError, VlmoptError
from vlmopt.graph.compare import random_inputs
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Modality, Program
from vlmopt.rewrite.capacity import best_of_each, best_pairs

SPECIAL = (1, 6, 7)
GROUPED = torch.ops.vlmopt.grouped_mm.default


def build(family: str) -> Any:
    """A model whose routers tell experts apart: tiny random ones weigh all alike."""
    model = zoo.build(family, layers=2)
    for name, weight in model.named_parameters():
        if name.endswith("gate.weight"):
            weight.data *= 20
    return model


def rows_of_products(program: Program, stage: str) -> list[int]:
    graph = program[stage].graph
    products = graph.find_nodes(op="call_function", target=GROUPED)
    return [int(node.meta["val"].shape[0]) for node in products]


def every(layer: int, weights: list[float], kind: str) -> list[bool]:
    return [True] * len(weights)


def modes(layer: int, weights: list[float], kind: str) -> list[bool]:
    return [weight >= {"text": 0.45, "vision": 0.25}[kind] for weight in weights]


def weighed(layer: int, weight: float, kind: str) -> float:
    return weight * {"text": (0.5, 2.0), "vision": (1.0, 0.25)}[kind][layer]


CASES: list[tuple[str, int, str, Rule, dict[str, Any]]] = [
    ("qwen3_vl_moe", 1, "modes{special=1,6,7 capacity=0.25}", every, {"capacity": 0.25}),
    (
        "qwen3_vl_moe",
        3,
        "modes{text=0.45 vision=0.25 special=1,6,7 capacity=0.6}",
        modes,
        {"capacity": 0.6},
    ),
    (
        "qwen3_vl_moe",
        2,
        "modes{text_weights=0.5,2 vision_weights=1,0.25 special=1,6,7 capacity=0.3}",
        every,
        {"capacity": 0.3, "score": weighed},
    ),
    ("kimi_k25", 2, "modes{special=1,6,7 capacity=0.4}", every, {"capacity": 0.4}),
]


@pytest.mark.parametrize(("family", "batch", "text", "rule", "options"), CASES)
def test_pairs_beyond_the_capacity_are_masked(
    family: str, batch: int, text: str, rule: Rule, options: dict[str, Any]
) -> None:
    model, inputs = build(family), zoo.inputs(family, batch=batch)
    if family == "kimi_k25":
        model.set_experts_implementation("batched_mm")
    padding = inputs["attention_mask"] == 0
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    generated = optimized.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=None)
    special = torch.isin(inputs["input_ids"], torch.tensor(SPECIAL))
    oracle = ExpertOracle(
        build(family), zoo.visual(inputs), rule, special, padding=padding, **options
    )
    wanted = oracle.logits(inputs)
    assert oracle.limited > 0
    assert (out.logits - wanted)[~padding].abs().max() <= 1e-5
    assert generated.tolist() == oracle.generate(inputs, 8).tolist()
    oracle.capacity = 1.0
    assert (oracle.logits(inputs) - wanted)[~padding].abs().max() > 1e-4  # what it is all about
    pairs = inputs["input_ids"].numel() * 2
    program = optimized.vlmopt.program
    assert set(rows_of_products(program, "language_model")) == {
        math.ceil(options["capacity"] * pairs)
    }
    assert set(rows_of_products(program, "decode")) == {math.ceil(options["capacity"] * batch * 2)}


@pytest.fixture(scope="module")
def captured() -> Program:
    return vlmopt.capture(build("qwen3_vl_moe"), zoo.inputs("qwen3_vl_moe"))


def prefill(program: Program) -> tuple[Tensor, ...]:
    stage = program["language_model"]
    with torch.no_grad():
        found: tuple[Tensor, ...] = stage.graph_module(*random_inputs(stage, 3))
    return found


def same_where_all_rows_are_there(captured: Program, options: str) -> Program:
    """``expert-topk`` with fixed sizes, which computes what it does without."""
    static, other = captured.clone(), captured.clone()
    run_pipeline(static, f"expert-topk{{{options} static}}", verify="full")
    run_pipeline(other, f"expert-topk{{{options}}}")
    for one, two in zip(prefill(static), prefill(other), strict=True):
        torch.testing.assert_close(one, two, atol=1e-6, rtol=0)
    assert (prefill(static)[0] - prefill(captured)[0]).abs().max() > 1e-4
    return static


def test_a_number_of_experts_for_each_layer(captured: Program) -> None:
    program = same_where_all_rows_are_there(captured, "k=1,2")
    tokens = captured["language_model"].facts["tokens"]
    wanted = [tokens, tokens, 2 * tokens, 2 * tokens]
    assert rows_of_products(program, "language_model") == wanted
    assert rows_of_products(program, "decode") == [1, 1, 2, 2]


def given() -> tuple[Tensor, Tensor]:
    x = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(1))
    modality = torch.full((2, 6), Modality.TEXT)
    modality[:, 1:4] = Modality.VISION
    modality[0, 0] = Modality.PADDING
    return x, modality


@pytest.mark.parametrize("dispatch", ["grouped", "batched"])
@pytest.mark.parametrize("capacity", [0.1, 0.5, 1.0])
def test_what_an_expert_does_beside_its_products(dispatch: str, capacity: float) -> None:
    layer = mixtures.mixture(
        score="sigmoid",
        scale=2.5,
        correction=torch.tensor([0.5, -0.5, 0.2, 0.0]),
        bias=torch.arange(32.0).view(4, 8) / 10,
        dispatch=dispatch,
    )
    program = mixtures.mixtures(layer, *given())
    run_pipeline(program, f"modes{{capacity={capacity}}}", verify="full")
    weights, _ = layer.route(given()[0].reshape(-1, 8))
    flat = weights.flatten().tolist()
    real = sorted(range(2, 24), key=lambda pair: (-flat[pair], pair))  # not of padding
    stays = torch.zeros(24, dtype=torch.bool)
    stays[real[: math.ceil(capacity * 24)]] = True
    (out,) = program["model"].graph_module(*given())
    wanted = layer.reference(given()[0], stays.view(12, 2))
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_capacities_of_each_layer_from_an_artifact(captured: Program, tmp_path: Path) -> None:
    stage = captured["language_model"]
    values = {
        "layers": [0, 1],
        "weights": {"text": [0.5, 0.5], "vision": [0.5, 0.5]},
        "thresholds": {"text": 0.1, "vision": 0.2},
        "skipped_by_layer": {"text": [0.5, 0.75], "vision": [0.25, 1.0]},
    }
    path = tmp_path / "modes.json"
    artifacts.write(path, "modes", captured, values)
    tokens, (seen,) = stage.facts["tokens"], stage.facts["visual_tokens"]
    text = tokens - seen
    program = captured.clone()
    run_pipeline(program, f"modes{{artifact={path} margin=1.2}}")
    wanted = [math.ceil(1.2 * 2 * (text * 0.5 + seen * 0.75)), math.ceil(1.2 * 2 * text * 0.25)]
    assert rows_of_products(program, "language_model") == [one for one in wanted for _ in "12"]
    assert rows_of_products(program, "decode") == [2, 2, 1, 1]
    program = same_where_all_rows_are_there(captured, f"artifact={path}")
    assert rows_of_products(program, "language_model") == [2 * tokens, 2 * tokens, tokens, tokens]
    assert rows_of_products(program, "decode") == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("modes{capacity=0.5,0.5,0.5}", "capacity has 3 values, and 2 layers"),
        ("modes{margin=1.5}", "margin is a multiple of what an artifact counted"),
        ("expert-topk{k=1,1,1}", "k has 3 values, and 2 layers"),
        ("expert-topk{k=1 static special=1}", "every token computes as many experts"),
        ("naee{beta=0.5 capacity=0.5} | expert-topk", "skipped some of these experts already"),
    ],
)
def test_options_that_do_not_fit(text: str, why: str, captured: Program) -> None:
    with pytest.raises(VlmoptError, match=why):
        run_pipeline(captured.clone(), text)


def test_tokens_are_dropped_before_not_after(captured: Program) -> None:
    """The number of pairs is that of the tokens present; it does not shrink with them."""
    program = captured.clone()
    run_pipeline(program, "v2drop{layers=1 keep=0.5} | modes{capacity=0.5}", verify="full")
    first, *_, last = rows_of_products(program, "language_model")
    assert first > last
    with pytest.raises(UnsupportedOperatorError, match="part of the token axis by position"):
        run_pipeline(captured.clone(), "modes{capacity=0.5} | v2drop{layers=1 keep=0.5}")


def test_ties_go_to_the_earlier_pair() -> None:
    score = torch.tensor([[0.5, 0.2], [0.5, 0.5], [0.2, 0.9]])
    stays = torch.tensor([[True, True], [True, False], [True, True]])
    pairs, chosen = best_pairs(score, stays, 4)
    assert (pairs.tolist(), chosen.tolist()) == ([5, 0, 2, 1], [True] * 4)
    pairs, chosen = best_pairs(score, stays, 6)
    assert (sorted(pairs.tolist()), chosen.tolist()) == ([*range(6)], [True] * 5 + [False])
    pairs, chosen = best_of_each(score, stays, 1)
    assert (pairs.tolist(), chosen.tolist()) == ([0, 2, 5], [True] * 3)


def test_experts_that_no_pair_computes_may_hold_anything() -> None:
    layer = mixtures.mixture(experts=8, k=2)
    weights, ids = layer.route(given()[0].reshape(-1, 8))
    flat = weights.flatten().tolist()
    best = sorted(range(2, 24), key=lambda pair: (-flat[pair], pair))[:3]
    stays = torch.zeros(24, dtype=torch.bool)
    stays[best] = True
    wanted = layer.reference(given()[0], stays.view(12, 2))
    others = sorted(set(range(8)) - set(ids.flatten()[best].tolist()))
    layer.gate_up[others] = layer.down[others] = float("nan")
    program = mixtures.mixtures(layer, *given())
    run_pipeline(program, "modes{capacity=0.125}")
    (out,) = program["model"].graph_module(*given())
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert out.isfinite().all()
