"""Token merging in vision transformers, once more: plain loops in the blocks of the user's model.

Each block is computed anew from the untouched model's own parts, one sample at a time and with the
whole attention matrix; shares no code with the product. ToMe from its paper (arXiv 2210.09461,
section 3), SAD-TM from the public description of "Saliency-Driven Token Merging for Vision
Transformers" (CVPR 2026).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Parts:
    """What a model calls the parts of its blocks.

    Attributes:
        blocks: path of their list.
        special: learned tokens in front of the patches.
        projections: query, key and value, or the one linear layer of all three.
        scales: of what attention and the feed-forward network add, where the model has such.
    """

    blocks: str
    special: int
    norms: tuple[str, str] = ("layer_norm1", "layer_norm2")
    attention: str = "self_attn"
    projections: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")
    out: str = "out_proj"
    scales: tuple[str, str] | None = None


@dataclass
class Token:
    """One token of one sample.

    Attributes:
        members: original tokens that it stands for, its own first.
        prior: what the method knows about its place.
    """

    members: list[int]
    prior: float = 0.0


@dataclass
class Seen:
    """One sample between the attention and the feed-forward network of a block.

    Attributes:
        rows: ``[tokens, width]``; keys: ``[heads, tokens, size]``; attention: ``[heads, tokens,
            tokens]``, over all keys.
    """

    tokens: list[Token]
    rows: Tensor
    keys: Tensor
    attention: Tensor
    special: int


Groups = list[list[int]]
Choose = Callable[[Seen, int], tuple[Groups, list[float]]]
"""``(seen, count)``: tokens that become one, each group under its place in the new order, the one
that the others join first; and the weight of each token therein."""


@dataclass
class MergedEncoder:
    """A model whose blocks merge tokens while :meth:`active`.

    Attributes:
        counts: tokens to merge in each block.
        restore: hand every block's result on with a row for each original token.
        prior: of each patch.
        lengths: tokens that each block's feed-forward network got, once it has run.
    """

    model: Any
    parts: Parts
    choose: Choose
    counts: dict[int, int]
    prop_attn: bool
    restore: bool
    prior: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def __call__(self, **inputs: Any) -> Any:
        with self.active(), torch.no_grad():
            return self.model(**inputs)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        blocks = self.model.get_submodule(self.parts.blocks)
        self.samples: list[list[Token]] = []
        try:
            for index, block in enumerate(blocks):
                block.forward = self._block(index, block)
            yield
        finally:
            for block in blocks:
                del block.forward

    def _block(self, index: int, block: Any) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
            if index == 0:
                self.samples = [self._start(hidden_states.shape[1]) for _ in hidden_states]
                self.lengths = []
            rows = [self._sample(index, block, at, x) for at, x in enumerate(hidden_states)]
            return torch.stack(rows)

        return forward

    def _start(self, tokens: int) -> list[Token]:
        special = self.parts.special
        prior = [0.0] * special + (self.prior or [0.0] * (tokens - special))
        return [Token([place], value) for place, value in zip(range(tokens), prior, strict=True)]

    def _sample(self, index: int, block: Any, at: int, rows: Tensor) -> Tensor:
        tokens, parts = self.samples[at], self.parts
        total = len(rows)
        if self.restore:
            rows = rows[[token.members[0] for token in tokens]]
        scale = [getattr(block, name) for name in parts.scales or ()] or [1.0, 1.0]
        mixed, keys, weights = self._attend(block, rows, tokens)
        rows = rows + scale[0] * mixed
        count = self.counts.get(index, 0)
        if count:
            seen = Seen(tokens, rows, keys, weights, parts.special)
            rows, tokens = merged(seen, *self.choose(seen, count))
            self.samples[at] = tokens
        if at == 0:
            self.lengths.append(len(rows))
        rows = rows + scale[1] * block.mlp(getattr(block, parts.norms[1])(rows))
        if not self.restore:
            return rows
        full = rows.new_full((total, rows.shape[1]), float("nan"))
        for row, token in zip(rows, tokens, strict=True):
            full[token.members] = row
        return full

    def _attend(
        self, block: Any, rows: Tensor, tokens: list[Token]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What attention adds; its keys and its probabilities."""
        attention = getattr(block, self.parts.attention)
        normed = getattr(block, self.parts.norms[0])(rows)
        made = [getattr(attention, name)(normed) for name in self.parts.projections]
        if len(made) == 1:
            made = list(made[0].chunk(3, -1))
        heads = next(
            getattr(attention, name)
            for name in ("num_heads", "num_attention_heads")
            if hasattr(attention, name)
        )
        query, key, value = (one.unflatten(-1, (heads, -1)).transpose(0, 1) for one in made)
        logits = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        if self.prop_attn:
            logits = logits + torch.tensor([len(token.members) for token in tokens]).log()
        weights = logits.softmax(-1)
        mixed = (weights @ value).transpose(0, 1).flatten(1)
        return getattr(attention, self.parts.out)(mixed), key, weights


