"""Drafts read by a captured model: each path as if it stood alone, and what of them stays."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from torch import _dynamo as dynamo

from tests.drafts import (
    BRANCHING,
    CAPACITY,
    PLACES,
    TOLERANCE,
    captured,
    ids,
    model,
    plain,
    read,
    read_text,
    target,
)
from vlmopt.errors import PreconditionError, StreamFullError
from vlmopt.program import Role
from vlmopt.rewrite.drafted import drafted_stage
from vlmopt.runtime.buffered import BufferedStage
from vlmopt.runtime.draft_cache import DraftCache
from vlmopt.speculative import tree
from vlmopt.speculative.block import Block, block_of


def require_paths(
    language_model: Any, before: Tensor, tokens: Tensor, parents: Tensor, hidden: Tensor
) -> None:
    """Each path of a draft is what the untouched model makes of it alone."""
    for row in tree.paths(parents):
        path = row[row >= 0]
        alone = plain(language_model, torch.cat([before, tokens[:, path]], 1))
        wanted = alone.hidden_states[-1][:, before.shape[1] :]
        torch.testing.assert_close(hidden[:, path], wanted, **TOLERANCE)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
def test_a_chain_is_plain_text(kind: str) -> None:
    """More text than one block holds, so that the last is filled up."""
    text, cache = ids(14, 1), DraftCache(target(kind).stage)
    found = read_text(cache, target(kind), text)
    alone = plain(model(kind), text)
    torch.testing.assert_close(found, alone.hidden_states[-1], **TOLERANCE)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "parents", [BRANCHING, tree.full((3, 1)).tolist(), tree.full((8,)).tolist()]
)
def test_each_path_is_its_own_text(parents: list[int], batch: int) -> None:
    """Samples of a batch differ in what stands before the draft, and in its tokens."""
    stage, nodes = target(batch=batch), torch.tensor(parents)
    text, draft = ids(11, 2, batch), ids(len(nodes), 3, batch)
    cache = DraftCache(stage.stage)
    read_text(cache, stage, text)
    hidden = read(cache, stage, draft, block_of(nodes, PLACES))
    require_paths(model(), text, draft, nodes, hidden)


def test_logits_are_those_of_the_hidden_states() -> None:
    cache, block = DraftCache(target().stage), block_of(torch.tensor(BRANCHING), PLACES)
    given = {"input_ids": block.fill(ids(7, 4))}
    results = cache.run(target(), given, block)
    (port,) = target().stage.find_outputs(Role.HIDDEN_STATES)
    with torch.no_grad():
        torch.testing.assert_close(results["logits"], model().lm_head(results[port.name]))


@pytest.mark.parametrize("batch", [1, 2])
def test_what_stays_is_what_plain_decoding_leaves(batch: int) -> None:
    """Drafts of which a path stays, or nothing but the root, and tokens that waited."""
    stage = target(batch=batch)
    cache, said = DraftCache(stage.stage), ids(5, 5, batch)
    read_text(cache, stage, said)
    steps = [  # tokens that wait, a draft, and the path of it that stays
        (0, BRANCHING, [0, 1, 4, 6]),
        (0, BRANCHING, [0]),
        (2, BRANCHING, [0, 2, 5]),
        (0, [-1], [0]),
        (3, tree.full((2, 2)).tolist()[:6], [0, 1]),
        (1, BRANCHING, [0, 1, 3]),
    ]
    for seed, (pending, parents, path) in enumerate(steps):
        nodes = torch.tensor(parents)
        tokens = ids(pending + len(nodes), seed, batch)
        block = block_of(nodes, PLACES, pending=pending)
        hidden = read(cache, stage, tokens, block)
        said = torch.cat([said, tokens[:, :pending]], 1)
        require_paths(model(), said, tokens[:, pending:], nodes, hidden[:, pending:])
        cache.commit([*range(pending), *(node + pending for node in path)])
        said = torch.cat([said, tokens[:, pending:][:, path]], 1)
    assert cache.length == said.shape[1]
    past = plain(model(), said).past_key_values
    for layer, (key, value) in enumerate(
        zip(cache.tensors(Role.KEY), cache.tensors(Role.VALUE), strict=True)
    ):
        torch.testing.assert_close(key, past.layers[layer].keys, **TOLERANCE)
        torch.testing.assert_close(value, past.layers[layer].values, **TOLERANCE)


def test_tokens_that_waited_are_read_as_text() -> None:
    stage, said, tokens = target(), ids(4, 6), ids(5, 7)
    cache = DraftCache(stage.stage)
    read_text(cache, stage, said)
    hidden = read(cache, stage, tokens, block_of(tree.chain(2), PLACES, pending=3))
    alone = plain(model(), torch.cat([said, tokens], 1)).hidden_states[-1][:, 4:]
    torch.testing.assert_close(hidden, alone, **TOLERANCE)


def test_blocks_of_another_size() -> None:
    """Two stages on the same buffers: rows that were refused are hidden from both."""
    few = BufferedStage(drafted_stage(captured(model(), 1, 2), CAPACITY, "few"), "eager")
    said, draft, nodes = ids(3, 1), ids(7, 2), torch.tensor(BRANCHING)
    cache, block = DraftCache(few.stage), block_of(nodes, PLACES)
    read_text(cache, target(), said)
    read(cache, target(), draft, block)
    cache.commit([0])
    more, pair = ids(2, 3), block_of(tree.chain(2), 2)
    hidden = read(cache, few, more, pair)
    alone = plain(model(), torch.cat([said, draft[:, :1], more], 1))
    torch.testing.assert_close(hidden, alone.hidden_states[-1][:, 4:], **TOLERANCE)


def test_all_drafts_run_in_one_compiled_graph() -> None:
    """Whatever the tree is, and however many tokens wait."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    stage = target().stage
    compiled, results = BufferedStage(stage, "inductor"), []
    for runs in (target(), compiled):
        cache = DraftCache(stage)
        found = [read_text(cache, runs, ids(4, 1))]
        for pending, parents in ((0, BRANCHING), (2, BRANCHING), (0, [-1]), (3, [-1, 0, 0])):
            block = block_of(torch.tensor(parents), PLACES, pending=pending)
            found.append(read(cache, runs, ids(block.size, len(found)), block))
            cache.commit(range(pending + 1))
        results.append(found + cache.tensors(Role.KEY))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
