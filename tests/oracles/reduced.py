"""The oracle for methods that choose tokens inside the model: hide instead of dropping.

The user's eager model runs untouched, once more for every cut: the choices made so far are imposed
(keys hidden, positions lowered, rows replaced), and what the next choice needs is recorded. Written
for models whose layers take ``position_embeddings``; shares no code with the product.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@dataclass
class Choice:
    """What one cut decided.

    Attributes:
        stays: bool ``[batch, prompt]``, everything that is still there.
        rows: residual stream at the cut, where merging changed it.
        until: layer before which the others come back.
    """

    layer: int
    stays: torch.Tensor
    rows: torch.Tensor | None = None
    until: int | None = None


class Recorded:
    """One eager run under the choices so far.

    Attributes:
        hidden: residual stream entering each layer; ``halves``: input (after its norm) and output
            (as added to the stream) of attention and of the feed-forward network.
        visual, real: bool ``[batch, prompt]``; ``present``: still there before the cut;
            ``seen``: those there in each layer.
    """

    def __init__(self, visual: torch.Tensor, real: torch.Tensor, present: torch.Tensor) -> None:
        self.visual, self.real, self.present = visual, real, present
        self.hidden: dict[int, torch.Tensor] = {}
        self.halves: dict[int, dict[str, torch.Tensor]] = {}
        self.heads: dict[int, tuple[Any, ...]] = {}
        self.seen: dict[int, torch.Tensor] = {}

    def attention(self, layer: int) -> torch.Tensor:
        """Probabilities ``[batch, heads, prompt, prompt]``."""
        query, key, mask, scale = self.heads[layer]
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        logits = query.float() @ key.float().transpose(-1, -2) * scale
        size = logits.shape[-1]
        if mask is None:
            mask = torch.ones(size, size).tril().bool()
        hidden = ~mask if mask.dtype == torch.bool else mask < -1e30
        return logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)


def decoder_of(model: Any) -> Any:
    """The module that holds the layers of the language model."""
    decoder = model.get_decoder()
    return decoder if hasattr(decoder, "layers") else decoder.model


class ReducedOracle:
    """Runs ``model`` on ``inputs`` as if tokens had been dropped.

    Args:
        visual: bool ``[batch, prompt]``.
        plan: ``(layer, choose)`` for each cut; ``choose(recorded, layer)`` gives a :class:`Choice`.
        renumber: tokens get new positions after each cut.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        visual: torch.Tensor,
        plan: list[tuple[int, Callable[[Recorded, int], Choice]]],
        *,
        renumber: bool = False,
    ) -> None:
        self.model, self.inputs, self.visual = model, inputs, visual
        self.renumber = renumber
        self.real = inputs["attention_mask"].bool()
        self.choices: list[Choice] = []
        self.seen = 0
        for layer, choose in plan:
            self.run()
            self.choices.append(choose(self.recorded, layer))
        self.logits = self.run()

    @property
    def present(self) -> torch.Tensor:
        gone = [choice.stays for choice in self.choices if choice.until is None]
        return torch.stack(gone).all(0) if gone else torch.ones_like(self.visual)

    @torch.no_grad()
    def run(self) -> torch.Tensor:
        with self.active():
            logits: torch.Tensor = self.model(**self.inputs).logits
        return logits

    @torch.no_grad()
    def generate(self, tokens: int) -> torch.Tensor:
        with self.active():
            out: torch.Tensor = self.model.generate(
                **self.inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None
            )
        return out

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        self.recorded = Recorded(self.visual, self.real, self.present)
        decoder = decoder_of(self.model)
        inside = set(decoder.modules())
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attention(
            module: Any, query: Any, key: Any, value: Any, mask: Any = None, **kw: Any
        ) -> Any:
            mask = kw.pop("attention_mask", mask)
            if module in inside:
                mask = self._hide(module.layer_idx, query, key, mask)
                if query.shape[2] > 1:
                    scale = kw.get("scaling") or query.shape[-1] ** -0.5
                    self.recorded.heads[module.layer_idx] = (query, key, mask, scale)
            return original(module, query, key, value, attention_mask=mask, **kw)

        hooks = []
        for index, layer in enumerate(decoder.layers):
            hooks.append(layer.register_forward_pre_hook(self._enter(index), with_kwargs=True))
            hooks.append(layer.register_forward_hook(self._leave(index), with_kwargs=True))
            hooks += self._halves(index, layer)
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        try:
            yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = original
            for hook in hooks:
                hook.remove()

    def _halves(self, index: int, layer: Any) -> list[Any]:
        def note(name: str) -> Callable[..., None]:
            def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
                given = args[0] if args else kwargs["hidden_states"]
                if given.shape[1] > 1:
                    here = self.recorded.halves.setdefault(index, {})
                    here[f"{name}_in"] = given
                    here[f"{name}_out"] = output[0] if isinstance(output, tuple) else output

            return hook

        ffn = layer.mlp if hasattr(layer, "mlp") else layer.feed_forward
        return [
            layer.self_attn.register_forward_hook(note("attention"), with_kwargs=True),
            ffn.register_forward_hook(note("ffn"), with_kwargs=True),
        ]

    def _covering(self, layer: int) -> list[Choice]:
        return [
            choice
            for choice in self.choices
            if choice.layer <= layer and (choice.until is None or layer < choice.until)
        ]

    def _hide(self, layer: int, query: Any, key: Any, mask: Any) -> Any:
        choices = self._covering(layer)
        if not choices:
            return mask
        queries, keys = query.shape[2], key.shape[2]
        if mask is None:
            mask = torch.ones(queries, keys).tril(keys - queries).bool()[None, None]
        for choice in choices:
            stays = torch.ones(len(choice.stays), self.seen, dtype=torch.bool)
            stays[:, : choice.stays.shape[1]] = choice.stays
            stays = stays[:, -keys:]  # a sliding window holds the last ones
            # a hidden token sees itself, or its softmax would be over nothing
            place = torch.arange(keys)
            itself = place[keys - queries :, None] == place
            visible = stays[:, None, None, :] | itself
            if mask.dtype == torch.bool:
                mask = mask & visible
            else:
                mask = torch.where(visible, mask, torch.finfo(mask.dtype).min)
        return mask

    def _enter(self, layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = args[0] if args else kwargs["hidden_states"]
            if layer == 0:
                self.seen = hidden.shape[1] if hidden.shape[1] > 1 else self.seen + 1
            if hidden.shape[1] > 1:
                for choice in self.choices:
                    if choice.layer == layer and choice.rows is not None:
                        hidden = torch.where(choice.stays[..., None], choice.rows, hidden)
                self.recorded.hidden[layer] = hidden
                seen = torch.ones_like(self.visual)
                for choice in self._covering(layer):
                    seen = seen & choice.stays
                self.recorded.seen[layer] = seen
            if self.renumber and self._covering(layer):
                kwargs = {**kwargs, "position_embeddings": self._rotary(hidden, layer, kwargs)}
            if args:
                return (hidden, *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": hidden}

        return hook

    def _rotary(self, hidden: torch.Tensor, layer: int, kwargs: Any) -> Any:
        stays = torch.stack([choice.stays for choice in self._covering(layer)]).all(0)
        here = stays & self.real
        positions = kwargs["position_ids"]
        if hidden.shape[1] > 1:
            rank = here.long().cumsum(1) - 1
            positions = torch.where(here, rank, positions.expand_as(rank))
        else:
            dropped = self.real.sum(1, keepdim=True) - here.sum(1, keepdim=True)
            positions = positions - dropped
        return decoder_of(self.model).rotary_emb(hidden, positions)

    def _leave(self, layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            before = args[0] if args else kwargs["hidden_states"]
            after = output[0] if isinstance(output, tuple) else output
            if before.shape[1] > 1:
                for choice in self._covering(layer):
                    if choice.until is not None:
                        after = torch.where(choice.stays[..., None], after, before)
            return (after, *output[1:]) if isinstance(output, tuple) else after

        return hook
