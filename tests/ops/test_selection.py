"""Greedy selections: the cards' numbers, brute force, both implementations, batches, bad cases."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmopt.ops.selection import (
    centrifugal,
    facility_location,
    facility_location_steps,
    farthest_point,
    farthest_point_steps,
    greedy_log_det,
    greedy_log_det_steps,
)

CORNERS = torch.tensor([[[1, 0], [0.96, 0.28], [0, 1], [-1, 0], [0.6, 0.8]]])


def there(features: torch.Tensor) -> torch.Tensor:
    return torch.ones(features.shape[:2], dtype=torch.bool)


def draw(seed: int, batch: int = 2, tokens: int = 13, width: int = 5) -> torch.Tensor:
    return torch.randn(batch, tokens, width, generator=torch.Generator().manual_seed(seed))


def test_the_most_isolated_comes_first() -> None:
    picks = farthest_point(CORNERS, there(CORNERS), None, None, 3, "cosine")
    assert picks.tolist() == [[3, 0, 2]]


def test_squared_distances_from_a_start() -> None:
    rows = torch.tensor([[[2.0, 0, 0], [0, 3, 0], [1, 1, 0], [0, 0, 4]]])
    picks = farthest_point(rows, there(rows), None, torch.tensor([0]), 3, "squared")
    assert picks.tolist() == [[0, 3, 1]]


@pytest.mark.parametrize(("alpha", "wanted"), [(0.8, {0, 2}), (0.0, {0, 3}), (1.0, {0, 2})])
def test_weights_pull(alpha: float, wanted: set[int]) -> None:
    weight = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    rows = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-1, 0]]])
    start = weight.argmax(-1)
    picks = farthest_point(rows, there(rows), weight**alpha, start, 2, "cosine")
    assert set(picks[0].tolist()) == wanted


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["cosine", "euclidean", "squared"]), st.booleans())
def test_both_implementations_of_farthest_point(seed: int, metric: str, weighted: bool) -> None:
    rows = draw(seed)
    valid = torch.rand(2, 13, generator=torch.Generator().manual_seed(seed)) < 0.8
    weight = draw(seed + 1)[..., 0].abs() if weighted else None
    start = torch.tensor([2, 5]) if seed % 2 else None
    arguments = (rows, valid, weight, start, 13, metric)
    picks = farthest_point(*arguments)
    assert picks.tolist() == farthest_point_steps(*arguments).tolist()
    assert picks.sort(-1).values.tolist() == [list(range(13))] * 2  # each once
    for sample in range(2):
        first = picks[sample, 1 : int(valid[sample].sum())]
        assert valid[sample, first].all() or start is not None
        alone = farthest_point(
            *(x if x is None or isinstance(x, (int, str)) else x[sample, None] for x in arguments)
        )
        assert alone[0].tolist() == picks[sample].tolist()


def test_greedy_diversity_is_half_of_the_best() -> None:
    """Gonzalez' bound: the smallest distance between picks is at least half of the best."""
    for seed in range(20):
        rows = draw(seed, batch=1, tokens=8)
        distance = torch.cdist(rows[0], rows[0])

        def spread(chosen: list[int], distance: torch.Tensor = distance) -> float:
            return min(float(distance[i, j]) for i, j in itertools.combinations(chosen, 2))

        best = max(spread(list(some)) for some in itertools.combinations(range(8), 4))
        picks = farthest_point(rows, there(rows), None, torch.tensor([0]), 4, "euclidean")
        assert spread(picks[0].tolist()) >= best / 2 - 1e-6


def test_duplicates_and_zero_rows_are_picked_once() -> None:
    rows = torch.zeros(1, 6, 3)
    rows[0, 3:] = 1
    for metric in ("cosine", "euclidean", "squared"):
        picks = farthest_point(rows, there(rows), None, None, 6, metric)
        assert sorted(picks[0].tolist()) == list(range(6))


def test_volume_never_takes_a_duplicate() -> None:
    rows = torch.tensor([[[2.0, 0], [2, 0], [0, 1]]])
    bonus = torch.zeros(1, 3)
    assert greedy_log_det(rows, there(rows), bonus, 1.0, 1e-9, 2, True).tolist() == [[0, 2]]


def test_volumes_that_differ_by_rounding_are_equal() -> None:
    rows = torch.nn.functional.normalize(draw(0, batch=4, tokens=9), dim=-1)
    given = (rows, there(rows), torch.zeros(4, 9), 1.0, 1e-6, 1, True)
    assert greedy_log_det(*given).tolist() == greedy_log_det_steps(*given).tolist() == [[0]] * 4


