"""DocPrune: background, question and comprehension."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from oracles import docprune, methods
from oracles.agreement import check
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt.calibration import calibrate
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens import page, select
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
            vlmopt.optimize(zoo.build("llava"), zoo.inputs("llava"), text)

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


MERGE = {"smolvlm": 2, "internvl": 2, "qwen2_vl": 2, "qwen3_vl": 2, "glm4v": 2}
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


class TestBackground:
    @pytest.mark.parametrize("family", ["llava", "smolvlm", "qwen2_vl", "qwen3_vl"])
    def test_it_equals_its_eager_reference(self, family: str) -> None:
        sheets, inputs = prompt(family)
        merge = MERGE.get(family, 1)
        stay = of_background(sheets, merge, 0.5, 8)
        assert len({len(kept) for kept in stay}) > 1
        assert max(map(len, stay)) == 8
        side = sheets.shape[1] // 8
        oracle = docprune.PrunedOracle(zoo.build(family), inputs, family, stay, side, merge)
        text = f"bg-prune{{tau_bg=0.5 keep=0.5 {NORMALISED}}}"
        check(zoo.build(family), inputs, text, oracle)
