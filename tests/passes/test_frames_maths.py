"""Choice of rows and of new tokens: the oracles of the method's card."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from vlmopt.passes.frames import novelty, reuse


def test_rows_to_update() -> None:
    assert reuse.rows_to_update(729, 0.25) == 182
    assert reuse.rows_to_update(3, 0.25) == 1
    assert reuse.rows_to_update(10, 1.0) == 10
    assert reuse.rows_to_update(100, 0.29) == 29  # 100 * 0.29 is below 29 in floating point


def test_schedule() -> None:
    assert [n for n in range(6) if reuse.is_reference(n, 2)] == [0, 2, 4]
    assert [n for n in range(8) if reuse.is_reference(n, 4)] == [0, 4]
    assert all(reuse.is_reference(n, 1) for n in range(4))


@pytest.mark.parametrize(
    ("metric", "wanted"),
    [
        ("cosine", [0.6, 0.0]),
        ("l1", [-6.0, -6.0]),
        ("l2", [-(20**0.5), -(26**0.5)]),
        ("dot", [3.0, 0.0]),
    ],
)
def test_similarity(metric: str, wanted: list[float]) -> None:
    key = torch.tensor([[[3.0, 4.0], [0.0, -5.0]]])
    reference = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    found = reuse.similarity(key, reference, metric)
    torch.testing.assert_close(found, torch.tensor([wanted]))
    assert reuse.similarity(key.bfloat16(), reference.bfloat16(), metric).dtype == torch.float32


@pytest.mark.parametrize("metric", reuse.METRICS)
def test_changed_rows_are_chosen(metric: str) -> None:
    generator = torch.Generator().manual_seed(0)
    reference = torch.randn(12, 8, generator=generator)
    key = reference.repeat(2, 1, 1)
    key[0, [2, 7, 9]] *= -1
    key[1, [0, 7, 11]] *= -1
    assert reuse.choose(key, reference, 0.25, metric).tolist() == [[2, 7, 9], [0, 7, 11]]


def test_ties_go_to_the_lower_index() -> None:
    same = torch.ones(40, 4)
    for metric in reuse.METRICS:
        assert reuse.choose(same[None], same, 0.25, metric).tolist() == [[*range(10)]]


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2"])
def test_rounding_does_not_choose(metric: str) -> None:
    """Among rows that another kernel gave, nearly as they were."""
    reference = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))
    key = reference * (1 + 1e-6 * torch.randn(64, 32, generator=torch.Generator().manual_seed(2)))
    key[40] *= -1
    assert reuse.choose(key[None], reference, 0.125, metric).tolist() == [[*range(7), 40]]


def test_rows_of_zeros_are_least_similar() -> None:
    reference = torch.ones(4, 2)
    key = torch.ones(1, 4, 2)
    key[0, 3] = 0
    assert reuse.similarity(key, reference, "cosine")[0].tolist() == pytest.approx([1, 1, 1, 0])
    assert reuse.choose(key, reference, 0.25, "cosine").tolist() == [[3]]


# -- what is new -------------------------------------------------------------------------------


CARD = torch.tensor([[[1.0, 0, 0, 9], [1, 0, 9, 0], [0, 1, 0, 0]]])


def begun(features: Tensor, window: int = 8) -> novelty.Memory:
    """What a stream remembers before its first chunk, ``features``."""
    return novelty.started(novelty.Memory.empty(features.shape[-1], window=window), features)


def test_card_example() -> None:
    memory = novelty.remember(begun(CARD), CARD)
    assert memory.channels.tolist() == [0, 1]
    score = novelty.gaussian_similarity(CARD, memory)
    torch.testing.assert_close(score, torch.tensor([[7.437, 7.437, 3.837]]), atol=1e-3, rtol=0)
    assert novelty.newest(CARD, memory, 1, strategy="gaussian").tolist() == [[2]]
    assert novelty.newest(CARD, memory, 1, strategy="dual_anchor").tolist() == [[2]]


def stream(frames: int = 6, tokens: int = 10, width: int = 8) -> Tensor:
    numbers = torch.randn(frames, tokens, width, generator=torch.Generator().manual_seed(3))
    return numbers * torch.linspace(0.1, 1, width)


def test_memory_is_bounded_and_the_mean_of_all_chunks() -> None:
    memory, means = begun(stream()[:1], window=3), []
    for frame in stream():
        memory = novelty.remember(novelty.started(memory, frame[None]), frame[None])
        means.append(frame[:, memory.channels].mean(0))
    torch.testing.assert_close(memory.total / memory.chunks, torch.stack(means).mean(0))
    torch.testing.assert_close(memory.recent, torch.stack(means[-3:]))
    assert (int(memory.chunks), int(memory.frames)) == (6, 6)


def test_channels_of_the_first_chunk_stay() -> None:
    """Unless the official code is followed to the letter."""
    first, second = stream(2)[:, None]
    second = second.flip(-1)
    once = novelty.remember(begun(first), first)
    kept = novelty.remember(novelty.started(once, second), second)
    assert kept.channels.tolist() == novelty.steady_channels(first, 4).tolist()
    strict = novelty.remember(once, second, strict_original=True)
    assert strict.channels.tolist() == novelty.steady_channels(second, 4).tolist()
    assert strict.channels.tolist() != kept.channels.tolist()


def test_dual_anchor() -> None:
    """Against plain sums, token by token, before and after the window is full."""
    memory, seen = begun(stream()[:1], window=3), []
    for frame in stream():
        memory = novelty.remember(memory, frame[None])
        rows = frame[:, memory.channels].double()
        seen.append(rows.mean(0))
        past = sum(seen[-3:]) / len(seen[-3:])
        found = novelty.dual_anchor_novelty(frame[None], memory, 0.3)[0]
        for row, value in zip(rows, found, strict=True):

            def cos(a: Any, b: Any) -> float:
                return float(a @ b / (a.norm() * b.norm()))

            wanted = 0.3 * (1 - cos(row, past)) + 0.7 * (1 - cos(row, rows.mean(0)))
            assert float(value) == pytest.approx(wanted, abs=1e-5)
        best = found.argsort(descending=True)[:4].sort().values
        kept = novelty.newest(frame[None], memory, 4, strategy="dual_anchor", alpha=0.3)
        assert kept[0].equal(best)


def test_what_repeats_is_not_new() -> None:
    """A token that only one frame has is kept in it, under both strategies."""
    frames = (stream(1) + 2).repeat(4, 1, 1)  # as tokens of one image, not far from their mean
    frames[3, 6] = -frames[3, 6]
    for strategy in novelty.STRATEGIES:
        memory = begun(frames[:1])
        for frame in frames:
            memory = novelty.remember(memory, frame[None])
            kept = novelty.newest(frame[None], memory, 3, strategy=strategy)
        assert 6 in kept[0].tolist()
