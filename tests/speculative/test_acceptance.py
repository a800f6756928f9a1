"""What is accepted is what the target alone would have said: exactly, or in distribution."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmopt.speculative import tree
from vlmopt.speculative.acceptance import accept_greedy, accept_sampled
from vlmopt.speculative.lantern import Neighbourhood

VOCAB = 5


def table(seed: int, context: int = 2) -> Tensor:
    """A language model: of each ``context`` tokens, the distribution of the next."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(*[VOCAB] * (context + 1), generator=generator) * 1.5).softmax(-1)


def following(model: Tensor, before: list[int], tokens: Tensor, parents: Tensor) -> Tensor:
    """What follows each node of a tree whose root stands behind ``before``."""
    mask = tree.tree_mask(parents)
    found = []
    for row in mask:
        line = [*before, *tokens[row].tolist()]
        found.append(model[line[-2], line[-1]])
    return torch.stack(found)


@st.composite
def drafts(draw: st.DrawFn) -> list[tuple[list[int], list[int]]]:
    """Some trees: parents, and tokens, of which any two siblings may be equal."""
    found = []
    for _ in range(draw(st.integers(8, 14))):
        size = draw(st.integers(1, 8))
        parents = [-1, *(draw(st.integers(0, at - 1)) for at in range(1, size))]
        found.append((parents, [draw(st.integers(0, VOCAB - 1)) for _ in range(size)]))
    return found


@given(st.integers(0, 10**6), drafts())
@settings(max_examples=60, deadline=None)
def test_greedy_is_argmax_decoding(seed: int, proposals: list[tuple[list[int], list[int]]]) -> None:
    model = table(seed)
    said, root = [0], 1
    for parents, tokens in proposals:
        nodes, names = torch.tensor(parents), torch.tensor([root, *tokens[1:]])
        found = accept_greedy(names, nodes, following(model, said, names, nodes))
        said += names[found.nodes].tolist()
        root = int(found.following.argmax())
        assert float(found.following[root]) == 1 == float(found.following.sum())
    plain = [0, 1]
    while len(plain) <= len(said):
        plain.append(int(model[plain[-2], plain[-1]].argmax()))
    assert [*said, root] == plain


def test_greedy_takes_all_that_fits() -> None:
    """Of siblings, the one that fits, and of that its child, but not the child of another."""
    parents = torch.tensor([-1, 0, 0, 1, 2, 4])
    tokens = torch.tensor([0, 3, 2, 1, 1, 4])
    probabilities = torch.eye(VOCAB)[[2, 1, 1, 0, 4, 3]]
    found = accept_greedy(tokens, parents, probabilities)
    assert found.nodes.tolist() == [0, 2, 4, 5] and found.following.argmax() == 3


def test_ties_go_to_the_lower_token() -> None:
    tokens, parents = torch.tensor([0, 2, 1]), torch.tensor([-1, 0, 0])
    found = accept_greedy(tokens, parents, torch.full((3, VOCAB), 1 / VOCAB))
    assert found.nodes.tolist() == [0] and found.following.argmax() == 0


def test_sampling_is_as_the_target_draws() -> None:
    """Three tokens behind a prompt, 20 000 times, through trees with several drafts per place.

    One hundred and twenty-five sequences, in classes of those that are expected at least 5 times.
    """
    model = table(7)
    parents = torch.tensor([-1, 0, 0, 0, 1, 1, 2, 4])
    tokens = torch.tensor([1, 3, 0, 3, 2, 4, 1, 0])  # two siblings are equal
    rows = following(model, [0], tokens, parents)
    generator = torch.Generator().manual_seed(0)
    draws = 20_000
    counts = torch.zeros(VOCAB, VOCAB, VOCAB)
    for uniforms in torch.rand(draws, len(tokens) - 1, generator=generator):
        found = accept_sampled(tokens, parents, rows, uniforms)
        said = [1, *tokens[found.nodes[1:]].tolist()]
        said.append(int(torch.multinomial(found.following, 1, generator=generator)))
        while len(said) < 4:
            said.append(int(torch.multinomial(model[said[-2], said[-1]], 1, generator=generator)))
        counts[said[1], said[2], said[3]] += 1
    expected = torch.zeros_like(counts)
    for one, two, three in itertools.product(range(VOCAB), repeat=3):
        expected[one, two, three] = model[0, 1, one] * model[1, one, two] * model[one, two, three]
    expected *= draws
    common = expected >= 5
    seen = torch.cat([counts[common], counts[~common].sum()[None]])
    wanted = torch.cat([expected[common], expected[~common].sum()[None]])
    statistic = float(((seen - wanted).square() / wanted).sum())
    # the 0.1 % point, by the approximation of Wilson and Hilferty
    free = len(seen) - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.09 * (2 / (9 * free)) ** 0.5) ** 3
    assert free > 50


