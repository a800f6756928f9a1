"""Anchors, sensitivity and what steps between anchors do, against the card of SODA."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmopt.denoising.plan import Action, Site
from vlmopt.errors import OptionError
from vlmopt.passes.denoise import mixing, sensitivity
from vlmopt.passes.denoise.anchors import find_anchors, interval_cost
from vlmopt.passes.denoise.mixing import base_for, between, decide, plan_of, rates
from vlmopt.passes.denoise.sensitivity import Errors, Sensitivity
from vlmopt.rewrite.branches import largest_rows

NAN = float("nan")
CARD = {
    (0, 1): 0.30,
    (0, 2): 0.70,
    (1, 1): 0.20,
    (1, 2): 0.45,
    (2, 1): 0.05,
    (2, 2): 0.08,
    (3, 1): 0.04,
    (3, 2): 0.10,
    (4, 1): 0.10,
}
"""(anchor, age) -> error of the card's example with six steps."""


def card_table() -> list[list[float]]:
    table = [[NAN, NAN] for _ in range(6)]
    for (anchor, age), error in CARD.items():
        table[anchor + age][age - 1] = error
    return table


@pytest.mark.parametrize(
    ("count", "anchors", "cost"),
    [
        (2, (0, 3), 1.14),
        (3, (0, 1, 3), 0.34),
        (4, (0, 1, 2, 5), 0.13),
        (6, (0, 1, 2, 3, 4, 5), 0.0),
    ],
)
def test_anchors_of_the_card(count: int, anchors: tuple[int, ...], cost: float) -> None:
    found = find_anchors(card_table(), count, 3)
    assert found.anchors == anchors
    assert found.cost == pytest.approx(cost)


def test_even_anchors_of_the_card_cost_more() -> None:
    even = sum(interval_cost(card_table(), anchor, 2) for anchor in (0, 2, 4))
    assert even == pytest.approx(0.45)


@pytest.mark.parametrize(("count", "longest"), [(0, 6), (7, 6), (2, 2)])
def test_no_schedule(count: int, longest: int) -> None:
    with pytest.raises(OptionError, match="anchors"):
        find_anchors([[0.5] * 5 for _ in range(6)], count, longest)


def test_equal_costs_take_the_shorter_first_interval() -> None:
    assert find_anchors([[1.0] * 3 for _ in range(5)], 3, 4).anchors == (0, 1, 2)


@st.composite
def tables(draw: st.DrawFn) -> tuple[list[list[float]], int]:
    steps, longest = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    error = st.integers(0, 6).map(float)  # whole numbers: ties occur, and sums are exact
    row = st.lists(error, min_size=longest, max_size=longest)
    return draw(st.lists(row, min_size=steps, max_size=steps)), longest


@given(tables())
@settings(max_examples=150, deadline=None)
def test_anchors_are_the_best_of_all_subsets(case: tuple[list[list[float]], int]) -> None:
    reuse, longest = case
    steps = len(reuse)
    before = float("inf")
    for count in range(1, steps + 1):
        costs = {}
        for rest in combinations(range(1, steps), count - 1):
            anchors = (0, *rest)
            lengths = [b - a for a, b in zip(anchors, (*rest, steps), strict=True)]
            if max(lengths) <= longest:
                pairs = zip(anchors, lengths, strict=True)
                costs[anchors] = sum(interval_cost(reuse, *pair) for pair in pairs)
        if not costs:
            with pytest.raises(OptionError):
                find_anchors(reuse, count, longest)
            continue
        found = find_anchors(reuse, count, longest)
        assert found.cost == min(costs.values())
        assert found.anchors == min(costs, key=lambda one: (costs[one], one))
        assert found.cost <= before
        before = found.cost


def test_cosine_errors_of_the_card() -> None:
    old = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]], [[1.0, 0.0]]])
    new = torch.tensor([[[0.0, 1.0]], [[5.0, 0.0]], [[-1.0, 0.0]], [[0.0, 0.0]], [[0.0, 0.0]]])
    assert sensitivity.cosine_error(new, old).tolist() == [1, 0, 2, 0, 1]
    scaled = sensitivity.relative_error(torch.tensor([[[5.0, 0.0]]]), torch.tensor([[[1.0, 0.0]]]))
    assert scaled.tolist() == [pytest.approx(0.8)]