def test_the_language_model_of_a_vlm(name: str) -> None:
    """It takes embeddings, and a mask for padding; positions of some are threefold."""
    whole = zoo.build(name, layers=2)
    text, draft = ids(5, 8) + 8, ids(7, 9) + 8
    stage = BufferedStage(drafted_stage(captured(whole, 1), CAPACITY, "verify"), "eager")
    cache, nodes = DraftCache(stage.stage), torch.tensor(BRANCHING)
    with torch.no_grad():
        for tokens, parents in ((text, tree.chain(5)), (draft, nodes)):
            block = block_of(parents, PLACES)
            embeds = whole.get_input_embeddings()(block.fill(tokens))
            results = cache.run(stage, {"inputs_embeds": embeds}, block)
            (port,) = stage.stage.find_outputs(Role.HIDDEN_STATES)
            hidden = results[port.name][:, : block.size]
            if parents is not nodes:
                cache.commit(range(5))
        for row in tree.paths(nodes):
            path = row[row >= 0]
            line = torch.cat([text, draft[:, path]], 1)
            wanted = whole(line, output_hidden_states=True).hidden_states[-1][:, 5:]
            torch.testing.assert_close(hidden[:, path], wanted, **TOLERANCE)


def test_full_buffers() -> None:
    cache = DraftCache(target().stage)
    read_text(cache, target(), ids(27, 1))
    read_text(cache, target(), ids(4, 2))
    assert cache.length == 31  # of 40, and 9 more rows are what a block needs
    read_text(cache, target(), ids(1, 3))
    with pytest.raises(StreamFullError, match="9 tokens needs as many free rows"):
        read_text(cache, target(), ids(1, 4))


