"""Late entry of vision, skipped halves of layers, and classes of tokens, against eager runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracles import methods
from oracles.compared import check
from oracles.reduced import Choice, Recorded, ReducedOracle
from oracles.skipped import SkippedOracle, edit

import vlmopt
from vlmopt.errors import PreconditionError
from vlmopt.pipeline.manager import run_pipeline

FAMILIES = ("llava", "gemma3", "qwen2_5_vl")


def no_vision(until: int | None = None) -> Callable[[Recorded, int], Choice]:
    return lambda recorded, layer: Choice(layer, ~recorded.visual, until=until)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("entry", [1, 2])
def test_vision_enters_later(family: str, entry: int) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = ReducedOracle(model, inputs, visual, [(0, no_vision(entry))])
    check(model, inputs, f"vision-entry{{layer={entry}}}", oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_vision_enters_later_and_leaves_earlier(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = ReducedOracle(model, inputs, visual, [(0, no_vision(1)), (3, no_vision())])
    check(model, inputs, "vision-entry{layer=1} | information-horizon{layers=3 keep=0}", oracle)


def test_samples_with_different_numbers_of_images() -> None:
    model = zoo.build("llava")
    inputs = zoo.inputs("llava", text=(6, 9, 4), images=(1, 2, 1))
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = ReducedOracle(model, inputs, visual, [(0, no_vision(2))])
    optimized = vlmopt.optimize(model, inputs, "vision-entry{layer=2}", backend="eager")
    with torch.no_grad():
        found = optimized(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (found - oracle.logits)[real].abs().max() <= 1e-5
    generated = optimized.generate(**inputs, do_sample=False, max_new_tokens=8, eos_token_id=None)
    assert generated.tolist() == oracle.generate(8).tolist()


def test_features_added_between_layers_are_refused() -> None:
    program = vlmopt.capture(zoo.build("qwen3_vl"), zoo.inputs("qwen3_vl"))
    with pytest.raises(PreconditionError, match=r"before layer 1 \(DeepStack\)"):
        run_pipeline(program, "vision-entry{layer=2}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vision-entry{layer=4}", "stage language_model has layers 0 to 3"),
        ("stride-drop{layers=0 keep=0.5} | vision-entry{layer=2}", "has already cut at layer 0"),
        ("vision-entry{layer=2} | stride-drop{layers=1 keep=0.5}", "has already cut at layer 0"),
        ("vision-entry{layer=2} | sublayer-skip{skip=1.5}", "has already taken tokens out"),
        ("sublayer-skip{skip=4}", "stage language_model has layers 0 to 3"),
        ("sublayer-skip{skip=1.25}", "cannot skip 1.25"),
    ],
)
def test_what_cannot_be(text: str, message: str) -> None:
    program: Any = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    with pytest.raises(PreconditionError, match=message):
        run_pipeline(program, text)


@pytest.mark.parametrize(
    ("family", "text", "skip", "attention"),
    [
        ("llava", "sublayer-skip", (1.5,), ("zero",)),
        ("llava", "sublayer-skip{skip=0,2 attention=vv,vt}", (0, 2), ("vv", "vt")),
        ("gemma3", "sublayer-skip{skip=0,1,1.5,3}", (0, 1, 1.5, 3), ("zero",)),
        ("gemma3", "sublayer-skip{skip=0,2 attention=zero,vt}", (0, 2), ("zero", "vt")),
        ("qwen2_5_vl", "sublayer-skip{skip=0,1,1.5,3}", (0, 1, 1.5, 3), ("zero",)),
        ("qwen2_5_vl", "sublayer-skip{skip=0,0.5,2 attention=vv}", (0, 0.5, 2), ("vv",)),
    ],
)
def test_halves_of_layers_are_skipped(
    family: str, text: str, skip: tuple[float, ...], attention: tuple[str, ...]
) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    check(model, inputs, text, SkippedOracle(model, inputs, visual, skip, attention))


def test_shares_that_become_zero() -> None:
    """The card's row: 0.2 to each of three visual tokens, 0.4 to text."""
    shares = torch.tensor([0.2, 0.2, 0.2, 0.4]).expand(1, 1, 4, 4)
    visual = torch.tensor([[True, True, True, False]])
    first = edit(shares, visual, "vt", first_layer=True)[0, 0, 3]
    later = edit(shares, visual, "vt", first_layer=False)[0, 0, 3]
    torch.testing.assert_close(first, torch.tensor([0.6, 0, 0, 0.4]))
    torch.testing.assert_close(later, torch.tensor([0, 0, 0, 0.4]))


def test_only_the_other_rows_are_computed() -> None:
    inputs = zoo.inputs("llava", batch=2, text=(6, 6))
    program = vlmopt.capture(zoo.build("llava"), inputs)
    run_pipeline(program, "sublayer-skip{skip=1,2.5}")
    graph = program["language_model"].graph
    linear = torch.ops.aten.linear.default
    rows = {
        str(node.args[1]).removeprefix("p_layers_").removesuffix("_weight"): node.meta["val"].shape[
            1
        ]
        for node in graph.find_nodes(op="call_function", target=linear)
    }
    tokens = inputs["input_ids"].shape[1]
    fewer = {name for name, count in rows.items() if count == tokens - 16}
    assert fewer == {
        "1_self_attn_q_proj",
        "1_self_attn_o_proj",
        "2_mlp_gate_proj",
        "2_mlp_up_proj",
        "2_mlp_down_proj",
    }
    assert set(rows.values()) == {tokens, tokens - 16}


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_cuts_before_and_behind_skipped_halves(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    keep = methods.fastv(lambda original, present: present // 2)
    plan = [(1, keep), (3, keep)]
    oracle = SkippedOracle(model, inputs, visual, (0.5, 1, 2.5, 3), plan=plan)
    text = "fastv{layers=1,3 keep=0.5} | sublayer-skip{skip=0.5,1,2.5,3}"
    check(model, inputs, text, oracle)
    check(
        model,
        inputs,
        "sublayer-skip{skip=0.5} | fastv{layers=1,3 keep=0.5} | sublayer-skip{skip=1,2.5,3}",
        oracle,
    )


def test_skipping_with_different_numbers_of_images() -> None:
    model = zoo.build("llava")
    inputs = zoo.inputs("llava", text=(6, 9, 4), images=(1, 2, 1))
    visual = inputs["input_ids"] == zoo.IMAGE
    for attention in (("zero", "vt"), ("vv", "vt")):
        oracle = SkippedOracle(model, inputs, visual, (0, 0.5, 2), attention)
        text = f"sublayer-skip{{skip=0,0.5,2 attention={','.join(attention)}}}"
        check(model, inputs, text, oracle)
