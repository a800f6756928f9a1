"""All methods that choose tokens in the language model, against eager references.

Same tokens, same logits, the same 32 tokens generated: batches of different images with padding.
"""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles.agreement import assert_equals_oracle, captured, check, check_batch
from oracles.methods import given, prune2drive
from oracles.plans import CASES, FAMILIES, half, quarter_of_all
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.pipeline.manager import run_pipeline


@pytest.mark.parametrize(
    ("method", "family"), [(name, family) for name in CASES for family in FAMILIES[name]]
)
def test_a_method_equals_its_eager_reference(method: str, family: str) -> None:
    text, plan = CASES[method]
    tiny, inputs = captured(family), zoo.inputs(family, batch=3)
    oracle = ReducedOracle(tiny.model, inputs, zoo.visual(inputs), plan(tiny.model))
    check(tiny, inputs, text, oracle)


@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("method", ["coin", "duet-vlm", "transprune"])
def test_positions_are_renumbered(method: str, family: str) -> None:
    text, plan = CASES[method]
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = ReducedOracle(model, inputs, visual, plan(model), renumber=True)
    check(model, inputs, text.replace("positions=keep", "positions=renumber"), oracle)
    kept = ReducedOracle(model, inputs, visual, plan(model))
    assert (kept.logits - oracle.logits).abs().max() > 1e-4  # it makes a difference


@pytest.mark.parametrize("method", ["duet-vlm", "transprune"])
@pytest.mark.parametrize("renumber", [True, False])
def test_samples_with_more_images_than_others(method: str, renumber: bool) -> None:
    """What fills up the shorter samples counts neither as a token nor as a position."""
    text, plan = CASES[method]
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=3, images=(1, 2, 1))
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = ReducedOracle(model, inputs, visual, plan(model), renumber=renumber)
    if renumber:
        text = text.replace("positions=keep", "positions=renumber")
    check(model, inputs, text, oracle)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("layer", [0, 1])
def test_each_view_has_its_own_budget(layer: int, padding: str, family: str) -> None:
    """Two images in each prompt, half of the first and a quarter of the second."""
    images = (2, 2, 2)
    tiny = captured(family)
    inputs = zoo.inputs(family, batch=3, images=images, padding=padding)
    plan = [(layer, prune2drive([half, quarter_of_all]))]
    oracle = ReducedOracle(tiny.model, inputs, zoo.visual(inputs), plan)
    assert (oracle.choices[0].stays & zoo.visual(inputs)).sum(1).tolist() == [8 + 4] * 3
    text = f"prune2drive{{layers={layer} views=2 budgets=0.5,0.25}}"
    check(tiny, inputs, text, oracle, tokens=32 if padding == "left" else 0)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("method", ["random-drop", "information-horizon"])
def test_a_random_choice_is_the_same_for_all_samples(
    method: str, padding: str, family: str
) -> None:
    tiny, inputs = captured(family), zoo.inputs(family, batch=3, padding=padding)
    text = {
        "vlm-pruner, some channels": "vlm-pruner{layers=2 keep=0.5 channels=16 grid=4,4}",
        "random-drop": "random-drop{layers=0,2 keep=0.33,0.5 seed=3}",
        "information-horizon": "information-horizon{layers=0,2 keep=0.33,0 mode=random seed=3}",
    }[method]
    oracle = assert_equals_oracle(
        tiny,
        inputs,
        text,
        lambda kept: [(at, given(kept[f"kept_{n}_slots"])) for n, at in ((1, 0), (2, 2))],
        tokens=32 if padding == "left" else 0,
    )
    visual = zoo.visual(inputs)
    for choice, count in zip(oracle.choices, (5, 2 if method == "random-drop" else 0), strict=True):
        chosen = [row[there].tolist() for row, there in zip(choice.stays, visual, strict=True)]
        assert sum(chosen[0]) == count
        assert chosen == [chosen[0]] * 3