def test_what_is_no_path() -> None:
    cache, block = DraftCache(target().stage), block_of(torch.tensor(BRANCHING), PLACES)
    with pytest.raises(PreconditionError, match="do not follow"):
        cache.commit([0])
    read(cache, target(), ids(7, 1), block)
    for nodes in ([0, 2, 4], [1, 3], [0, 1, 2], [0, 3]):
        with pytest.raises(PreconditionError, match="do not follow one another"):
            cache.commit(nodes)
    cache.commit([0, 1, 4])
    assert cache.length == 3


def test_drafts_read_level_by_level() -> None:
    """As a drafter writes them: a level sees what it descends from in those above."""
    text, draft, nodes = ids(5, 1), ids(7, 2), torch.tensor([-1, 0, 0, 1, 1, 2, 2])
    cache = DraftCache(target().stage)
    read_text(cache, target(), text)
    seen, found = tree.tree_mask(nodes), []
    for depth, level in enumerate(([0], [1, 2], [3, 4, 5, 6])):
        mask = torch.zeros(PLACES, level[0] + PLACES, dtype=torch.bool)
        mask[:, level[0] :] = torch.eye(PLACES, dtype=torch.bool)
        mask[: len(level), : level[0]] = seen[level, : level[0]]
        block = Block(mask, torch.full((PLACES,), depth), len(level))
        found.append(read(cache, target(), draft[:, level], block))
    require_paths(model(), text, draft, nodes, torch.cat(found, 1))
    cache.commit([])
    assert cache.length == 5
    require_paths(
        model(), text, ids(7, 3), nodes, read(cache, target(), ids(7, 3), block_of(nodes, PLACES))
    )


def test_branches_of_unequal_length() -> None:
    """Padded on the left, of which no one sees anything; then a draft."""
    text, draft, nodes = ids(13, 1, 2), ids(7, 2, 2), torch.tensor(BRANCHING)
    present = torch.ones(2, 13, dtype=torch.bool)
    present[1, :4] = False
    stage = target(batch=2)
    cache = DraftCache(stage.stage)
    for start in (0, PLACES):
        part, some = text[:, start : start + PLACES], present[:, start : start + PLACES]
        block = block_of(tree.chain(part.shape[1]), PLACES)
        cache.run(stage, {"input_ids": block.fill(part)}, block, some)
        cache.commit(range(block.size), some)
    hidden = read(cache, stage, draft, block_of(nodes, PLACES))
    require_paths(model(), text[:1], draft[:1], nodes, hidden[:1])
    require_paths(model(), text[1:, 4:], draft[1:], nodes, hidden[1:])


def test_what_the_model_itself_has_read() -> None:
    text, draft, nodes = ids(11, 1), ids(7, 2), torch.tensor(BRANCHING)
    layers = plain(model(), text).past_key_values.layers
    cache, everything = DraftCache(target().stage), torch.ones(1, 11, dtype=torch.bool)
    past = [(layer.keys, layer.values) for layer in layers]
    cache.load(past, everything, torch.tensor([11]))
    require_paths(
        model(), text, draft, nodes, read(cache, target(), draft, block_of(nodes, PLACES))
    )
    with pytest.raises(PreconditionError, match="behind 11 that are held"):
        cache.load(past, everything, torch.tensor([11]))


def test_blocks_that_do_not_fit() -> None:
    with pytest.raises(PreconditionError, match="do not fit in 9 places"):
        block_of(tree.full((2, 2)), PLACES, pending=3)
    with pytest.raises(PreconditionError, match="do not fit in buffers of 8 rows"):
        drafted_stage(captured(model(), 1), 8, "verify")


def test_models_that_look_at_windows() -> None:
    """Of four tokens, in blocks of nine."""
    windows = model("mistral", sliding_window=4)
    with pytest.raises(PreconditionError, match="hides other tokens than later ones"):
        drafted_stage(captured(windows, 1), CAPACITY, "verify")
