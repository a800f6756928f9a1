"""Each method once more, from its paper or card: plain loops, one sample at a time.

Every function makes a ``choose`` for :class:`oracles.reduced.ReducedOracle`; ``keep`` gives the
number of visual tokens to keep from the original number and the number present.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

from oracles.reduced import Choice, Recorded

Keep = Callable[[int, int], int]
Choose = Callable[[Recorded, int], Choice]


def best(
    recorded: Recorded, layer: int, score: Callable[[int, list[int]], Any], keep: Keep
) -> Choice:
    """The visual tokens with the highest scores; ``score(sample, slots)`` gives one per slot."""
    stays = recorded.present.clone()
    for sample in range(len(stays)):
        slots = torch.nonzero(recorded.visual[sample] & recorded.present[sample])[:, 0].tolist()
        values = [float(value) for value in score(sample, slots)]
        ranked = sorted(range(len(slots)), key=lambda at: (-values[at], at))
        count = keep(int(recorded.visual[sample].sum()), len(slots))
        for at in ranked[count:]:
            stays[sample, slots[at]] = False
    return Choice(layer, stays)


def instruction(recorded: Recorded, sample: int) -> list[int]:
    last = max(torch.nonzero(recorded.visual[sample])[:, 0].tolist())
    text = [at for at in range(last + 1, recorded.visual.shape[1]) if recorded.real[sample, at]]
    return text or [last]


def fastv(keep: Keep) -> Choose:
    def choose(recorded: Recorded, layer: int) -> Choice:
        rows = recorded.attention(layer - 1).mean(1)
        return best(recorded, layer, lambda b, slots: rows[b, _last(recorded, b), slots], keep)

    return choose


def given(slots: torch.Tensor) -> Choose:
    """What someone else chose: int64 ``[batch, slots]``, -1 for fillers."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        stays = torch.zeros_like(recorded.present)
        for row, chosen in zip(stays, slots.tolist(), strict=True):
            row[[slot for slot in chosen if slot >= 0]] = True
        return Choice(layer, stays | ~recorded.visual)

    return choose


def v2drop(keep: Keep) -> Choose:
    def choose(recorded: Recorded, layer: int) -> Choice:
        here, before = recorded.hidden[layer].float(), recorded.hidden[layer - 1].float()
        change = (here - before).norm(dim=-1)
        return best(recorded, layer, lambda b, slots: change[b, slots], keep)

    return choose


def pyramid_drop(keep: Keep) -> Choose:
    def choose(recorded: Recorded, layer: int) -> Choice:
        rows = recorded.attention(layer).mean(1)
        return best(recorded, layer, lambda b, slots: rows[b, _last(recorded, b), slots], keep)

    return choose


def _last(recorded: Recorded, sample: int) -> int:
    return int(torch.nonzero(recorded.real[sample])[-1])


def duet(keep: Keep) -> Choose:
    def choose(recorded: Recorded, layer: int) -> Choice:
        rows = recorded.attention(layer).mean(1)

        def score(sample: int, slots: list[int]) -> torch.Tensor:
            return rows[sample][instruction(recorded, sample)][:, slots].mean(0)

        return best(recorded, layer, score, keep)

    return choose


def transprune(keep: Keep, scored: range) -> Choose:
    def choose(recorded: Recorded, layer: int) -> Choice:
        rows = recorded.attention(layer).mean(1)

        def score(sample: int, slots: list[int]) -> torch.Tensor:
            total = torch.zeros(len(slots))
            for one in scored:
                if one >= layer:
                    continue
                for half in ("attention", "ffn"):
                    total += _transition(recorded, one, half, sample, slots)
            attention = rows[sample][instruction(recorded, sample)][:, slots].mean(0)
            return total / (total.sum() + 1e-8) + attention / (attention.sum() + 1e-8)

        return best(recorded, layer, score, keep)

    return choose


def _transition(
    recorded: Recorded, layer: int, half: str, sample: int, slots: list[int]
) -> torch.Tensor:
    before = recorded.halves[layer][f"{half}_in"][sample].float()
    after = recorded.halves[layer][f"{half}_out"][sample].float()
    there = torch.nonzero(recorded.seen[layer][sample] & recorded.real[sample])[:, 0].tolist()
    cosine = torch.cosine_similarity(before, after, dim=-1)
    turns = {at: math.exp(1 - float(cosine[at])) for at in there}
    whole = sum(turns.values())
    return torch.tensor(
        [float(after[at].norm() / before[at].norm()) * turns[at] / whole for at in slots]
    )


