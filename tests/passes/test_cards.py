"""Small worked examples of each method, by hand."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch

from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.alvts import Alvts
from vlmopt.passes.tokens.apet import ApET, approximation_error
from vlmopt.passes.tokens.coin import CoIn
from vlmopt.passes.tokens.duet_vlm import DuetEncoder
from vlmopt.passes.tokens.hawk import Hawk
from vlmopt.passes.tokens.prune2drive import Prune2Drive
from vlmopt.passes.tokens.score import SCoRe
from vlmopt.passes.tokens.selectors import Selector
from vlmopt.passes.tokens.transprune import TransPrune
from vlmopt.passes.tokens.visionzip import VisionZip
from vlmopt.passes.tokens.vlm_pruner import VlmPruner
from vlmopt.passes.tokens.zoo_prune import ZooPrune


def every(*shape: int) -> torch.Tensor:
    return torch.ones(shape, dtype=torch.bool)


class TestTransPrune:
    def test_length_times_turn(self) -> None:
        before = torch.tensor([[[1.0, 0], [1, 0]]])
        after = torch.tensor([[[0.0, 2], [2, 0]]])
        e = math.e
        found = TransPrune().transition(every(1, 2), before, after)
        torch.testing.assert_close(found, torch.tensor([[2 * e / (e + 1), 2 / (e + 1)]]))

    def test_a_reversed_token_turns_most_unless_the_paper_is_followed(self) -> None:
        before = torch.tensor([[[1.0, 0], [1, 0]]])
        after = torch.tensor([[[-2.0, 0], [0, 2]]])
        code = TransPrune().transition(every(1, 2), before, after)
        paper = TransPrune(abs_cos=True).transition(every(1, 2), before, after)
        assert code[0, 0] > code[0, 1]
        assert paper[0, 0] < paper[0, 1]

    def test_padding_takes_no_share(self) -> None:
        before = torch.randn(1, 3, 4)
        after = torch.randn(1, 3, 4)
        alone = TransPrune().transition(every(1, 2), before[:, 1:], after[:, 1:])
        padded = TransPrune().transition(torch.tensor([[False, True, True]]), before, after)
        torch.testing.assert_close(padded[:, 1:], alone)

    def test_shares_are_of_the_original_tokens(self) -> None:
        counts = [TransPrune().quota(576, share) for share in (0.875, 0.625, 0.125)]
        assert counts == [504, 360, 72]

    def test_a_common_factor_changes_nothing(self) -> None:
        history, attention = torch.rand(1, 9), torch.rand(1, 9)
        one = TransPrune().score(history, attention, every(1, 9)).argsort()
        seven = TransPrune().score(7 * history, attention, every(1, 9)).argsort()
        assert torch.equal(one, seven)


class TestHawk:
    def test_one_head(self) -> None:
        """Queries (1,0) and (3,0), keys (1,0) (2,5) (-2,1): 1/3, 2/3, -2/3."""
        keys = torch.tensor([[1.0, 0], [2, 5], [-2, 1]])
        logits = (keys @ torch.tensor([2.0, 0]) / 2**0.5)[None, :, None]
        score = Hawk().score(logits, every(1, 3))
        torch.testing.assert_close(score, torch.tensor([[1 / 3, 2 / 3, -2 / 3]]))

    @pytest.mark.parametrize("norm", ["l2", "softmax", "minmax"])
    def test_tokens_that_are_not_there_change_nothing(self, norm: str) -> None:
        logits = torch.randn(1, 5, 2)
        more = torch.cat([logits, 100 * torch.ones(1, 2, 2)], 1)
        valid = torch.tensor([[True] * 5 + [False] * 2])
        alone = Hawk(norm=norm).score(logits, every(1, 5))
        torch.testing.assert_close(Hawk(norm=norm).score(more, valid)[:, :5], alone)

    def test_a_factor_of_a_head_cancels(self) -> None:
        logits = torch.randn(1, 6, 3)
        scaled = logits * torch.tensor([1.0, 7, 1])
        one, other = (Hawk().score(value, every(1, 6)) for value in (logits, scaled))
        torch.testing.assert_close(one, other)

    def test_shares_are_rounded_up(self) -> None:
        assert [Hawk().quota(5, 0.5), Hawk().quota(3, 0.01)] == [3, 1]


class TestPrune2Drive:
    def test_counts(self) -> None:
        assert Prune2Drive().quota(729, 0.095) == 69
        assert Prune2Drive(views=6).quota(6 * 729, 0.1) == 6 * 72

    def test_views_have_budgets_of_their_own(self) -> None:
        method = Prune2Drive(views=2, budgets=(1.0, 0.5))
        assert method.quota(8, 0.1) == 6
        rows = torch.randn(1, 8, 3)
        best = method.score(rows, every(1, 8))[0].topk(6).indices.sort().values
        assert best[:4].tolist() == [0, 1, 2, 3]
        other = torch.cat([torch.randn(1, 4, 3), rows[:, 4:]], 1)
        same = method.score(other, every(1, 8))[0].topk(6).indices.sort().values
        assert same.tolist() == best.tolist()

    def test_uneven_views_are_refused(self) -> None:
        with pytest.raises(PreconditionError, match="7 visual tokens are not 2 views"):
            Prune2Drive(views=2).quota(7, 0.5)


class TestCoIn:
    def test_only_volume(self) -> None:
        rows = torch.tensor([[[2.0, 0], [2, 0], [0, 1]]])
        score = CoIn(alpha=1.0).score(rows, torch.ones(1, 2), every(1, 3), 2)
        assert score.argsort(descending=True)[0, :2].tolist() == [0, 2]

    def test_only_information(self) -> None:
        rows, text = torch.randn(1, 9, 4), torch.randn(1, 4)
        method = CoIn(alpha=0.0)
        wanted = method.information(rows, text, every(1, 9)).topk(4).indices
        assert method.score(rows, text, every(1, 9), 4).topk(4).indices.tolist() == wanted.tolist()

    def test_what_matters_to_what(self) -> None:
        rows = torch.randn(1, 9, 4)
        norms = [CoIn(beta=1.0).information(rows, t, every(1, 9)) for t in torch.randn(2, 1, 4)]
        assert torch.equal(*norms)
        text = torch.randn(1, 4)
        scaled = rows * torch.rand(1, 9, 1)
        one, other = (CoIn(beta=0.0).information(r, text, every(1, 9)) for r in (rows, scaled))
        torch.testing.assert_close(one, other)


class TestApET:
    tokens = torch.tensor(
        [[[2, 0, 0], [0, 3, 0], [1, 1, 0], [0, 1, 4], [1, 0, 3], [2, 2, 1], [0, 1, 0.5]]]
    )
    basis = torch.tensor([[0, 1]])

    @pytest.mark.parametrize(
        ("mode", "wanted"),
        [
            ("overwrite", [[0, 2, 2], [4 / 3, 1 / 3, 1], [2, 0, 0], [0, 3, 0]]),
            ("blend", [[0, 2, 2], [4 / 3, 1 / 3, 1], [2, 1, 0.5], [0, 2, 0.25]]),
        ],
    )
    def test_errors_and_merging(self, mode: str, wanted: list[list[float]]) -> None:
        error = approximation_error(self.tokens, self.basis, 1e-5)
        assert error[0].tolist() == pytest.approx([0, 0, 0, 4, 3, 1, 0.5], abs=1e-3)
        kept = torch.tensor([[False, False, False, True, True, True, True]])
        method = ApET(basis=2, mode=mode)
        merged = method.merged(self.tokens, error, kept, every(1, 7), self.basis)
        torch.testing.assert_close(merged[kept], torch.tensor(wanted, dtype=torch.float32))

    def test_the_span_of_the_basis_has_no_error(self) -> None:
        rows = torch.randn(1, 3, 8)
        inside = torch.cat([rows, torch.randn(1, 5, 3) @ rows], 1)
        error = approximation_error(inside, torch.tensor([[0, 1, 2]]), 1e-6)
        assert error.max() < 1e-3 * inside.norm(dim=-1).max()

    def test_a_basis_as_large_as_what_stays_is_refused(self) -> None:
        with pytest.raises(PreconditionError, match="not more than its basis of 10"):
            ApET().score(torch.randn(1, 30, 4), every(1, 30), 10)


class TestAlvts:
    def test_product_of_both(self) -> None:
        mass = torch.tensor([[[0.4, 0.1], [0.3, 0.2], [0.2, 0.3], [0.1, 0.4]]])
        score = Alvts.score(mass)
        kept = select.keep_best(score, every(1, 4), 2)
        assert kept.tolist() == [[1, 2]]

    def test_full_rank_is_exact(self) -> None:
        query, key = torch.randn(8, 6), torch.randn(4, 6)  # 4 heads and 2 key heads of size 2
        (left,), right = Selector.of(query, key, 4, 6).sides()
        rows = torch.randn(5, 6)
        heads_of_keys = (rows @ key.T).unflatten(-1, (2, 2)).repeat_interleave(2, dim=1)
        wanted = torch.einsum("qhd,khd->qk", (rows @ query.T).unflatten(-1, (4, 2)), heads_of_keys)
        torch.testing.assert_close(rows @ left @ (rows @ right).T, wanted, atol=1e-4, rtol=1e-4)

    def test_exact_shares(self) -> None:
        assert Alvts().quota(576, 64) == 64


class TestVlmPruner:
    def test_dropped_tokens_are_fed_to_the_kept(self) -> None:
        """Weights 0.6 and 0.2 of followers 1 and 5: 0.3 of 10 and 0.7 of 2."""
        method = VlmPruner()
        hidden = torch.randn(1, 9, 12)
        kept = torch.tensor([[True] + [False] * 8])
        merged = method.merge(
            hidden, torch.zeros(1, 9), kept, hidden, hidden, every(1, 9), torch.tensor([[1]]), 1
        )
        rows = hidden[0]
        unit = rows / rows.norm(dim=-1, keepdim=True)
        weight = (unit[1:] @ unit[0]).clamp(min=0)
        mean = (weight[:, None] * rows[1:]).sum(0) / weight.sum()
        torch.testing.assert_close(merged[0, 0], 0.3 * rows[0] + 0.7 * mean, atol=1e-5, rtol=1e-4)

    def test_shares_are_rounded(self) -> None:
        assert VlmPruner().quota(576, 0.111) == 64

    def test_what_is_no_grid_is_refused(self) -> None:
        rows = torch.randn(1, 12, 4)
        with pytest.raises(OptionError, match="12 visual tokens are no grid of 3 by 3"):
            VlmPruner().score(rows, rows, every(1, 12), torch.tensor([[4]]), 4)


class TestDuetEncoder:
    attention = torch.tensor([[0.1, 0.9, 0.2, 0.8, 0.3, 0.4]])

    def stage(self, context: float, width: int) -> DuetEncoder:
        return DuetEncoder(keep=(2, context), width=width)

    def test_pool_anchor_and_member(self) -> None:
        method, present = self.stage(1 / 6, 2), torch.tensor([[6]])
        groups = method.groups(self.attention, every(1, 6), present)
        assert torch.nonzero(groups.dominant[0])[:, 0].tolist() == [1, 3]
        assert torch.nonzero(groups.anchors[0])[:, 0].tolist() == [5]
        assert torch.nonzero(groups.members[0])[:, 0].tolist() == [4]
        rows = torch.eye(6)[None]
        keys = torch.ones(1, 6, 2)
        values = (self.attention, keys, every(1, 6), present)
        merged = method.merge(rows, self.attention, every(1, 6), *values)
        assert merged[0, 5].tolist() == [0, 0, 0, 0, 1, 1]

    def test_an_anchor_without_members_stays_as_it_is(self) -> None:
        method, present = self.stage(1 / 6, 1), torch.tensor([[6]])
        rows, keys = torch.eye(6)[None], torch.ones(1, 6, 2)
        values = (self.attention, keys, every(1, 6), present)
        merged = method.merge(rows, self.attention, every(1, 6), *values)
        assert torch.equal(merged, rows)

    def test_anchors_are_spread_over_the_pool(self) -> None:
        attention = torch.arange(12.0, 0, -1)[None]
        method = DuetEncoder(keep=(2, 2), width=4)
        groups = method.groups(attention, every(1, 12), torch.tensor([[12]]))
        assert torch.nonzero(groups.anchors[0])[:, 0].tolist() == [2, 6]


class TestVisionZip:
    def test_every_third_of_the_rest_takes_in_others(self) -> None:
        attention = torch.tensor([[0.0, 9, 0, 0, 8, 0, 0, 0]])
        method = VisionZip(keep=(0.5,), context=0.5)
        groups = method.groups(attention, every(1, 8), torch.tensor([[8]]))
        assert torch.nonzero(groups.dominant[0])[:, 0].tolist() == [1, 4]
        assert torch.nonzero(groups.anchors[0])[:, 0].tolist() == [0, 5]


class TestScore:
    salience = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    rows = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-1, 0]]])

    def picks(self, alpha: float, count: int = 2) -> list[int]:
        score = SCoRe(alpha=alpha).score(self.salience, self.rows, every(1, 4), count)
        return sorted(score[0].topk(count).indices.tolist())

    def test_salience_against_distance(self) -> None:
        assert self.picks(0.8) == [0, 2]
        assert self.picks(0.0) == [0, 3]
        assert self.picks(1.0) == [0, 2]

    def test_scale_changes_nothing(self) -> None:
        score = SCoRe().score(10 * self.salience, 3 * self.rows, every(1, 4), 2)
        assert torch.equal(score, SCoRe().score(self.salience, self.rows, every(1, 4), 2))

    def test_all_are_picked_once(self) -> None:
        zero = torch.zeros(1, 4)
        score = SCoRe().score(zero, torch.ones(1, 4, 2), every(1, 4), 4)
        assert sorted(score[0].tolist()) == [1, 2, 3, 4]


@dataclass
class Sensitivity:
    """Stands in for a projector."""

    found: list[float]
    width: int = 3

    def derivatives(self, rows: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
        return torch.tensor([self.found])


class TestZooPrune:
    def picked(self, sensitivity: list[float], rows: list[list[float]], count: int) -> list[float]:
        found = ZooPrune(directions=2).score(
            torch.zeros(1, len(rows), 3),
            torch.tensor([rows]),
            every(1, len(rows)),
            count,
            Sensitivity(sensitivity),  # type: ignore[arg-type]
        )
        return found[0].tolist()

    def test_a_copy_of_what_is_picked_is_worth_nothing(self) -> None:
        rows: list[list[float]] = [[1, 0], [1, 0], [0, 1], [0, -1]]
        found = self.picked([1.0, 0.9, 0.5, 0.0], rows, 2)
        assert found == [2, 0, 1, 0]

    def test_equal_sensitivity_leaves_distance(self) -> None:
        found = self.picked([0.5, 0.5, 0.5], [[1.0, 0], [0.9, 0.1], [-1, 0]], 2)
        assert found == [2, 0, 1]
