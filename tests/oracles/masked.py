"""The mask oracle: dropping a token at layer k is hiding it as a key in all layers from k on.

The user's eager model runs untouched; only its attention function is told which keys each layer
may see. Selection is made here from the hidden states of this very run, by its own few lines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

Score = Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def v2drop_score(
    layer: int, hidden: torch.Tensor, previous: torch.Tensor, visual: torch.Tensor
) -> torch.Tensor:
    return torch.linalg.vector_norm(hidden.float() - previous.float(), dim=-1)


class MaskOracle:
    """Runs ``model`` with the tokens that a method would drop hidden instead.

    Args:
        visual: bool ``[batch, prompt]``.
        cuts: layer -> share kept of the visual tokens present.
        score: ``(layer, hidden, previous hidden, visual) -> [batch, prompt]``.
    """

    def __init__(
        self,
        model: Any,
        visual: torch.Tensor,
        cuts: dict[int, float],
        score: Score = v2drop_score,
    ) -> None:
        self.model = model
        self.visual = visual
        self.cuts = cuts
        self.score = score
        self.present = torch.ones_like(visual)
        self.allowed: dict[int, torch.Tensor] = {}
        self.previous: torch.Tensor | None = None

    @contextlib.contextmanager
    def active(self) -> Iterator[MaskOracle]:
        decoder = self.model.get_decoder()
        inside = set(decoder.modules())
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attention(
            module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any
        ) -> Any:
            mask = kw.pop("attention_mask", mask)
            if module in inside:
                mask = self._hide(module.layer_idx, query, key, mask)
            return original(module, query, key, value, attention_mask=mask, **kw)

        hooks = [
            layer.register_forward_pre_hook(self._before(index), with_kwargs=True)
            for index, layer in enumerate(decoder.layers)
        ]
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        try:
            yield self
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = original
            for hook in hooks:
                hook.remove()

    def _before(self, layer: int) -> Callable[..., None]:
        def hook(module: Any, args: Any, kwargs: Any) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] == 1:
                return
            if layer in self.cuts:
                assert self.previous is not None or layer == 0
                self._choose(layer, hidden)
            self.allowed[layer] = self.present.clone()
            self.previous = hidden

        return hook

    def _choose(self, layer: int, hidden: torch.Tensor) -> None:
        previous = self.previous if self.previous is not None else hidden
        scores = self.score(layer, hidden, previous, self.visual)
        for sample in range(hidden.shape[0]):
            there = torch.nonzero(self.visual[sample] & self.present[sample])[:, 0].tolist()
            share = Fraction(str(self.cuts[layer]))
            keep = max(1, int(len(there) * share)) if there else 0
            best = sorted(there, key=lambda slot: (-scores[sample, slot].item(), slot))[:keep]
            for slot in set(there) - set(best):
                self.present[sample, slot] = False

    def _hide(self, layer: int, query: Any, key: Any, mask: Any) -> torch.Tensor:
        batch, _, queries, _ = query.shape
        keys = key.shape[2]
        allowed = self.allowed[layer]
        grown = torch.ones(batch, max(0, keys - allowed.shape[1]), dtype=torch.bool)
        if queries == 1:  # decoding: everything generated is visible
            seen = self.seen
            grown = torch.ones(batch, seen - allowed.shape[1], dtype=torch.bool)
        visible = torch.cat([allowed, grown], dim=1)[:, -keys:]
        if mask is None:
            full = torch.ones(queries, keys, dtype=torch.bool)
            mask = full.tril(keys - queries)[None, None] if queries > 1 else full[None, None]
        return mask & visible[:, None, None, :]

    seen: int = 0