def test_without_volume_it_ranks_by_bonus() -> None:
    bonus = torch.tensor([[0.1, 0.9, 0.3, 0.9]])
    rows = draw(0, batch=1, tokens=4)
    assert greedy_log_det(rows, there(rows), bonus, 0.0, 1e-6, 4, True).tolist() == [[1, 3, 2, 0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.booleans())
def test_greedy_volume_is_greedy(seed: int, per_step: bool) -> None:
    """Each pick has the largest determinant with the ones before; both implementations agree."""
    rows = draw(seed, batch=1, tokens=9, width=6)
    bonus = torch.rand(1, 9, generator=torch.Generator().manual_seed(seed))
    arguments = (rows, there(rows), bonus, 0.5, 1e-6, 5, per_step)
    assert greedy_log_det(*arguments).tolist() == greedy_log_det_steps(*arguments).tolist()
    picks = greedy_log_det(rows, there(rows), bonus, 1.0, 1e-6, 5, per_step)[0].tolist()
    gram = rows[0].double() @ rows[0].double().T
    gram += 1e-6 * rows.square().sum(-1).mean() * torch.eye(9)
    for at in range(5):
        volume = {
            one: float(torch.linalg.slogdet(gram[some][:, some])[1])
            for one in range(9)
            if one not in picks[:at]
            for some in [[*picks[:at], one]]
        }
        assert volume[picks[at]] >= max(volume.values()) - 1e-4


def test_more_picks_than_dimensions_give_no_nan() -> None:
    rows = torch.ones(1, 5, 2)
    bonus = torch.tensor([[0.0, 0.2, 0.4, 0.6, 0.8]])
    picks = greedy_log_det(rows, there(rows), bonus, 0.5, 1e-6, 5, True)
    assert picks.tolist() == [[4, 3, 2, 1, 0]]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6))
def test_facilities_are_chosen_greedily(seed: int) -> None:
    """Each pick covers the valid tokens best with the ones before; both implementations agree."""
    rows = draw(seed, batch=2, tokens=9, width=4)
    valid = torch.rand(2, 9, generator=torch.Generator().manual_seed(seed)) > 0.3
    valid[:, 0] = True
    picks = facility_location(rows, valid, 5)
    assert picks.tolist() == facility_location_steps(rows, valid, 5).tolist()
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    for sample in range(2):
        similar = (unit[sample] @ unit[sample].T).clamp(min=0)[:, valid[sample]]
        chosen = picks[sample].tolist()
        assert len(set(chosen)) == 5
        there = [pick for pick in chosen if valid[sample, pick]]
        assert there == chosen[: min(5, int(valid[sample].sum()))]
        for at, pick in enumerate(there):
            covered = {
                one: float(similar[[*there[:at], one]].amax(0).sum())
                for one in range(9)
                if valid[sample, one]
            }
            assert covered[pick] >= max(covered.values()) - 5e-3  # cosines lie on a grid


def test_a_duplicate_covers_nothing_more() -> None:
    rows = torch.tensor([[[1.0, 0], [1, 0], [1, 0], [0, 1]]])
    assert facility_location(rows, there(rows), 2).tolist() == [[0, 3]]


def grown(hidden: torch.Tensor, keys: torch.Tensor, count: int, *, fill: bool) -> list[int]:
    side = math.isqrt(hidden.shape[1])
    place = torch.arange(hidden.shape[1])
    places = torch.stack([place % side, place // side], -1).float()
    quota = torch.tensor([[count]])
    diagonal = math.hypot(side, side)
    picks = centrifugal(
        hidden, keys, places, there(hidden), quota, count, 4, 256, 0.5, 0.8, 0.1, 16, diagonal, fill
    )
    return [pick for pick in picks[0].tolist() if pick >= 0]


def test_pivots_lie_far_apart() -> None:
    keys = torch.tensor([[[0.0], [10], [4], [9]]])
    assert grown(draw(0, 1, 4), keys, 3, fill=False) == [1, 0, 2]


def test_equal_tokens_leave_the_pivots_alone() -> None:
    hidden = torch.ones(1, 16, 3) * torch.tensor([1.0, 2, 3])
    keys = draw(1, 1, 16)
    assert len(grown(hidden, keys, 9, fill=False)) == 4
    filled = grown(hidden, keys, 9, fill=True)
    assert len(set(filled)) == 9


@pytest.mark.parametrize("training", [False, True])
def test_operators_keep_their_contracts(training: bool) -> None:
    """In training too: features ask for gradients that no choice passes on."""
    rows = draw(3).requires_grad_(training)
    weight = draw(3)[..., 0].abs().requires_grad_(training)
    valid = there(rows)
    places, quota = torch.zeros(rows.shape[1], 2), torch.full((len(rows), 1), 4)
    for operator, arguments in (
        (torch.ops.vlmopt.farthest_point, (rows, valid, None, None, 4, "cosine")),
        (torch.ops.vlmopt.farthest_point, (rows, valid, weight, None, 4, "euclidean")),
        (torch.ops.vlmopt.greedy_log_det, (rows, valid, weight, 0.5, 1e-6, 4, True)),
        (torch.ops.vlmopt.facility_location, (rows, valid, 4)),
        (
            torch.ops.vlmopt.centrifugal,
            (rows, rows, places, valid, quota, 4, 2, 2, 1.0, 0.5, 0.1, 2, 1.0, True),
        ),
    ):
        picks = operator(*arguments)
        assert not picks.requires_grad
        torch.library.opcheck(operator.default, arguments)


def test_an_unknown_metric_is_refused() -> None:
    with pytest.raises(ValueError, match="metric 'hamming' is none of cosine"):
        farthest_point(CORNERS, there(CORNERS), None, None, 2, "hamming")
