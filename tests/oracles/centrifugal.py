"""VLM-Pruner once more, from its paper: plain loops over one sample at a time."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from oracles.methods import Choose, Keep
from oracles.reduced import Choice, Recorded


def vlm_pruner(
    keep: Keep,
    grid: tuple[int, int],
    *,
    channels: int,
    batch: int,
    pivots: int = 4,
    spatial: float = 0.5,
    threshold: float = 0.8,
    step: float = 0.1,
    own: float = 0.3,
    clamp: bool = True,
    fill: bool = True,
) -> Choose:
    """Pivots in the keys of the layer before, rounds of growth, and feeding of the dropped."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        stays, replaced = recorded.present.clone(), recorded.hidden[layer].clone()
        keys = recorded.heads[layer - 1][1].transpose(1, 2).flatten(2)
        for sample in range(len(stays)):
            slots = torch.nonzero(recorded.visual[sample] & recorded.present[sample])[:, 0].tolist()
            rows = recorded.hidden[layer][sample, slots].float()
            alike = _similarities(rows, channels)
            spots = [(at % grid[1], at // grid[1]) for at in range(len(slots))]
            away = [[math.dist(a, b) / math.hypot(*grid) for b in spots] for a in spots]
            count = keep(int(recorded.visual[sample].sum()), len(slots))
            picks = _pivots(keys[sample, slots].float(), min(pivots, count))
            _grow(picks, alike, away, count, batch, spatial, threshold, step, fill)
            stays[sample, [at for place, at in enumerate(slots) if place not in picks]] = False
            followers: dict[int, dict[int, float]] = {pick: {} for pick in sorted(picks)}
            for at in range(len(slots)):
                if at not in picks:
                    weight, before = max((alike[at][pick], -pick) for pick in picks)
                    best = -before
                    followers[best][at] = max(weight, 0.0) if clamp else weight
            for pick, members in followers.items():
                total = max(sum(members.values()), 1e-8)
                if sum(weight / total for weight in members.values()) > 0:
                    mean = sum(weight / total * rows[at] for at, weight in members.items())
                    replaced[sample, slots[pick]] = own * rows[pick] + (1 - own) * mean
        return Choice(layer, stays, replaced)

    return choose


def _similarities(rows: Tensor, channels: int) -> list[list[float]]:
    spread = rows.var(0).tolist()
    varying = sorted(range(len(spread)), key=lambda at: (-spread[at], at))[:channels]
    chosen = rows[:, sorted(varying)]
    return [[float(torch.cosine_similarity(a, b, dim=0)) for b in chosen] for a in chosen]


def _pivots(keys: Tensor, count: int) -> list[int]:
    picks = [int(keys.abs().sum(1).argmax())]
    while len(picks) < count:
        left = [at for at in range(len(keys)) if at not in picks]
        apart = [min(float((keys[at] - keys[pick]).norm()) for pick in picks) for at in left]
        picks.append(left[apart.index(max(apart))])
    return picks


def _grow(
    picks: list[int],
    alike: list[list[float]],
    away: list[list[float]],
    count: int,
    batch: int,
    spatial: float,
    threshold: float,
    step: float,
    fill: bool,
) -> None:
    """Appends to ``picks`` until there are ``count``, or a round adds none."""

    def redundancy(at: int) -> float:
        near = min(away[at][pick] for pick in picks)
        return max(alike[at][pick] * (1 + spatial * near) for pick in picks)

    def waiting() -> list[int]:
        left = [at for at in range(len(alike)) if at not in picks]
        return sorted(left, key=lambda at: (redundancy(at), at))

    number, added = 0, True
    while len(picks) < count and added:
        order, before = waiting(), len(picks)
        for start in range(0, len(order), batch):
            part = order[start : start + batch]
            level = {at: redundancy(at) for at in part}
            joins = [at for at in part if level[at] < threshold + step * number]
            if len(picks) + len(joins) > count:
                joins = sorted(part, key=lambda at: level[at])[: count - len(picks)]
            picks += joins
            if len(picks) == count or (start == 0 and not joins):
                break
        number, added = number + 1, len(picks) > before
    if fill:
        picks += waiting()[: count - len(picks)]