def test_strongest_rows_come_by_magnitude_and_ties_to_the_front() -> None:
    given_ = torch.tensor([[[1.0, -1.0], [0.5, 0.5], [-3.0, 0.0], [1.0, 1.0]]])
    assert largest_rows(given_, 3).tolist() == [[2, 0, 3]]


def test_no_rows_is_reuse_and_all_rows_is_computation() -> None:
    kept, new = torch.randn(2, 6, 4), torch.randn(2, 6, 4)
    for rows, whole in ((0, kept), (6, new)):
        chosen = largest_rows(new, rows)
        assert sensitivity.refreshed(kept, new, chosen).equal(whole)


def generations(count: int, steps: int = 4, branches: int = 2) -> torch.Tensor:
    return torch.randn(count, steps, branches, 3, 16, 5, generator=torch.Generator().manual_seed(0))


def measured(outputs: torch.Tensor, table: Sensitivity) -> Sensitivity:
    for generation in outputs:
        table.begin()
        for step in generation:
            table.step(list(step), list(step.flip(0)))
    return table


@pytest.mark.parametrize("metric", sensitivity.METRICS)
def test_tables_are_means_of_errors(metric: str) -> None:
    outputs = generations(2)
    found = measured(outputs, Sensitivity(4, 2, 3, metric)).errors()
    wanted = torch.stack(
        [sensitivity.distance(outputs[at, 3, 1], outputs[at, 1, 1], metric) for at in range(2)]
    )
    assert found.reuse[3, 1, 1] == pytest.approx(wanted.mean().item(), abs=1e-6)
    assert found.reuse[1].isnan().tolist() == [[False, True], [False, True]]
    chosen = largest_rows(outputs[0, 2, 1], 6)  # inputs are those of the other branch
    mixed = sensitivity.refreshed(outputs[0, 1, 0], outputs[0, 2, 0], chosen)
    one = measured(outputs[:1], Sensitivity(4, 2, 3, metric)).errors()
    error = sensitivity.distance(outputs[0, 2, 0], mixed, metric).mean().item()
    assert one.partial[2, 0, 2] == pytest.approx(error, abs=1e-6)
    assert one.partial[0].isnan().all()


def test_an_interrupted_measurement_goes_on() -> None:
    outputs = generations(3)
    whole = measured(outputs, Sensitivity(4, 2, 3)).errors()
    first = measured(outputs[:2], Sensitivity(4, 2, 3))
    first.begin()
    first.step(list(outputs[2, 0]), list(outputs[2, 0]))  # is dropped: the generation is unfinished
    second = Sensitivity(4, 2, 3)
    second.restore(first.state())
    found = measured(outputs[2:], second).errors()
    assert torch.equal(found.reuse.nan_to_num(), whole.reuse.nan_to_num())
    assert torch.equal(found.partial.nan_to_num(), whole.partial.nan_to_num())
    with pytest.raises(ValueError, match="sizes"):
        Sensitivity(5, 2, 3).restore(first.state())
    with pytest.raises(ValueError, match="no generation"):
        Sensitivity(5, 2, 3).errors()


def example_errors(steps: int = 7, branches: int = 3) -> Errors:
    generator = torch.Generator().manual_seed(1)
    reuse = torch.rand(steps, branches, 3, generator=generator).cumsum(-1) / 4
    partial = reuse[..., :1] * torch.linspace(1.1, 0.1, sensitivity.SHARES - 1)
    return Errors(reuse, partial)


def test_errors_between_anchors_are_those_of_the_age() -> None:
    errors = example_errors()
    found = between(errors, (0, 2, 6))
    assert found.steps == (1, 3, 4, 5)
    for row, (step, age) in enumerate([(1, 1), (3, 1), (4, 2), (5, 3)]):
        assert found.reuse[row].equal(errors.reuse[step, :, age - 1].double())


