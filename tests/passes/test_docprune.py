"""DocPrune: background, question and comprehension."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles import docprune, methods
from oracles.agreement import check
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt.calibration import calibrate
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.lowering.onnx import export_program
from vlmopt.passes.tokens import page, select
from vlmopt.passes.tokens.comprehension_prune import ComprehensionPrune
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program


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

    def test_later_cuts_count_what_is_left(self) -> None:
        model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=3, text=(6, 6, 6))
        visual = inputs["input_ids"] == zoo.IMAGE
        plan = [
            (1, docprune.comprehension(threshold=1.0, most=12)),
            (3, methods.fastv(lambda original, present: present // 2)),
        ]
        oracle = ReducedOracle(model, inputs, visual, plan)
        text = "comprehension-prune{layers=1 keep=0.75 tau_att=1} | fastv{layers=3 keep=0.5}"
        check(model, inputs, text, oracle)

    def test_calibration(self, tmp_path: Path) -> None:
        """The median layer, and room for as many as pass there."""
        model = zoo.build("llava")
        samples = [zoo.inputs("llava", batch=2, seed=seed) for seed in range(2)]
        norms, shares = [], []
        for sample in samples:
            visual = sample["input_ids"] == zoo.IMAGE
            recorded = ReducedOracle(model, sample, visual, []).recorded
            rows = [recorded.hidden[layer][:, -1].norm(dim=-1) for layer in range(1, 4)]
            norms += torch.stack(rows, 1).tolist()
            for b in range(2):
                chosen = [docprune.comprehension(1.0, 16)(recorded, at) for at in range(1, 4)]
                shares.append([int((one.stays & visual)[b].sum()) / 16 for one in chosen])
        tau = sorted(row[1] for row in norms)[1] - 1e-4  # three prompts reach it in layer 1
        path = tmp_path / "found.json"
        method = ComprehensionPrune(tau_comp=tau, tau_att=1.0, quantile=1.0)
        found = calibrate(model, samples, method, path)
        first = [next((at for at, c in enumerate(row) if c >= tau), 3) for row in norms]
        wanted = sorted(first)[1]
        assert len(set(first)) > 1
        assert found["layer"] == wanted + 1
        assert found["keep"] == pytest.approx(max(row[wanted] for row in shares), abs=1e-5)
        text = f"comprehension-prune{{tau_att=1 artifact={path}}}"
        stage = vlmopt.optimize(model, samples[0], text, backend="eager").vlmopt.program
        (cut,) = stage["language_model"].cuts
        assert cut.layer == found["layer"]
        assert cut.visual[0][1] == int(16 * found["keep"])
        never = tmp_path / "never.json"
        calibrate(model, samples[:1], ComprehensionPrune(tau_comp=1e9), never)
        with pytest.raises(OptionError, match="never reach a norm of 1e"):
            vlmopt.optimize(model, samples[0], f"comprehension-prune{{artifact={never}}}")

    def test_what_depends_on_the_prompt_cannot_be_skipped(self) -> None:
        text = "comprehension-prune{layers=1 tau_att=1} | sublayer-skip{skip=2}"
        with pytest.raises(PreconditionError, match="depends on the prompt"):
            run_pipeline(captured("llava"), text)

    def test_the_layer(self) -> None:
        norms = torch.tensor([[10.0, 30, 50, 70]])
        for tau, layer in ((45.0, 2), (50.0, 2), (100.0, 4)):
            assert ComprehensionPrune(tau_comp=tau).understood(norms).tolist() == [layer]

    def test_the_score(self) -> None:
        visual = torch.tensor([[False, True, True, True, False]])
        row = torch.tensor([[5.0, 0.7, 0.2, 0.1, 9.0]]).log()
        method = ComprehensionPrune(tau_att=0.5)
        score = method.score(row, visual)
        torch.testing.assert_close(score, torch.tensor([[0, 2.1, 0.6, 0.3, 0]]))
        assert method.passing(score)[0].tolist() == [False, True, True, False, False]
        even = method.score(torch.zeros(1, 5), visual)
        torch.testing.assert_close(even[visual], torch.ones(3))


@functools.cache
def _captured(family: str) -> Program:
    return vlmopt.capture(zoo.build(family), zoo.inputs(family, batch=2, text=(6, 6)))


def captured(family: str) -> Program:
    """Two images, captured once."""
    return _captured(family).clone()


MERGE = dict.fromkeys(("smolvlm", "internvl", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"), 2)
SIZE = {"llava": 32, "gemma3": 32, "vipllava": 32}
NORMALISED = "mean=0.5,0.5,0.5 std=0.25,0.25,0.25"


def prompt(family: str, seed: int = 0, **options: Any) -> tuple[torch.Tensor, dict[str, Any]]:
    """Three pages, and the inputs that hold them."""
    sheets = docprune.pages(3, SIZE.get(family, 64), seed)
    inputs = zoo.inputs(family, batch=3, **options)
    inputs["pixel_values"] = docprune.pixel_values(family, sheets, 0.5, 0.25)
    return sheets, inputs


def of_background(
    sheets: torch.Tensor, merge: int, tau_bg: float, most: int
) -> list[list[tuple[int, int]]]:
    stay = []
    for sheet in sheets:
        shares = docprune.ink(sheet, 1.0)
        passing = [[share <= tau_bg for share in row] for row in shares]
        score = [[-share for share in row] for row in shares]
        stay.append(docprune.groups(passing, score, merge, most))
    return stay


def oracle_of(
    family: str,
    sheets: torch.Tensor,
    inputs: dict[str, Any],
    stay: list[list[tuple[int, int]]],
    plan: Any = None,
) -> docprune.PrunedOracle:
    plain = {name: value for name, value in inputs.items() if not name.startswith("retrieved")}
    side = sheets.shape[1] // 8
    return docprune.PrunedOracle(
        zoo.build(family), plain, family, stay, side, MERGE.get(family, 1), plan
    )


class TestBackground:
    @pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
    def test_it_equals_its_eager_reference(self, family: str) -> None:
        sheets, inputs = prompt(family)
        tau = 0.6 if family == "llava" else 0.5
        stay = of_background(sheets, MERGE.get(family, 1), tau, 8)
        assert len({len(kept) for kept in stay}) > 1
        assert max(map(len, stay)) == 8  # more pass than there is room for
        oracle = oracle_of(family, sheets, inputs, stay)
        text = f"bg-prune{{tau_bg={tau} keep=0.5 {NORMALISED}}}"
        check(zoo.build(family), inputs, text, oracle, tokens=32 if family == "llava" else 8)

    def test_one_token_of_a_blank_page_stays(self) -> None:
        sheets, inputs = prompt("llava", text=(6, 6, 6))
        sheets[1] = 7
        inputs["pixel_values"] = docprune.pixel_values("llava", sheets, 0.5, 0.25)
        stay = of_background(sheets, 1, 0.6, 16)
        assert stay[1] == [(0, 0)]
        oracle = oracle_of("llava", sheets, inputs, stay)
        text = f"bg-prune{{tau_bg=0.6 keep=1 {NORMALISED}}}"  # keep=1: nothing but the threshold
        check(zoo.build("llava"), inputs, text, oracle, tokens=4)

    def test_nothing_changes_where_nothing_can_go(self) -> None:
        program = captured("llava")
        before = program["vision_encoder"].graph_module.code
        run_pipeline(program, "bg-prune{tau_bg=1 keep=1}")
        assert program["vision_encoder"].graph_module.code == before
        assert not program["language_model"].cuts

    def test_the_encoder_is_smaller(self) -> None:
        program = captured("qwen2_vl")
        run_pipeline(program, "bg-prune{keep=0.25}")
        attention = torch.ops.aten.scaled_dot_product_attention.default
        shapes = [
            tuple(node.args[0].meta["val"].shape)
            for node in program["vision_encoder"].graph.nodes
            if node.target is attention
        ]
        assert shapes == [(2, 4, 16, 8)] * 2  # 4 of 16 tokens, of 4 patches each

    def test_several_images_in_one_row_are_refused(self) -> None:
        program = captured("mistral3")
        with pytest.raises(PreconditionError, match="a mask keeps them apart"):
            run_pipeline(program, "bg-prune{keep=0.5}")

    def test_windows_that_end_with_the_image(self) -> None:
        """Three by three tokens, in windows of 2 x 2, 2 x 1, 1 x 2 and one."""
        sheets = docprune.pages(1, 48, seed=1)
        inputs = zoo.of_grid(zoo.inputs("qwen2_5_vl"), [(6, 6)])
        inputs["pixel_values"] = docprune.pixel_values("qwen2_5_vl", sheets, 0.5, 0.25)
        stay = of_background(sheets, 2, 0.5, 5)
        assert len(stay[0]) == 5
        oracle = oracle_of("qwen2_5_vl", sheets, inputs, stay)
        text = f"bg-prune{{tau_bg=0.5 keep=5 {NORMALISED}}}"
        check(zoo.build("qwen2_5_vl"), inputs, text, oracle, tokens=4)

    @pytest.mark.parametrize(
        ("family", "grids", "message"),
        [
            ("qwen2_5_vl", [(6, 6), (6, 6)], "in one row of several images, and images or windows"),
            ("qwen2_5_vl", [(8, 8), (4, 8)], "in one row of several images, and images or windows"),
            ("qwen2_vl", [(8, 8), (4, 8)], "a mask keeps them apart"),
        ],
    )
    def test_what_differs_in_size(
        self, family: str, grids: list[tuple[int, int]], message: str
    ) -> None:
        inputs = zoo.of_grid(zoo.inputs(family, images=(2,)), grids)
        program = vlmopt.capture(zoo.build(family), inputs)
        with pytest.raises(PreconditionError, match=message):
            run_pipeline(program, "bg-prune{keep=0.5}")

    def test_nothing_is_seen_in_a_window_without_ink(self) -> None:
        """Fillers alone are left there; what they compute reaches nobody."""
        sheets, inputs = prompt("qwen2_5_vl", text=(6, 6, 6))
        sheets[:, :32] = 255
        inputs["pixel_values"] = docprune.pixel_values("qwen2_5_vl", sheets, 0.5, 0.25)
        stay = of_background(sheets, 2, 0.5, 15)
        assert all(row >= 2 for kept in stay for row, _ in kept)
        assert max(map(len, stay)) < 9  # so that fillers stand in both upper windows
        oracle = oracle_of("qwen2_5_vl", sheets, inputs, stay)
        text = f"bg-prune{{tau_bg=0.5 keep=15 {NORMALISED}}}"
        check(zoo.build("qwen2_5_vl"), inputs, text, oracle, tokens=4)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("bg-prune | query-prune", "bg-prune has already"),
            ("bg-prune | tome{r=2}", "bg-prune has already"),
            ("visionzip{layers=1} | bg-prune", "reads what each patch"),
            ("fastv | bg-prune", "has already cut"),
        ],
    )
    def test_other_passes(self, text: str, message: str) -> None:
        program = captured("llava")
        with pytest.raises(PreconditionError, match=message):
            run_pipeline(program, text)

    def test_background_of_the_card(self) -> None:
        sheet = torch.full((4, 4), 255)
        sheet[0, 0] = 0
        patches = sheet.view(2, 2, 2, 2).transpose(1, 2).reshape(1, 4, 4)
        assert page.background(patches, 1.0).tolist() == [[3, 4, 4, 4]]
        for tau, stays in ((0.8, [0]), (1.0, [0, 1, 2, 3]), (0.75, [0]), (0.7, [])):
            passing = page.foreground(patches, 1.0, tau)[1]
            assert torch.nonzero(passing[0])[:, 0].tolist() == stays

    def test_nearly_the_same_value(self) -> None:
        gray = torch.tensor([[[255, 255, 255, 254]]])
        assert page.background(gray, 1.0).tolist() == [[3]]
        assert page.background(gray, 2.0).tolist() == [[4]]
        assert page.background(torch.tensor([[[9, 9, 4, 4]]]), 1.0).tolist() == [[2]]

    def test_gray(self) -> None:
        colours = torch.tensor([[255.0, 0, 10], [0, 255.0, 20], [0, 0, 33]]) / 255
        mean, std = (0.1, 0.2, 0.3), (0.5, 0.4, 0.2)
        pixels = (colours - torch.tensor(mean)[:, None]) / torch.tensor(std)[:, None]
        assert page.to_gray(pixels.flatten(), mean, std).tolist() == [76, 150, 18]

    def test_the_best_that_pass(self) -> None:
        score = torch.tensor([[1.0, 5, 3, 3], [1, 2, 3, 4]])
        passing = torch.tensor([[True, False, True, True], [False] * 4])
        slots, real = select.best_passing(score, passing, 2)
        assert slots.tolist() == [[2, 3], [2, 3]]
        assert real.tolist() == [[True, True], [False, True]]
        slots, real = select.best_passing(score, passing, 4)
        assert real.tolist() == [[True, False, True, True], [False, False, False, True]]


def asked(inputs: dict[str, Any], pages: int, tokens: int = 3) -> None:
    """Add what a retriever with 3 by 5 patches says."""
    generator = torch.Generator().manual_seed(5)
    batch = len(inputs["input_ids"])
    inputs["retrieved_question"] = torch.randn(batch, tokens, 6, generator=generator)
    inputs["retrieved_page"] = torch.randn(pages, 15, 6, generator=generator)


def of_question(sheets: torch.Tensor, inputs: dict[str, Any]) -> list[list[list[float]]]:
    return [
        docprune.relevance(sheet, question, (3, 5), sheets.shape[1] // 8, 1.0)
        for sheet, question in zip(
            inputs["retrieved_page"], inputs["retrieved_question"], strict=True
        )
    ]


RETRIEVER = "retriever=3,5,6 question=4"


class TestQuestion:
    @pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
    def test_it_equals_its_eager_reference(self, family: str) -> None:
        sheets, inputs = prompt(family)
        asked(inputs, 3)
        scores = of_question(sheets, inputs)
        tau = 0.2 if family == "qwen2_vl" else 0.11
        stay = [
            docprune.groups(
                [[value >= tau for value in row] for row in score], score, MERGE.get(family, 1), 10
            )
            for score in scores
        ]
        assert len({len(kept) for kept in stay}) > 1
        oracle = oracle_of(family, sheets, inputs, stay)
        text = f"query-prune{{tau={tau} keep=10 {RETRIEVER}}}"
        check(zoo.build(family), inputs, text, oracle, tokens=8)

    def test_embeddings_are_missing_or_of_another_shape(self) -> None:
        inputs = zoo.inputs("llava")
        text = f"query-prune{{{RETRIEVER}}}"
        model = vlmopt.optimize(zoo.build("llava"), inputs, text, backend="eager")
        with pytest.raises(PreconditionError, match="there is no retrieved_question"):
            model(**inputs)
        asked(inputs, 1, tokens=5)
        with pytest.raises(PreconditionError, match=r"\[1, 5, 6\], and the pass was told of"):
            model.generate(**inputs, max_new_tokens=1)

    def test_a_question_said_twice_counts_twice(self) -> None:
        generator = torch.Generator().manual_seed(0)
        pages = torch.randn(2, 15, 6, generator=generator)
        question = torch.randn(2, 4, 6, generator=generator)
        once = page.similarity(pages, question)
        torch.testing.assert_close(page.similarity(pages, question.repeat(1, 2, 1)), 2 * once)
        longer = torch.cat([question, torch.zeros(2, 3, 6)], 1)
        torch.testing.assert_close(page.similarity(pages, longer), once)

    def test_a_grid_that_is_not_there(self) -> None:
        program = captured("qwen2_vl")
        with pytest.raises(PreconditionError, match="form no grid of 6 by 10"):
            run_pipeline(program, "query-prune{size=3,5}")
        with pytest.raises(OptionError, match="option retriever has 2 values"):
            run_pipeline(program, "query-prune{retriever=3,5}")


class TestTogether:
    @pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl"])
    def test_it_equals_its_eager_reference(self, family: str) -> None:
        sheets, inputs = prompt(family)
        asked(inputs, 3)
        scores = of_question(sheets, inputs)
        stay = []
        for sheet, score in zip(sheets, scores, strict=True):
            shares = docprune.ink(sheet, 1.0)
            passing = [
                [a <= 0.8 and b >= 0.0 for a, b in zip(*rows, strict=True)]
                for rows in zip(shares, score, strict=True)
            ]
            stay.append(docprune.groups(passing, score, MERGE.get(family, 1), 10))
        assert len({len(kept) for kept in stay}) > 1
        plan = [(2, docprune.comprehension(threshold=1.0, most=6))]
        oracle = oracle_of(family, sheets, inputs, stay, plan)
        text = (
            f"docprune{{tau_bg=0.8 tau_qst=0 tau_att=1 layers=0,2 keep=10,6 "
            f"{RETRIEVER} {NORMALISED}}}"
        )
        check(zoo.build(family), inputs, text, oracle, tokens=8)

    def test_without_a_question(self) -> None:
        """The parts by themselves do the same, one after the other."""
        sheets, inputs = prompt("llava")
        stay = of_background(sheets, 1, 0.6, 8)
        oracle = oracle_of("llava", sheets, inputs, stay)
        text = f"docprune{{ask=false tau_bg=0.6 layers=0 keep=0.5 {NORMALISED}}}"
        check(zoo.build("llava"), inputs, text, oracle, tokens=2)

    @pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
    def test_onnx_runtime_agrees(self, family: str, tmp_path: Path) -> None:
        program = captured(family)
        run_pipeline(program, f"docprune{{tau_bg=0.004 layers=0,2 keep=0.5,0.5 {RETRIEVER}}}")
        stages = ["vision_encoder", "language_model", "decode"]
        report = export_program(program, tmp_path / "out", stages=stages)
        assert report.examples == 4
        assert "encoded_kept" in report.errors["vision_encoder"]

    def test_layers_that_are_none(self) -> None:
        program = captured("llava")
        with pytest.raises(OptionError, match="not at layers 1,2"):
            run_pipeline(program, "docprune{layers=1,2}")
