"""Whole generations: drafts, verification and skips around a captured model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.drafts import TOLERANCE, VOCAB, ids, model, plain
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.program import Program, Role
from vlmopt.speculative.capture import DraftTree, capture_draft, capture_target
from vlmopt.speculative.decoders import text_decoder
from vlmopt.speculative.distribution import Sampling
from vlmopt.speculative.drafters import Allowed, Context, Drafter, PromptLookup
from vlmopt.speculative.eagle import EagleDecoder, EagleHead
from vlmopt.speculative.loop import Prefilled
from vlmopt.speculative.session import SpeculativeSession
from vlmopt.speculative.tree import full, tree_mask

TREE = DraftTree(depth=3, width=3, nodes=9)
GREEDY = Sampling(temperature=0.0)
CODES = torch.randn(VOCAB, 4, generator=torch.Generator().manual_seed(3))


@functools.cache
def target(branches: int = 1, kind: str = "llama", capacity: int = 80) -> Program:
    return capture_target(text_decoder(model(kind)), TREE, capacity=capacity, branches=branches)


@functools.cache
def drafter(branches: int = 1, kind: str = "llama") -> Program:
    decoder = text_decoder(model(kind))
    torch.manual_seed(1)
    head = EagleHead(decoder.config)
    return capture_draft(EagleDecoder(decoder, head).eval(), TREE, capacity=80, branches=branches)


def session(branches: int = 1, draft: Any = None, **options: Any) -> SpeculativeSession:
    found = drafter(branches) if draft is None else draft
    return SpeculativeSession(target(branches), found, backend="eager", **options)


class Oracle(Drafter):
    """Mostly says what the target will, on the first path of a tree."""

    def __init__(self, prompt: Tensor, right: float = 0.7) -> None:
        self.prompt, self.right = prompt, right
        self.generator = torch.Generator().manual_seed(0)

    def draft(
        self, context: Context, sampling: Sampling, allowed: Allowed | None
    ) -> tuple[Tensor, Tensor]:
        parents = full((2, 2))
        tokens = [context.said[-1]]
        for node in range(1, len(parents)):
            line = tree_mask(parents)[node, :node].nonzero()[:, 0]
            before = torch.cat([self.prompt, context.said[:-1], torch.stack(tokens)[line]])
            said = plain(model(), before[None]).logits[0, -1].argmax()
            wrong = torch.randint(VOCAB, (), generator=self.generator)
            right = torch.rand((), generator=self.generator) < self.right
            tokens.append(said if right else wrong)
        return torch.stack(tokens), parents


def greedy(prompt: Tensor, new: int, guidance: float | None = None) -> Tensor:
    """Plain decoding of ``[branches, tokens]``."""
    said: list[Tensor] = []
    for _ in range(new):
        more = torch.stack(said).expand(len(prompt), -1) if said else prompt[:, :0]
        logits = plain(model(), torch.cat([prompt, more], 1)).logits[:, -1]
        if guidance is not None:
            logits = logits[1:] + guidance * (logits[:1] - logits[1:])
        said.append(logits[0].argmax())
    return torch.stack(said)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_greedy_without_skips_is_plain_decoding(seed: int) -> None:
    prompt = ids(14, seed)
    for draft in (drafter(), Oracle(prompt[0]), PromptLookup(3)):
        found = session(draft=draft).generate(prompt, max_new_tokens=20, sampling=GREEDY)
        assert found.tokens.equal(greedy(prompt, 20))
        assert found.statistics.tokens == 20 and found.statistics.skipped == 0
    found = session(draft=Oracle(prompt[0])).generate(prompt, max_new_tokens=20, sampling=GREEDY)
    assert found.statistics.tokens_per_forward > 1.5
    assert {0, 2} <= set(found.statistics.accepted)  # some drafts were refused, some were not


def test_a_text_that_repeats_itself() -> None:
    """Untrained models soon say the same over and over, which the text itself foretells."""
    prompt = ids(4, 7)
    lookup = PromptLookup(3)
    found = session(draft=lookup).generate(prompt, max_new_tokens=40, sampling=GREEDY)
    assert found.tokens.equal(greedy(prompt, 40))
    assert found.statistics.tokens_per_forward > 1.2


def test_no_draft_is_plain_decoding() -> None:
    alone = SpeculativeSession(target(), None, backend="eager")
    found = alone.generate(ids(4, 1), max_new_tokens=8, sampling=GREEDY)
    assert found.tokens.equal(greedy(ids(4, 1), 8))
    assert found.statistics.forwards == 7  # the first token is the prompt's


@pytest.mark.parametrize("lengths", [(6, 6), (12, 9)])
def test_guidance(lengths: tuple[int, int]) -> None:
    """Both branches at once, of prompts that differ in length too."""
    longest = max(lengths)
    prompt, present = ids(longest, 5, 2), torch.ones(2, longest, dtype=torch.bool)
    present[1, : longest - lengths[1]] = False
    parts = [row[mask] for row, mask in zip(prompt, present, strict=True)]
    wanted: list[Tensor] = []
    for _ in range(12):
        logits = [
            plain(model(), torch.cat([part, *(w[None] for w in wanted)])[None]).logits[0, -1]
            for part in parts
        ]
        wanted.append((logits[1] + 2.5 * (logits[0] - logits[1])).argmax())
    how = Sampling(temperature=0.0, guidance=2.5)
    found = session(2).generate(prompt, max_new_tokens=12, sampling=how, present=present)
    assert found.tokens.equal(torch.stack(wanted))


def test_a_prompt_that_the_model_has_read() -> None:
    prompt = ids(9, 6)
    read = plain(model(), prompt)
    known = Prefilled(
        [(layer.keys, layer.values) for layer in read.past_key_values.layers],
        torch.ones(1, 9, dtype=torch.bool),
        read.hidden_states[-1],
        read.logits[:, -1],
        torch.tensor([9]),
    )
    found = session().generate(known, max_new_tokens=15, sampling=GREEDY)
    assert found.tokens.equal(greedy(prompt, 15))


def test_stop_tokens_and_what_may_stand_where() -> None:
    prompt = ids(5, 1)
    plainly = greedy(prompt, 12)
    stop = int(plainly[5])
    first = plainly.tolist().index(stop)
    found = session().generate(prompt, max_new_tokens=12, sampling=GREEDY, stop=[stop])
    assert found.tokens.equal(plainly[: first + 1])
    even, odd = torch.arange(VOCAB) % 2 == 0, torch.arange(VOCAB) % 2 == 1

    def allowed(index: int) -> Tensor:
        return even if index % 3 else odd

    for how in (GREEDY, Sampling(temperature=1.3)):
        found = session().generate(prompt, max_new_tokens=18, sampling=how, allowed=allowed)
        assert [int(t) % 2 for t in found.tokens] == [0 if at % 3 else 1 for at in range(18)]


@pytest.mark.parametrize("policy", ["never", "uniform{interval=2}", "dynamic{threshold=-1}"])
def test_what_the_target_has_seen_is_plain_text(policy: str) -> None:
    """After recovery too: keys and values are those of one causal forward."""
    prompt = ids(4, 9)
    run = session(draft=Oracle(prompt[0]), policy=policy, codebook=CODES)
    loop = run._loop(GREEDY, None, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loop.begin(prompt, None)
        said = loop.run(24, ())
        while loop.waiting:
            loop.step()
    seen = torch.cat([prompt[0], loop.tokens])
    assert loop.cache.length == len(seen)
    past = plain(model(), seen[None]).past_key_values
    for role, name in ((Role.KEY, "keys"), (Role.VALUE, "values")):
        for layer, found in enumerate(loop.cache.tensors(role)):
            torch.testing.assert_close(found, getattr(past.layers[layer], name), **TOLERANCE)
    skips = loop.statistics.skipped
    assert (skips == 0) == (policy == "never")
    assert said.equal(greedy(prompt, 24)) == (policy == "never")
    assert loop.statistics.forwards + skips == loop.statistics.drafts


def test_skips_raise_tokens_per_forward() -> None:
    prompt = ids(4, 9)
    forwards = []
    for policy in ("never", "uniform{interval=4}", "uniform{interval=2}"):
        run = session(policy=policy)
        found = run.generate(prompt, max_new_tokens=50, generator=torch.Generator().manual_seed(1))
        forwards.append(found.statistics.forwards)
    assert forwards[0] > forwards[1] > forwards[2]


def test_nothing_but_image_tokens_is_skipped() -> None:
    """Where the codebook ends, something else is being written."""
    prompt = ids(4, 9)
    run = session(policy="uniform{interval=2}", codebook=CODES[:8])
    text = torch.arange(VOCAB) >= 8
    found = run.generate(prompt, max_new_tokens=20, allowed=lambda index: text)
    assert found.statistics.skipped == 0
    found = run.generate(prompt, max_new_tokens=20, allowed=lambda index: ~text)
    assert found.statistics.skipped > 2


def test_relaxed_acceptance_accepts_more() -> None:
    prompt, counts = ids(4, 9), []
    for rule in ("exact", "lantern{delta=0.5 k=20}"):
        run = session(acceptance=rule, codebook=CODES)
        found = run.generate(prompt, max_new_tokens=50, generator=torch.Generator().manual_seed(2))
        counts.append(found.statistics.forwards)
    assert counts[1] < counts[0]


def test_sampled_sequences_are_the_targets() -> None:
    """Chi-square of the second and third token over many generations, fixed seed."""
    from scipy.stats import chisquare  # type: ignore[import-untyped]

    prompt, few = ids(4, 3), torch.arange(VOCAB) < 6
    run, draws = session(), 1500
    generator = torch.Generator().manual_seed(0)
    counts = torch.zeros(6, 6)
    for _ in range(draws):
        found = run.generate(
            prompt, max_new_tokens=2, allowed=lambda index: few, generator=generator
        )
        counts[tuple(found.tokens.tolist())] += 1
    first = plain(model(), prompt).logits[0, -1, :6].softmax(-1)
    behind = torch.stack(
        [
            plain(model(), torch.cat([prompt, torch.tensor([[t]])], 1))
            .logits[0, -1, :6]
            .softmax(-1)
            for t in range(6)
        ]
    )
    wanted = (first[:, None] * behind).double()
    found_p = chisquare(counts.flatten(), (wanted / wanted.sum() * draws).flatten()).pvalue
    assert found_p > 0.01


def test_compiled_once() -> None:
    from torch import _dynamo as dynamo

    prompt = ids(4, 9)
    dynamo.reset()
    dynamo.utils.counters.clear()
    run = SpeculativeSession(target(), drafter(), policy="uniform{interval=2}")
    for new in (6, 30):
        found = run.generate(prompt, max_new_tokens=new, sampling=GREEDY)
        assert len(found.tokens) == new
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 3  # draft, verify, recover
    assert 0 < found.statistics.stage_seconds < found.statistics.seconds


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(PreconditionError, match="need 98 rows, and the buffers of the target"):
        session().generate(ids(4, 1), max_new_tokens=79, sampling=GREEDY)
    decoder = text_decoder(model())
    head = EagleDecoder(decoder, EagleHead(decoder.config)).eval()
    small = session(draft=capture_draft(head, TREE, capacity=20))
    with pytest.raises(PreconditionError, match="need 29 rows, and the buffers of the drafter"):
        small.generate(ids(4, 1), max_new_tokens=10)
    with pytest.raises(OptionError, match="guidance is 2"):
        session().generate(ids(4, 1), max_new_tokens=5, sampling=Sampling(guidance=2.0))
    with pytest.raises(OptionError, match="max_new_tokens is 0"):
        session().generate(ids(4, 1), max_new_tokens=0)
    with pytest.raises(PreconditionError, match="for 1 branches"):
        session().generate(ids(4, 1, 2), max_new_tokens=5)
    with pytest.raises(PreconditionError, match="there is no codebook"):
        session(policy="dynamic{threshold=0.6}")
    with pytest.raises(PreconditionError, match="captured for branches 1"):
        SpeculativeSession(target(), drafter(2), backend="eager")
    with pytest.raises(OptionError, match="is no tree"):
        DraftTree(depth=1, width=2, nodes=4)


def test_windows_that_a_draft_is_too_short_to_show() -> None:
    decoder = text_decoder(model("mistral", sliding_window=70))
    with pytest.raises(PreconditionError, match="attend by sliding_attention over 70 tokens"):
        capture_target(decoder, TREE, capacity=80)
    assert capture_target(decoder, TREE, capacity=70)["verify"].facts["tokens"] == TREE.nodes
