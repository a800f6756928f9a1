"""Selection: from scores to the slots that stay. Pure tensor functions, shared by all methods.

Scores are float32; ties go to the lower index, so that eager, Inductor and ONNX Runtime keep the
same tokens. The number of slots is static.
"""

from __future__ import annotations

import torch
from torch import Tensor


def keep_best(score: Tensor, visual: Tensor, length: int | torch.SymInt) -> Tensor:
    """Slots of all tokens but the visual ones with the lowest scores.

    Every sample must have the same number of visual tokens.

    Args:
        score: float32 ``[batch, tokens]``; values of other tokens are ignored.
        visual: bool ``[batch, tokens]``.
        length: tokens that stay per sample, all others included.

    Returns:
        int64 ``[batch, length]``, ascending.
    """
    ranked = torch.where(visual, score, float("inf"))
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices
    return order[:, :length].sort(dim=-1).values


def keep_best_ragged(
    score: Tensor, visual: Tensor, padding: Tensor, quota: Tensor, length: int | torch.SymInt
) -> tuple[Tensor, Tensor]:
    """As :func:`keep_best` for samples with different numbers of visual tokens.

    Each sample keeps its own quota. A shorter one is filled up with its padding, then with dropped
    tokens that must be masked: never with budget of another sample.

    Args:
        score: float32 ``[batch, tokens]``.
        visual, padding: bool ``[batch, tokens]``, disjoint.
        quota: int64 ``[batch, 1]``, visual tokens to keep.
        length: slots per sample; at least the other tokens plus the quota of every sample.

    Returns:
        Slots int64 ``[batch, length]``, ascending, and bool ``[batch, length]``: False marks a
        filler that no one may attend to.
    """
    order = torch.sort(
        torch.where(visual, score, float("-inf")), dim=-1, descending=True, stable=True
    ).indices
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.zeros_like(order).scatter(1, order, place)
    # kept text and visual tokens, then padding, then what is dropped
    tier = torch.where(visual, torch.where(rank < quota, 2, 0), torch.where(padding, 1, 2))
    chosen = torch.sort(tier, dim=-1, descending=True, stable=True).indices[:, :length]
    slots = chosen.sort(dim=-1).values
    return slots, tier.gather(1, slots) != 0


def best_passing(score: Tensor, passing: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows that pass, the best ``count`` at most, filled up with the best of the others.

    Args:
        score: float32 ``[batch, rows]``.
        passing: bool, likewise. Where none passes, the best row stands in.

    Returns:
        int64 ``[batch, count]``, ascending; bool, likewise: False for fillers.
    """
    order = torch.sort(score, dim=-1, descending=True, stable=True).indices
    first = torch.sort(passing.gather(1, order).long(), dim=-1, descending=True, stable=True)
    order = order.gather(1, first.indices[:, :count])
    place = torch.arange(count, device=score.device)
    real = place < passing.sum(-1, keepdim=True).clamp(min=1)
    slots, back = order.sort(dim=-1)
    return slots, real.gather(1, back)


def visual_slots(visual: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Slots of the visual tokens of each sample, in order.

    Args:
        visual: bool ``[batch, tokens]``.
        count: the most visual tokens that a sample has.

    Returns:
        int64 ``[batch, count]``, and bool ``[batch, count]``: False where a sample has fewer; the
        slots there are those of other tokens.
    """
    order = torch.sort(visual.long(), dim=-1, descending=True, stable=True).indices
    slots = order[:, :count]
    # not gathered: compilers would gather again wherever it is used
    number = visual.sum(-1, keepdim=True)
    return slots, torch.arange(slots.shape[1], device=slots.device) < number


def take(values: Tensor, slots: Tensor) -> Tensor:
    """Rows ``slots[b]`` of each sample: ``[batch, tokens, ...]`` to ``[batch, slots, ...]``."""
    index = slots.view(*slots.shape, *[1] * (values.ndim - 2))
    return values.gather(1, index.expand(*slots.shape, *values.shape[2:]))


def put(score: Tensor, slots: Tensor, visual: Tensor) -> Tensor:
    """Scores of the visual tokens at their slots, minus infinity at the others."""
    spread = score.new_full(visual.shape, float("-inf")).scatter(1, slots, score)
    return torch.where(visual, spread, float("-inf"))


def by_order(picks: Tensor, count: int) -> Tensor:
    """Scores that rank ``count`` tokens by the order of picking; float32 ``[batch, count]``.

    Args:
        picks: int64 ``[batch, picks]``, best first. Tokens that were not picked score 0.
    """
    rank = torch.arange(picks.shape[1], 0, -1, device=picks.device, dtype=torch.float32)
    zeros = torch.zeros(picks.shape[0], count, device=picks.device)
    return zeros.scatter(1, picks, rank.expand_as(picks))


def min_max(values: Tensor, valid: Tensor) -> Tensor:
    """Scaled to 0 .. 1 over the valid entries of each row; 0 where all are the same."""
    low = values.masked_fill(~valid, float("inf")).amin(-1, keepdim=True)
    high = values.masked_fill(~valid, float("-inf")).amax(-1, keepdim=True)
    return torch.where(high > low, (values - low) / (high - low), 0.0)


_PRIME = 2**31 - 1  # squares of what is below still fit int64


def hashed(number: Tensor, seed: int) -> Tensor:
    """A fixed random value for each number: no state, and the same wherever it runs.

    Args:
        number: int64, any shape.

    Returns:
        float32, like ``number``.
    """
    value = (number.clamp(min=0) + 1 + 7919 * (seed + 1)) % _PRIME
    for _ in range(3):  # squaring breaks the even steps of a multiplicative generator
        value = value * 48271 % _PRIME
        value = (value * value + 11) % _PRIME
    return (value % 2**24).float()


def strided(number: Tensor, quota: Tensor, present: Tensor) -> Tensor:
    """1 for ``quota`` numbers below ``present``, evenly spread, 0 for the others.

    Args:
        number: int64 ``[batch, tokens]``.
        quota, present: int64 ``[batch, 1]``.

    Returns:
        float32 ``[batch, tokens]``.
    """
    there = present.clamp(min=1)
    before = torch.div(number * quota, there, rounding_mode="floor")
    after = torch.div((number + 1) * quota, there, rounding_mode="floor")
    return (after > before).float()


def ordinal(visual: Tensor) -> Tensor:
    """Number of each visual token among those of its sample, from 0; int64, like ``visual``."""
    return visual.long().cumsum(-1) - 1


def above_threshold(
    score: Tensor, visual: Tensor, threshold: float | Tensor, capacity: int | torch.SymInt
) -> tuple[Tensor, Tensor]:
    """Slots of the visual tokens that score above a threshold; the best ones where room is short.

    Args:
        score: float32 ``[batch, tokens]``.
        visual: bool ``[batch, tokens]``.
        threshold: a number, or ``[batch, 1]``; a score equal to it does not pass.
        capacity: slots per sample, at most the number of tokens.

    Returns:
        Slots int64 ``[batch, capacity]``, ascending, and bool ``[batch, capacity]``: False marks a
        filler, a token that did not pass and that no one may attend to.
    """
    passes = visual & (score > threshold)
    ranked = torch.where(visual, score, float("-inf"))
    order = torch.sort(ranked, dim=-1, descending=True, stable=True).indices[:, :capacity]
    slots = order.sort(dim=-1).values
    return slots, passes.gather(1, slots)
