"""What writes drafts: a trained head on the target's features, or the text itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmopt.program import Program, Role
from vlmopt.runtime.buffered import BufferedStage
from vlmopt.runtime.draft_cache import DraftCache
from vlmopt.speculative.block import Block, block_of
from vlmopt.speculative.capture import DraftTree, guidance_of
from vlmopt.speculative.distribution import Sampling
from vlmopt.speculative.pruning import likeliest_subtree
from vlmopt.speculative.tree import PAD, chain

Allowed = Callable[[int], Tensor | None]
"""Which tokens may stand at a place of what is generated, counted from 0: bool ``[vocabulary]``, or
``None`` for all."""


@dataclass(frozen=True)
class Context:
    """What a draft goes on from.

    Attributes:
        tokens: int64 ``[branches, tokens]``, the tokens behind those that the last draft started
            from, up to the root of this one.
        features: ``[branches, tokens, width]`` of the token before each of them.
        present: bool ``[branches, tokens]``; ``None`` where nothing is padding.
        prompt: int64 ``[tokens]``, of the first branch; empty, where it is no text of the
            vocabulary.
        said: int64 ``[tokens]``, all that was generated, and the root.
    """

    tokens: Tensor
    features: Tensor
    prompt: Tensor
    said: Tensor
    present: Tensor | None = None


class Drafter(ABC):
    """Writes drafts for one sequence."""

    @abstractmethod
    def draft(
        self, context: Context, sampling: Sampling, allowed: Allowed | None
    ) -> tuple[Tensor, Tensor]:
        """A draft whose root is the last token of the context.

        Returns:
            int64 ``[nodes]``, its tokens; and their parents, see :mod:`vlmopt.speculative.tree`.
        """


class NoDraft(Drafter):
    """The root alone: plain decoding."""

    def draft(
        self, context: Context, sampling: Sampling, allowed: Allowed | None
    ) -> tuple[Tensor, Tensor]:
        return context.said[-1:].cpu(), chain(1)


class PromptLookup(Drafter):
    """What stood behind the last tokens where they stood before; needs no training.

    "Prompt Lookup Decoding", A. Saxena 2023.

    Args:
        depth: tokens of a draft.
        longest: so many last tokens are looked for, then fewer.
    """

    def __init__(self, depth: int, longest: int = 3) -> None:
        self.depth = depth
        self.longest = longest

    def draft(
        self, context: Context, sampling: Sampling, allowed: Allowed | None
    ) -> tuple[Tensor, Tensor]:
        text = torch.cat([context.prompt, context.said]).tolist()
        for length in range(min(self.longest, len(text) - 1), 0, -1):
            last = text[-length:]
            for at in range(len(text) - length - 1, -1, -1):  # the latest first
                if text[at : at + length] == last:
                    found = text[at + length : at + length + self.depth]
                    tokens = torch.tensor([text[-1], *found])
                    return tokens, chain(len(tokens))
        return torch.tensor(text[-1:]), chain(1)


class EagleDrafter(Drafter):
    """A draft head; grows the likeliest tokens level by level, and keeps the likeliest tree.

    "EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees", arXiv 2406.16858.

    Args:
        program: see :func:`vlmopt.speculative.capture.capture_draft`.
        stage: its stage, compiled.
    """

    def __init__(self, program: Program, stage: BufferedStage) -> None:
        self.tree = DraftTree(**program.metadata["tree"])
        self._stage = stage
        self._cache = DraftCache(stage.stage)
        self._places = int(stage.stage.facts["tokens"])
        (port,) = stage.stage.find_outputs(Role.HIDDEN_STATES)
        self._hidden = port.name

    def draft(
        self, context: Context, sampling: Sampling, allowed: Allowed | None
    ) -> tuple[Tensor, Tensor]:
        guess, logits = self._extend(context, sampling)
        width, first = self.tree.width, len(context.said)
        sums, found = (each[0] for each in self._likeliest(logits, allowed and allowed(first)))
        # all nodes, level by level: their tokens, parents, and chances to be reached
        pool, reached = [context.said[-1:].numpy(), found], [np.zeros_like(sums[:1]), sums]
        parents = [np.full(1, PAD), np.zeros(len(found), dtype=np.int64)]
        # those of the last level that are gone on from: tokens, numbers, what they come behind
        tokens, nodes, features = found, np.arange(len(found)) + 1, guess.expand(-1, len(found), -1)
        mask, size = np.eye(len(tokens), dtype=bool), 1 + len(tokens)
        for level in range(1, self.tree.depth):
            hidden, logits = self._read(tokens, features, mask, level - 1, sampling)
            chances, found = self._likeliest(logits, allowed and allowed(first + level))
            behind = found.shape[1]
            each = (sums[:, None] + chances).ravel()
            pool.append(found.ravel())
            parents.append(nodes.repeat(behind))
            reached.append(each)
            best = (-each).argsort(kind="stable")[:width]
            came = best // behind
            tokens, sums, nodes = pool[-1][best], each[best], size + best
            features = hidden.index_select(1, torch.from_numpy(came).to(hidden.device))
            mask = np.concatenate([mask[came], np.eye(len(best), dtype=bool)], 1)
            size += len(each)
        self._cache.commit([])
        total = torch.from_numpy(np.concatenate(reached))
        count = min(self.tree.nodes, int(total.isfinite().sum()))
        kept, inside = likeliest_subtree(torch.from_numpy(np.concatenate(parents)), total, count)
        return torch.from_numpy(np.concatenate(pool))[kept], inside

    def _extend(self, context: Context, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """Read what is new; the guessed feature of the root, ``[branches, 1, width]``; logits."""
        present = context.present
        for start in range(0, context.tokens.shape[1], self._places):
            part = slice(start, start + self._places)
            tokens, features = context.tokens[:, part], context.features[:, part]
            block = block_of(chain(tokens.shape[1]), self._places)
            some = None if present is None else present[:, part]
            results = self._run(tokens, features, block, sampling, some)
            self._cache.commit(range(block.size), some)
        last = slice(block.size - 1, block.size)
        return results[self._hidden][:, last], results["logits"][:, last]

    def _read(
        self,
        tokens: NDArray[np.int64],
        features: Tensor,
        mask: NDArray[np.bool_],
        depth: int,
        sampling: Sampling,
    ) -> tuple[Tensor, Tensor]:
        """Guessed features of the nodes of one level, and the logits of what follows them."""
        count, earlier = len(tokens), mask.shape[1] - len(tokens)
        whole = np.eye(self._places, earlier + self._places, earlier, dtype=bool)
        whole[:count, : earlier + count] = mask
        offsets = torch.full((self._places,), depth)
        given = torch.from_numpy(tokens).expand(features.shape[0], -1)
        block = Block(torch.from_numpy(whole), offsets, count)
        results = self._run(given, features, block, sampling, None)
        return results[self._hidden][:, :count], results["logits"][:, :count]

    def _run(
        self,
        tokens: Tensor,
        features: Tensor,
        block: Block,
        sampling: Sampling,
        present: Tensor | None,
    ) -> dict[str, Tensor]:
        rest = len(block.mask) - features.shape[1]
        values = {
            "input_ids": block.fill(tokens),
            "features": torch.nn.functional.pad(features, (0, 0, 0, rest)),
            **guidance_of(sampling),
        }
        return self._cache.run(self._stage, values, block, present)

    def _likeliest(
        self, logits: Tensor, allowed: Tensor | None
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Logarithms of chances, and tokens, ``[nodes, width]``, likeliest first."""
        scores = logits[0].float()
        if allowed is not None:
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        found = scores.log_softmax(-1).topk(min(self.tree.width, scores.shape[-1]))
        return found.values.cpu().numpy(), found.indices.cpu().numpy()
