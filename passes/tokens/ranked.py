"""What methods share that rank visual tokens by attention in the vision encoder, and merge some."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from vlmopt.passes.tokens.assign import assigned_merge, nearest
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.select import take
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program
from vlmopt.rewrite.encoded import NEEDS_ROUTES
from vlmopt.rewrite.projector import Projector, projector_before


class Groups(NamedTuple):
    """What becomes of the visual tokens; bool ``[batch, visual tokens]`` each.

    Attributes:
        dominant: stay as they are.
        anchors: stay, and take in others.
        members: are merged into an anchor. The rest is dropped.
    """

    dominant: Tensor
    anchors: Tensor
    members: Tensor


@dataclass(frozen=True, kw_only=True)
class RankedMerge(TokenDrop):
    """Base of the methods that keep dominant tokens, and anchors to which others are added.

    Members join the anchor most similar by keys; their mean is added to it. That happens before the
    projector where it makes one token of each row that enters it, else behind it. With
    ``contexts=last`` and ``positions=renumber`` tokens stand as in the official LLaVA codes.

    The official codes hand the class token on as one more visual token; prompts have no place for
    it, so it is left out.
    """

    reads = ("encoded_attention", "encoded_keys", "valid", "present")
    compact = True
    needs_capture = NEEDS_ROUTES
    merges = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    contexts: str = option(
        "own",
        "places of the tokens that take in others: their own, or behind all dominant ones",
        choices=("own", "last"),
    )

    @abstractmethod
    def groups(self, attention: Tensor, valid: Tensor, present: Tensor) -> Groups:
        """Who stays, who takes in others, who is taken in.

        Args:
            attention: float32 ``[batch, visual tokens]``.
            valid: bool ``[batch, visual tokens]``.
            present: visual tokens of each sample, int64 ``[batch, 1]``.
        """

    def projector(self, program: Program, entry: fx.Node) -> Projector | None:
        return projector_before(program, entry)

    def score(self, attention: Tensor, keys: Tensor, valid: Tensor, present: Tensor) -> Tensor:  # type: ignore[override]
        """2 for dominant tokens, 1 for anchors, else 0; float32 ``[batch, visual tokens]``."""
        groups = self.groups(attention, valid, present)
        return 2.0 * groups.dominant + 1.0 * groups.anchors

    def merge(self, tokens: Tensor, score: Tensor, kept: Tensor, *values: Any) -> Tensor:
        attention, keys, valid, present = values
        groups = self.groups(attention, valid, present)
        place = torch.arange(keys.shape[1], device=keys.device)
        target = torch.where(groups.members, nearest(keys, groups.anchors), place)
        merged = assigned_merge(tokens, target, torch.ones_like(attention), "sum")
        if self.contexts == "own":
            return merged
        # the slots that stay, in order, take the dominant rows and then those of the anchors
        tier = torch.where(groups.dominant, 0, torch.where(groups.anchors, 1, 2))
        number = torch.where(groups.anchors, self.order(attention, valid), place)
        order = torch.sort(tier * 2 * keys.shape[1] + number, dim=-1, stable=True).indices
        slots = torch.sort((tier == 2).long(), dim=-1, stable=True).indices
        return torch.zeros_like(merged).scatter(
            1, slots[..., None].expand_as(merged), take(merged, order)
        )

    def order(self, attention: Tensor, valid: Tensor) -> Tensor:
        """Order among the tokens that take in others, for ``contexts=last``; int64."""
        return torch.arange(attention.shape[1], device=attention.device).expand_as(attention)


def rank(score: Tensor, valid: Tensor) -> Tensor:
    """Place of each token by falling score, ties in order; int64, others last."""
    order = torch.sort(
        score.float().masked_fill(~valid, float("-inf")), dim=-1, descending=True, stable=True
    ).indices
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, place)


def spread(number: Tensor, among: Tensor, count: Tensor) -> Tensor:
    """Every ``n``-th of some tokens, ``count`` per sample: bool, like ``among``.

    Args:
        number: int64 ``[batch, tokens]``, of the tokens ``among``, from 0.
        among: bool ``[batch, tokens]``.
        count: int64 ``[batch, 1]``, at most as many as there are.
    """
    step = torch.div(among.sum(-1, keepdim=True), count.clamp(min=1), rounding_mode="floor")
    step = step.clamp(min=1)
    times = torch.div(number, step, rounding_mode="floor")
    return among & (number % step == 0) & (times < count)
