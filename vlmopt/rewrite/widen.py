"""Running a layer on more tokens than there are: copies of some, in other resolution.

The copies stand behind the visual tokens in causal order, at the positions of the tokens that they
are copies of. In the tensors they come last; masks tell what may see them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import Layers
from vlmopt.analysis.sublayers import attention_of
from vlmopt.analysis.token_axes import B, Dims, T, follow_tokens, shape_of
from vlmopt.graph.attention import attention_mask, is_causal, replace_mask
from vlmopt.program import Modality
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.region import gather_tokens, shorten_region
from vlmopt.rewrite.tokens import CutSite, emitting, finish_cut, kept_slots, later_of
from vlmopt.rewrite.values import CutValues, compute_rows, last_place, last_slot

aten = torch.ops.aten


@dataclass(frozen=True)
class Copies:
    """Tokens that a layer runs on besides those of the prompt.

    Attributes:
        rows: their residual stream, ``[batch, copies, width]``.
        parents: slots of the tokens that they are copies of, int64 ``[batch, copies]``.
        live: bool ``[batch, 1]``; where it is False nothing sees them.
    """

    rows: fx.Node
    parents: fx.Node
    live: fx.Node


def attention_of_last(values: CutValues, copies: Copies) -> fx.Node:
    """Attention that each sample's last token would pay in the layer ahead, copies among the keys.

    Returns:
        float32 ``[batch, tokens]``, mean over heads, without the copies.
    """
    attention, emit = attention_of(values.layers, values.layer), values.emit
    query, key = attention.args[:2]
    last = emit.trace(last_slot, values.modality, names=("last",))
    count = copies.parents.meta["val"].shape[1]
    (row,) = compute_rows(values, [query], slots=last, length=1)
    (keys,) = compute_rows(values, [key])
    (more,) = compute_rows(values, [key], slots=copies.parents, length=count, rows=copies.rows)
    mask = values.mask_of(attention)
    scale: Any = attention.kwargs.get("scale")

    def attend(
        row: Tensor,
        keys: Tensor,
        more: Tensor,
        mask: Tensor | None,
        modality: Tensor,
        last: Tensor,
        parents: Tensor,
        live: Tensor,
    ) -> Tensor:
        tokens = keys.shape[2]
        wide = _wide_mask(mask, is_causal(attention), modality, parents, live)
        index = last[:, None, :, None].expand(-1, wide.shape[1], 1, wide.shape[3])
        seen = wide.gather(2, index)
        every = torch.cat([keys, more], 2)
        shares = torch.ops.vlmopt.attention_rows(row, every, seen, None, scale)
        return shares.mean(1)[:, 0, :tokens]

    result: fx.Node = emit.trace(
        attend,
        row,
        keys,
        more,
        mask,
        values.modality,
        last,
        copies.parents,
        copies.live,
        names=("attention",),
    )
    return result


def widen_layer(
    site: CutSite,
    layers: Layers,
    count: int,
    step: Callable[[Emitter, fx.Node], tuple[Copies, Sequence[fx.Node]]],
    carried: Sequence[fx.Node] = (),
) -> tuple[Copies, Sequence[fx.Node]]:
    """Run the layer of ``site`` on copies of tokens too.

    Args:
        site: of one layer, ``until`` its end; ``quotas`` count the copies.
        count: copies per sample.
        step: called with an emitter before the layer and the modality of the tokens; returns the
            copies, and what is still needed behind the layer.
        carried: what ``step`` takes from before.

    Returns:
        The copies as they leave the layer, and what was still needed.
    """
    graph, stop = site.stage.graph, site.until[0] if site.until else None
    assert stop is not None
    batch, _, width = shape_of(site.hidden)
    tokens = site.hidden.meta["val"].shape[1]
    attention = attention_of(layers, site.layer)
    mask = attention_mask(attention)
    dims: Dims = ((B,) if batch != 1 else (1,), (T,), (width,))
    axes = follow_tokens(
        graph,
        {site.hidden: dims},
        tokens=shape_of(site.hidden)[1],
        batch=None if batch == 1 else batch,
        absorb=False,
        stops=[stop],
    )
    with emitting(site, site.hidden, *carried) as (emit, modality, anchor):
        copies, needed = step(emit, modality)
        given = (copies.rows, copies.parents, copies.live)
        length: Any = tokens + count
        if not isinstance(length, int):
            size = emit.call(aten.sym_size.int, site.hidden, 1)
            length = emit.call(operator.add, size, count, name="length")
        slots, valid, wide = emit.trace(
            _wide, site.hidden, *given, names=("slots", "valid", "wide")
        )
        kept = emit.trace(kept_slots, slots, valid, names=("kept",))
        about = (is_causal(attention), modality, copies.parents, copies.live)
        frontier = {}
        for value, found in axes.frontier.items():
            with graph.inserting_before(later_of(graph, value, anchor)):
                if value is mask:
                    frontier[value] = emit.trace(_wide_mask, value, *about, names=("mask",))
                else:
                    frontier[value] = gather_tokens(
                        emit, value, found, lambda _: slots, name=f"wide_{value.name}"
                    )
        if mask is None:
            replace_mask(attention, emit.trace(_wide_mask, None, *about, names=("mask",)))
        users = [user for user in stop.users if user not in axes.dims and user not in axes.ends]
        shorten_region(axes, emit, starts={site.hidden: wide}, length=length, frontier=frontier)
        with graph.inserting_before(stop.next):
            inside = _at(emit, stop)
            narrow, rest = inside.trace(_split, stop, count, names=("narrow", "rest"))
        for user in users:
            user.replace_input_with(stop, narrow)
    after = Copies(rest, copies.parents, copies.live)
    left = {after.rows, after.parents, after.live, *needed}
    finish_cut(site, axes, kept, tokens, tokens + count, left)
    return after, needed


def _at(emit: Emitter, place: fx.Node) -> Emitter:
    return Emitter(
        emit.graph, stamp=emit.stamp, place=place, prefix=emit.prefix, fake_mode=emit.fake_mode
    )


def _wide(
    hidden: Tensor, rows: Tensor, parents: Tensor, live: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    place = torch.arange(hidden.shape[1], device=hidden.device).expand(hidden.shape[:2])
    slots = torch.cat([place, parents], 1)
    valid = torch.cat([torch.ones_like(place, dtype=torch.bool), live.expand_as(parents)], 1)
    return slots, valid, torch.cat([hidden, rows.to(hidden.dtype)], 1)


def _split(wide: Tensor, count: int) -> tuple[Tensor, Tensor]:
    return wide[:, :-count], wide[:, -count:]


def _wide_mask(
    mask: Tensor | None, causal: bool, modality: Tensor, parents: Tensor, live: Tensor
) -> Tensor:
    """An attention mask for the prompt and the copies behind it.

    A copy sees what the last visual token sees, and the copies up to itself; it is seen, where its
    parent is, by itself and by what comes behind the last visual token.

    Args:
        mask: ``[batch or 1, heads or 1, tokens or 1, tokens]``, bool or added; ``None``: all is
            seen, or what came before if ``causal``.

    Returns:
        Like ``mask``, or bool, ``[batch, heads or 1, tokens + copies, tokens + copies]``.
    """
    batch, tokens = modality.shape
    place = torch.arange(tokens, device=modality.device)
    if mask is None:
        mask = place <= place[:, None] if causal else torch.ones_like(place[:, None] == place)
        mask = mask[None, None]
    mask = mask.expand(batch, -1, tokens, -1)
    heads, whole = mask.shape[1], tokens + parents.shape[1]
    last = last_place(modality == Modality.VISION)
    every = place.expand(batch, -1)
    rows = torch.cat([every, last.clamp(min=0).expand_as(parents)], 1)
    columns = torch.cat([every, parents], 1)
    mask = mask.gather(3, columns[:, None, None, :].expand(-1, heads, tokens, -1))
    mask = mask.gather(2, rows[:, None, :, None].expand(-1, heads, -1, whole))
    copies = torch.arange(parents.shape[1], device=modality.device)
    behind = torch.where(every > last, every + parents.shape[1], every)
    order = torch.cat([behind, last + 1 + copies], 1)
    original = torch.arange(whole, device=modality.device) < tokens
    seen = (order[:, None, :] <= order[:, :, None]) & live[..., None]
    seen = (seen | original)[:, None]
    if mask.dtype == torch.bool:
        return mask & seen
    return torch.where(seen, mask, torch.finfo(mask.dtype).min)