@pytest.mark.parametrize("method", sorted(CASES))
def test_padding_may_stand_on_the_right(method: str) -> None:
    text, plan = CASES[method]
    tiny, inputs = captured("llava"), zoo.inputs("llava", batch=3, padding="right")
    oracle = ReducedOracle(tiny.model, inputs, zoo.visual(inputs), plan(tiny.model))
    check(tiny, inputs, text, oracle, tokens=0)


BATCHED = {name: text for name, (text, _) in CASES.items()} | {
    "transprune, renumbered": "transprune{layers=1,3 keep=0.5,0.25 scored=3 positions=auto}",
    "duet-vlm, renumbered": "duet-vlm{layers=1,3 keep=0.5,0.25 positions=auto}",
    "random-drop": "random-drop{layers=0,2 keep=0.33,0.5}",
    "embedlens": "embedlens{anchors=11,23,42 keep=0.5}",
    "zoo-prune": "zoo-prune{keep=0.5}",
    "score": "score{keep=0.5}",
    "visionzip": "visionzip{keep=0.5}",
    "duet-vlm, both stages": "duet-vlm{dominant=0.5 context=0.125 layers=1,3 keep=0.5,0.25}",
    "hilo-prune": "hilo-prune{keep=0.5}",
    "vision-entry": "vision-entry{layer=2}",
}


@pytest.mark.parametrize("method", sorted(BATCHED))
def test_a_batch_equals_its_samples(method: str) -> None:
    """Different images and texts of different lengths, padded on the left."""
    check_batch(captured("llava"), BATCHED[method], zoo.inputs("llava", text=(6, 11, 6)))


@pytest.mark.parametrize(
    "method", sorted({*BATCHED} - {"vlm-pruner", "vlm-pruner, rounds that end early"})
)
def test_a_batch_with_several_images_equals_its_samples(method: str) -> None:
    images = (1, 2, 1)
    inputs = zoo.inputs("llava", text=(6, 5, 6), images=images)
    check_batch(captured("llava"), BATCHED[method], inputs, images)


@pytest.mark.parametrize("method", ["v2drop", "fastv", "transprune", "hawk", "alvts", "apet"])
def test_a_batch_with_three_axes_of_positions_equals_its_samples(method: str) -> None:
    inputs = zoo.inputs("qwen2_5_vl", text=(6, 11, 6))
    check_batch(captured("qwen2_5_vl"), BATCHED[method], inputs)


def test_several_axes_of_positions_cannot_be_renumbered() -> None:
    model, inputs = zoo.build("qwen2_5_vl"), zoo.inputs("qwen2_5_vl")
    with pytest.raises(PreconditionError, match="several axes of them"):
        vlmopt.optimize(model, inputs, "duet-vlm{layers=1 keep=0.5 positions=renumber}")


def test_tokens_that_come_back_keep_their_positions() -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    with pytest.raises(OptionError, match="the tokens that it leaves out come back"):
        run_pipeline(program, "alvts{layers=1 rank=8 positions=renumber}")


def test_a_cut_that_keeps_all_does_not_count_layers_twice() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2)
    logits = []
    for text in (
        "transprune{layers=1,3 keep=1,0.5 scored=3}",
        "transprune{layers=3 keep=0.5 scored=3}",
    ):
        with torch.no_grad():
            logits.append(vlmopt.optimize(model, inputs, text, backend="eager")(**inputs).logits)
    assert torch.equal(*logits)


def test_prompts_of_any_length_in_one_graph() -> None:
    text = "fastv{layers=1 keep=0.5} | duet-vlm{layers=3 keep=0.25}"
    model = zoo.build("llava")
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="vlmopt", options={"passes": text, "lowering": "eager"}, dynamic=True
    )
    for length in (6, 9):
        inputs = zoo.inputs("llava", batch=2, text=(length, length))
        with torch.no_grad():
            found = compiled(**inputs).logits
            wanted = vlmopt.optimize(model, inputs, text, backend="eager")(**inputs).logits
        assert (found - wanted).abs().max() <= 1e-5
    torch._dynamo.reset()