def merged(seen: Seen, groups: Groups, weights: list[float]) -> tuple[Tensor, list[Token]]:
    """Each group's weighted mean, of rows and of priors; sizes add up."""
    rows, tokens = [], []
    for group in groups:
        total = sum(weights[place] for place in group)
        rows.append(sum(seen.rows[place] * (weights[place] / total) for place in group))
        tokens.append(
            Token(
                [member for place in group for member in seen.tokens[place].members],
                sum(seen.tokens[place].prior * weights[place] for place in group) / total,
            )
        )
    return torch.stack([torch.as_tensor(row) for row in rows]), tokens


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def tome(seen: Seen, count: int) -> tuple[Groups, list[float]]:
    """The most similar pairs of even and odd tokens, by the mean of the keys over heads."""
    metric = seen.keys.mean(0)
    places = range(len(metric))
    edges = []
    for even in places[::2]:
        likeness = {
            odd: cosine(metric[even], metric[odd]) for odd in places[1::2] if odd >= seen.special
        }
        if even >= seen.special:
            best = max(likeness, key=lambda odd: likeness[odd])
            edges.append((-likeness[best], even, best))
    joins = {even: odd for _, even, odd in sorted(edges)[:count]}
    stays = [place for place in places if place not in joins]
    special = [place for place in stays if place < seen.special]
    evens = [place for place in stays if place >= seen.special and place % 2 == 0]
    odds = [place for place in stays if place >= seen.special and place % 2 == 1]
    groups = [[to, *(a for a, b in joins.items() if b == to)] for to in special + evens + odds]
    return groups, [float(len(token.members)) for token in seen.tokens]


def sad_tm(alpha: float) -> Choose:
    """Patches of least importance, each into the most similar of the others."""

    def choose(seen: Seen, count: int) -> tuple[Groups, list[float]]:
        patches = range(seen.special, len(seen.tokens))
        looked_at = seen.attention.mean(0)
        attention = looked_at[0] if seen.special else looked_at.mean(0)
        by_attention = spread([float(attention[place]) for place in patches])
        by_prior = spread([seen.tokens[place].prior for place in patches])
        importance = {
            place: alpha * a + (1 - alpha) * b
            for place, a, b in zip(patches, by_attention, by_prior, strict=True)
        }
        order = sorted(patches, key=lambda place: importance[place])
        others = sorted(order[count:])
        joins = {}
        for place in order[:count]:
            likeness = [cosine(seen.rows[place], seen.rows[other]) for other in others]
            joins[place] = others[likeness.index(max(likeness))]
        stays = [*range(seen.special), *others]
        groups = [[to, *(a for a, b in joins.items() if b == to)] for to in stays]
        weights = [1.0] * seen.special + [importance[place] + 1e-6 for place in patches]
        return groups, weights

    return choose


def spread(values: list[float]) -> list[float]:
    """Scaled to 0 .. 1; 0 where all are the same."""
    low, high = min(values), max(values)
    return [(value - low) / (high - low) if high > low else 0.0 for value in values]
