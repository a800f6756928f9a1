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

Raise = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""``(logits, chance, seen, among)``: scaled logits and attention towards the tokens that leave,
float32 ``[batch, heads, tokens, leaving]``; how many keys each query sees, int64 ``[batch or 1, 1,
tokens, 1]``; which logits may be raised, bool ``[batch, 1, tokens, leaving]``. Gives what is added
to the logits, 0 for all others."""


def raise_attention(
    stage: Stage,
    layers: Layers,
    layer: int,
    leaving: fx.Node,
    slots: fx.Node,
    valid: fx.Node,
    added: Raise,
    emitter: Callable[[fx.Node], Emitter],
) -> None:
    """Add to the attention logits of a layer what ``added`` makes of those towards some tokens.

    Attention stays as it is, and its result is corrected: with few logits changed, the others weigh
    as much as before but for one factor. That takes the sum of exponentials of each query.

    Args:
        leaving: which tokens, bool ``[batch, tokens]``; ``slots``: the same as places, int64
            ``[batch, leaving]``, of which ``valid``, bool, tells those that count. All known before
            the layer.
        emitter: makes an emitter at a node.
    """
    attention = attention_of(layers, layer)
    given = attention_arguments(attention)
    causal, scale = bool(given.get("is_causal")), given.get("scale")

    def corrected(
        result: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        leaving: Tensor,
        slots: Tensor,
        valid: Tensor,
        hides: Tensor | None,
    ) -> Tensor:
        total = torch.ops.vlmopt.attention_logsumexp(query, key, hides, causal, scale)[..., None]
        groups = query.shape[1] // key.shape[1]
        keys, values = (
            one.gather(2, slots[:, None, :, None].expand(*one.shape[:2], -1, one.shape[3]))
            .repeat_interleave(groups, dim=1)
            .float()
            for one in (key, value)
        )
        query = query.float() * (scale if scale is not None else query.shape[-1] ** -0.5)
        own = query @ keys.transpose(-1, -2)
        visible, seen = _shown(query.shape[2], key.shape[2], slots, causal, hides)
        among = visible & valid[:, None, None] & ~leaving[:, None, :, None]
        before = torch.where(among, own - total, 0.0)
        extra = added(own, before.exp(), seen, among)
        after = before + extra
        top = after.amax(-1, keepdim=True).clamp(min=0)  # keeps exponentials within range
        share = torch.where(extra != 0, (after - top).exp() - (before - top).exp(), 0.0)
        rest = (-top).exp()
        raised = result.float() * rest + share @ values
        return (raised / (rest + share.sum(-1, keepdim=True))).to(result.dtype)

    readers = list(attention.users)
    end = attention.next
    with stage.graph.inserting_before(end):
        values = (given[name] for name in ("query", "key", "value"))
        arguments = attention, *values, leaving, slots, valid, given.get("attn_mask")
        result = emitter(attention).trace(corrected, *arguments, names=("raised",))
    for reader in readers:
        reader.replace_input_with(attention, result)


def _shown(
    queries: int, keys: int, slots: Tensor, causal: bool, hides: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Which of the keys ``slots`` each query sees, and how many of all.

    Returns:
        bool ``[batch, heads or 1, queries, slots]``, and int64 of as many dimensions, the last 1.
    """
    last = torch.arange(keys - queries, keys, device=slots.device)[:, None]
    visible = slots[:, None, None] <= last
    if not causal:
        visible = torch.ones_like(visible)
    if hides is None:
        seen = last + 1 if causal else torch.full_like(last, keys)
        return visible, seen[None, None]
    shown = hides if hides.dtype == torch.bool else hides > _HIDDEN
    if causal:
        shown = shown & (torch.arange(keys, device=slots.device) <= last)
    shown = shown.expand(len(slots), -1, queries, keys)
    columns = slots[:, None, None].expand(-1, shown.shape[1], queries, -1)
    return shown.gather(3, columns), shown.sum(-1, keepdim=True)


_HIDDEN = -1e30
"""Masks that are added hold about this for what is hidden, and 0 for the rest."""
