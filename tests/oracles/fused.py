"""Hi-Lo Prune on the user's eager model: plain loops, from its card."""

from __future__ import annotations

import math
from typing import Any

import torch

from oracles.reduced import Choice, ReducedOracle


def diverse(rows: torch.Tensor, among: list[int], count: int) -> list[int]:
    """Greedy max-diversity by cosine distance; the most isolated row first."""
    unit = torch.nn.functional.normalize(rows.double(), dim=-1)
    apart = (1 - unit @ unit.T).round(decimals=7)  # two that are nearest to each other tie

    def best(worth: dict[int, float]) -> int:
        return min(worth, key=lambda at: (-worth[at], at))

    if not among or not count:
        return []
    alone = {a: min((float(apart[a, b]) for b in among if b != a), default=0.0) for a in among}
    picked = [best(alone)]
    while len(picked) < count:
        rest = [at for at in among if at not in picked]
        picked.append(best({at: min(float(apart[at, p]) for p in picked) for at in rest}))
    return picked


class HiLoOracle(ReducedOracle):  # type: ignore[misc]
    """Hides what is dropped, and raises logits before the cut.

    Args:
        pixels: of each visual token, ``[visual tokens, pixels]`` per sample.
        keep: share of the visual tokens that stay.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        visual: torch.Tensor,
        pixels: list[torch.Tensor],
        *,
        layer: int,
        keep: float,
        gain: float,
        top: int,
        positive: bool = False,
    ) -> None:
        self.layer, self.gain, self.top, self.positive = layer, gain, top, positive
        self.leaving: torch.Tensor | None = None
        super().__init__(model, inputs, visual, [])
        stays = torch.ones_like(visual)
        leaving = torch.zeros_like(visual)
        for sample in range(len(visual)):
            slots = torch.nonzero(visual[sample])[:, 0].tolist()
            count = int(len(slots) * keep)
            wide = min(len(slots), math.ceil(count + 0.3 * len(slots) - 1e-6))
            coarse = diverse(pixels[sample], list(range(len(slots))), wide)
            rows = self.recorded.hidden[0][sample][visual[sample]]
            fine = diverse(rows, sorted(coarse), count)
            for at, slot in enumerate(slots):
                stays[sample, slot] = at in fine
                leaving[sample, slot] = at in coarse and at not in fine
        self.leaving = leaving
        self.choices.append(Choice(layer, stays))
        self.logits = self.run()

    def _hide(self, layer: int, query: Any, key: Any, mask: Any) -> Any:
        mask = super()._hide(layer, query, key, mask)
        if self.leaving is None or layer >= self.layer or query.shape[2] == 1:
            return mask
        keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
        tokens = query.shape[2]
        shown = torch.ones(tokens, tokens).tril().bool()[None, None].expand_as(logits)
        if mask is not None:
            shown = mask.expand_as(logits) if mask.dtype == torch.bool else mask > -1e30
            shown = shown.expand_as(logits)
        raised = torch.zeros_like(logits)
        for b in range(len(logits)):
            candidates = torch.nonzero(self.leaving[b])[:, 0].tolist()
            for head in range(logits.shape[1]):
                for i in range(tokens):
                    seen = torch.nonzero(shown[b, head, i])[:, 0]
                    if self.leaving[b, i] or not len(seen):
                        continue
                    chance = torch.zeros(tokens)
                    chance[seen] = logits[b, head, i, seen].softmax(-1)
                    largest = sorted(candidates, key=lambda j: (-float(chance[j]), j))[: self.top]
                    for j in largest:
                        if float(chance[j]) > 1 / len(seen):
                            value = logits[b, head, i, j]
                            raised[b, head, i, j] = self.gain * (
                                value.abs() if self.positive else value
                            )
        return torch.where(shown, raised, torch.finfo(query.dtype).min)
