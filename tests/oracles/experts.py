"""The oracle for methods that skip experts: a dense mask on the weights of the chosen ones.

The user's eager model runs untouched, every expert in its loop; only the weights that reach the
experts are set to zero where the method would skip. Decides pair by pair, in plain numbers; shares
no code with the product.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

Rule = Callable[[int, list[float], str], Sequence[bool]]
"""``(layer, weights of a token's experts, class) -> which are computed``."""

Score = Callable[[int, float, str], float]
"""``(layer, weight, class) -> score`` that pairs are ranked by."""


class ExpertOracle:
    """Runs ``model`` with the weights of some chosen experts set to zero.

    Args:
        visual, special: bool ``[batch, prompt]``.
        rule: for tokens of class ``text`` and ``vision``; special tokens keep all.
        padding: bool likewise; only where pairs are limited does it matter what padding computes.
        capacity: share of the pairs of a layer that are computed at most: those of special tokens,
            then those of highest ``score``.
    """

    def __init__(
        self,
        model: Any,
        visual: torch.Tensor,
        rule: Rule,
        special: torch.Tensor | None = None,
        *,
        padding: torch.Tensor | None = None,
        capacity: float = 1.0,
        score: Score = lambda layer, weight, kind: weight,
    ) -> None:
        self.model = model
        model.set_experts_implementation("eager")
        self.rule = rule
        special = torch.zeros_like(visual) if special is None else special
        self.classes = [
            ["vision" if v else "special" if s else "text" for v, s in zip(*row, strict=True)]
            for row in zip(visual.tolist(), special.tolist(), strict=True)
        ]
        if padding is not None:
            for at, token in padding.nonzero().tolist():
                self.classes[at][token] = "padding"
        self.capacity = capacity
        self.score = score
        self.total = self.skipped = self.limited = 0

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        decoder = self.model.get_decoder()
        layers = decoder.layers if hasattr(decoder, "layers") else decoder.model.layers
        hooks = [
            module.register_forward_pre_hook(self._mask(index, layer), with_kwargs=True)
            for index, layer in enumerate(layers)
            for name, module in layer.named_modules()
            if name.rpartition(".")[2] == "experts"
        ]
        assert hooks
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def logits(self, inputs: dict[str, Any]) -> torch.Tensor:
        with self.active():
            found: torch.Tensor = self.model(**inputs).logits
        return found

    @torch.no_grad()
    def generate(self, inputs: dict[str, Any], tokens: int) -> torch.Tensor:
        with self.active():
            out: torch.Tensor = self.model.generate(
                **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None
            )
        return out

    def _mask(self, index: int, layer: Any) -> Callable[..., Any]:
        scale = 1.0
        for module in layer.modules():
            scale = getattr(module, "routed_scaling_factor", scale)

        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            rows, ids, weights = args
            flat = [kind for row in self.classes for kind in row]
            kinds = flat if len(flat) == len(rows) else ["text"] * len(rows)
            mask, scores = [], []
            for kind, own in zip(kinds, weights.tolist(), strict=True):
                bare = [weight / scale for weight in own]
                if kind in ("special", "padding"):
                    mask.append([kind == "special"] * len(own))
                    scores.append([math.inf] * len(own))
                else:
                    mask.append(list(self.rule(index, bare, kind)))
                    scores.append([self.score(index, one, kind) for one in bare])
            self._limit(mask, scores)
            kept_pairs = torch.tensor(mask)
            self.total += kept_pairs.numel()
            self.skipped += int((~kept_pairs).sum())
            return (rows, ids, weights * kept_pairs), kwargs

        return hook

    def _limit(self, mask: list[list[bool]], scores: list[list[float]]) -> None:
        """Strike out what exceeds the capacity, the least and last first."""
        room = math.ceil(self.capacity * sum(map(len, mask)) - 1e-6)
        ranked = sorted(
            (-scores[token][place], token, place)
            for token, kept in enumerate(mask)
            for place, one in enumerate(kept)
            if one
        )
        for _, token, place in ranked[room:]:
            mask[token][place] = False
            self.limited += 1
