"""Matching and merging: numbers by hand, plain loops, gradients, graphs, batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from vlmopt.errors import PreconditionError
from vlmopt.passes.tokens import merge, select

few = settings(max_examples=15, deadline=None)
seeds = st.integers(0, 10**6)


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -- bipartite matching ------------------------------------------------------------------------


def match_in_loops(metric: Tensor, merged: int, protected: list[bool]) -> list[tuple[int, int]]:
    """Pairs of one sample, the most similar first."""
    unit = torch.nn.functional.normalize(metric, dim=-1)
    proposals = []
    for source in range(0, len(metric), 2):
        best, partner = -math.inf, 1
        for destination in range(1, len(metric), 2):
            similar = float(unit[source] @ unit[destination])
            if not (protected[source] or protected[destination]) and similar > best:
                best, partner = similar, destination
        proposals.append((-best, source, partner))
    return [(source, partner) for _, source, partner in sorted(proposals)[:merged]]


@few
@given(seeds, st.integers(6, 11))
def test_bipartite_matching_is_the_plain_loop(seed: int, tokens: int) -> None:
    metric = draw(seed, 3, tokens, 4)
    protected = torch.zeros(3, tokens, dtype=torch.bool)
    protected[:, 0] = True
    protected[1, 3] = True
    merged = tokens // 2 - 1
    match = merge.bipartite_match(metric, merged, protected)
    for sample in range(3):
        wanted = match_in_loops(metric[sample], merged, protected[sample].tolist())
        found = zip(match.sources[sample].tolist(), match.destinations[sample].tolist())  # noqa: B905
        assert list(found) == wanted
        left = sorted(set(range(tokens)) - {source for source, _ in wanted})
        assert match.kept[sample].tolist() == left
        alone = merge.bipartite_match(metric[sample, None], merged, protected[sample, None])
        assert all(one[0].equal(all_[sample]) for one, all_ in zip(alone, match, strict=True))


def test_equal_rows_join_the_first() -> None:
    match = merge.bipartite_match(torch.ones(1, 8, 3), 3)
    assert match.sources.tolist() == [[0, 2, 4]]
    assert match.destinations.tolist() == [[1, 1, 1]]
    assert match.kept.tolist() == [[1, 3, 5, 6, 7]]
    zero = merge.bipartite_match(torch.zeros(1, 4, 3), 2)  # rows without direction: no NaN
    assert zero.destinations.tolist() == [[1, 1]]


def test_merging_nothing_and_half() -> None:
    metric = draw(5, 2, 7, 3)
    none = merge.bipartite_match(metric, 0)
    assert none.kept.tolist() == [list(range(7))] * 2
    half = merge.bipartite_match(metric, 3)
    assert half.kept.shape == (2, 4)
    with pytest.raises(PreconditionError, match="4 of 7 tokens cannot be merged"):
        merge.bipartite_match(metric, 4)


# -- merging -----------------------------------------------------------------------------------


@few
@given(seeds)
def test_merging_is_the_plain_loop(seed: int) -> None:
    rows, weights = draw(seed, 2, 9, 4), draw(seed + 1, 2, 9).abs() + 0.1
    match = merge.bipartite_match(draw(seed + 2, 2, 9, 4), 4)
    place = merge.places(match)
    total = merge.merge_sum(rows, match, place)
    mean = merge.merge_mean(rows, weights, match, place)
    for sample in range(2):
        kept = match.kept[sample].tolist()
        assert kept == sorted(set(range(9)) - set(match.sources[sample].tolist()))
        pairs = zip(
            match.sources[sample].tolist(), match.destinations[sample].tolist(), strict=True
        )
        joins = dict(pairs)
        for at, row in enumerate(kept):
            members = [row, *(source for source, to in joins.items() if to == row)]
            assert [int(place[sample, member]) for member in members] == [at] * len(members)
            share = weights[sample, members]
            wanted = (rows[sample, members] * share[:, None]).sum(0) / share.sum()
            torch.testing.assert_close(total[sample, at], rows[sample, members].sum(0))
            torch.testing.assert_close(mean[sample, at], wanted)


@few
@given(seeds)
def test_sizes_keep_the_sum(seed: int) -> None:
    """Merged rows times their sizes sum up to all rows, block after block."""
    rows, sizes = draw(seed, 2, 12, 5), torch.ones(2, 12)
    total = rows.sum(1)
    for merged in (4, 3, 2):
        match = merge.bipartite_match(rows, merged)
        place = merge.places(match)
        rows = merge.merge_mean(rows, sizes, match, place)
        sizes = merge.merge_sum(sizes, match, place)
        torch.testing.assert_close((rows * sizes[..., None]).sum(1), total, atol=1e-4, rtol=1e-4)
        assert sizes.sum(-1).tolist() == [12, 12]
    assert rows.shape == (2, 3, 5)


def test_sizes_weigh_in_any_order_of_those_that_stay() -> None:
    rows = torch.tensor([[[1.0], [4.0], [-9.0], [9.0]]])
    sizes = torch.tensor([[2.0, 1, 1, 5]])
    match = merge.Match(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[3, 1, 2]]))
    place = merge.places(match)
    assert place.tolist() == [[1, 1, 2, 0]]
    assert merge.merge_mean(rows, sizes, match, place)[0, :, 0].tolist() == [9, 2, -9]
    assert merge.merge_sum(sizes, match, place).tolist() == [[5, 3, 1]]


def test_nothing_merged_is_nothing_changed() -> None:
    rows = draw(7, 2, 9, 3)
    match = merge.bipartite_match(rows, 0)
    place = merge.places(match)
    assert merge.merge_mean(rows, torch.ones(2, 9), match, place).equal(rows)
    assert place.tolist() == [list(range(9))] * 2


def test_merging_can_be_trained() -> None:
    rows = draw(1, 1, 5, 3).requires_grad_()
    weights = (draw(2, 1, 5).abs() + 0.5).requires_grad_()
    match = merge.bipartite_match(rows, 2)
    place = merge.places(match)
    merged = merge.merge_mean(rows, weights, match, place)
    gradient, by_weight = torch.autograd.grad(merged.sum(), (rows, weights))
    share = weights / merge.merge_sum(weights, match, place).gather(1, place)
    torch.testing.assert_close(gradient, share.detach()[..., None].expand_as(gradient))
    alone = ~torch.isin(torch.arange(5), torch.cat([match.sources, match.destinations], 1))
    assert by_weight[0, alone].abs().max() <= 1e-6  # nothing to share
    assert by_weight[0, ~alone].abs().min() > 1e-6


def test_merging_half_precision_accumulates_in_full() -> None:
    """2048 equal rows: bfloat16 sums stop growing at 256."""
    rows = torch.full((1, 2049, 1), 1.5, dtype=torch.bfloat16)
    place = torch.arange(2049)[None]
    match = merge.Match(place[:, 1:], torch.zeros(1, 2048, dtype=torch.int64), place[:, :1])
    merged = merge.merge_mean(rows, torch.ones(1, 2049), match, merge.places(match))
    assert merged.dtype is torch.bfloat16
    assert float(merged[0, 0, 0]) == 1.5


# -- thresholds --------------------------------------------------------------------------------


def test_a_threshold_with_capacity() -> None:
    score = torch.tensor([[9.0, 0.1, 0.7, 0.5, 0.7, 0.9]] * 2)
    visual = torch.tensor([[False, True, True, True, True, True]] * 2)
    slots, there = select.above_threshold(score, visual, 0.5, 2)
    assert slots[0].tolist() == [2, 5]  # of equal scores the first
    assert there.all()
    slots, there = select.above_threshold(score, visual, torch.tensor([[0.5], [0.8]]), 4)
    assert slots.tolist() == [[2, 3, 4, 5]] * 2
    assert there.tolist() == [[True, False, True, True], [False, False, False, True]]


@few
@given(seeds, st.integers(1, 10))
def test_a_threshold_keeps_the_best(seed: int, capacity: int) -> None:
    score = draw(seed, 2, 10)
    visual = draw(seed + 1, 2, 10) > -0.5
    slots, there = select.above_threshold(score, visual, 0.2, capacity)
    for sample in range(2):
        above = [i for i in range(10) if visual[sample, i] and score[sample, i] > 0.2]
        best = sorted(sorted(above, key=lambda i: -float(score[sample, i]))[:capacity])
        assert slots[sample][there[sample]].tolist() == best
        assert len(set(slots[sample].tolist())) == capacity


# -- graphs ------------------------------------------------------------------------------------


def everything(rows: Tensor) -> tuple[Tensor, ...]:
    """All of the module once, as a method would use it."""
    ones = torch.ones(rows.shape[:2], device=rows.device)
    match = merge.bipartite_match(rows, 5, ones.cumsum(-1) == 1)
    place = merge.places(match)
    merged = merge.merge_mean(rows, ones, match, place)
    slots, there = select.above_threshold(rows[..., 0].float(), ones > 0, 0.0, 6)
    return merged, merge.merge_sum(ones, match, place), place, *match, slots, there


def agree(found: Any, wanted: Any) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_traced_and_compiled() -> None:
    rows = draw(11, 2, 13, 6)
    wanted = everything(rows)
    traced = make_fx(everything, tracing_mode="fake", pre_dispatch=True)(rows)
    called = [n.target for n in traced.graph.nodes if isinstance(n.target, torch._ops.OpOverload)]
    assert called and not any(target._schema.is_mutable for target in called)
    agree(traced(rows), wanted)
    agree(torch.compile(everything, fullgraph=True)(rows), wanted)


def test_half_precision_keeps_its_type() -> None:
    rows = draw(12, 2, 13, 6).bfloat16()
    exact = everything(rows.float())
    found = everything(rows)
    for one, other in zip(found, exact, strict=True):
        if one.dtype is torch.bfloat16:
            torch.testing.assert_close(one.float(), other, atol=2e-2, rtol=2e-2)
        else:
            assert one.equal(other)  # choices do not depend on the type