@pytest.mark.parametrize("uniform", [0.0, 0.999999])
def test_what_is_impossible_is_never_drawn(uniform: float) -> None:
    tokens, parents = torch.tensor([0, 2, 1]), torch.tensor([-1, 0, 0])
    sure = torch.eye(VOCAB)[[1, 3, 4]]
    found = accept_sampled(tokens, parents, sure, torch.full((2,), uniform))
    assert found.nodes.tolist() == [0, 2] and found.following.equal(sure[2])


def test_rejected_tokens_leave_the_distribution() -> None:
    tokens, parents = torch.tensor([0, 2, 1]), torch.tensor([-1, 0, 0])
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]]).expand(3, -1)
    found = accept_sampled(tokens, parents, rows, torch.tensor([0.3001, 0.2858]))
    torch.testing.assert_close(found.following, torch.tensor([0.2, 0, 0, 0.8, 0]))
    assert accept_sampled(tokens, parents, rows, torch.tensor([0.3001, 0.2857])).nodes.tolist() == [
        0,
        2,
    ]  # 0.2 / 0.7
    assert accept_sampled(tokens, parents, rows, torch.tensor([0.2999, 1.0])).nodes.tolist() == [
        0,
        1,
    ]


def test_neighbours_leave_with_a_token() -> None:
    near = Neighbourhood(torch.tensor([[1, 2], [0, 2], [1, 3], [4, 2], [3, 2]]), 0.25)
    tokens, parents = torch.tensor([0, 2]), torch.tensor([-1, 0])
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]]).expand(2, -1)
    taken = accept_sampled(tokens, parents, rows, torch.tensor([0.49]), near)
    assert taken.nodes.tolist() == [0, 1]  # 0.3, and 0.2 of its neighbour
    left = accept_sampled(tokens, parents, rows, torch.tensor([0.51]), near)
    torch.testing.assert_close(left.following, torch.tensor([1.0, 0, 0, 0, 0]))
    alone = torch.tensor([[0, 0.2, 0.3, 0.5, 0.0]]).expand(2, -1)
    rest = accept_sampled(tokens, parents, alone, torch.tensor([0.51]), near)
    torch.testing.assert_close(rest.following, torch.tensor([0, 0.2, 0, 0.5, 0]) / 0.7)


def test_greedy_with_neighbours() -> None:
    near = Neighbourhood(torch.tensor([[1, 2], [0, 2], [1, 3], [4, 2], [3, 2]]), 0.25)
    tokens, parents = torch.tensor([0, 2]), torch.tensor([-1, 0])
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.4, 0.0]]).expand(2, -1)
    assert accept_greedy(tokens, parents, rows).nodes.tolist() == [0]
    found = accept_greedy(tokens, parents, rows, near)
    assert found.nodes.tolist() == [0, 1] and found.following.argmax() == 3


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_codes_among_other_tokens(seed: int) -> None:
    """Under other numbers, in a larger vocabulary: the same path is accepted."""
    generator = torch.Generator().manual_seed(seed)
    near = torch.stack([torch.randperm(VOCAB - 1, generator=generator)[:3] for _ in range(VOCAB)])
    near += near >= torch.arange(VOCAB)[:, None]
    ids = torch.randperm(VOCAB + 4, generator=generator)[:VOCAB]
    parents = torch.tensor([-1, 0, 0, 0, 1, 1, 2, 4])
    tokens = torch.randint(VOCAB, (len(parents),), generator=generator)
    rows = torch.randn(len(parents), VOCAB, generator=generator).softmax(-1)
    wide = torch.zeros(len(parents), VOCAB + 4).index_copy(1, ids, rows)
    uniforms = torch.rand(len(parents) - 1, generator=generator)
    plain, among = Neighbourhood(near, 0.3), Neighbourhood(near, 0.3, ids)
    for one, other in (
        (
            accept_sampled(tokens, parents, rows, uniforms, plain),
            accept_sampled(ids[tokens], parents, wide, uniforms, among),
        ),
        (
            accept_greedy(tokens, parents, rows, plain),
            accept_greedy(ids[tokens], parents, wide, among),
        ),
    ):
        assert one.nodes.equal(other.nodes)
        torch.testing.assert_close(other.following[ids], one.following)


def test_other_tokens_have_no_neighbours() -> None:
    near = Neighbourhood(torch.tensor([[1, 2], [0, 2], [1, 0]]), 1.0, torch.tensor([2, 3, 4]))
    rows = torch.tensor([[0.1, 0.2, 0.3, 0.25, 0.15]]).expand(2, -1)
    found, helped = near.relaxed(rows, torch.tensor([1, 4]))
    torch.testing.assert_close(found, torch.tensor([0.2, 0.4]))
    assert helped.tolist() == [False, True]
