"""Trees, similarity, truncation, features and policies: the oracles of the method's card."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmopt.errors import OptionError, PipelineSyntaxError, PreconditionError
from vlmopt.speculative import tree
from vlmopt.speculative.features import stale_features
from vlmopt.speculative.lantern import Neighbourhood, nearest_codes
from vlmopt.speculative.pruning import likeliest_subtree
from vlmopt.speculative.similarity import path_similarity
from vlmopt.speculative.skipping import Draft, Dynamic, Never, SkipPolicy, Uniform, parse_policy
from vlmopt.speculative.truncation import take_path

CODES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])


@st.composite
def trees(draw: st.DrawFn, most: int = 12) -> Tensor:
    size = draw(st.integers(1, most))
    return torch.tensor([-1, *(draw(st.integers(0, at - 1)) for at in range(1, size))])


def ancestry(parents: Tensor, node: int) -> list[int]:
    """From the root to a node, one step at a time."""
    found = [node]
    while int(parents[found[0]]) >= 0:
        found.insert(0, int(parents[found[0]]))
    return found


@given(trees())
@settings(max_examples=60, deadline=None)
def test_a_tree_is_what_its_parents_say(parents: Tensor) -> None:
    tree.require_tree(parents)
    lines = [ancestry(parents, node) for node in range(len(parents))]
    for node, row in enumerate(tree.tree_mask(parents)):
        assert row.nonzero()[:, 0].tolist() == lines[node]
    leaves = [node for node in range(len(parents)) if node not in parents.tolist()]
    paths = tree.paths(parents)
    assert [[at for at in row if at >= 0] for row in paths.tolist()] == [lines[x] for x in leaves]
    assert paths.shape[1] == max(map(len, lines))


@given(trees())
@settings(max_examples=40, deadline=None)
def test_paths_make_their_tree(parents: Tensor) -> None:
    """Numbered path by path: the same tree, under names that are told apart."""
    names = torch.randperm(len(parents), generator=torch.Generator().manual_seed(0)) + 5
    rows = tree.candidates(names, tree.paths(parents))
    tokens, again, nodes = tree.tree_of(rows)
    tree.require_tree(again)
    assert tree.candidates(tokens, nodes).equal(rows)
    for node, name in enumerate(tokens):
        before = parents[(names == name).nonzero()[0, 0]]
        assert tokens[again[node]] == names[before] if node else before == again[node] == -1


def test_shapes_of_trees() -> None:
    assert tree.chain(4).tolist() == [-1, 0, 1, 2]
    assert tree.full((2, 3)).tolist() == [-1, 0, 0, 1, 1, 1, 2, 2, 2]
    assert tree.full(()).tolist() == [-1]
    assert tree.paths(tree.full((2, 1))).tolist() == [[0, 1, 3], [0, 2, 4]]


@pytest.mark.parametrize("parents", [[], [0], [-1, 1], [-1, 2, 0], [-1, -1]])
def test_what_is_no_tree(parents: list[int]) -> None:
    with pytest.raises(PreconditionError, match="no tree"):
        tree.require_tree(torch.tensor(parents, dtype=torch.int64))


@pytest.mark.parametrize("rows", [[[0, 1], [1, 1]], [[0, -1, 2]]])
def test_paths_of_no_tree(rows: list[list[int]]) -> None:
    with pytest.raises(PreconditionError, match="one tree"):
        tree.tree_of(torch.tensor(rows))


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        ([[0, 1, 2], [0, 1, 2]], 1.0),
        ([[0, 1, 2], [0, 1, 0]], (1 + 0.9 * 0.5**0.5) / 1.9),
        ([[0, 1, 2], [0, 1, -1]], 1 / 1.9),
        ([[0, 1, 2], [0, 1, 0], [0, 0, 2]], 0.5566),
        ([[0, 1, 2]], 0.0),
        ([[0, 1, 2], [0, -1, -1]], 0.0),
        ([[0, 1, -1], [0, 1, -1]], 1.0),
    ],
)
def test_path_similarity(rows: list[list[int]], wanted: float) -> None:
    found = path_similarity(torch.tensor(rows), CODES)
    assert float(found) == pytest.approx(wanted, abs=1e-4) and found.dtype == torch.float32


def test_truncation() -> None:
    rows = torch.tensor([[5, 1, 2, 3], [5, 1, 4, -1], [5, 6, -1, -1], [5, 7, 8, -1]])
    first, third = take_path(rows, 0), take_path(rows, 2)
    assert first.tokens.tolist() == [5, 1] and int(first.root) == 2
    assert third.tokens.tolist() == [5] and int(third.root) == 6
    with pytest.raises(PreconditionError, match="no more than its root"):
        take_path(rows[:, :1], 0)


def test_stale_features() -> None:
    features = torch.arange(6.0)[None, :, None].expand(2, 6, 3)
    assert stale_features(features, 3)[0, :, 0].tolist() == [3, 4, 5]
    assert stale_features(features, 8)[1, :, 2].tolist() == [0, 1, 2, 3, 4, 5, 5, 5]
    with pytest.raises(PreconditionError, match="no feature"):
        stale_features(features[:, :0], 1)


def skipped(policy: SkipPolicy, steps: int, new_tokens: int = 50) -> list[int]:
    """Iterations that a policy skips; all paths are alike."""
    rows, found = torch.tensor([[0, 1, 2], [0, 1, 2]]), [0]
    for at in range(1, steps):
        draft = Draft(at, new_tokens, found[-1] == at - 1 > 0, rows.repeat(2, 1), CODES)
        if policy.skips(draft):
            found.append(at)
    return found[1:]


def test_policies() -> None:
    assert skipped(Uniform(interval=4), 16) == [1, 5, 9, 13]
    assert skipped(Uniform(interval=2), 8) == [1, 3, 5, 7]
    assert skipped(Dynamic(threshold=0.9), 6) == [1, 3, 5]  # never twice running
    assert skipped(Never(), 9) == skipped(Uniform(interval=4), 9, new_tokens=5) == []


def test_dynamic_looks_at_every_other_path() -> None:
    rows = torch.tensor([[0, 1], [0, 0], [0, 1], [0, 3]])
    draft = Draft(3, 9, False, rows, CODES)
    assert Dynamic(threshold=1.0).skips(draft)
    assert not Dynamic(threshold=1.0, stride=1).skips(draft)


def test_policies_as_text() -> None:
    assert parse_policy("uniform{interval=4}") == Uniform(interval=4)
    assert parse_policy(" dynamic{threshold=0.65 stride=1} ") == Dynamic(threshold=0.65, stride=1)
    assert parse_policy("never") == Never()
    for text, kind, message in [
        ("uniform{interval=1}", OptionError, "must be at least 2"),
        ("sometimes", OptionError, "sometimes is not a policy"),
        ("never | never", PipelineSyntaxError, "expected nothing more"),
        ("", PipelineSyntaxError, "the name of a policy"),
        ("uniform{every=3}", OptionError, "no option every"),
    ]:
        with pytest.raises(kind, match=re.escape(message)):
            parse_policy(text)


def test_nearest_codes() -> None:
    codes = torch.tensor([[0.0], [1.0], [-1.0], [3.0], [0.0]])
    assert nearest_codes(codes, 2).tolist()[0] == [4, 1, 2]  # of 1 and 2, equally far, the lower
    assert nearest_codes(codes, 2).tolist()[3] == [1, 0, 4]
    with pytest.raises(OptionError, match="5 neighbours"):
        nearest_codes(codes, 4)


@pytest.mark.parametrize(
    ("delta", "wanted"), [(0.0, 0.2), (0.15, 0.3), (0.5, 0.6), (1.5, 0.3), (3.0, 0.6)]
)
def test_neighbours_help_within_a_bound(delta: float, wanted: float) -> None:
    """A code of 0.2, and its neighbours, by distance, of 0.1 and 0.3; beyond 1 it is relative."""
    found, helped = Neighbourhood(torch.tensor([[1, 2, 3]]), delta).relaxed(
        torch.tensor([[0.2, 0.1, 0.3, 0.4]]), torch.tensor([0])
    )
    assert float(found) == pytest.approx(wanted) and bool(helped) == (wanted != 0.2)


@given(trees(), st.data())
@settings(max_examples=60, deadline=None)
def test_likeliest_subtree(parents: Tensor, data: st.DataObject) -> None:
    """By exhaustive products; chances of 0 and 1, and equal ones, are among them."""
    some = st.sampled_from([0.0, 0.25, 0.5, 1.0])
    chances = torch.tensor([data.draw(some) for _ in parents])
    count = data.draw(st.integers(1, len(parents)))
    reached = torch.stack([chances[ancestry(parents, n)[1:]].prod() for n in range(len(parents))])
    kept, again = likeliest_subtree(parents, reached.log(), count)
    wanted = sorted(range(len(parents)), key=lambda n: (-float(reached[n]), n))[:count]
    assert kept.tolist() == sorted(wanted)
    tree.require_tree(again)
    for node, old in enumerate(kept.tolist()):
        assert kept[ancestry(again, node)].tolist() == ancestry(parents, old)


def test_a_subtree_has_no_more_nodes_than_the_tree() -> None:
    with pytest.raises(PreconditionError, match="4 nodes cannot be chosen from a tree of 3"):
        likeliest_subtree(tree.chain(3), torch.zeros(3), 4)
