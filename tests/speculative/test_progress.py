"""Which features a draft starts from, step by step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.speculative.progress import Progress


def numbered(first: int, count: int) -> Tensor:
    """Features of two branches: the number of the token, and its negative."""
    row = torch.arange(first, first + count, dtype=torch.float32)
    return torch.stack([row, -row])[..., None].expand(2, count, 3)


def started(memory: int = 4) -> Progress:
    return Progress.start(torch.arange(5), numbered(0, 5), memory)


def step(now: Progress, kept: int) -> Progress:
    """Tokens, and features, are called by their place in the sequence."""
    seen = len(now.tokens) - now.waiting
    tokens = torch.arange(len(now.tokens), len(now.tokens) + kept)
    return now.verified(tokens, numbered(seen, now.waiting + kept))


def skip(now: Progress, taken: int) -> Progress:
    return now.skipped(torch.arange(len(now.tokens), len(now.tokens) + taken))


def drafting(now: Progress) -> list[int]:
    assert (now.drafting[1] == -now.drafting[0]).all()
    return now.drafting[0, :, 0].int().tolist()


def test_features_of_a_draft() -> None:
    now = started()
    assert drafting(now) == [0, 1, 2, 3, 4]
    now = step(now, 2)
    assert drafting(now) == [5, 6]
    stale = skip(now, 3)
    assert drafting(stale) == [5, 6, 6] and stale.waiting == 3  # the prompt's do not count
    now = step(stale, 2)
    assert drafting(now) == [10, 11] and now.waiting == 0  # those that waited are remembered
    assert drafting(skip(now, 4)) == [8, 9, 10, 11]
    assert now.tokens.tolist() == [*range(12)] and now.new_tokens == 7


@given(st.lists(st.integers(1, 4), min_size=1, max_size=12), st.integers(4, 9))
@settings(max_examples=50, deadline=None)
def test_no_more_is_remembered_than_is_needed(counts: list[int], memory: int) -> None:
    """Every other step is a skip; with and without a bound, drafts start from the same."""
    now, all_of_it = started(memory), started(1000)
    for at, count in enumerate(counts):
        act = skip if at % 2 else step
        now, all_of_it = act(now, count), act(all_of_it, count)
        assert now.drafting.equal(all_of_it.drafting) and now.drafting.shape[1] == count
        assert now.features.shape[1] <= memory
        wanted = all_of_it.features.shape[1] + all_of_it.waiting
        assert wanted == now.new_tokens == len(now.tokens) - 5


def test_what_cannot_be() -> None:
    with pytest.raises(PreconditionError, match="no feature"):
        skip(started(), 1)
    now = step(started(), 2)
    with pytest.raises(PreconditionError, match="at most 4"):
        skip(now, 5)
    with pytest.raises(PreconditionError, match="2 wait already"):
        skip(skip(now, 2), 1)
    with pytest.raises(PreconditionError, match="1 features, for 2 tokens that waited and 1"):
        skip(now, 2).verified(torch.tensor([9]), numbered(9, 1))
