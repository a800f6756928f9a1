"""Late entry of vision, skipped halves of layers, and classes of tokens, against eager runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles import methods
from oracles.agreement import check
from oracles.reduced import Choice, Recorded, ReducedOracle
from oracles.skipped import SkippedOracle, edit

import vlmopt
from vlmopt.calibration import calibrate
from vlmopt.errors import ArtifactError, OptionError, PreconditionError
from vlmopt.passes.tokens import classes, select
from vlmopt.passes.tokens.embedlens import EmbedLens
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program

FAMILIES = ("llava", "gemma3", "qwen2_5_vl")


ANCHORS = (11, 23, 42)


@pytest.fixture(scope="module")
def llava() -> Program:
    return vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))


def half(original: int, present: int) -> int:
    return present // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_dropped_by_the_exact_test(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    table = model.get_input_embeddings().weight.detach()
    oracle = ReducedOracle(model, inputs, visual, [(0, methods.embedlens(half, table, ANCHORS))])
    check(model, inputs, "embedlens{anchors=11,23,42 keep=0.5}", oracle)


@pytest.mark.parametrize("family", FAMILIES)
def test_classes_are_dropped_by_a_calibration(family: str, tmp_path: Path) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    path = tmp_path / "embedlens.json"
    found = calibrate(model, [inputs], EmbedLens(anchors=ANCHORS), path)
    assert found["anchors"] == list(ANCHORS)
    table = model.get_input_embeddings().weight.detach()
    hidden: dict[str, Any] = {}
    with torch.no_grad():
        hook = model.get_decoder().register_forward_pre_hook(
            lambda module, args, kwargs: hidden.update(kwargs), with_kwargs=True
        )
        model(**inputs)
        hook.remove()
    visual = inputs["input_ids"] == zoo.IMAGE
    exact = classes.in_group(hidden["inputs_embeds"][visual], table, ANCHORS, 3)
    assert found["group"] == pytest.approx(float(exact.float().mean()), abs=1e-6)
    assert found["agreement"] >= max(found["group"], 1 - found["group"])
    choose = methods.near_anchors(half, table[list(ANCHORS)], found["thresholds"])
    oracle = ReducedOracle(model, inputs, visual, [(0, choose)])
    check(model, inputs, f"embedlens{{artifact={path} keep=0.5}}", oracle)


def synthetic(samples: int) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A table, and tokens: 6 near id 5, 4 near id 9, 10 of their own in each sample."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(40, 32, generator=generator)
    tokens = []
    for sample in range(samples):
        noise = torch.randn(20, 32, generator=generator)
        centre = torch.zeros(20, 32)
        centre[:6], centre[6:10] = 9 * table[5], 7 * table[9]
        centre[10:] = 2 * table[10 + (torch.arange(10) + 10 * sample) % 30]
        tokens.append(centre + noise)
    return table, tokens


def test_anchors_are_found() -> None:
    table, tokens = synthetic(3)
    rows = [classes.measure(sample, table, (), 1) for sample in tokens]
    found = classes.summarise(rows, table, (), 0.9)
    assert found["anchors"] == [5, 9]
    assert found["shares"] == [0.3, 0.2]
    assert (found["group"], found["agreement"]) == (0.5, 1.0)
    vectors, thresholds = (torch.tensor(found[name]) for name in ("vectors", "thresholds"))
    fast = classes.threshold_margin(tokens[0], vectors, thresholds) >= 0
    assert fast.tolist() == [True] * 10 + [False] * 10
    with pytest.raises(ArtifactError, match="no classes of nearly equal tokens"):
        classes.summarise([classes.measure(tokens[0][10:], table, (), 1)], table, (), 0.9)


def test_third_nearest_counts() -> None:
    """The card's token (0.9, 0.3, 0.1, 0.05) against four unit vectors: near ids 0, 1 and 2."""
    token = torch.tensor([0.9, 0.3, 0.1, 0.05])
    wanted = {0: True, 1: True, 2: True, 3: False}
    for anchor, inside in wanted.items():
        assert bool(classes.in_group(token, torch.eye(4), (anchor,), 3)) is inside
        margin = classes.class_margin(token, torch.eye(4), anchors=(anchor,), top_k=3)
        assert bool(margin >= 0) is inside
    assert not classes.in_group(token, torch.eye(4), (2,), 1)


