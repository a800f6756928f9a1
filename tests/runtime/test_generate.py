"""Generation with dropped tokens, token by token against the masked eager model."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles.masked import MaskOracle

import vlmopt

TEXT = "v2drop{layers=1,3 keep=0.5}"


@pytest.mark.parametrize(("family", "batch"), [("llava", 2), ("gemma3", 1), ("qwen2_5_vl", 2)])
def test_greedy_generation_equals_the_masked_model(family: str, batch: int) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=batch)
    wanted = _generate_masked(model, inputs, 64)
    optimized = vlmopt.optimize(model, inputs, TEXT, backend="eager")
    got = optimized.generate(
        **inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False
    )[:, inputs["input_ids"].shape[1] :]
    assert got.tolist() == wanted.tolist()


def test_beams_run_and_return_the_prompt() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2)
    optimized = vlmopt.optimize(model, inputs, TEXT, backend="eager")
    out = optimized.generate(**inputs, num_beams=3, max_new_tokens=5, do_sample=False)
    assert torch.equal(out[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])


def test_prompts_without_images_are_untouched() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    optimized = vlmopt.optimize(model, inputs, TEXT, backend="eager")
    prompt = torch.tensor([[1, 9, 10, 11]])
    with torch.no_grad():
        assert torch.equal(optimized(input_ids=prompt).logits, model(input_ids=prompt).logits)


def test_the_users_model_is_left_alone() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    with torch.no_grad():
        before = model(**inputs).logits
        modules = dict(model.named_modules())
        vlmopt.optimize(model, inputs, TEXT, backend="eager")(**inputs)
        assert dict(model.named_modules()) == modules
        assert torch.equal(model(**inputs).logits, before)


def test_inductor_keeps_the_same_tokens() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    eager = vlmopt.optimize(model, inputs, TEXT, backend="eager")
    compiled = vlmopt.optimize(model, inputs, TEXT, backend="inductor")
    for seed in range(20):
        inputs["pixel_values"] = torch.randn(
            inputs["pixel_values"].shape, generator=torch.Generator().manual_seed(seed)
        )
        with torch.no_grad():
            one, two = eager(**inputs), compiled(**inputs)
        kept = one.past_key_values.kept["kept_2_slots"]
        assert torch.equal(kept, two.past_key_values.kept["kept_2_slots"])
        assert (one.logits - two.logits).abs().max() <= 1e-5


def _generate_masked(model: object, inputs: dict[str, torch.Tensor], steps: int) -> torch.Tensor:
    """Greedy decoding of the untouched model without a cache of fewer tokens: each step reruns
    nothing, the oracle hides the dropped keys."""
    oracle = MaskOracle(model, inputs["input_ids"] == zoo.IMAGE, {1: 0.5, 3: 0.5})
    prompt = inputs["input_ids"].shape[1]

    def count(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        oracle.seen = ids.shape[1] + 1
        return scores

    with oracle.active():
        out = model.generate(  # type: ignore[attr-defined]
            **inputs,
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            logits_processor=[count],
        )
    return out[:, prompt:]