def test_anchors_must_be_as_near_as_errors_are_known() -> None:
    with pytest.raises(OptionError, match="known for 3"):
        between(example_errors(), (0, 1))


def test_stretches_decide_alike() -> None:
    errors = example_errors(steps=9)
    found = between(errors, (0, 3, 6), stretches=2)
    # steps 1, 2, 4 and 5, 7, 8; of which ages are 1, 2, 1 and 2, 1, 2
    assert found.reuse[0].equal(found.reuse[2])
    assert found.reuse[3].equal(found.reuse[5])
    assert found.partial[3].equal(found.partial[5])
    alone = between(errors, (0, 3, 6))
    assert found.reuse[1].equal(alone.reuse[1])
    torch.testing.assert_close(found.reuse[0], (alone.reuse[0] + alone.reuse[2]) / 2)
    assert len({tuple(row) for row in found.reuse.tolist()}) == 4


def test_recomputation_must_do_less_harm_than_reuse() -> None:
    errors = Errors(torch.full((2, 1, 1), 0.3), torch.full((2, 1, sensitivity.SHARES - 1), 0.3))
    errors.partial[:, :, 5] = 0.29
    found = between(errors, (0,))
    taken = [decide(found, torch.tensor([[eighths / 8]])).item() for eighths in range(9)]
    assert taken == [0, 0, 0, 0, 0, 0, 6, 0, 8]


@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0])
@pytest.mark.parametrize("alpha_means", mixing.MEANINGS)
def test_the_base_rate_meets_the_budget(alpha_means: str, scale: float) -> None:
    found = between(example_errors(), (0, 3))
    shares = []
    for budget in (0.0, 0.1, 0.3, 0.5, 0.9, 1.0):
        base = base_for(found, budget, scale, alpha_means)
        eighths = decide(found, rates(found.reuse, scale, base, alpha_means))
        shares.append(eighths.double().mean().item() / 8)
        assert shares[-1] <= budget + 1e-6
        # no other base comes closer from below
        for other in torch.linspace(-4, 4, 1601).tolist():
            share = decide(found, rates(found.reuse, scale, other, alpha_means)).double().mean() / 8
            assert not shares[-1] + 1e-6 < share <= budget
    assert shares[0] == 0
    assert shares[-1] == 1
    assert shares == sorted(shares)


def test_the_budget_may_weigh_branches() -> None:
    errors = Errors(torch.full((2, 2, 1), 0.5), torch.zeros(2, 2, sensitivity.SHARES - 1))
    errors.reuse[:, 1] = 0.4
    found = between(errors, (0,))
    base = base_for(found, 0.25, 10.0, weights=(3.0, 1.0))
    assert decide(found, rates(found.reuse, 10.0, base)).tolist() == [[2, 0]]


def test_a_bad_budget() -> None:
    with pytest.raises(OptionError, match="from 0 to 1"):
        base_for(between(example_errors(), (0, 3)), 1.5)


def test_a_plan_of_decisions() -> None:
    sites = [Site(0, "attention"), Site(0, "mlp")]
    errors = example_errors(steps=3, branches=2)
    found = between(errors, (0,))
    plan = plan_of(sites, (12, 16), 3, found, torch.tensor([[0, 8], [3, 3]]))
    assert plan.anchors == (0,)
    assert [choice.action for choice in plan.steps[1]] == [Action.REUSE, Action.COMPUTE]
    assert [choice.rows for choice in plan.steps[2]] == [5, 6]
    share = mixing.recomputed_share(plan, (12, 16))
    assert share == pytest.approx((2 + 1 + 5 / 12 + 6 / 16) / 6)


def test_as_many_anchors_as_steps_leave_nothing_between() -> None:
    found = between(example_errors(), tuple(range(7)))
    assert found.steps == ()
    assert decide(found, rates(found.reuse, 1.0, base_for(found, 0.5))).shape == (0, 3)
