"""V2Drop and random-drop on real architectures, against oracles that share no code with them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import zoo
from oracles.masked import MaskOracle
from safetensors.torch import load_file

import vlmopt
from vlmopt.errors import NoVisualTokensError, OptionError, PreconditionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.duet_vlm import DuetVlm
from vlmopt.passes.tokens.hawk import Hawk
from vlmopt.passes.tokens.random_drop import RandomDrop
from vlmopt.passes.tokens.v2drop import V2Drop
from vlmopt.pipeline.manager import run_pipeline

VECTORS = Path(os.environ.get("VLMOPT_VECTORS", Path(__file__).parents[3] / "shared" / "vectors"))


class Rounding(V2Drop):
    """Shares rounded to the nearest count."""

    rounding = "round"


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_dropping_equals_masking(family: str, batch: int) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=batch)
    oracle = MaskOracle(model, inputs["input_ids"] == zoo.IMAGE, {1: 0.5, 3: 0.5})
    with torch.no_grad(), oracle.active():
        reference = model(**inputs).logits
    optimized = vlmopt.optimize(model, inputs, "v2drop{layers=1,3 keep=0.5}", backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    kept = out.past_key_values.kept["kept_2_slots"]
    assert [torch.nonzero(row)[:, 0].tolist() for row in oracle.present] == kept.tolist()
    wanted = reference.gather(1, kept[..., None].expand(-1, -1, reference.shape[-1]))
    real = inputs["attention_mask"].gather(1, kept).bool()
    assert (out.logits - wanted)[real].abs().max() <= 1e-5
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths[0] > lengths[1] == lengths[2] > lengths[3]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_the_input_of_the_first_layer_can_be_cut(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=2)
    number = (inputs["input_ids"] == zoo.IMAGE).long().cumsum(1) - 1

    def score(layer: int, *_: torch.Tensor) -> torch.Tensor:
        return RandomDrop(seed=5).score(number)

    oracle = MaskOracle(model, inputs["input_ids"] == zoo.IMAGE, {0: 0.5}, score)
    with torch.no_grad(), oracle.active():
        reference = model(**inputs).logits
    text = "random-drop{layers=0 keep=0.5 seed=5}"
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    kept = out.past_key_values.kept["kept_1_slots"]
    assert [torch.nonzero(row)[:, 0].tolist() for row in oracle.present] == kept.tolist()
    wanted = reference.gather(1, kept[..., None].expand(-1, -1, reference.shape[-1]))
    real = inputs["attention_mask"].gather(1, kept).bool()
    assert (out.logits - wanted)[real].abs().max() <= 1e-5
    assert len({layer.keys.shape[2] for layer in out.past_key_values.layers}) == 1


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_bfloat16_models_score_in_float32(family: str) -> None:
    model = zoo.build(family).bfloat16()
    inputs = zoo.inputs(family, batch=2)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    oracle = MaskOracle(model, inputs["input_ids"] == zoo.IMAGE, {1: 0.5})
    with torch.no_grad(), oracle.active():
        reference = model(**inputs).logits
    optimized = vlmopt.optimize(model, inputs, "v2drop{layers=1 keep=0.5}", backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    nodes = optimized.vlmopt.program["language_model"].graph.nodes
    scores = [node for node in nodes if node.name == "v2drop_score"]
    assert [node.meta["val"].dtype for node in scores] == [torch.float32]
    kept = out.past_key_values.kept["kept_1_slots"]
    assert [torch.nonzero(row)[:, 0].tolist() for row in oracle.present] == kept.tolist()
    wanted = reference.gather(1, kept[..., None].expand(-1, -1, reference.shape[-1]))
    real = inputs["attention_mask"].gather(1, kept).bool()
    assert out.logits.dtype == torch.bfloat16
    # other shapes round otherwise: some units in the last place of bfloat16, 2**-8 of the value
    assert (out.logits - wanted)[real].abs().max() <= 0.04 * reference.abs().max()


@pytest.mark.parametrize("family", ["llava", "gemma3", "qwen2_vl", "qwen3_vl"])
def test_a_batch_equals_its_samples(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=2, text=(6, 6))
    text = "v2drop{layers=1 keep=0.25}"
    with torch.no_grad():
        both = vlmopt.optimize(model, inputs, text, backend="eager")(**inputs).logits
    for sample in range(2):
        single = {key: value[sample : sample + 1] for key, value in inputs.items()}
        if family.startswith("qwen"):  # patches of all images are packed
            per = inputs["pixel_values"].shape[0] // 2
            single["pixel_values"] = inputs["pixel_values"][sample * per : (sample + 1) * per]
        with torch.no_grad():
            alone = vlmopt.optimize(model, single, text, backend="eager")(**single).logits
        assert (both[sample] - alone[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_keeping_everything_changes_nothing(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family)
    program = vlmopt.capture(model, inputs)
    before = [str(stage.graph) for stage in program]
    report = run_pipeline(program, "v2drop{layers=1 keep=1}", verify="full")
    assert [str(stage.graph) for stage in program] == before
    assert not report.records[0].result.changed


def test_golden_vectors_of_the_official_code() -> None:
    folder = VECTORS / "53-v2drop"
    if not folder.is_dir():
        pytest.skip(f"no golden vectors at {folder}")
    cases = sorted(folder.glob("*.json"))
    assert cases
    for case in cases:
        description = json.loads(case.read_text())
        tensors = load_file(case.with_suffix(".safetensors"))
        for stage, keep in enumerate(description["parameters"]["keep"]):
            hidden = tensors[f"s{stage}.h_cur"][None]
            score = V2Drop().score(hidden, tensors[f"s{stage}.h_prev"][None])
            count = hidden.shape[1]
            kept = select.keep_best(
                score, torch.ones(1, count, dtype=torch.bool), V2Drop().quota(count, keep)
            )
            assert kept[0].tolist() == tensors[f"s{stage}.kept_local"].tolist()


def test_score_is_the_norm_of_the_update() -> None:
    norms = torch.tensor([3.0, 1.0, 2.0, 5.0])
    hidden = torch.zeros(1, 4, 2)
    hidden[0, :, 0] = norms
    score = V2Drop().score(hidden, torch.zeros_like(hidden))
    kept = select.keep_best(score, torch.ones(1, 4, dtype=torch.bool), 2)
    assert kept.tolist() == [[0, 3]]
    doubled = torch.tensor([[[4.0, 0.0]]])
    assert V2Drop().score(2 * doubled, doubled).item() == 4
    assert V2Drop().score(doubled.bfloat16(), doubled.bfloat16()).dtype == torch.float32


def test_counts_of_the_paper() -> None:
    quota = V2Drop().quota
    assert [quota(576, 0.5), quota(288, 0.3), quota(86, 0)] == [288, 86, 1]
    assert quota(100, 0.29) == 29  # a float product would give 28


@pytest.mark.parametrize("method", [V2Drop, Hawk, DuetVlm, Rounding])
@pytest.mark.parametrize("keep", [0, 0.111, 0.29, 0.5, 1, 2, 64])
def test_shares_of_tensors_are_those_of_numbers(method: type[TokenDrop], keep: float) -> None:
    counts = [576, 100, 25, 9, 5, 3, 1, 0]
    wanted = [[method().quota(count, keep)] for count in counts]
    assert method()._quotas(torch.tensor(counts)[:, None], keep).tolist() == wanted


def test_ties_go_to_the_lower_index() -> None:
    score = torch.zeros(1, 6)
    visual = torch.tensor([[False, True, True, True, True, False]])
    assert select.keep_best(score, visual, 4).tolist() == [[0, 1, 2, 5]]


def test_ragged_selection_keeps_each_samples_own_quota() -> None:
    visual = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 0, 0, 1, 1, 0]]).bool()
    padding = torch.tensor([[0] * 6, [1, 1, 0, 0, 0, 0]]).bool()
    score = torch.tensor([[0, 4.0, 3, 2, 1, 0], [0, 0, 0, 1.0, 2, 0]])
    slots, valid = select.keep_best_ragged(
        score, visual, padding, torch.tensor([[2], [1]]), length=4
    )
    assert slots.tolist() == [[0, 1, 2, 5], [0, 2, 4, 5]]
    assert valid.all()


def test_random_drop_is_reproducible_and_depends_on_its_seed() -> None:
    number = torch.arange(64)[None]
    first = RandomDrop(seed=0).score(number)
    assert torch.equal(first, RandomDrop(seed=0).score(number))
    assert first.unique().numel() == 64
    orders = {tuple(RandomDrop(seed=s).score(number)[0].argsort().tolist()) for s in range(8)}
    assert len(orders) == 8


def test_passes_compose() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    program = vlmopt.capture(model, inputs)
    run_pipeline(
        program,
        "random-drop{layers=1 keep=0.5} | v2drop{layers=2 keep=0.5} | fold-constants",
        verify="full",
    )
    cuts = program["language_model"].cuts
    assert [cut.visual[0] for cut in cuts] == [(16, 8), (8, 4)]


def test_errors_name_the_reason() -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    with pytest.raises(PreconditionError, match=r"cannot cut at layer 9.*has layers 0 to 3"):
        run_pipeline(program, "v2drop{layers=9 keep=0.5}")
    with pytest.raises(PreconditionError, match="put the pass that cuts earlier first"):
        run_pipeline(program, "v2drop{layers=2 keep=0.5} | v2drop{layers=1 keep=0.5}")
    with pytest.raises(OptionError, match="keep has 2 values for 1 layer"):
        run_pipeline(program, "v2drop{layers=1 keep=0.5,0.5}")
    toy = vlmopt.capture(torch.nn.Linear(2, 2), (torch.ones(1, 2),))
    with pytest.raises(NoVisualTokensError, match="no token of this Linear program"):
        run_pipeline(toy, "v2drop{layers=1 keep=0.5}")