def test_places_keep_their_gap() -> None:
    """The card's span 2..5 without its second token."""
    score = EmbedLens().score(torch.tensor([[0.0, 0, -0.3, 0.1, -0.2, -0.1, 0]]), torch.zeros(1, 7))
    visual = torch.tensor([[False, False, True, True, True, True, False]])
    assert select.keep_best(score, visual, 6).tolist() == [[0, 1, 2, 4, 5, 6]]


def test_controls() -> None:
    margin, ordinal = torch.tensor([[0.1, -0.1, 0.2, -0.2, -0.3]]), torch.arange(5)[None]
    others = EmbedLens(drop="others").score(margin, ordinal)
    assert others.argsort(descending=True)[0, :2].tolist() == [2, 0]
    blind = [EmbedLens(drop="random", seed=seed).score(margin, ordinal) for seed in range(8)]
    assert all(set(score.topk(2).indices[0].tolist()) == {0, 2} for score in blind)
    assert len({int(score.argmin()) for score in blind}) > 1


def test_artifacts_belong_to_one_checkpoint(tmp_path: Path) -> None:
    inputs = zoo.inputs("llava")
    path = tmp_path / "embedlens.json"
    calibrate(zoo.build("llava"), [inputs], EmbedLens(anchors=ANCHORS), path)
    other = vlmopt.capture(zoo.build("llava", seed=1), inputs)
    with pytest.raises(ArtifactError, match="was made with other embeddings"):
        run_pipeline(other, f"embedlens{{artifact={path}}}")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"thresholds": [0.5]}))
    with pytest.raises(ArtifactError, match="parts that do not fit"):
        run_pipeline(other, f"embedlens{{artifact={path}}}")
    path.write_text(json.dumps({key: content[key] for key in content if key != "vectors"}))
    with pytest.raises(ArtifactError, match="lacks parts: 'vectors'"):
        run_pipeline(other, f"embedlens{{artifact={path}}}")
    with pytest.raises(OptionError, match="needs an artifact, or anchors, and not both"):
        run_pipeline(other, "embedlens")
    with pytest.raises(OptionError, match="there is no id 64"):
        run_pipeline(other, "embedlens{anchors=64}")


def no_vision(until: int | None = None) -> Callable[[Recorded, int], Choice]:
    return lambda recorded, layer: Choice(layer, ~recorded.visual, until=until)


@pytest.mark.parametrize(
    ("family", "entry"), [("llava", 1), ("llava", 2), ("gemma3", 2), ("qwen2_5_vl", 2)]
)
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
def test_what_cannot_be(text: str, message: str, llava: Program) -> None:
    with pytest.raises(PreconditionError, match=message):
        run_pipeline(llava.clone(), text)


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


def test_only_a_class_skips(tmp_path: Path) -> None:
    model = zoo.build("llava")
    inputs = zoo.inputs("llava", text=(6, 9, 4), images=(1, 2, 1))
    visual = inputs["input_ids"] == zoo.IMAGE
    path = tmp_path / "embedlens.json"
    found = calibrate(model, [inputs], EmbedLens(anchors=ANCHORS), path)
    table = model.get_input_embeddings().weight.detach()
    near = methods.near_anchors(
        lambda original, present: present - int(present * 0.3),
        table[list(ANCHORS)],
        found["thresholds"],
    )

    def rows(recorded: Recorded) -> torch.Tensor:
        return visual & ~near(recorded, 0).stays

    oracle = SkippedOracle(model, inputs, visual, (0.5, 1, 2), rows=rows)
    text = f"sublayer-skip{{skip=0.5,1,2 share=0.3 artifact={path}}}"
    check(model, inputs, text, oracle)
    program = vlmopt.capture(model, inputs)
    with pytest.raises(OptionError, match="needs an artifact where share is below 1"):
        run_pipeline(program, "sublayer-skip{skip=1 share=0.3}")
    with pytest.raises(OptionError, match="attention=vt is about all visual tokens"):
        run_pipeline(program, f"sublayer-skip{{skip=1 share=0.3 artifact={path} attention=vt}}")
    with pytest.raises(PreconditionError, match="looks at tokens as they enter layer 0"):
        run_pipeline(program, f"stride-drop{{layers=0}} | {text}")


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
