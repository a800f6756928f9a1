"""DocPrune once more, from its card: plain loops, one sample and one page at a time."""

from __future__ import annotations

import math

import torch

from oracles.methods import Choose
from oracles.reduced import Choice, Recorded


def comprehension(
    threshold: float, most: int, *, share: float = 0.0, of: str = "logit_mean"
) -> Choose:
    """Visual tokens that the last token attends to in the layer before.

    Args:
        most: that stay; or ``share`` of those of each sample.
    """

    def choose(recorded: Recorded, layer: int) -> Choice:
        stays = recorded.present.clone()
        query, key, _, scale = recorded.heads[layer - 1]
        for sample in range(len(stays)):
            last = max(torch.nonzero(recorded.real[sample])[:, 0].tolist())
            slots = torch.nonzero(recorded.visual[sample] & recorded.present[sample])[:, 0].tolist()
            heads, groups = query.shape[1], query.shape[1] // key.shape[1]
            if of == "logit_mean":
                logits = [
                    sum(
                        float(query[sample, h, last] @ key[sample, h // groups, slot]) * scale
                        for h in range(heads)
                    )
                    / heads
                    for slot in slots
                ]
                total = sum(math.exp(value) for value in logits)
                scores = [math.exp(value) / total * len(slots) for value in logits]
            else:
                row = recorded.attention(layer - 1)[sample, :, last].mean(0)
                scores = [float(row[slot]) * len(slots) for slot in slots]
            ranked = sorted(range(len(slots)), key=lambda at: (-scores[at], at))
            room = int(share * len(slots)) if share else most
            kept = [at for at in ranked[:room] if scores[at] >= threshold] or ranked[:1]
            for at, slot in enumerate(slots):
                stays[sample, slot] = at in kept
        return Choice(layer, stays)

    return choose
