"""Hi-Lo Prune: selection by pixels and meaning, logits raised before the cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from oracles.agreement import check
from oracles.fused import HiLoOracle

import vlmopt
from vlmopt.encoding import pixels_by_token
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens.hilo_prune import HiLoPrune
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Modality


def patches(family: str, inputs: dict[str, Any]) -> list[torch.Tensor]:
    """Pixels of each visual token, per sample, by what the family's processor does."""
    images = inputs["pixel_values"]
    batch = len(inputs["input_ids"])
    if family.startswith("qwen"):  # rows are patches, four behind each other make a token
        return list(images.view(batch, -1, 4 * images.shape[-1]))
    size = 8  # 32 pixels, 4 patches a side
    rows = torch.nn.functional.unfold(images, size, stride=size).transpose(1, 2)
    return list(rows)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3"])
def test_it_equals_its_eager_reference(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3)
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = HiLoOracle(
        model, inputs, visual, patches(family, inputs), layer=2, keep=0.25, gain=4.0, top=2
    )
    plain = HiLoOracle(
        model, inputs, visual, patches(family, inputs), layer=2, keep=0.25, gain=0.0, top=2
    )
    assert (plain.logits - oracle.logits).abs().max() > 1e-5  # raising makes a difference
    check(model, inputs, "hilo-prune{layers=2 keep=0.25 gain=4 top=2}", oracle)


def test_magnitudes_and_later_cuts() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2)
    visual = inputs["input_ids"] == zoo.IMAGE
    oracle = HiLoOracle(
        model,
        inputs,
        visual,
        patches("llava", inputs),
        layer=3,
        keep=0.5,
        gain=2.0,
        top=3,
        positive=True,
    )
    check(model, inputs, "hilo-prune{layers=3 keep=0.5 gain=2 top=3 positive=true}", oracle)


class TestCard:
    def method(self, **options: Any) -> HiLoPrune:
        return HiLoPrune(**options)

    def test_greedy_diversity(self) -> None:
        rows = torch.tensor([[[1, 0], [0.96, 0.28], [0, 1], [-1, 0], [0.6, 0.8]]])
        order = HiLoPrune.first(rows, torch.ones(1, 5).bool(), torch.tensor([[3]]), 3)
        assert order[0].argsort(descending=True, stable=True)[:3].tolist() == [3, 0, 2]
        assert order[0, [1, 4]].tolist() == [0, 0]

    def test_one_query(self) -> None:
        logits = torch.tensor([[[[2.0, 1.0, 0.0]]]]).expand(1, 1, 3, 3)
        among = torch.zeros(1, 1, 3, 3, dtype=torch.bool)
        among[..., 2, :2] = True  # the third query towards two runners-up
        seen = torch.full((1, 1, 3, 1), 3)
        method = self.method(gain=0.5, threshold=1 / 3, top=2)
        added = method.added(logits, logits.softmax(-1), seen, among)
        assert added[0, 0, 2].tolist() == [1, 0, 0]
        raised = (logits + added)[0, 0, 2].softmax(-1)
        torch.testing.assert_close(raised, torch.tensor([0.844, 0.114, 0.042]), atol=5e-4, rtol=0)
        assert not added[0, 0, :2].any()

    def test_the_sets(self) -> None:
        generator = torch.Generator().manual_seed(0)
        modality = torch.tensor([[1] + [2] * 20 + [1], [0, 1] + [2] * 10 + [1] * 10])
        pixels, hidden = (torch.randn(2, 22, 5, generator=generator) for _ in range(2))
        found = self.method(keep=(0.2,)).select(modality, pixels, hidden, 4, 20)
        assert (found > 0).sum(1).tolist() == [4, 2]
        assert (found < 0).sum(1).tolist() == [6, 3]  # 30 % of all
        assert not found[modality != Modality.VISION].any()
        only = self.method(keep=(0.2,), alpha=1.0).select(modality, pixels, hidden, 4, 20)
        assert not (only < 0).any()


def test_pixels_of_tokens_of_several_patches() -> None:
    images = torch.arange(8.0)
    first, offsets = torch.tensor([0, 2, 4, 6]), torch.tensor([0, 1])
    tokens = torch.tensor([1, 0, 1, 0])
    modality = torch.tensor([[1, 2, 2]])
    found = pixels_by_token(images, first, offsets, tokens, modality)
    assert found.tolist() == [[[0, 0, 0, 0], [2, 3, 6, 7], [0, 1, 4, 5]]]


def test_line_ends_have_no_pixels() -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    program["vision_encoder"].facts["encoding"]["pixels"] = None
    with pytest.raises(PreconditionError, match="into patches that lie side by side"):
        run_pipeline(program, "hilo-prune{layers=2 keep=0.25}")


def test_one_cut_only() -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    with pytest.raises(OptionError, match="cuts at one layer, not at 2"):
        run_pipeline(program, "hilo-prune{layers=2,3 keep=0.5}")
