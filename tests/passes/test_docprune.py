"""DocPrune: background, question and comprehension."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracles import docprune
from oracles.agreement import check
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt.passes.tokens.comprehension_prune import ComprehensionPrune


class TestComprehension:
    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "qwen3_vl"])
    def test_it_equals_its_eager_reference(self, family: str) -> None:
        model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
        visual = inputs["input_ids"] == zoo.IMAGE
        choose = docprune.comprehension(threshold=1.0, most=12)
        oracle = ReducedOracle(model, inputs, visual, [(2, choose)])
        left = (oracle.choices[0].stays & visual).sum(1)
        assert len(set(left.tolist())) > 1  # samples keep different numbers
        check(model, inputs, "comprehension-prune{layers=2 keep=0.75 tau_att=1}", oracle)

    @pytest.mark.parametrize("text", [(6,), (6, 6, 6)])
    @pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
    def test_prompts_without_padding(self, family: str, text: tuple[int, ...]) -> None:
        """Their attention has no mask of its own that could hide anything."""
        model, inputs = zoo.build(family), zoo.inputs(family, batch=len(text), text=text)
        visual = inputs["input_ids"] == zoo.IMAGE
        choose = docprune.comprehension(threshold=1.0, most=12)
        oracle = ReducedOracle(model, inputs, visual, [(2, choose)])
        check(model, inputs, "comprehension-prune{layers=2 keep=0.75 tau_att=1}", oracle)

    def test_shares_of_all_attention(self) -> None:
        model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=3, images=(1, 2, 1))
        visual = inputs["input_ids"] == zoo.IMAGE
        choose = docprune.comprehension(threshold=0.55, most=24, share=0.75, of="prob_mean")
        oracle = ReducedOracle(model, inputs, visual, [(3, choose)])
        text = "comprehension-prune{layers=3 keep=0.75 tau_att=0.55 attention=prob_mean}"
        check(model, inputs, text, oracle)
