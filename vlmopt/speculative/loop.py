"""The loop of speculative decoding over one sequence: draft, skip or verify, accept, draw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from vlmopt.program import Role
from vlmopt.runtime.buffered import BufferedStage
from vlmopt.runtime.draft_cache import DraftCache
from vlmopt.speculative import tree
from vlmopt.speculative.acceptance import Accepted, accept_greedy, accept_sampled
from vlmopt.speculative.block import Block, block_of
from vlmopt.speculative.capture import guidance_of
from vlmopt.speculative.distribution import Sampling, guided
from vlmopt.speculative.drafters import Allowed, Context, Drafter
from vlmopt.speculative.lantern import Neighbourhood
from vlmopt.speculative.progress import Progress
from vlmopt.speculative.skipping import Draft, Never, SkipPolicy
from vlmopt.speculative.truncation import take_path


@dataclass(frozen=True)
class Prefilled:
    """A prompt that the model itself has read.

    Attributes:
        past: keys and values of each layer, ``[branches, heads, tokens, width]``.
        present: bool ``[branches, tokens]``, ``False`` for padding.
        features: ``[branches, tokens, width]``, hidden states after the last norm.
        logits: ``[branches, vocabulary]`` of the first new token, not guided.
        position: int64 ``[branches]``, of the first new token.
        ids: int64 ``[branches, tokens]``, of the vocabulary that new tokens are of, if there are;
            for drafters that look into the prompt.
    """

    past: Sequence[tuple[Tensor, Tensor]]
    present: Tensor
    features: Tensor
    logits: Tensor
    position: Tensor
    ids: Tensor | None = None


@dataclass
class Statistics:
    """What a generation took; the forwards over the prompt are not counted.

    Attributes:
        tokens: new ones.
        drafts: steps of the loop.
        skipped: drafts that the target was not asked about.
        accepted: of each draft that it was asked about, how many tokens it accepted, the root not
            among them.
        seconds: of all of it, the prompt apart.
        stage_seconds: of that, time within compiled stages.
    """

    tokens: int = 0
    drafts: int = 0
    skipped: int = 0
    accepted: list[int] = field(default_factory=list)
    seconds: float = 0.0
    stage_seconds: float = 0.0

    @property
    def forwards(self) -> int:
        """Of the target."""
        return len(self.accepted)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens per forward of the target."""
        return self.tokens / max(self.forwards, 1)

    @property
    def skip_share(self) -> float:
        """Share of drafts that the target was not asked about."""
        return self.skipped / max(self.drafts, 1)

    @property
    def overhead(self) -> float:
        """Share of the time that is spent outside compiled stages."""
        return 1 - self.stage_seconds / self.seconds if self.seconds else 0.0


