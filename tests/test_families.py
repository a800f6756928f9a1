"""More families than the eight of every test: dropping equals hiding, generation included."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import methods
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt.errors import VerifyError


def half(original: int, present: int) -> int:
    return present // 2


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", zoo.MORE_FAMILIES)
def test_dropping_equals_hiding(family: str, batch: int) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=batch)
    visual = inputs["input_ids"] == zoo.IMAGE
    plan = [(1, methods.divprune(half)), (3, methods.divprune(half))]
    oracle = ReducedOracle(model, inputs, visual, plan)
    text = "divprune{layers=1,3 keep=0.5}"
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    kept = out.past_key_values.kept["kept_2_slots"]
    assert kept.tolist() == [torch.nonzero(row)[:, 0].tolist() for row in oracle.present]
    wanted = oracle.logits.gather(1, kept[..., None].expand(-1, -1, oracle.logits.shape[-1]))
    real = inputs["attention_mask"].gather(1, kept).bool()
    assert (out.logits - wanted)[real].abs().max() <= 1e-5
    generated = optimized.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert generated.tolist() == oracle.generate(8).tolist()


def test_experts_that_sort_tokens_are_refused_with_a_way_out() -> None:
    model, inputs = zoo.build("qwen3_vl_moe"), zoo.inputs("qwen3_vl_moe")
    model.set_experts_implementation("grouped_mm")
    with pytest.raises(VerifyError, match=r"set_experts_implementation\(.batched_mm.\)"):
        vlmopt.optimize(model, inputs, "v2drop{layers=1 keep=0.5}", backend="eager")
