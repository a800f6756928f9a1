"""Drafts, verification and skips, in a loop around a captured model."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.drafts import (
    BRANCHING,
    PLACES,
    TOLERANCE,
    VOCAB,
    ids,
    model,
    plain,
    read,
    read_text,
    target,
)
from vlmopt.program import Role
from vlmopt.runtime.draft_cache import DraftCache
from vlmopt.speculative import tree
from vlmopt.speculative.acceptance import accept_greedy
from vlmopt.speculative.block import block_of
from vlmopt.speculative.skipping import Draft, Never, SkipPolicy, Uniform
from vlmopt.speculative.truncation import take_path

PARENTS = torch.tensor(BRANCHING)


def next_token(before: Tensor) -> Tensor:
    return plain(model(), before[None]).logits[0, -1].argmax()


def drafted(before: Tensor, root: Tensor, generator: torch.Generator) -> Tensor:
    """Tokens of a draft: the first child is mostly what the target says, the others are not."""
    tokens = [root]
    for node in range(1, len(PARENTS)):
        line = tree.tree_mask(PARENTS)[node, :node].nonzero()[:, 0]
        right = next_token(torch.cat([before, torch.stack(tokens)[line]]))
        wrong = torch.randint(VOCAB, (), generator=generator)
        tokens.append(right if torch.rand((), generator=generator) < 0.6 else wrong)
    return torch.stack(tokens)


def generate(prompt: Tensor, new: int, policy: SkipPolicy) -> tuple[Tensor, list[int], DraftCache]:
    """What is said, the tokens that each forward of the target added, and what it has seen."""
    stage, generator = target(), torch.Generator().manual_seed(0)
    cache = DraftCache(stage.stage)
    hidden = read_text(cache, stage, prompt[None])
    root = model().lm_head(hidden[0, -1]).argmax()
    said, waiting, added = prompt, 0, []
    for iteration in itertools.count():
        tokens = drafted(said, root, generator)
        rows = tree.candidates(tokens, tree.paths(PARENTS))
        if policy.skips(Draft(iteration, len(said) - len(prompt), waiting > 0, rows)):
            row = int(torch.randint(len(rows), (), generator=generator))
            taken = take_path(rows, row)
            said, root, waiting = torch.cat([said, taken.tokens]), taken.root, len(taken.tokens)
            continue
        block = block_of(PARENTS, PLACES, pending=waiting)
        whole = torch.cat([said[len(said) - waiting :], tokens])
        hidden = read(cache, stage, whole[None], block)[0, waiting:]
        found = accept_greedy(tokens, PARENTS, model().lm_head(hidden).softmax(-1))
        cache.commit(block, found.nodes)
        said = torch.cat([said, tokens[found.nodes]])
        added.append(waiting + len(found.nodes))
        root, waiting = found.following.argmax(), 0
        if len(said) - len(prompt) >= new:
            return said, added, cache
    raise AssertionError


def require_seen(cache: DraftCache, said: Tensor) -> None:
    """Keys and values are those of plain text."""
    past = plain(model(), said[None]).past_key_values
    assert cache.length == len(said)
    for role, name in ((Role.KEY, "keys"), (Role.VALUE, "values")):
        for layer, found in enumerate(cache.tensors(role)):
            torch.testing.assert_close(found, getattr(past.layers[layer], name), **TOLERANCE)


def decoded(prompt: Tensor, length: int) -> Tensor:
    while len(prompt) < length:
        prompt = torch.cat([prompt, next_token(prompt)[None]])
    return prompt


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_without_skips_is_plain_decoding(seed: int) -> None:
    prompt = ids(5, seed)[0]
    with torch.no_grad():
        said, added, cache = generate(prompt, 20, Never())
    assert said.equal(decoded(prompt, len(said)))
    assert min(added) < 3 < max(added)  # some drafts were refused, and some were not
    require_seen(cache, said)


@pytest.mark.parametrize("interval", [2, 3])
def test_after_recovery_the_target_has_seen_all(interval: int) -> None:
    prompt = ids(4, 9)[0]
    with torch.no_grad():
        said, added, cache = generate(prompt, 20, Uniform(interval=interval))
    require_seen(cache, said)
    assert sum(added) == len(said) - len(prompt)
    assert not said.equal(decoded(prompt, len(said)))  # what was skipped was not asked
