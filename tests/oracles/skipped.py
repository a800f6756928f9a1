"""The oracle for skipped halves of layers: the eager model with their outputs set to zero."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oracles.reduced import Choice, Recorded, ReducedOracle


class SkippedOracle(ReducedOracle):  # type: ignore[misc]
    """Runs ``model`` with what some tokens add in some halves of layers taken away, in prompts.

    Args:
        skip: n for attention of layer n, n + 0.5 for its feed-forward network.
        attention: ``zero`` and which probabilities become zero: ``vv``, ``vt``.
        rows: bool ``[batch, prompt]``, the tokens that skip; the visual ones otherwise.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        visual: torch.Tensor,
        skip: tuple[float, ...],
        attention: tuple[str, ...] = ("zero",),
        *,
        rows: Callable[[Recorded], torch.Tensor] | None = None,
        plan: list[tuple[int, Callable[[Recorded, int], Choice]]] | None = None,
    ) -> None:
        self.skip, self.attention, self.rows = skip, attention, rows
        super().__init__(model, inputs, visual, plan or [])

    def _skipped(self) -> torch.Tensor:
        return self.visual if self.rows is None else self.rows(self.recorded)

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        decoder = self.model.get_decoder()
        inside = {layer.self_attn: index for index, layer in enumerate(decoder.layers)}
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def zero(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
            first = output[0] if isinstance(output, tuple) else output
            if first.shape[1] == 1:
                return output
            first = torch.where(self._skipped()[..., None], 0.0, first)
            return (first, *output[1:]) if isinstance(output, tuple) else first

        def attend(
            module: Any, query: Any, key: Any, value: Any, attention_mask: Any = None, **kw: Any
        ) -> Any:
            layer = inside.get(module)
            if query.shape[2] > 1 and layer in self.skip:
                return self._edited(layer, query, key, value, attention_mask, kw), None
            return original(module, query, key, value, attention_mask=attention_mask, **kw)

        hooks = []
        for index, layer in enumerate(decoder.layers):
            if index in self.skip and "zero" in self.attention:
                hooks.append(layer.self_attn.register_forward_hook(zero, with_kwargs=True))
            if index + 0.5 in self.skip:
                hooks.append(layer.mlp.register_forward_hook(zero, with_kwargs=True))
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attend
        try:
            with super().active():
                yield
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = original
            for hook in hooks:
                hook.remove()

    def _edited(self, layer: int, query: Any, key: Any, value: Any, mask: Any, kw: Any) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scale = kw.get("scaling") or query.shape[-1] ** -0.5
        logits = query @ key.transpose(-1, -2) * scale
        if mask is None:
            mask = torch.ones(logits.shape[-2:]).tril().bool()
        hidden = ~mask if mask.dtype == torch.bool else mask < -1e30
        shares = logits.masked_fill(hidden, float("-inf")).softmax(-1).nan_to_num(0.0)
        for which in set(self.attention) - {"zero"}:
            shares = edit(shares, self.visual & self.present, which, first_layer=layer == 0)
        return (shares @ value).transpose(1, 2)


def edit(
    shares: torch.Tensor, visual: torch.Tensor, which: str, *, first_layer: bool
) -> torch.Tensor:
    """Attention without that of vision to vision (``vv``), or of text to vision (``vt``).

    Args:
        shares: ``[batch, heads, tokens, tokens]``.
        visual: bool ``[batch, tokens]``.
    """
    shares = shares.clone()
    for sample, seen in enumerate(visual):
        columns = torch.nonzero(seen)[:, 0]
        rows = columns if which == "vv" else torch.nonzero(~seen)[:, 0]
        for row in rows.tolist():
            lost = shares[sample, :, row, columns].sum(-1)
            shares[sample, :, row, columns] = 0
            if which == "vt" and first_layer and len(columns):
                shares[sample, :, row, columns[0]] = lost
    return shares
