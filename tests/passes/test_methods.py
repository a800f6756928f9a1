"""All methods that choose tokens in the language model, against eager references.

Same tokens, same logits, the same 32 tokens generated: batches of different images with padding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracles import methods
from oracles.compared import check
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.pipeline.manager import run_pipeline

Plan = list[tuple[int, methods.Choose]]


def half(original: int, present: int) -> int:
    return present // 2


def quarter_of_all(original: int, present: int) -> int:
    return original // 4


def none(original: int, present: int) -> int:
    return 0


def nearly(share: float) -> methods.Keep:
    return lambda original, present: int(original * share)


CASES: dict[str, tuple[str, Callable[[Any], Plan]]] = {
    "fastv": (
        "fastv{layers=1,3 keep=0.5}",
        lambda model: [(at, methods.fastv(half)) for at in (1, 3)],
    ),
    "pyramid-drop": (
        "pyramid-drop{layers=0,2 keep=0.5,0.25}",
        lambda model: [
            (0, methods.pyramid_drop(half)),
            (2, methods.pyramid_drop(quarter_of_all)),
        ],
    ),
    "duet-vlm": (
        "duet-vlm{layers=1,3 keep=0.5,0 positions=keep}",
        lambda model: [(1, methods.duet(half)), (3, methods.duet(none))],
    ),
    "transprune": (
        "transprune{layers=1,2,3 keep=0.75,0.5,0.25 scored=3 positions=keep}",
        lambda model: [
            (layer, methods.transprune(nearly(share), range(3)))
            for layer, share in ((1, 0.75), (2, 0.5), (3, 0.25))
        ],
    ),
    "hawk": ("hawk{keep=0.5}", lambda model: [(0, methods.hawk(half, model))]),
    "divprune": ("divprune{keep=0.5}", lambda model: [(0, methods.divprune(half))]),
    "prune2drive": (
        "prune2drive{layers=1 keep=0.5}",
        lambda model: [(1, methods.divprune(half))],
    ),
    "coin": ("coin{keep=0.25}", lambda model: [(0, methods.coin(quarter_of_all))]),
    "apet": ("apet{layers=1 keep=0.5 basis=3}", lambda model: [(1, methods.apet(half, 3))]),
    "alvts": (
        "alvts{layers=0,1,3 keep=0.5 rank=32}",
        lambda model: [(at, methods.alvts(half, model)) for at in (0, 1, 3)],
    ),
    "composed": (
        "hawk{keep=0.5} | fastv{layers=2 keep=0.5} | alvts{layers=3 keep=0.5 rank=32}",
        lambda model: [
            (0, methods.hawk(half, model)),
            (2, methods.fastv(half)),
            (3, methods.alvts(half, model)),
        ],
    ),
}
FAMILIES = dict.fromkeys(CASES, ("llava", "qwen2_5_vl")) | {
    "fastv": ("llava", "gemma3", "qwen3_vl", "internvl"),
    "duet-vlm": ("llava", "gemma3", "qwen3_vl", "smolvlm"),
    "hawk": ("llava", "qwen2_5_vl", "qwen3_vl"),
    "alvts": ("llava", "internvl"),
}


@pytest.mark.parametrize(
    ("method", "family"), [(name, family) for name in CASES for family in FAMILIES[name]]
)
def test_a_method_equals_its_eager_reference(method: str, family: str) -> None:
    text, plan = CASES[method]
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = ReducedOracle(model, inputs, visual, plan(model))
    check(model, inputs, text, oracle)


@pytest.mark.parametrize("family", ["llava", "internvl"])
@pytest.mark.parametrize("method", ["duet-vlm", "transprune"])
def test_positions_are_renumbered(method: str, family: str) -> None:
    text, plan = CASES[method]
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = ReducedOracle(model, inputs, visual, plan(model), renumber=True)
    check(model, inputs, text.replace("positions=keep", "positions=renumber"), oracle)
    kept = ReducedOracle(model, inputs, visual, plan(model))
    assert (kept.logits - oracle.logits).abs().max() > 1e-4  # it makes a difference


@pytest.mark.parametrize("method", sorted(CASES))
def test_a_batch_equals_its_samples(method: str) -> None:
    text, _ = CASES[method]
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=3, text=(6, 6, 6))
    with torch.no_grad():
        together = vlmopt.optimize(model, inputs, text, backend="eager")(**inputs).logits
    for sample in range(3):
        single = {name: value[sample : sample + 1] for name, value in inputs.items()}
        with torch.no_grad():
            alone = vlmopt.optimize(model, single, text, backend="eager")(**single).logits
        assert (together[sample] - alone[0]).abs().max() <= 1e-5


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
