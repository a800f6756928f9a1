"""Assigned merging and clustering: numbers by hand, plain loops, gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.passes.tokens import assign

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


def test_apet_averages_into_anchors() -> None:
    """Card of ApET: t0 and t2 join t4, t1 joins t3."""
    rows = torch.tensor([[[2, 0, 0], [0, 3, 0], [1, 1, 0], [0, 1, 4], [1.0, 0, 3]]])
    target = torch.tensor([[4, 3, 4, 3, 4]])
    merged = assign.assigned_merge(rows, target, torch.ones(1, 5))
    assert merged[0, 3].tolist() == [0, 2, 2]
    torch.testing.assert_close(merged[0, 4], torch.tensor([4 / 3, 1 / 3, 1]))
    assert merged[:, :3].equal(rows[:, :3])  # what leaves is as it came


def test_duet_adds_the_mean_of_members() -> None:
    """Card of DUET-VLM: anchor plus mean, and an anchor alone as it is."""
    rows = torch.tensor([[[5.0, 1], [4, 2], [2, 4], [7, 7]]])
    merged = assign.assigned_merge(rows, torch.tensor([[0, 0, 0, 3]]), torch.ones(1, 4), "sum")
    assert merged[0, 0].tolist() == [8, 4]
    assert merged[0, 3].tolist() == [7, 7]


@few
@given(seeds, st.sampled_from(["mean", "sum"]))
def test_assigned_merge_is_the_plain_loop(seed: int, mode: str) -> None:
    rows, target, weight = draw(seed, 2, 9, 4), forest(seed, 2, 9), draw(seed + 1, 2, 9).abs()
    weight[:, ::4] = 0
    merged = assign.assigned_merge(rows, target, weight, mode)
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
    merged = assign.assigned_merge(rows, target, torch.zeros(1, 3))
    assert merged.equal(rows)
    (gradient,) = torch.autograd.grad(merged.sum(), rows)
    assert gradient.equal(torch.ones_like(rows))


def test_assigned_merge_can_be_trained() -> None:
    rows = draw(1, 1, 5, 3).double().requires_grad_()
    weight = (draw(2, 1, 5).abs() + 0.5).double().requires_grad_()
    target = torch.tensor([[0, 0, 2, 2, 0]])
    for mode in ("mean", "sum"):
        out = assign.assigned_merge(rows, target, weight, mode)
        gradients = torch.autograd.grad(out.square().sum(), (rows, weight))
        for value, gradient in zip((rows, weight), gradients, strict=True):
            step = draw(3, *value.shape).double()
            step *= 1e-2 / step.norm()
            with torch.no_grad():
                change = [
                    assign.assigned_merge(
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
    merged = assign.assigned_merge(
        rows, torch.zeros(1, 4096, dtype=torch.int64), torch.ones(1, 4096)
    )
    assert merged.dtype is torch.bfloat16
    assert float(merged[0, 0, 0]) == 1.5


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="mode 'max' is neither mean nor sum"):
        assign.assigned_merge(
            torch.ones(1, 2, 1), torch.zeros(1, 2).long(), torch.ones(1, 2), "max"
        )


@few
@given(seeds)
def test_nearest_is_the_plain_loop(seed: int) -> None:
    metric = draw(seed, 2, 10, 4)
    order = shuffled(seed, 2, 10)[:, :4]
    unit = torch.nn.functional.normalize(metric, dim=-1)
    found = assign.nearest(metric, order)
    for sample in range(2):
        for row in range(10):
            anchors = order[sample].tolist()
            similar = [float(unit[sample, row] @ unit[sample, anchor]) for anchor in anchors]
            wanted = row if row in anchors else anchors[similar.index(max(similar))]
            assert int(found[sample, row]) == wanted
    mask = torch.zeros(2, 10, dtype=torch.bool).scatter(1, order, True)
    assert assign.nearest(metric, mask).equal(found)


def test_of_equal_anchors_the_first_in_order() -> None:
    metric = torch.tensor([[[1.0, 0], [2, 0], [3, 0], [0, 0]]])
    assert assign.nearest(metric, torch.tensor([[2, 0]])).tolist() == [[0, 2, 2, 2]]
    mask = torch.tensor([[True, False, True, False]])
    assert assign.nearest(metric, mask).tolist() == [[0, 0, 2, 0]]
    nothing = torch.zeros(1, 4, dtype=torch.bool)
    assert assign.nearest(metric, nothing).tolist() == [[0, 1, 2, 3]]


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
    centers, assignment = assign.dpc_knn(metric, clusters, neighbours, torch.ones(2, 14).bool())
    for sample in range(2):
        wanted = clusters_in_loops(metric[sample], clusters, neighbours)
        assert (centers[sample].tolist(), assignment[sample].tolist()) == wanted


def test_clusters_far_apart_are_found() -> None:
    """Three groups of duplicates: one center each, although each group has equal densities."""
    corner = torch.tensor([[100.0, 0], [0, 100], [-100, -100]])
    member = torch.tensor([0, 1, 2, 1, 0, 2, 2, 0])
    centers, assignment = assign.dpc_knn(corner[member][None], 3, 2, torch.ones(1, 8).bool())
    assert sorted(centers[0].tolist()) == [0, 1, 2]
    assert member[centers[0]][assignment[0]].equal(member)


def test_every_row_its_own_cluster() -> None:
    metric = torch.ones(1, 5, 2)  # all equal
    centers, assignment = assign.dpc_knn(metric, 5, 5, torch.ones(1, 5).bool())
    assert sorted(centers[0].tolist()) == list(range(5))
    assert centers[0][assignment[0]].tolist() == list(range(5))


def test_rows_that_are_not_there_shape_no_cluster() -> None:
    metric = draw(3, 1, 12, 4)
    valid = torch.arange(12)[None] < 9
    short = assign.dpc_knn(metric[:, :9], 3, 4, valid[:, :9])
    spoiled = torch.where(valid[..., None], metric, 1e4)
    centers, assignment = assign.dpc_knn(spoiled, 3, 4, valid)
    assert centers.equal(short[0])
    assert assignment[:, :9].equal(short[1])
    centers, assignment = assign.dpc_knn(spoiled, 11, 4, valid)
    assert sorted(centers[0, :9].tolist()) == list(range(9))
    assert centers[0][assignment[0, :9]].tolist() == list(range(9))


def test_too_many_clusters_are_refused() -> None:
    with pytest.raises(PreconditionError, match="4 tokens have no 5 clusters"):
        assign.dpc_knn(torch.ones(1, 4, 2), 5, 2, torch.ones(1, 4).bool())
