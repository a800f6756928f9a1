"""Which tokens of a draft tree the target accepts, and what comes behind them.

With a draft that is settled before its acceptance is drawn, the tokens are distributed as if the
target had chosen each: "Fast Inference from Transformers via Speculative Decoding",
arXiv 2211.17192; several drafts for one place: "SpecInfer", arXiv 2305.09781.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmopt.speculative.lantern import Neighbourhood


@dataclass(frozen=True)
class Accepted:
    """What the target makes of a draft.

    Attributes:
        nodes: int64 ``[accepted + 1]``: the root, and the path of tokens accepted behind it.
        following: float32 ``[vocabulary]``, distribution of the token behind them.
    """

    nodes: Tensor
    following: Tensor


class Rows(Protocol):
    """``[nodes, vocabulary]``, a node at a time."""

    def __getitem__(self, node: int, /) -> Tensor: ...


def accept_greedy(
    tokens: Tensor,
    parents: Tensor,
    probabilities: Tensor,
    neighbours: Neighbourhood | None = None,
) -> Accepted:
    """The longest path of tokens that the target finds the most probable; of equal, the first.

    Args:
        tokens, parents: int64 ``[nodes]``, a tree; see :mod:`vlmopt.speculative.tree`.
        probabilities: float32 ``[nodes, vocabulary]`` of what follows each node; without
            neighbours, anything that is ordered like them.
        neighbours: a token may be the most probable with the help of these.

    Returns:
        The path; all of ``following`` is at the most probable token.
    """
    before, drafts = probabilities[parents[1:]], tokens[1:]
    if neighbours is not None:
        helped, _ = neighbours.relaxed(before, drafts)
        before = before.scatter(1, drafts[:, None], helped[:, None])
    fits = (before.argmax(-1) == drafts).tolist()
    nodes: list[list[int]] = [[0]]  # the path to each node, empty where it is not accepted
    for node, parent in enumerate(parents[1:].tolist(), 1):
        ok = fits[node - 1] and nodes[parent]
        nodes.append([*nodes[parent], node] if ok else [])
    best = max(nodes, key=len)
    last = probabilities[best[-1]]
    return Accepted(tokens.new_tensor(best), F.one_hot(last.argmax(), len(last)).float())


def accept_sampled(
    tokens: Tensor,
    parents: Tensor,
    probabilities: Rows,
    uniforms: Tensor,
    neighbours: Neighbourhood | None = None,
) -> Accepted:
    """A path of tokens as the target would draw them.

    The children of a node are tried in order: one is accepted with the probability that the target
    gives it; else it is taken out of the distribution. Without neighbours this is lossless: path
    and next token are distributed as those that the target draws one by one.

    Args:
        tokens, parents: int64 ``[nodes]``, a tree; see :mod:`vlmopt.speculative.tree`.
        probabilities: float32 ``[nodes, vocabulary]`` of what follows each node; only those on the
            path are looked at.
        uniforms: float32 ``[nodes - 1]``, drawn from ``[0, 1)``; used from the first on.
        neighbours: these help a token, and leave with it if they did, unless that leaves nothing;
            the official code then draws from all of the vocabulary alike.
    """
    children: list[list[int]] = [[] for _ in range(len(tokens))]
    for node, parent in enumerate(parents[1:].tolist(), 1):
        children[parent].append(node)
    draws = iter(uniforms.tolist())
    path = [0]
    while True:
        tried: dict[int, int] = {}  # of equal tokens, the first
        for node in children[path[-1]]:
            tried.setdefault(int(tokens[node]), node)
        chosen, left = _choose(probabilities[path[-1]], list(tried), draws, neighbours)
        if chosen is None:
            return Accepted(tokens.new_tensor(path), left)
        path.append(tried[chosen])


def _choose(
    left: Tensor, tokens: list[int], draws: Iterator[float], neighbours: Neighbourhood | None
) -> tuple[int | None, Tensor]:
    """The first of some tokens that is accepted, if any; else what is left of the distribution."""
    if not tokens:
        return None, left
    if neighbours is None:
        return _choose_exactly(left, tokens, draws)
    for token in tokens:
        many, any_helped = neighbours.relaxed(left[None], torch.tensor([token]).to(left.device))
        # a uniform may be 0, and what is impossible must stay so
        if next(draws) < float(many[0]):
            return token, left
        rest = left.index_fill(0, torch.tensor([token]).to(left.device), 0.0)
        if any_helped:
            fewer = neighbours.without(rest, token)
            rest = fewer if bool(fewer.any()) else rest
        if not bool(rest.any()):  # all was on this token, up to rounding
            return token, left
        left = rest / rest.sum()
    return None, left


def _choose_exactly(
    left: Tensor, tokens: list[int], draws: Iterator[float]
) -> tuple[int | None, Tensor]:
    """As :func:`_choose`, where no token helps another: what is left is scaled once, at the end."""
    places = torch.tensor(tokens).to(left.device)
    mass = float(left.sum(dtype=torch.float64))
    for token, chance in zip(tokens, left[places].tolist(), strict=True):
        if next(draws) * mass < chance:
            return token, left
        mass -= chance
    rest = left.index_fill(0, places, 0.0)
    total = rest.sum()
    if not total > 0:  # all was on these tokens, up to rounding
        return tokens[-1], left
    return None, rest / total
