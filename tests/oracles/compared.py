"""A pipeline held to an oracle: the same tokens, logits, and 32 tokens generated."""

from __future__ import annotations

from typing import Any

import torch

import vlmopt
from oracles.reduced import ReducedOracle


def check(model: Any, inputs: dict[str, Any], text: str, oracle: ReducedOracle) -> None:
    """Optimize ``model`` by the pipeline ``text``, and compare on ``inputs``."""
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    stage = optimized.vlmopt.program["language_model"]
    kept = out.past_key_values.kept
    for cut, choice in zip(stage.cuts, oracle.choices, strict=True):
        found = kept[f"{cut.kept}_slots"]
        assert found.tolist() == [torch.nonzero(row)[:, 0].tolist() for row in choice.stays]
    last = stage.last_cut
    slots = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    slots = slots if last is None else kept[f"{last.kept}_slots"]
    wanted = oracle.logits.gather(1, slots[..., None].expand(-1, -1, oracle.logits.shape[-1]))
    real = inputs["attention_mask"].gather(1, slots).bool()
    assert (out.logits - wanted)[real].abs().max() <= 1e-5
    generated = optimized.generate(**inputs, do_sample=False, max_new_tokens=32, eos_token_id=None)
    assert generated.tolist() == oracle.generate(32).tolist()
