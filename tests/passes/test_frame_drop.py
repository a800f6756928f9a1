"""Dropping what is not new to a prompt's frames, against the untouched eager model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import zoo
from oracles.agreement import check
from oracles.plans import half, nearly
from oracles.reduced import ReducedOracle
from oracles.streams import evs, stc_pruner

import vlmopt
from vlmopt.errors import PreconditionError
from vlmopt.passes.frames.evs import EfficientVideoSampling
from vlmopt.passes.frames.novelty import Memory
from vlmopt.passes.frames.stc_pruner import StcPruner
from vlmopt.pipeline.manager import run_pipeline

CASES: dict[str, tuple[str, Callable[[], Any]]] = {
    "evs": ("evs{frames=2 keep=0.75}", lambda: evs(2, nearly(0.75))),
    "stc-pruner": ("stc-pruner{frames=2 keep=0.5}", lambda: stc_pruner(2, half)),
    "stc-pruner, cosine": (
        "stc-pruner{frames=2 keep=0.5 strategy=dual_anchor}",
        lambda: stc_pruner(2, half, dual=True),
    ),
}


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
@pytest.mark.parametrize("method", CASES)
def test_equals_hiding_the_same_tokens(method: str, family: str) -> None:
    """Three different prompts of two frames each, padded on the left; 16 tokens generated."""
    text, choose = CASES[method]
    model, inputs = zoo.build(family), zoo.inputs(family, batch=3, images=(2, 2, 2))
    renumber = method != "evs" and family == "llava"
    oracle = ReducedOracle(model, inputs, zoo.visual(inputs), [(0, choose())], renumber=renumber)
    check(model, inputs, text, oracle, tokens=16)


def frames(count: int, size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, count * size, 8, generator=generator)


def test_what_did_not_change_goes_first() -> None:
    """Of a still picture the first frame stays, and what moved, there and back."""
    hidden = frames(1, 6).repeat(1, 4, 1)
    hidden[0, 6 + 2] *= -1
    hidden[0, 18 + 5] *= -1
    one = EfficientVideoSampling(frames=4, keep=(9,))
    score, _ = one.watch(one.by_frame(hidden), None)
    best = score.flatten().sort(descending=True, stable=True).indices[: one.quota(24, 9)]
    assert best.sort().values.tolist() == [0, 1, 2, 3, 4, 5, 8, 14, 23]
    assert one.quota(24, 0.1) == 6  # never fewer than a frame has


@pytest.mark.parametrize("each", [1, 2, 3])
def test_change_is_the_same_in_chunks(each: int) -> None:
    """Of six frames, however many come at a time: across the border of two chunks as elsewhere."""
    whole = EfficientVideoSampling(frames=6)
    hidden = frames(6, 5)
    wanted, _ = whole.watch(whole.by_frame(hidden), None)
    one = EfficientVideoSampling(frames=each, carry=True)
    memory, found = one.empty(5, 8), []
    size = {name: value.shape for name, value in memory.items()}
    for chunk in hidden.split(5 * each, 1):
        scores, memory = one.watch(one.by_frame(chunk), memory)
        assert {name: value.shape for name, value in memory.items()} == size
        found.append(scores)
    assert torch.equal(torch.cat(found, 1), wanted)
    assert memory["frames"] == 6


def test_a_stream_keeps_as_many_of_each_chunk() -> None:
    """Of a first frame that does not fit, tokens that lie apart: no two of six are neighbours."""
    one = EfficientVideoSampling(frames=1, keep=(0.25,), carry=True)
    assert one.quota(24, 0.25) == 6
    scores, _ = one.watch(frames(1, 24).view(1, 1, 24, 8), one.empty(24, 8))
    best = scores.flatten().sort(descending=True, stable=True).indices[:6].sort().values
    assert best.diff().min() > 1
    assert scores.min() > 2  # than which no change is larger


def test_a_batch_is_no_stream() -> None:
    inputs = zoo.inputs("llava", batch=2, images=(2, 2))
    program = vlmopt.capture(zoo.build("llava"), inputs)
    with pytest.raises(PreconditionError, match="a batch of 2 prompts is no stream"):
        run_pipeline(program, "evs{frames=2 carry=true}")


def stays(one: StcPruner, hidden: torch.Tensor) -> torch.Tensor:
    return one.choose(one.by_frame(hidden)[0], Memory.empty(hidden.shape[-1]))[0]


def test_every_frame_keeps_as_many() -> None:
    one = StcPruner(frames=3, keep=(0.4,))
    assert stays(one, frames(3, 10)).sum(1).tolist() == [4, 4, 4]
    assert one.quota(30, 0.4) == 12
    assert one.quota(30, 7) == 6
    assert one.quota(30, 2) == 3  # at least one of each
    assert one.quota(30, 1) == 30


def test_frames_do_not_look_ahead() -> None:
    one = StcPruner(frames=3, keep=(0.4,))
    hidden = frames(3, 10)
    before = stays(one, hidden)
    hidden[:, 20:] = -hidden[:, 20:]
    assert torch.equal(stays(one, hidden)[:2], before[:2])


@pytest.mark.parametrize(
    ("images", "text", "why"),
    [
        ((2, 2), "evs{frames=3}", "32 visual tokens are not 3 frames"),
        ((1, 2), "stc-pruner{frames=1}", "have 16, 32 visual tokens"),
    ],
)
def test_tokens_that_are_no_frames(images: tuple[int, ...], text: str, why: str) -> None:
    inputs = zoo.inputs("llava", batch=2, images=images)
    with pytest.raises(PreconditionError, match=why):
        vlmopt.optimize(zoo.build("llava"), inputs, text, backend="eager")
