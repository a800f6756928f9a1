"""More families than the eight of every test: dropping equals hiding, generation included."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import methods
from oracles.agreement import Plan, assert_equals_oracle
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt.errors import CaptureError, PreconditionError
from vlmopt.pipeline.manager import run_pipeline

TEXT = "divprune{layers=1,3 keep=0.5}"


def half(original: int, present: int) -> int:
    return present // 2


def plan(kept: dict[str, torch.Tensor]) -> Plan:
    return [(1, methods.divprune(half)), (3, methods.divprune(half))]


@pytest.mark.parametrize("family", zoo.MORE_FAMILIES)
def test_dropping_equals_hiding(family: str) -> None:
    inputs = zoo.inputs(family, batch=3)
    assert_equals_oracle(zoo.build(family), inputs, TEXT, plan, tokens=8)


REASONS = {
    "florence2": "encodes its prompt apart from the text that it writes",
    "mllama": r"layer 1 of \w+ has 17 keys for a prompt of 12 tokens",
    "lfm2_vl": r"layer 0 of \w+ carries a state that runs through all tokens \(conv_states",
}


@pytest.mark.parametrize("family", zoo.REFUSED_FAMILIES)
def test_a_family_that_cannot_leave_tokens_out_is_refused_with_the_fact(family: str) -> None:
    with pytest.raises(CaptureError, match=REASONS[family]):
        vlmopt.capture(zoo.build(family), zoo.inputs(family))


def test_a_selector_needs_queries_and_keys_of_one_input() -> None:
    program = vlmopt.capture(zoo.build("kimi_k25"), zoo.inputs("kimi_k25"))
    with pytest.raises(PreconditionError, match="query and key of layer 1 are projected from diff"):
        run_pipeline(program, "alvts{layers=1 keep=0.5}")


def test_layers_whose_halves_are_parallel() -> None:
    model = zoo.build("cohere2_vision")
    text = (
        "transprune{layers=1,2 keep=0.75,0.5 scored=2 positions=keep} | "
        "alvts{layers=3 keep=0.5 rank=32}"
    )

    def plan(kept: dict[str, torch.Tensor]) -> Plan:
        return [
            (1, methods.transprune(lambda original, present: original * 3 // 4, range(2))),
            (2, methods.transprune(lambda original, present: original // 2, range(2))),
            (3, methods.alvts(half, model)),
        ]

    assert_equals_oracle(model, zoo.inputs("cohere2_vision", batch=2), text, plan, tokens=8)


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "paligemma"])
def test_dropping_equals_hiding_in_one_sample(family: str) -> None:
    assert_equals_oracle(zoo.build(family), zoo.inputs(family), TEXT, plan, tokens=8)


def test_experts_that_do_not_sort_tokens() -> None:
    model = zoo.build("qwen3_vl_moe")
    model.set_experts_implementation("batched_mm")
    assert_equals_oracle(model, zoo.inputs("qwen3_vl_moe", batch=2), TEXT, plan, tokens=8)


def test_experts_of_unequal_samples() -> None:
    inputs = zoo.inputs("qwen3_vl_moe", text=(6, 8), images=(1, 2))
    assert_equals_oracle(zoo.build("qwen3_vl_moe"), inputs, TEXT, plan, tokens=8)


def test_experts_in_bfloat16() -> None:
    """ATen has a grouped product for it: another operator than in the other tests."""
    model = zoo.build("qwen3_vl_moe").to(torch.bfloat16)
    inputs = zoo.inputs("qwen3_vl_moe", batch=2)
    inputs["pixel_values"] = inputs["pixel_values"].to(torch.bfloat16)
    optimized = vlmopt.optimize(model, inputs, "random-drop{layers=1 keep=0.5}", backend="eager")
    graph = optimized.vlmopt.program["language_model"].graph
    assert graph.find_nodes(op="call_function", target=torch.ops.aten._grouped_mm.default)
    with torch.no_grad():
        out = optimized(**inputs)
    kept = out.past_key_values.kept["kept_1_slots"]
    oracle = ReducedOracle(model, inputs, zoo.visual(inputs), [(1, methods.given(kept))])
    wanted = oracle.logits.gather(1, kept[..., None].expand(-1, -1, oracle.logits.shape[-1]))
    real = oracle.real.gather(1, kept)
    assert (out.logits - wanted)[real].abs().max() <= 0.02 * wanted[real].abs().max()