def _greedy(rows: torch.Tensor, count: int) -> list[int]:
    """Max-min diversity by cosine distance, from the most isolated row on."""
    unit = torch.stack([row / max(float(row.norm()), 1e-12) for row in rows.float()])
    distance = (1 - unit @ unit.T).clamp(min=0)
    alone = distance.clone().fill_diagonal_(math.inf).amin(1)
    picks = [int(alone.argmax())]
    while len(picks) < count:
        far = distance[picks].amin(0)
        far[picks] = -1
        picks.append(int(far.argmax()))
    return picks


def divprune(keep: Keep) -> Choose:
    def choose(recorded: Recorded, layer: int) -> Choice:
        def score(sample: int, slots: list[int]) -> list[float]:
            count = keep(int(recorded.visual[sample].sum()), len(slots))
            picks = _greedy(recorded.hidden[layer][sample, slots], count)
            return [len(slots) - picks.index(at) if at in picks else 0 for at in range(len(slots))]

        return best(recorded, layer, score, keep)

    return choose


def prune2drive(budgets: list[Keep]) -> Choose:
    """Each view, as many tokens as any other, on its own; ``budgets`` count those of a view."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        stays = recorded.present.clone()
        for sample in range(len(stays)):
            slots = torch.nonzero(recorded.visual[sample] & recorded.present[sample])[:, 0].tolist()
            size = len(slots) // len(budgets)
            for view, budget in enumerate(budgets):
                own = slots[view * size : (view + 1) * size]
                picks = _greedy(recorded.hidden[layer][sample, own], budget(size, size))
                stays[sample, [slot for at, slot in enumerate(own) if at not in picks]] = False
        return Choice(layer, stays)

    return choose


def stride_drop(keep: Keep) -> Choose:
    """Of n tokens the ones at which another of q becomes due: n/q, 2n/q, ... rounded up."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        def score(sample: int, slots: list[int]) -> list[float]:
            count = keep(int(recorded.visual[sample].sum()), len(slots))
            due = [-(-turn * len(slots) // count) - 1 for turn in range(1, count + 1)]
            return [float(at in due) for at in range(len(slots))]

        return best(recorded, layer, score, keep)

    return choose


def coin(keep: Keep, alpha: float = 0.5, beta: float = 0.5, ridge: float = 1e-6) -> Choose:
    def choose(recorded: Recorded, layer: int) -> Choice:
        def score(sample: int, slots: list[int]) -> list[float]:
            hidden = recorded.hidden[layer][sample].float()
            rows = hidden[slots]
            text = hidden[recorded.real[sample] & ~recorded.visual[sample]].mean(0)
            norm, aligned = rows.norm(dim=1), torch.cosine_similarity(rows, text[None])
            info = beta * _scaled(norm) + (1 - beta) * _scaled(aligned)
            count = keep(int(recorded.visual[sample].sum()), len(slots))
            gram = rows @ rows.T
            gram = gram + ridge * rows.square().sum(1).mean() * torch.eye(len(rows))
            picks: list[int] = []
            while len(picks) < count:
                open_ = [at for at in range(len(rows)) if at not in picks]
                gains = torch.tensor([_gain(gram, picks, at) for at in open_])
                value = (1 - alpha) * info[open_] + alpha * _scaled(gains)
                picks.append(open_[int(value.argmax())])
            return [len(slots) - picks.index(at) if at in picks else 0 for at in range(len(slots))]

        return best(recorded, layer, score, keep)

    return choose


def _gain(gram: torch.Tensor, picks: list[int], at: int) -> float:
    """Growth of the logarithm of the determinant."""
    more = [*picks, at]
    after = torch.linalg.slogdet(gram[more][:, more].double())[1]
    before = torch.linalg.slogdet(gram[picks][:, picks].double())[1] if picks else 0.0
    return float(after - before)


def _scaled(values: torch.Tensor) -> torch.Tensor:
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def hawk(
    keep: Keep, model: Any, asked: Callable[[Recorded, int], list[int]] = instruction
) -> Choose:
    """Queries and keys from the layer's own modules, never rotated."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        block = model.get_decoder().layers[layer]
        own = block.self_attn
        normed = block.input_layernorm(recorded.hidden[layer])
        size = own.head_dim
        query = own.q_proj(normed).unflatten(-1, (-1, size))
        key = own.k_proj(normed).unflatten(-1, (-1, size))
        if hasattr(own, "q_norm"):
            query, key = own.q_norm(query), own.k_norm(key)

        def score(sample: int, slots: list[int]) -> torch.Tensor:
            mean = query[sample, asked(recorded, sample)].mean(0)
            total = torch.zeros(len(slots))
            for head in range(len(mean)):
                keys = key[sample, slots, head // (len(mean) // key.shape[2])]
                logits = keys @ mean[head]
                total += logits / max(float(logits.norm()), 1e-12) / len(mean)
            return total

        return best(recorded, layer, score, keep)

    return choose


def alvts(keep: Keep, model: Any) -> Choose:
    """At full rank the selector is the sum of the products of all heads, without rotation."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        block = model.get_decoder().layers[layer]
        own = block.self_attn
        normed = block.input_layernorm(recorded.hidden[layer])
        query = own.q_proj(normed).unflatten(-1, (-1, own.head_dim))
        key = own.k_proj(normed).unflatten(-1, (-1, own.head_dim))
        key = key.repeat_interleave(query.shape[2] // key.shape[2], dim=2)
        logits = torch.einsum("bqhd,bkhd->bqk", query, key) / query.shape[2] / own.head_dim**0.5
        size = logits.shape[-1]
        seen = torch.ones(size, size).tril().bool() & recorded.real[:, None]
        map_ = logits.masked_fill(~seen, -math.inf).softmax(-1).nan_to_num(0.0)

        def score(sample: int, slots: list[int]) -> torch.Tensor:
            text = recorded.real[sample] & ~recorded.visual[sample]
            return map_[sample, slots][:, slots].mean(0) * map_[sample, text][:, slots].mean(0)

        choice = best(recorded, layer, score, keep)
        choice.until = layer + 1
        return choice

    return choose


def apet(
    keep: Keep,
    basis: int,
    ridge: float = 1e-5,
    features: list[torch.Tensor] | None = None,
    project: Any = None,
) -> Choose:
    """``mode=overwrite``, places by index; on what enters the projector where that is given."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        stays = recorded.present.clone()
        replaced = recorded.hidden[layer].clone()
        for sample in range(len(stays)):
            slots = torch.nonzero(recorded.visual[sample] & recorded.present[sample])[:, 0].tolist()
            rows = recorded.hidden[layer][sample, slots].float()
            if features is not None:
                rows = features[sample].float()
            picks = [int(rows.norm(dim=1).argmax())]
            while len(picks) < basis:
                far = (rows[:, None] - rows[picks][None]).square().sum(-1).amin(1)
                far[picks] = -1
                picks.append(int(far.argmax()))
            base = rows[picks]
            gram = base @ base.T + ridge * torch.eye(basis)
            error = (rows - torch.linalg.solve(gram, base @ rows.T).T @ base).norm(dim=1)
            count = keep(int(recorded.visual[sample].sum()), len(slots))
            rank = sorted(range(len(slots)), key=lambda at: (-float(error[at]), at))[:count]
            anchors, places = rank[: count - basis], sorted(rank[count - basis :])
            new = rows.clone()
            for place, pick in zip(places, picks, strict=True):
                new[place] = rows[pick]
            groups: dict[int, list[int]] = {anchor: [] for anchor in anchors}
            for at in range(len(slots)):
                if at not in rank:
                    near = [float(torch.cosine_similarity(new[at], new[a], dim=0)) for a in anchors]
                    groups[anchors[near.index(max(near))]].append(at)
                    stays[sample, slots[at]] = False
            merged = new.clone()
            for anchor, members in groups.items():
                merged[anchor] = new[[anchor, *members]].mean(0)
            if features is not None:
                with torch.no_grad():
                    merged = project(merged[None])[0]
            replaced[sample, slots] = merged.to(replaced.dtype)
        return Choice(layer, stays, replaced)

    return choose


def embedlens(keep: Keep, table: torch.Tensor, anchors: tuple[int, ...], top_k: int = 3) -> Choose:
    """Drops the tokens whose best anchor beats the ``top_k``-th nearest id by most."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        def score(sample: int, slots: list[int]) -> list[float]:
            found = []
            for at in slots:
                token = recorded.hidden[layer][sample, at].float()
                near = [float(torch.cosine_similarity(token, row.float(), dim=0)) for row in table]
                nearest = max(near[anchor] for anchor in anchors)
                found.append(sorted(near)[-top_k] - nearest)
            return found

        return best(recorded, layer, score, keep)

    return choose


def near_anchors(keep: Keep, vectors: torch.Tensor, thresholds: list[float]) -> Choose:
    """The same against a threshold for each anchor."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        def score(sample: int, slots: list[int]) -> list[float]:
            tokens = recorded.hidden[layer][sample, slots].float()
            near = torch.stack([torch.cosine_similarity(tokens, row[None]) for row in vectors], 1)
            return [-max(row) for row in (near - torch.tensor(thresholds)).tolist()]

        return best(recorded, layer, score, keep)

    return choose
