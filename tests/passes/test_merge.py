"""Merging, restoring and clustering: numbers by hand, plain loops, gradients, graphs, batches."""

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


def shuffled(seed: int, batch: int, count: int) -> Tensor:
    return draw(seed, batch, count).argsort(-1)


def forest(seed: int, batch: int, tokens: int) -> Tensor:
    """Random targets: every third row or so stays, the others join one that does."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(batch):
        order = torch.randperm(tokens, generator=generator)
        anchors = order[: max(1, tokens // 3)]
        row = torch.arange(tokens)
        leaving = order[len(anchors) :]
        row[leaving] = anchors[torch.randint(len(anchors), leaving.shape, generator=generator)]
        rows.append(row)
    return torch.stack(rows)


# -- assigned merge ----------------------------------------------------------------------------


def test_apet_averages_into_anchors() -> None:
    """Card of ApET: t0 and t2 join t4, t1 joins t3."""
    rows = torch.tensor([[[2, 0, 0], [0, 3, 0], [1, 1, 0], [0, 1, 4], [1.0, 0, 3]]])
    target = torch.tensor([[4, 3, 4, 3, 4]])
    merged = merge.assigned_merge(rows, target, torch.ones(1, 5))
    assert merged[0, 3].tolist() == [0, 2, 2]
    torch.testing.assert_close(merged[0, 4], torch.tensor([4 / 3, 1 / 3, 1]))
    assert merged[:, :3].equal(rows[:, :3])  # what leaves is as it came


def test_duet_adds_the_mean_of_members() -> None:
    """Card of DUET-VLM: anchor plus mean, and an anchor alone as it is."""
    rows = torch.tensor([[[5.0, 1], [4, 2], [2, 4], [7, 7]]])
    merged = merge.assigned_merge(rows, torch.tensor([[0, 0, 0, 3]]), torch.ones(1, 4), "sum")
    assert merged[0, 0].tolist() == [8, 4]
    assert merged[0, 3].tolist() == [7, 7]


@few
@given(seeds, st.sampled_from(["mean", "sum"]))
def test_assigned_merge_is_the_plain_loop(seed: int, mode: str) -> None:
    rows, target, weight = draw(seed, 2, 9, 4), forest(seed, 2, 9), draw(seed + 1, 2, 9).abs()
    weight[:, ::4] = 0
    merged = merge.assigned_merge(rows, target, weight, mode)
    for sample in range(2):
        for row in range(9):
            wanted: Any = rows[sample, row]
            if target[sample, row] == row:
                members = [
                    i for i in range(9) if target[sample, i] == row and (mode == "mean" or i != row)
                ]
                total = sum(float(weight[sample, i]) for i in members)
                if total > 0:
                    mean = sum(weight[sample, i] * rows[sample, i] for i in members) / total
                    wanted = mean if mode == "mean" else wanted + mean
            torch.testing.assert_close(merged[sample, row], wanted, atol=1e-5, rtol=1e-5)


def test_weights_of_zero_make_no_nan() -> None:
    rows = draw(0, 1, 3, 2).requires_grad_()
    target = torch.tensor([[0, 0, 2]])
    merged = merge.assigned_merge(rows, target, torch.zeros(1, 3))
    assert merged.equal(rows)
    (gradient,) = torch.autograd.grad(merged.sum(), rows)
    assert gradient.equal(torch.ones_like(rows))


def test_assigned_merge_can_be_trained() -> None:
    rows = draw(1, 1, 5, 3).double().requires_grad_()
    weight = (draw(2, 1, 5).abs() + 0.5).double().requires_grad_()
    target = torch.tensor([[0, 0, 2, 2, 0]])
    for mode in ("mean", "sum"):
        out = merge.assigned_merge(rows, target, weight, mode)
        gradients = torch.autograd.grad(out.square().sum(), (rows, weight))
        for value, gradient in zip((rows, weight), gradients, strict=True):
            step = draw(3, *value.shape).double()
            step *= 1e-2 / step.norm()
            with torch.no_grad():
                change = [
                    merge.assigned_merge(
                        rows + at * step if value is rows else rows,
                        target,
                        weight + at * step if value is weight else weight,
                        mode,
                    ).square()
                    for at in (1, -1)
                ]
            slope = float((change[0] - change[1]).sum() / 2)
            assert slope == pytest.approx(float((gradient * step).sum()), rel=1e-2, abs=1e-4)


def test_merging_half_precision_accumulates_in_full() -> None:
    """4096 equal rows: bfloat16 sums stop growing at 256."""
    rows = torch.full((1, 4096, 1), 1.5, dtype=torch.bfloat16)
    merged = merge.assigned_merge(
        rows, torch.zeros(1, 4096, dtype=torch.int64), torch.ones(1, 4096)
    )
    assert merged.dtype is torch.bfloat16
    assert float(merged[0, 0, 0]) == 1.5


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode 'max' is neither mean nor sum"):
        merge.assigned_merge(torch.ones(1, 2, 1), torch.zeros(1, 2).long(), torch.ones(1, 2), "max")


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


@few
@given(seeds)
def test_sizes_keep_the_sum(seed: int) -> None:
    """Merged rows times their sizes sum up to all rows, layer after layer."""
    rows, sizes = draw(seed, 2, 12, 5), torch.ones(2, 12)
    total = rows.sum(1)
    for merged in (4, 3, 2):
        match = merge.bipartite_match(rows, merged)
        rows, sizes = merge.merge_sizes(rows, sizes, match)
        torch.testing.assert_close((rows * sizes[..., None]).sum(1), total, atol=1e-4, rtol=1e-4)
        assert sizes.sum(-1).tolist() == [12, 12]
    assert rows.shape == (2, 3, 5)


def test_sizes_weigh() -> None:
    rows = torch.tensor([[[1.0], [4.0], [-9.0], [9.0]]])
    match = merge.Match(torch.tensor([[0]]), torch.tensor([[1]]), torch.tensor([[1, 2, 3]]))
    merged, sizes = merge.merge_sizes(rows, torch.tensor([[2.0, 1, 1, 5]]), match)
    assert merged[0, :, 0].tolist() == [2, -9, 9]
    assert sizes.tolist() == [[3, 1, 5]]


def test_unmerging_gives_each_row_its_merged_one() -> None:
    rows = draw(7, 2, 9, 3)
    match = merge.bipartite_match(rows, 4)
    target = merge.targets(match)
    merged, _ = merge.merge_sizes(rows, torch.ones(2, 9), match)
    back = merge.unmerge(merged, merge.source_map(target, match.kept))
    full = merge.assigned_merge(rows, target, torch.ones(2, 9))
    assert back.equal(select.take(full, target))


# -- nearest -----------------------------------------------------------------------------------


@few
@given(seeds)
def test_nearest_is_the_plain_loop(seed: int) -> None:
    metric = draw(seed, 2, 10, 4)
    order = shuffled(seed, 2, 10)[:, :4]
    unit = torch.nn.functional.normalize(metric, dim=-1)
    found = merge.nearest(metric, order)
    for sample in range(2):
        for row in range(10):
            anchors = order[sample].tolist()
            similar = [float(unit[sample, row] @ unit[sample, anchor]) for anchor in anchors]
            wanted = row if row in anchors else anchors[similar.index(max(similar))]
            assert int(found[sample, row]) == wanted
    mask = torch.zeros(2, 10, dtype=torch.bool).scatter(1, order, True)
    assert merge.nearest(metric, mask).equal(found)


def test_of_equal_anchors_the_first_in_order() -> None:
    metric = torch.tensor([[[1.0, 0], [2, 0], [3, 0], [0, 0]]])
    assert merge.nearest(metric, torch.tensor([[2, 0]])).tolist() == [[0, 2, 2, 2]]
    mask = torch.tensor([[True, False, True, False]])
    assert merge.nearest(metric, mask).tolist() == [[0, 0, 2, 0]]
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert merge.nearest(metric, nothing).tolist() == [[0, 1, 2, 3]]


# -- restore -----------------------------------------------------------------------------------


@few
@given(seeds, st.integers(1, 8))
def test_restoring_what_was_taken(seed: int, kept: int) -> None:
    rows = draw(seed, 2, 8, 3)
    slots = shuffled(seed, 2, 8)[:, :kept]
    taken = select.take(rows, slots)
    assert merge.restore(taken, slots, 8, rows).equal(rows)
    filled = merge.restore(taken, slots, 8, -1.0)
    assert select.take(filled, slots).equal(taken)
    assert int((filled == -1).all(-1).sum()) == 2 * (8 - kept)


def test_rows_without_slot_are_left_out() -> None:
    rows = torch.tensor([[[1.0], [2], [3]]], dtype=torch.bfloat16, requires_grad=True)
    back = merge.restore(rows, torch.tensor([[2, -1, 0]]), 4, 0.5)
    assert back.flatten().tolist() == [3, 0.5, 1, 0.5]
    (gradient,) = torch.autograd.grad(back.sum(), rows)
    assert gradient.flatten().tolist() == [1, 0, 1]


# -- clustering --------------------------------------------------------------------------------


def clusters_in_loops(
    metric: Tensor, clusters: int, neighbours: int
) -> tuple[list[int], list[int]]:
    rows = metric.double().tolist()
    count, width = len(rows), len(rows[0])
    distance = [[math.dist(a, b) / math.sqrt(width) for b in rows] for a in rows]
    density = [
        math.exp(-sum(d * d for d in sorted(row)[:neighbours]) / neighbours) for row in distance
    ]
    isolation = []
    for i in range(count):
        denser = [distance[i][j] for j in range(count) if (density[j], -j) > (density[i], -i)]
        isolation.append(min(denser) if denser else max(distance[i]))
    ranked = sorted(range(count), key=lambda i: -density[i] * isolation[i])[:clusters]
    assignment = []
    for i in range(count):
        away = [distance[i][center] for center in ranked]
        assignment.append(ranked.index(i) if i in ranked else away.index(min(away)))
    return ranked, assignment


@few
@given(seeds, st.integers(1, 6), st.integers(2, 5))
def test_clustering_is_the_plain_loop(seed: int, clusters: int, neighbours: int) -> None:
    metric = draw(seed, 2, 14, 3)
    centers, assignment = merge.dpc_knn(metric, clusters, neighbours, torch.ones(2, 14).bool())
    for sample in range(2):
        wanted = clusters_in_loops(metric[sample], clusters, neighbours)
        assert (centers[sample].tolist(), assignment[sample].tolist()) == wanted


def test_clusters_far_apart_are_found() -> None:
    """Three groups of duplicates: one center each, although each group has equal densities."""
    corner = torch.tensor([[100.0, 0], [0, 100], [-100, -100]])
    member = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0])
    centers, assignment = merge.dpc_knn(corner[member][None], 3, 2, torch.ones(1, 8).bool())
    assert sorted(centers[0].tolist()) == [0, 1, 2]
    assert member[centers[0]][assignment[0]].equal(member)


def test_every_row_its_own_cluster() -> None:
    metric = torch.ones(1, 5, 2)  # all equal
    centers, assignment = merge.dpc_knn(metric, 5, 5, torch.ones(1, 5).bool())
    assert sorted(centers[0].tolist()) == list(range(5))
    assert centers[0][assignment[0]].tolist() == list(range(5))


def test_rows_that_are_not_there_shape_no_cluster() -> None:
    metric = draw(3, 1, 12, 4)
    valid = torch.arange(12)[None] < 9
    short = merge.dpc_knn(metric[:, :9], 3, 4, valid[:, :9])
    spoiled = torch.where(valid[..., None], metric, 1e4)
    centers, assignment = merge.dpc_knn(spoiled, 3, 4, valid)
    assert centers.equal(short[0])
    assert assignment[:, :9].equal(short[1])
    centers, assignment = merge.dpc_knn(spoiled, 11, 4, valid)
    assert sorted(centers[0, :9].tolist()) == list(range(9))
    assert centers[0][assignment[0, :9]].tolist() == list(range(9))


def test_too_many_clusters_are_refused() -> None:
    with pytest.raises(PreconditionError, match="4 tokens have no 5 clusters"):
        merge.dpc_knn(torch.ones(1, 4, 2), 5, 2, torch.ones(1, 4).bool())


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
    batch, tokens, _ = rows.shape
    ones = torch.ones(batch, tokens, device=rows.device)
    match = merge.bipartite_match(rows, 5, ones.cumsum(-1) == 1)
    merged, sizes = merge.merge_sizes(rows, ones, match)
    back = merge.unmerge(merged, merge.source_map(merge.targets(match), match.kept))
    centers, assignment = merge.dpc_knn(rows, 3, 4, ones > 0)
    pooled = merge.assigned_merge(rows, centers.gather(1, assignment), ones, "sum")
    near = merge.nearest(rows, match.kept[:, :4])
    slots, there = select.above_threshold(rows[..., 0].float(), ones > 0, 0.0, 6)
    restored = merge.restore(merged, match.kept, tokens, rows)
    return merged, sizes, back, pooled, near, restored, slots, there, centers


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


def test_sizes_may_be_open() -> None:
    def back(rows: Tensor, slots: Tensor, like: Tensor) -> Tensor:
        return merge.restore(rows, slots, like.shape[1])

    traced = make_fx(back, tracing_mode="symbolic", pre_dispatch=True)(
        draw(0, 2, 3, 4), torch.tensor([[0, 3, -1], [1, 2, 4]]), draw(0, 2, 5)
    )
    rows, slots = draw(1, 2, 3, 4), torch.tensor([[6, 0, 2], [5, -1, 4]])
    assert traced(rows, slots, draw(0, 2, 7)).equal(merge.restore(rows, slots, 7))


def test_half_precision_keeps_its_type() -> None:
    rows = draw(12, 2, 13, 6).bfloat16()
    exact = everything(rows.float())
    found = everything(rows)
    for one, other in zip(found, exact, strict=True):
        if one.dtype is torch.bfloat16:
            torch.testing.assert_close(one.float(), other, atol=2e-2, rtol=2e-2)
        else:
            assert one.equal(other)  # choices do not depend on the type
