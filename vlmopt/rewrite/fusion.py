"""Attention that is raised towards tokens about to be dropped, in the layers before a cut."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import Layers
from vlmopt.analysis.sublayers import attention_of
from vlmopt.graph.attention import attention_arguments
from vlmopt.program import Stage
from vlmopt.rewrite.emit import Emitter

Raise = Callable[[Tensor, Tensor], Tensor]
"""Scaled logits ``[batch, heads, tokens, tokens]``, float32, minus infinity where hidden, and
per-token values ``[batch, tokens]``: what is added to the logits."""


def raise_attention(
    stage: Stage,
    layers: Layers,
    layer: int,
    values: fx.Node,
    added: Raise,
    emitter: Callable[[fx.Node], Emitter],
) -> None:
    """Add to the attention logits of a layer what ``added`` makes of them.

    The whole matrix of the layer is computed once more for it.

    Args:
        values: per-token values, known before the layer.
        emitter: makes an emitter at a node.
    """
    attention = attention_of(layers, layer)
    given = attention_arguments(attention)
    causal, scale = bool(given.get("is_causal")), given.get("scale")

    def mask(query: Tensor, key: Tensor, values: Tensor, hides: Tensor | None) -> Tensor:
        heads, queries = query.shape[1], query.shape[2]
        keys = key.repeat_interleave(heads // key.shape[1], dim=1).float()
        logits = query.float() @ keys.transpose(-1, -2)
        logits = logits * (scale if scale is not None else query.shape[-1] ** -0.5)
        shown = torch.ones(queries, keys.shape[2], dtype=torch.bool, device=query.device)
        if causal:
            shown = shown.tril(keys.shape[2] - queries)
        if hides is not None:
            shown = shown & (hides if hides.dtype == torch.bool else hides > _HIDDEN)
        raised = added(logits.masked_fill(~shown, float("-inf")), values)
        raised = torch.where(shown, raised, torch.finfo(query.dtype).min)
        return raised.to(query.dtype)

    with stage.graph.inserting_before(attention):
        emit = emitter(attention)
        arguments = (given["query"], given["key"], values, given.get("attn_mask"))
        raised = emit.trace(mask, *arguments, names=("raised",))
    attention.args = (given["query"], given["key"], given["value"], raised)
    attention.kwargs = {
        name: value
        for name, value in attention.kwargs.items()
        if name not in ("attn_mask", "is_causal")
    }


_HIDDEN = -1e30
"""Masks that are added hold about this for what is hidden, and 0 for the rest."""
