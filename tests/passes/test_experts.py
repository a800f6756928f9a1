"""Skipping experts on real architectures, against a dense mask in the untouched eager model."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles.agreement import check
from oracles.experts import ExpertOracle, Rule
from oracles.methods import v2drop
from oracles.reduced import ReducedOracle

import vlmopt
from tests.mixtures import mixtral, prompt_of_text, spread
from vlmopt import artifacts
from vlmopt.analysis.cost import (
    Pairs,
    computed_pairs,
    node_flops,
    stage_cost,
    tokens_per_layer,
)
from vlmopt.analysis.experts import find_experts
from vlmopt.calibration import calibrate
from vlmopt.errors import OptionError
from vlmopt.graph.compare import random_inputs
from vlmopt.graph.stats import program_stats, stats_text
from vlmopt.lowering.experts import with_kernels, without_skipped_rows
from vlmopt.passes.experts import frontier
from vlmopt.passes.experts.expert_topk import ExpertTopK
from vlmopt.passes.experts.modes import MoDES
from vlmopt.passes.experts.naee import Naee
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Modality
from vlmopt.runtime.model import compile_stage

FAMILIES = ["qwen3_vl_moe", "internvl_moe", "glm4v_moe", "ernie4_5_vl_moe", "aria", "kimi_k25"]
SPECIAL = (1, 6, 7)
GROUPED = torch.ops.vlmopt.grouped_mm.default


def build(family: str, layers: int = 2) -> Any:
    return spread(zoo.build(family, layers=layers))


def modes(text: float, vision: float) -> Rule:
    thresholds = {"text": text, "vision": vision}
    return lambda layer, weights, kind: [weight >= thresholds[kind] for weight in weights]


def marked(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.isin(inputs["input_ids"], torch.tensor(SPECIAL))


def agrees(model: Any, inputs: dict[str, Any], text: str, oracle: ExpertOracle) -> Any:
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    wanted = oracle.logits(inputs)
    real = inputs["attention_mask"].bool()
    assert 0 < oracle.skipped < oracle.total
    assert (out.logits - wanted)[real].abs().max() <= 1e-5
    generated = optimized.generate(**inputs, do_sample=False, max_new_tokens=32, eos_token_id=None)
    assert generated.tolist() == oracle.generate(inputs, 32).tolist()
    return optimized


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_skipping_equals_masking(family: str, batch: int) -> None:
    inputs = zoo.inputs(family, batch=batch)
    oracle = ExpertOracle(build(family), zoo.visual(inputs), modes(0.45, 0.55), marked(inputs))
    agrees(build(family), inputs, "modes{text=0.45 vision=0.55 special=1,6,7}", oracle)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("expert-topk{k=1}", lambda layer, weights, kind: [w == max(weights) for w in weights]),
        (
            "naee{beta=0.7}",
            lambda layer, weights, kind: [w >= 0.7 * max(weights) for w in weights],
        ),
    ],
)
def test_methods_to_compare_with(text: str, rule: Rule) -> None:
    inputs = zoo.inputs("qwen3_vl_moe", batch=2)
    oracle = ExpertOracle(build("qwen3_vl_moe"), zoo.visual(inputs), rule)
    agrees(build("qwen3_vl_moe"), inputs, text, oracle)


@pytest.mark.parametrize("family", ["aria", "kimi_k25"])
def test_weights_copied_for_each_row_are_multiplied_in_groups(family: str) -> None:
    model, inputs = build(family), zoo.inputs(family, batch=2)
    model.set_experts_implementation("batched_mm")
    oracle = ExpertOracle(build(family), zoo.visual(inputs), modes(0.45, 0.55))
    optimized = agrees(model, inputs, "modes{text=0.45 vision=0.55}", oracle)
    for stage in ("language_model", "decode"):
        targets = [node.target for node in optimized.vlmopt.program[stage].graph.nodes]
        assert torch.ops.aten.bmm.default not in targets


def test_a_model_of_text_alone() -> None:
    inputs = prompt_of_text(9)
    visual = torch.zeros_like(inputs["input_ids"]).bool()
    oracle = ExpertOracle(mixtral(), visual, modes(0.45, 0.0))
    agrees(mixtral(), inputs, "modes{text=0.45}", oracle)


class Both(ReducedOracle):  # type: ignore[misc]
    """Tokens hidden and experts masked in one run."""

    def __init__(self, experts: ExpertOracle, *args: Any) -> None:
        self.experts = experts
        super().__init__(experts.model, *args)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        with self.experts.active(), super().active():
            yield


@pytest.mark.parametrize(
    "text",
    [
        "modes{text=0.45 vision=0.55 special=1,6,7} | v2drop{layers=1 keep=0.5}",
        "v2drop{layers=1 keep=0.5} | modes{text=0.45 vision=0.55 special=1,6,7}",
    ],
)
def test_classes_follow_the_tokens_that_stay(text: str) -> None:
    inputs = zoo.inputs("qwen3_vl_moe", batch=3)
    visual = zoo.visual(inputs)
    experts = ExpertOracle(build("qwen3_vl_moe"), visual, modes(0.45, 0.55), marked(inputs))
    oracle = Both(experts, inputs, visual, [(1, v2drop(lambda original, present: present // 2))])
    assert 0 < experts.skipped < experts.total
    check(build("qwen3_vl_moe"), inputs, text, oracle)


@pytest.fixture(scope="module")
def captured() -> tuple[Any, dict[str, torch.Tensor], Any]:
    model, inputs = build("kimi_k25"), zoo.inputs("kimi_k25", batch=2, text=(6, 6))
    return model, inputs, vlmopt.capture(model, inputs)


def prefill(program: Any) -> tuple[torch.Tensor, ...]:
    stage = program["language_model"]
    with torch.no_grad():
        found: tuple[torch.Tensor, ...] = stage.graph_module(*random_inputs(stage, 3))
    return found


def test_thresholds_that_nothing_is_below(captured: Any) -> None:
    """No threshold leaves the graphs alone; the least one leaves every bit of the results."""
    program = captured[2].clone()
    report = run_pipeline(program, "modes", verify="full")
    assert not report.records[0].result.changed
    report = run_pipeline(program, [MoDES(text=1e-30, vision=1e-30)], verify="full")
    assert report.records[0].result.changed
    for found, wanted in zip(prefill(program), prefill(captured[2]), strict=True):
        assert torch.equal(found, wanted)


def test_thresholds_that_all_are_below(captured: Any) -> None:
    """What is left are the shared experts."""
    base = captured[2]
    program = base.clone()
    run_pipeline(program, [MoDES(text=2.0, vision=2.0)], verify="full")
    found = prefill(program)
    off = base.clone()
    stage = off["language_model"]
    for block in find_experts(stage).blocks:
        with stage.graph.inserting_after(block.weighted):
            zeros = stage.graph.call_function(torch.zeros_like, (block.weighted,))
        for user in set(block.weighted.users) - {zeros}:
            user.replace_input_with(block.weighted, zeros)
    stage.graph_module.recompile()
    for value, wanted in zip(found, prefill(off), strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-6, rtol=0)


def test_rows_that_no_expert_computes_are_never_read(captured: Any) -> None:
    program = captured[2].clone()
    run_pipeline(program, [MoDES(text=0.45, vision=0.55)])
    wanted = prefill(program)
    poisoned = []

    def poison(rows: torch.Tensor, weights: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        product = GROUPED(rows, weights, ends)
        product[int(ends[-1]) :] = float("nan")
        poisoned.append(len(product) - int(ends[-1]))
        return product

    for node in program["language_model"].graph.nodes:
        if node.target is GROUPED:
            node.target = poison
    program["language_model"].graph_module.recompile()
    for found, value in zip(prefill(program), wanted, strict=True):
        assert torch.equal(found, value)
    assert all(poisoned)


def routed_flops(stage: Any) -> int:
    """Of all rows of grouped products, computed or not."""
    return sum(node_flops(node) for node in stage.graph.nodes if "grouped_mm" in str(node.target))


def test_flops_are_those_of_the_pairs_that_are_computed(captured: Any) -> None:
    before = captured[2]["language_model"]
    cost = stage_cost(before)
    assert 0 < routed_flops(before) < cost.flops
    program = captured[2].clone()
    run_pipeline(program, "expert-topk{k=1 count=true} | v2drop{layers=1 keep=0.5}")
    stage = program["language_model"]
    pairs = prefill(program)[[port.name for port in stage.outputs].index("expert_pairs")]
    batch, tokens = before.facts["batch"], tokens_per_layer(stage, range(2))
    shares = computed_pairs(stage)
    for (layer, share), counted in zip(shares.items(), pairs, strict=True):
        assert share == pytest.approx(int(counted[:, 1].sum()) / (batch * tokens[layer] * 2))
    assert shares[1] == pytest.approx(0.5)  # no padding here
    program = captured[2].clone()
    run_pipeline(program, "expert-topk{k=1}")
    after = stage_cost(program["language_model"])
    assert after.flops == cost.flops - routed_flops(before) // 2
    assert (cost.pairs, after.pairs) == (Pairs.ALL, Pairs.COUNTED)
    program = captured[2].clone()
    run_pipeline(program, "expert-topk{k=1 static}")  # half of the rows are not there
    assert stage_cost(program["language_model"]).flops == after.flops


@pytest.mark.parametrize("text", ["naee", "modes{text=0.1}", "expert-topk{k=1 special=1}"])
def test_flops_that_only_a_run_would_tell_are_an_upper_bound(captured: Any, text: str) -> None:
    program = captured[2].clone()
    run_pipeline(program, text)
    cost = stage_cost(program["language_model"])
    assert cost.pairs is Pairs.AT_MOST
    assert cost.flops == stage_cost(captured[2]["language_model"]).flops
    shown = stats_text([program_stats(program, text)])
    assert "at most" in next(line for line in shown.splitlines() if "FLOPs, prefill" in line)
    assert "how many pairs of token and expert are skipped is known at run time." in shown


def test_flops_as_measured_in_calibration(captured: Any, tmp_path: Path) -> None:
    program = captured[2].clone()
    before = program["language_model"]
    layers = [block.layer for block in find_experts(before).blocks]
    path = tmp_path / "modes.json"
    values = {
        "layers": layers,
        "weights": {"text": [1.0] * len(layers), "vision": [1.0] * len(layers)},
        "thresholds": {"text": 0.5, "vision": 0.5},
        "skipped_by_layer": {"text": [0.25] * len(layers), "vision": [0.75] * len(layers)},
    }
    artifacts.write(path, "modes", program, values)
    report = run_pipeline(program, f"modes{{artifact={path}}}")
    assert report.records[0].result.changed
    stage = program["language_model"]
    text, vision = sum(stage.facts["text_tokens"]), sum(stage.facts["visual_tokens"])
    share = (0.75 * text + 0.25 * vision) / (text + vision)
    assert computed_pairs(stage) == pytest.approx(dict.fromkeys(layers, share))
    assert computed_pairs(program["decode"]) == pytest.approx(dict.fromkeys(layers, 0.75))
    cost = stage_cost(stage)
    wanted = stage_cost(captured[2]["language_model"]).flops - (1 - share) * routed_flops(stage)
    assert cost.flops == pytest.approx(wanted, abs=len(layers))
    shown = stats_text([program_stats(program, "modes")])
    assert "at most" not in shown
    assert "as many pairs of token and expert are skipped as in calibration." in shown


def test_the_run_time_rule_of_the_card() -> None:
    weights = torch.tensor([[0.5, 0.3, 0.1]]) / 0.9
    kinds = torch.tensor([[Modality.TEXT], [Modality.VISION]])
    stays = MoDES.stays(weights.expand(2, 3), kinds, 0.2, 0.05, 0.03, 0.02)
    assert stays.tolist() == [[True, True, False], [True, False, False]]
    # a score that equals the threshold stays
    assert MoDES.stays(torch.tensor([[0.5]]), kinds[:1], 0.5, 1.0, 0.25, 1.0).item()


def test_fewer_experts_of_equal_weight_are_the_first() -> None:
    weights = torch.tensor([[0.2, 0.4, 0.2, 0.2]])
    text = torch.ones(1, 1, dtype=torch.int64)
    stays = ExpertTopK().stays(weights, text, 2, 1)
    assert stays.tolist() == [[True, True, False, False]]
    assert Naee(beta=0.5).stays(weights, torch.ones(1, 1)).all()


def test_the_frontier_of_the_card() -> None:
    share = [[0.20, 0.40, 0.60], [0.35, 0.55, 0.75], [0.60, 0.80, 0.95]]
    harm = [[0.01, 0.03, 0.06], [0.05, 0.08, 0.12], [0.15, 0.20, 0.30]]
    found = frontier.search_frontier(3, 0.55, lambda i, j: (share[i][j], harm[i][j]))
    assert (found.text, found.vision, found.harm) == (0, 2, 0.06)
    assert {(0, 2), (1, 1), (2, 0)} <= found.evaluated.keys()
    with pytest.raises(OptionError, match=r"skip 0\.950 of all pairs"):
        frontier.search_frontier(3, 0.96, lambda i, j: (share[i][j], harm[i][j]))


@pytest.mark.parametrize("seed", range(20))
def test_the_frontier_of_tables_that_do_not_only_grow(seed: int) -> None:
    """Not optimal there, but feasible, never worse than what was looked at, and as cheap."""
    draw = random.Random(seed)
    size = 15
    table = {
        (i, j): ((i + j) / (2 * size) + draw.uniform(-0.1, 0.1), draw.random())
        for i in range(size)
        for j in range(size)
    }
    table[size - 1, size - 1] = (1.0, 1.0)
    found = frontier.search_frontier(size, 0.5, lambda i, j: table[i, j])
    assert found.share >= 0.5
    feasible = [pair for pair in found.evaluated if table[pair][0] >= 0.5]
    assert found.harm == min(table[pair][1] for pair in feasible)
    assert len(found.evaluated) <= 2 * size


def test_grids_of_thresholds() -> None:
    text = frontier.threshold_grid(100, frontier.TEXT_END)
    vision = frontier.threshold_grid(100, frontier.VISION_END)
    assert [round(value, 7) for value in (text[0], vision[0])] == [9.08e-05, 9.08e-05]
    assert (round(text[-1], 4), round(vision[-1], 4)) == (0.1043, 0.0360)
    assert all(one < two for one, two in itertools.pairwise(text))
    linear = frontier.threshold_grid(5, frontier.TEXT_END, linear=True)
    assert linear[0] == text[0]
    assert linear[-1] == pytest.approx(text[-1])
    assert linear[2] == pytest.approx((text[0] + text[-1]) / 2)
    assert frontier.threshold_grid(3, 1.0)[-1] == 1.0


def test_layers_weigh_as_answers_drift() -> None:
    assert frontier.layer_weights([1.0, 3.0]) == [0.25, 0.75]
    with pytest.raises(OptionError, match="the same without the experts"):
        frontier.layer_weights([0.0, 0.0])


def test_calibration(tmp_path: Path) -> None:
    """Weights sum to 1, enough is skipped, and the artifact does what was measured."""
    model = build("qwen3_vl_moe")
    samples = [zoo.inputs("qwen3_vl_moe", seed=seed) for seed in range(2)]
    labels = torch.full_like(samples[1]["input_ids"], -100)
    labels[:, -3:] = samples[1]["input_ids"][:, -3:]
    samples[1]["labels"] = labels  # the answers, three of them
    path = tmp_path / "modes.json"
    one = MoDES(rho=0.3, grid=4, linear=True)
    runs: list[int] = []

    def interrupt(done: int, total: int | None) -> None:
        runs.append(done)
        if len(runs) == 4:  # in the middle of the search
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples, one, path, progress=interrupt)
    assert runs == [1, 2, 1, 2]
    values = calibrate(model, samples, one, path, progress=lambda done, total: runs.append(done))
    assert runs[4:7] == [1, 2, 3]  # what was measured is not measured again
    assert not list(tmp_path.glob("*.partial"))
    assert [sum(values["weights"][kind]) for kind in ("text", "vision")] == pytest.approx([1, 1])
    assert values["layers"] == [0, 1]
    assert values["skipped"] >= 0.3
    assert values["trials"] <= 8
    for sample in samples:
        sample.pop("labels", None)
    optimized = vlmopt.optimize(
        model, samples[0], f"modes{{artifact={path} count=true}}", backend="eager"
    )
    pairs = torch.zeros(2, 3, 2)
    with torch.no_grad():
        for sample in samples:
            pairs += optimized(**sample).past_key_values.reported["expert_pairs"]
    every, computed = pairs.sum((0, 1)).tolist()
    assert 1 - computed / every == pytest.approx(values["skipped"], abs=1e-6)
    for at, kind in enumerate(("text", "vision")):
        shares = 1 - pairs[:, at, 1] / pairs[:, at, 0]
        assert shares.tolist() == pytest.approx(values["skipped_by_layer"][kind], abs=1e-5)


def test_compiled_rows_of_skipped_pairs_are_left_out() -> None:
    """By Inductor the rows that are computed are all that there are; results are the same."""
    model, inputs = build("qwen3_vl_moe"), zoo.inputs("qwen3_vl_moe", batch=2)
    text = "modes{text=0.45 vision=0.55}"
    eager = vlmopt.optimize(model, inputs, text, backend="eager")
    fast = vlmopt.optimize(model, inputs, text, backend="inductor")
    with torch.no_grad():
        torch.testing.assert_close(
            fast(**inputs).logits, eager(**inputs).logits, atol=1e-5, rtol=1e-5
        )
    stage = fast.vlmopt.program["language_model"].graph_module
    left = without_skipped_rows(stage)
    sizes = []

    class Reader(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n.target is GROUPED:
                sizes.append((result.shape[0], n.meta["val"].shape[0]))
            return result

    with torch.no_grad():
        Reader(left).run(*random_inputs(fast.vlmopt.program["language_model"], 3))
    assert len(sizes) == 4  # two layers, two products each
    assert all(computed < every for computed, every in sizes)


def test_products_of_aten_run_as_those_of_vlmopt_on_the_cpu() -> None:
    class Products(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.randn(3, 16, 8).bfloat16())

        def forward(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = torch._grouped_mm(rows, self.weight.transpose(1, 2), offs=ends)
            return found

    given = torch.randn(7, 8).bfloat16(), torch.tensor([2, 2, 7], dtype=torch.int32)
    gm = vlmopt.capture(Products(), given)["model"].graph_module
    ours = with_kernels(gm)
    assert [
        len(graph.find_nodes(op="call_function", target=GROUPED))
        for graph in (gm.graph, ours.graph)
    ] == [0, 1]
    with torch.no_grad():
        torch.testing.assert_close(ours(*given)[0], gm(*given)[0], atol=3e-2, rtol=1e-2)


@pytest.mark.parametrize("text", [1e-30, 2.0])
def test_compiled_with_nothing_and_everything_skipped(captured: Any, text: float) -> None:
    program = captured[2].clone()
    run_pipeline(program, [MoDES(text=text, vision=text)])
    stage = program["language_model"]
    run = compile_stage(stage, "inductor")
    with torch.no_grad():
        for found, wanted in zip(run(*random_inputs(stage, 3)), prefill(program), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_calibration_as_in_the_paper(tmp_path: Path) -> None:
    """One weight for each layer, scores over all experts; the artifact says so."""
    model, sample = build("qwen3_vl_moe"), zoo.inputs("qwen3_vl_moe")
    path = tmp_path / "modes.json"
    one = MoDES(rho=0.3, grid=3, linear=True, of="scores", shared=True)
    values = calibrate(model, [sample], one, path)
    assert (values["of"], values["shared"]) == ("scores", True)
    assert values["weights"]["text"] == values["weights"]["vision"]
    text = f"modes{{artifact={path} count=true}}"
    optimized = vlmopt.optimize(model, sample, text, backend="eager")
    with torch.no_grad():
        pairs = optimized(**sample).past_key_values.reported["expert_pairs"]
    every, computed = pairs.sum((0, 1)).tolist()
    assert 1 - computed / every == pytest.approx(values["skipped"], abs=1e-6)
