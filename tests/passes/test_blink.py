"""Copies of the attended patch, against the eager model on sequences that really are longer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from oracles.blinked import BlinkOracle

import vlmopt
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens.blink import Blink
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program


def alone(inputs: dict[str, Any], sample: int) -> dict[str, Any]:
    """One sample of a batch, without its padding."""
    ids, real = inputs["input_ids"], inputs["attention_mask"][sample].bool()
    return {
        name: value[sample : sample + 1, real]
        if value.shape == ids.shape
        else value.chunk(len(ids))[sample]
        for name, value in inputs.items()
    }


@pytest.fixture(scope="module")
def llava() -> Program:
    return vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))


def pointed(family: str) -> Any:
    """A model whose attention is not spread evenly."""
    model = zoo.build(family)
    with torch.no_grad():
        for layer in model.get_decoder().layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model


@pytest.mark.parametrize(
    ("family", "layers", "expand", "drop", "wanted"),
    [
        ("llava", (1, 2, 3), 0.35, 0.3, ["001", "111", "101"]),
        ("qwen2_5_vl", (0, 1, 2), 0.45, 0.3, ["111", "110", "000"]),
        ("gemma3", (1,), 0.3, 0.2, ["1", "1", "0"]),
    ],
)
def test_copies_as_in_the_eager_reference(
    family: str, layers: tuple[int, ...], expand: float, drop: float, wanted: list[str]
) -> None:
    model, inputs = pointed(family), zoo.inputs(family, batch=3)
    text = f"blink{{layers={','.join(map(str, layers))} expand={expand} drop={drop}}}"
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    generated = optimized.generate(**inputs, do_sample=False, max_new_tokens=32, eos_token_id=None)
    lives = [
        out.past_key_values.kept[f"{cut.kept}_slots"][:, -1] >= 0
        for cut in optimized.vlmopt.program["language_model"].cuts
    ]
    for sample in range(3):
        single = alone(inputs, sample)
        visual = single["input_ids"] == zoo.IMAGE
        oracle = BlinkOracle(model, single, visual, layers, expand=expand, drop=drop)
        live = [int(there) for _, there in oracle.history]
        assert "".join(map(str, live)) == wanted[sample]  # it comes, stays and goes
        assert [int(there[sample]) for there in lives] == live
        size = visual.shape[1]
        assert (out.logits[sample, -size:] - oracle.logits[0]).abs().max() <= 1e-5
        assert generated[sample, -32:].tolist() == oracle.generate(32)[0, -32:].tolist()


def test_without_copies_nothing_changes() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    text = "pyramid-drop{layers=3 keep=0.5}"
    found, wanted = (
        vlmopt.optimize(model, inputs, pipeline, backend="eager")
        for pipeline in (f"blink{{layers=1,2 expand=2}} | {text}", text)
    )
    with torch.no_grad():
        one, other = found(**inputs), wanted(**inputs)
    assert (one.logits - other.logits).abs().max() <= 1e-6
    kept, expected = one.past_key_values.kept, other.past_key_values.kept
    assert torch.equal(kept["kept_3_slots"], expected["kept_1_slots"])
    given = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(found.generate(**inputs, **given), wanted.generate(**inputs, **given))


def shares(*sums: float) -> torch.Tensor:
    """Attention to a grid of four by four, its patches' sums given."""
    grid = torch.tensor(sums).view(2, 2) / 4
    return grid.repeat_interleave(2, 0).repeat_interleave(2, 1).reshape(1, 16)


NO, FIRST = torch.tensor([[False]]), torch.tensor([[0]])


def test_the_patch_with_the_largest_share() -> None:
    places = Blink(patch=2).places(16)
    assert places[1].tolist() == [2, 3, 6, 7]
    for share, copied in ((0.49, True), (0.5, False)):  # the patch has 8 of 16
        live, region, _ = Blink(expand=share).decide(shares(2, 8, 4, 2), NO, FIRST, places)
        assert (bool(live), int(region)) == (copied, int(copied))
    even, region, _ = Blink(expand=0.24, drop=0.2).decide(shares(4, 4, 4, 4), NO, FIRST, places)
    assert (bool(even), int(region)) == (True, 0)  # ties go to the first


def test_two_thresholds() -> None:
    """The card's shares 0.35, 0.5, 0.35, 0.25, 0.35, between 0.4 and 0.3."""
    method, live, region = Blink(expand=0.4, drop=0.3), NO, FIRST
    found = []
    for share in (0.35, 0.5, 0.35, 0.25, 0.35):
        attention = shares(share, *[(1 - share) / 3] * 3)
        live, region, _ = method.decide(attention, live, region, method.places(16))
        found.append(int(live))
    assert found == [0, 1, 1, 0, 0]


@pytest.mark.parametrize("swap", [False, True])
def test_attention_moves_to_another_patch(swap: bool) -> None:
    method = Blink(expand=0.4, drop=0.3, swap=swap)
    live = torch.tensor([[True]])
    found = method.decide(shares(1, 1, 7, 1), live, FIRST, method.places(16))
    assert [int(value) for value in found] == [1, 2 if swap else 0, int(swap)]


def test_a_constant_patch_has_constant_copies() -> None:
    weights = Blink(up=2).weights(2)
    assert weights.shape == (16, 4)
    torch.testing.assert_close(weights.sum(1), torch.ones(16))
    line = weights @ torch.tensor([0.0, 1, 0, 1])
    torch.testing.assert_close(line[:4], torch.tensor([0, 0.25, 0.75, 1]))
    assert Blink(up=2).parents(2)[:8].tolist() == [0, 0, 1, 1, 0, 0, 1, 1]


def test_images_of_a_prompt_share_no_patch() -> None:
    places = Blink(patch=2, grid=(2, 4)).places(16)
    assert places.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("blink{layers=1,3}", OptionError, "layers 1, 3 do not follow one another"),
        ("blink{layers=3,4}", PreconditionError, "stage language_model has layers 0 to 3"),
        ("blink{layers=1 drop=0.4}", OptionError, "drop=0.4 is above expand=0.35"),
        ("blink{layers=1 patch=3}", OptionError, "patches of 3 by 3 do not tile 4 by 4"),
        ("blink{layers=1 grid=3,3}", OptionError, "16 visual tokens are no grid of 3 by 3"),
        ("fastv{layers=1} | blink{layers=2}", PreconditionError, "has already cut at layer 1"),
    ],
)
def test_what_cannot_be(text: str, error: type[Exception], message: str, llava: Program) -> None:
    with pytest.raises(error, match=message):
        run_pipeline(llava.clone(), text)


def test_samples_with_different_numbers_of_images_are_refused() -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava", text=(6, 9), images=(1, 2)))
    with pytest.raises(PreconditionError, match="samples have 16, 32 visual tokens"):
        run_pipeline(program, "blink{layers=1}")


def test_a_cache_that_hides_no_copies_is_refused() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    text = "blink{layers=1,2 expand=0.25 drop=0.2}"
    options: dict[str, Any] = {"passes": text, "lowering": "eager"}
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="vlmopt", options=options)
    with torch.no_grad():
        with pytest.raises(Exception, match="copies that decoding could not tell from tokens"):
            compiled(**inputs)
        torch._dynamo.reset()
        found = torch.compile(model, backend="vlmopt", options=options)(**inputs, use_cache=False)
        wanted = vlmopt.optimize(model, inputs, text, backend="eager")(**inputs)
    assert (found.logits - wanted.logits).abs().max() <= 1e-6
    torch._dynamo.reset()