class Loop:
    """One sequence; see :class:`vlmopt.speculative.session.SpeculativeSession`.

    Args:
        verify, recover: the target on a draft, and on tokens that wait and a draft behind them.
        drafter, policy, neighbours, codebook, sampling, allowed, generator: as of the session.
        depth: most tokens that one skip commits.
    """

    def __init__(
        self,
        verify: BufferedStage,
        recover: BufferedStage,
        drafter: Drafter,
        policy: SkipPolicy,
        neighbours: Neighbourhood | None,
        codebook: Tensor | None,
        depth: int,
        sampling: Sampling,
        allowed: Allowed | None,
        generator: torch.Generator | None,
    ) -> None:
        self.verify, self.recover = verify, recover
        self.drafter = drafter
        self.policy = policy
        self.neighbours = neighbours
        self.codebook = codebook
        self.depth = depth
        self.sampling = sampling
        self.allowed = allowed
        self.generator = generator
        self.statistics = Statistics()
        self.cache = DraftCache(verify.stage)
        self._progress: Progress
        self._root: Tensor  # int64 [1], committed by the next step
        # what the drafter has not read of the tokens before the root, on each branch
        self._unread: Tensor
        self._present: Tensor | None = None
        self._prompt = torch.empty(0, dtype=torch.int64)  # of the first branch

    def begin(self, prompt: Tensor | Prefilled, present: Tensor | None) -> None:
        """Read a prompt, and draw the first token."""
        if isinstance(prompt, Prefilled):
            self.cache.load(prompt.past, prompt.present, prompt.position)
            features, logits = prompt.features[:, -1:], prompt.logits[:, None]
            if self.sampling.guidance is not None:
                logits = guided(logits, self.sampling.guidance)
            self._unread = prompt.present.new_empty(len(features), 0, dtype=torch.int64)
            ids, present = prompt.ids, prompt.present
        else:
            features, logits = self._read_prompt(prompt, present)
            self._unread, self._present = prompt[:, 1:], present
            ids = prompt
        if ids is not None:
            self._prompt = (ids[0] if present is None else ids[0][present[0]]).cpu()
        nothing = torch.empty(0, dtype=torch.int64)
        self._progress = Progress.start(nothing, features, self.depth)
        (scores,) = self._scores(logits, torch.zeros(1, dtype=torch.int64))
        self._root = self._draw(self.sampling.distribution(scores))

    def run(self, most: int, stop: Sequence[int]) -> Tensor:
        """New tokens: ``most``, or up to the first that ends the sequence."""
        while True:
            tokens = torch.cat([self._progress.tokens, self._root])
            ends = [at for at, token in enumerate(tokens.tolist()) if token in stop]
            count = min(ends[0] + 1, most) if ends else most
            if len(tokens) >= count:
                return tokens[:count]
            self.step()

    @property
    def tokens(self) -> Tensor:
        """All that is committed, int64."""
        return self._progress.tokens

    @property
    def waiting(self) -> int:
        """How many of the last of these the target has not seen."""
        return self._progress.waiting

    def step(self) -> None:
        """One draft, and what becomes of it."""
        progress = self._progress
        said = torch.cat([progress.tokens, self._root])
        branches = len(progress.drafting)
        read = torch.cat([self._unread, self._root.to(self._unread).expand(branches, 1)], 1)
        context = Context(read, progress.drafting, self._prompt, said, self._present)
        tokens, parents = self.drafter.draft(context, self.sampling, self.allowed)
        rows = self._rows_to_skip(tokens, parents)
        self.statistics.drafts += 1
        if rows is None:
            self._verify(tokens, parents)
        else:
            self._skip(rows)
        self._present = None
        count = self._progress.drafting.shape[1] - 1
        unread = self._progress.tokens[len(self._progress.tokens) - count :]
        self._unread = unread.to(self._unread).expand(branches, -1)

    # without the target

    def _rows_to_skip(self, tokens: Tensor, parents: Tensor) -> Tensor | None:
        """The paths of a draft that the target is not asked about; else ``None``."""
        if isinstance(self.policy, Never) or len(tokens) < 2:
            return None
        if self.codebook is not None and int(tokens.max()) >= len(self.codebook):
            return None  # something else than an image is being written
        rows = tree.candidates(tokens, tree.paths(parents))
        made, waiting = self._progress.new_tokens, self._progress.waiting > 0
        draft = Draft(self.statistics.drafts, made, waiting, rows, self.codebook)
        return rows if self.policy.skips(draft) else None

    def _skip(self, rows: Tensor) -> None:
        row = int(torch.randint(len(rows), (), generator=self.generator))
        taken = take_path(rows, row)
        self._progress = self._progress.skipped(taken.tokens)
        self._root = taken.root[None]
        self.statistics.skipped += 1

    # with the target

    def _verify(self, tokens: Tensor, parents: Tensor) -> None:
        progress, waiting = self._progress, self._progress.waiting
        stage = self.recover if waiting else self.verify
        block = block_of(parents, int(stage.stage.facts["tokens"]), pending=waiting)
        read = torch.cat([progress.tokens[len(progress.tokens) - waiting :], tokens])
        hidden, logits = self._read(stage, read.expand(len(progress.drafting), -1), block, None)
        places = block.offsets[waiting : block.size] - waiting
        found = self._accept(tokens, parents, logits[:, waiting : block.size], places)
        kept = [*range(waiting), *(found.nodes + waiting).tolist()]
        self.cache.commit(kept)
        self._progress = progress.verified(tokens[found.nodes], hidden[:, kept])
        self._root = self._draw(found.following)
        self.statistics.accepted.append(len(found.nodes) - 1)

    def _accept(self, tokens: Tensor, parents: Tensor, logits: Tensor, depths: Tensor) -> Accepted:
        scores = self._scores(logits, depths + len(self._progress.tokens) + 1)
        if not self.sampling.greedy:
            uniforms = torch.rand(len(tokens) - 1, generator=self.generator)
            chances = _Chances(scores, self.sampling)
            return accept_sampled(tokens, parents, chances, uniforms, self.neighbours)
        if self.neighbours is not None:
            scores = self.sampling.distribution(scores)
        return accept_greedy(tokens, parents, scores, self.neighbours)

    # the target's words

    def _read_prompt(self, prompt: Tensor, present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Features of all tokens, and logits of the last, ``[branches, 1, vocabulary]``."""
        places = int(self.recover.stage.facts["tokens"])
        found = []
        for start in range(0, prompt.shape[1], places):
            part = slice(start, start + places)
            block = block_of(tree.chain(prompt[:, part].shape[1]), places)
            some = None if present is None else present[:, part]
            hidden, logits = self._read(self.recover, prompt[:, part], block, some)
            self.cache.commit(range(block.size), some)
            found.append(hidden[:, : block.size])
        return torch.cat(found, 1), logits[:, block.size - 1 : block.size]

    def _read(
        self, stage: BufferedStage, tokens: Tensor, block: Block, present: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and logits of the places of a block."""
        (port,) = stage.stage.find_outputs(Role.HIDDEN_STATES)
        given = {"input_ids": block.fill(tokens), **guidance_of(self.sampling)}
        results = self.cache.run(stage, given, block, present)
        return results[port.name], results["logits"]

    def _scores(self, logits: Tensor, places: Tensor) -> Tensor:
        """Logits ``[nodes, vocabulary]`` of what may stand at these places."""
        scores = logits[0]
        if self.allowed is None:
            return scores
        for place in {*places.tolist()}:
            mask = self.allowed(place)
            if mask is not None:
                hidden = (places == place)[:, None] & ~mask.cpu()
                scores = scores.masked_fill(hidden.to(scores.device), -torch.inf)
        return scores

    def _draw(self, chances: Tensor) -> Tensor:
        """A token, int64 ``[1]``."""
        if self.sampling.greedy:
            return chances.argmax(-1, keepdim=True).cpu()
        return chances.cpu().multinomial(1, generator=self.generator)


class _Chances:
    """Distributions of what follows the nodes of a tree, made where they are looked at."""

    def __init__(self, scores: Tensor, sampling: Sampling) -> None:
        self._scores = scores
        self._sampling = sampling

    def __getitem__(self, node: int, /) -> Tensor:
        return self._sampling.distribution(self._scores[node])
