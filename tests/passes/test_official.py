"""Options for what a paper, or its official code, does otherwise than the default."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles import encoded, methods
from oracles.agreement import captured, check
from oracles.centrifugal import vlm_pruner
from oracles.plans import half
from oracles.reduced import Choice, Recorded, ReducedOracle

import vlmopt
from vlmopt.calibration import calibrate
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens.coin import CoIn
from vlmopt.passes.tokens.hawk import Hawk
from vlmopt.passes.tokens.hilo_prune import HiLoPrune
from vlmopt.passes.tokens.v2drop import V2Drop
from vlmopt.passes.tokens.visionzip import VisionZip
from vlmopt.passes.tokens.vlm_pruner import VlmPruner
from vlmopt.pipeline.manager import run_pipeline


def every(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


@pytest.mark.parametrize(("metric", "wanted"), [("l2", [5, 0]), ("l1", [7, 0]), ("cosine", [0, 2])])
def test_distances_of_v2drop(metric: str, wanted: list[float]) -> None:
    """A token twice as long, (3, 4) farther, and one that only turns round at length 0.5."""
    before = torch.tensor([[[3.0, 4], [0.5, 0]]])
    after = torch.tensor([[[6.0, 8], [-0.5, 0]]])
    score = V2Drop(metric=metric).score(after, before)
    if metric == "cosine":
        assert score[0].tolist() == pytest.approx(wanted, abs=1e-6)
    else:
        assert score[0, 0] == wanted[0]
        assert score[0, 1] == 1


class TestHawk:
    def test_without_normalisation_a_loud_head_decides(self) -> None:
        logits = torch.tensor([[[1.0, 0], [0, 0.9], [0, 0]]])  # [batch, tokens, heads]
        loud = logits * torch.tensor([1.0, 7])
        for norm, changes in (("l2", False), ("none", True)):
            one, other = (Hawk(norm=norm).score(v, every(1, 3)).argmax() for v in (logits, loud))
            assert bool(one != other) == changes

    def test_it_is_the_weighted_sum_of_the_paper(self) -> None:
        logits = torch.randn(1, 6, 4)
        found = Hawk(norm="none").score(logits, every(1, 6))
        torch.testing.assert_close(found, logits.mean(-1))

    @pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
    def test_the_instruction_stands_between_markers(self, family: str) -> None:
        """Behind an image: text, the end of vision, the question (or none), its end, more text."""
        model = zoo.build(family)
        inputs = zoo.inputs(family, batch=3, text=(12, 11, 10))
        ids, spans = inputs["input_ids"], []
        for row, length in enumerate((3, 1, 0)):
            start = int(torch.nonzero(ids[row] == zoo.IMAGE)[-1]) + 2
            ids[row, start], ids[row, start + length + 1] = 60, 61
            spans.append([*range(start + 1, start + length + 1)] or [start])

        def asked(recorded: Recorded, sample: int) -> list[int]:
            return spans[sample]

        def plan(how: Any) -> list[tuple[int, methods.Choose]]:
            return [(0, methods.hawk(half, model, how))]

        visual = ids == zoo.IMAGE
        oracle = ReducedOracle(model, inputs, visual, plan(asked))
        check(model, inputs, "hawk{keep=0.5 markers=60,61}", oracle)
        plain = ReducedOracle(model, inputs, visual, plan(methods.instruction))
        assert (plain.choices[0].stays != oracle.choices[0].stays).any()

    def test_markers_behind_another_cut(self) -> None:
        model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2)
        inputs["input_ids"][:, -3], inputs["input_ids"][:, -1] = 60, 61
        first = "stride-drop{layers=0 keep=0.5}"
        logits = []
        for second in ("hawk{layers=1 keep=0.5}", "hawk{layers=1 keep=0.5 markers=60,61}"):
            twin = vlmopt.optimize(model, inputs, f"{first} | {second}", backend="eager")
            with torch.no_grad():
                logits.append(twin(**inputs).logits)
        assert logits[0].shape == logits[1].shape

    def test_markers_need_ids(self) -> None:
        model, inputs = zoo.build("llava"), zoo.inputs("llava")
        with pytest.raises(OptionError, match="option markers has 1 values"):
            vlmopt.optimize(model, inputs, "hawk{markers=60}", backend="eager")
        options: Any = {"passes": "hawk{keep=0.5 markers=60,61}", "lowering": "eager"}
        torch._dynamo.reset()
        with pytest.raises(Exception, match="does not see the ids of tokens"), torch.no_grad():
            torch.compile(model, backend="vlmopt", options=options)(**inputs)

    def test_heads_left_out_of_all_layers(self, tmp_path: Path) -> None:
        model, inputs = zoo.build("llava", layers=2), zoo.inputs("llava")
        found = calibrate(model, [inputs], Hawk(all_layers=True), tmp_path / "hawk.json")
        whole = self.answer(model, inputs)
        apart = []
        for head in range(4):
            layers = [layer.self_attn.o_proj.weight for layer in model.get_decoder().layers]
            size = layers[0].shape[1] // 4
            saved = [weight.detach().clone() for weight in layers]
            for weight in layers:
                weight.data[:, head * size : (head + 1) * size] = 0
            other = self.answer(model, inputs)
            for weight, value in zip(layers, saved, strict=True):
                weight.data.copy_(value)
            apart.append(sum(p * math.log(p / q) for p, q in zip(whole, other, strict=True)))
        above = [value - min(apart) for value in apart]
        wanted = [value / sum(above) for value in above]
        assert found["weights"] == pytest.approx(wanted, abs=1e-3)
        assert calibrate(model, [inputs], Hawk(), tmp_path / "one.json")["weights"] != wanted

    @torch.no_grad()
    def answer(self, model: Any, inputs: dict[str, torch.Tensor]) -> list[float]:
        chances: list[float] = model(**inputs).logits[0, -1].double().softmax(-1).tolist()
        return chances


class TestCoIn:
    def test_volume_of_directions_alone(self) -> None:
        rows, text = torch.randn(1, 9, 4), torch.randn(1, 4)
        scaled = rows * (1 + 9 * torch.rand(1, 9, 1))
        for unit in (True, False):
            method = CoIn(alpha=1.0, unit=unit)
            one, other = (method.score(each, text, every(1, 9), 3) for each in (rows, scaled))
            assert torch.equal(one, other) == unit

    def test_gains_by_the_extremes_of_the_first_step(self) -> None:
        rows, text = torch.randn(1, 12, 6), torch.randn(1, 6)
        found = {}
        for norm in ("step", "global"):
            method = CoIn(alpha=0.5, norm=norm)
            score = method.score(rows, text, every(1, 12), 4)[0]
            found[norm] = score.argsort(descending=True)[:4].tolist()
        method = CoIn()
        information = method.information(rows, text, every(1, 12))[0].tolist()
        gram = rows[0] @ rows[0].T + 1e-6 * rows.square().sum(-1).mean() * torch.eye(12)
        low, high = gram.diagonal().log().min(), gram.diagonal().log().max()
        picks: list[int] = []
        while len(picks) < 4:
            worth = {}
            for at in set(range(12)) - set(picks):
                more = [*picks, at]
                gain = gram[more][:, more].logdet()
                gain = gain - gram[picks][:, picks].logdet() if picks else gain
                worth[at] = 0.5 * information[at] + 0.5 * float((gain - low) / (high - low))
            picks.append(max(worth, key=lambda at: worth[at]))
        assert found["global"] == picks


class TestVlmPruner:
    def test_lines_wrap_at_twice_the_columns(self) -> None:
        """The official Qwen code: grids of patches, of which four make a token."""
        tiny, inputs = captured("qwen2_5_vl"), zoo.inputs("qwen2_5_vl", batch=3)
        given = {"channels": 256, "batch": 2, "threshold": 0.1, "spatial": 2.0}
        plans = [[(2, vlm_pruner(half, grid, **given))] for grid in ((8, 8), (4, 4))]
        oracle, right = (
            ReducedOracle(tiny.model, inputs, zoo.visual(inputs), plan) for plan in plans
        )
        assert not oracle.choices[0].stays.equal(right.choices[0].stays)
        text = "vlm-pruner{layers=2 keep=0.5 batch=2 threshold=0.1 spatial=2 premerge}"
        check(tiny, inputs, text, oracle)

    def test_what_is_not_there_chooses_no_channels(self) -> None:
        method = VlmPruner(channels=2)
        hidden = torch.randn(1, 6, 5)
        loud = torch.cat([hidden, 100 * torch.randn(1, 3, 5)], 1)
        merged = []
        for rows, valid in ((hidden, every(1, 6)), (loud, torch.arange(9)[None] < 6)):
            kept = (torch.arange(rows.shape[1]) < 2)[None]
            rest = torch.zeros(kept.shape), kept, rows, rows, valid, torch.tensor([[2]]), 2
            merged.append(method.merge(rows, *rest)[:, :2])
        torch.testing.assert_close(*merged)


def test_hilo_rounds_shares() -> None:
    assert [HiLoPrune().quota(count, 0.111) for count in (576, 64)] == [64, 7]
    quotas = HiLoPrune()._quotas(torch.tensor([[576], [64]]), 0.111)
    assert quotas.tolist() == [[64], [7]]


def test_contexts_stand_behind_the_dominant_tokens() -> None:
    """As LLaVA code lines them up: dominant tokens in order, then anchors by attention."""
    tiny, inputs = captured("llava"), zoo.inputs("llava", batch=3)
    found = encoded.Encoded(tiny.model, inputs, "llava")
    first = encoded.duet_encoder(found, 5, 3, 2)

    def choose(recorded: Recorded, layer: int) -> Choice:
        choice = first(recorded, layer)
        assert choice.rows is not None
        for sample, attention in enumerate(found.attention):
            slots = torch.nonzero(recorded.visual[sample])[:, 0].tolist()
            order = sorted(range(len(slots)), key=lambda at: -attention[at])
            stays = [at for at in order if choice.stays[sample, slots[at]]]
            lined_up = sorted(stays[:5]) + stays[5:]
            assert lined_up != sorted(stays)
            rows = choice.rows[sample, [slots[at] for at in lined_up]]
            choice.rows[sample, [slots[at] for at in sorted(stays)]] = rows
        return choice

    oracle = ReducedOracle(
        tiny.model,
        inputs,
        zoo.visual(inputs),
        [(0, choose), (2, methods.duet(half))],
        renumber=True,
    )
    text = (
        "duet-vlm{dominant=5 context=3 width=2 layers=2 keep=0.5 contexts=last positions=renumber}"
    )
    check(tiny, inputs, text, oracle)


def test_contexts_of_visionzip_stay_in_order() -> None:
    attention = torch.tensor([[0.0, 9, 0, 0, 8, 0, 0, 0]])
    values = attention, torch.ones(1, 8, 2), every(1, 8), torch.tensor([[8]])
    merged = []
    for contexts in ("own", "last"):
        method = VisionZip(keep=(0.5,), context=0.5, contexts=contexts)
        kept = method.score(*values) > 0
        assert torch.nonzero(kept[0])[:, 0].tolist() == [0, 1, 4, 5]
        merged.append(method.merge(torch.eye(8)[None], attention, kept, *values)[0, kept[0]])
    assert merged[1].equal(merged[0][[1, 2, 0, 3]])  # 1 and 4 are dominant


class TestApET:
    def test_features_are_merged_before_the_projector(self) -> None:
        tiny, inputs = captured("llava"), zoo.inputs("llava", batch=3)
        found = encoded.Encoded(tiny.model, inputs, "llava")
        assert found.features is not None
        rows = list(found.features)
        plan = [(0, methods.apet(half, 3, features=rows, project=found.project))]
        oracle = ReducedOracle(tiny.model, inputs, zoo.visual(inputs), plan)
        check(tiny, inputs, "apet{keep=0.5 basis=3 space=features}", oracle)

    def test_there_are_features_at_the_first_layer_only(self) -> None:
        program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
        with pytest.raises(OptionError, match="at layer 1, where tokens are no features"):
            run_pipeline(program, "apet{layers=1 keep=0.5 basis=3 space=features}")
        program = vlmopt.capture(zoo.build("smolvlm"), zoo.inputs("smolvlm"))
        with pytest.raises(PreconditionError, match="no projector that makes one token"):
            run_pipeline(program, "apet{keep=0.5 basis=3 space=features}")
