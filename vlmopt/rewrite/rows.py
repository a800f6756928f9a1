"""Halves of layers computed for some tokens only: the others stay as keys, and add nothing."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import Layers
from vlmopt.analysis.modality import TokenModality
from vlmopt.analysis.sublayers import Sublayers, attention_of, middle_of
from vlmopt.analysis.token_axes import B, Dims, T, TokenAxes, follow_tokens, shape_of
from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_mask, is_causal
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Modality, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.region import gather_tokens, shorten_region
from vlmopt.rewrite.tokens import modality_of_kept, put_back
from vlmopt.rewrite.values import CutValues, compute_rows, mask_rows

aten = torch.ops.aten

Values = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Rows:
    """Some tokens of those present.

    Attributes:
        modality: int64 ``[batch, tokens]`` of all tokens present.
        slots: int64 ``[batch, count]``, ascending.
        valid: bool ``[batch, count]``, False for fillers; ``None`` where there are none.
        count: an int, or a node where prompts may have any length.
    """

    modality: fx.Node
    slots: fx.Node
    valid: fx.Node | None
    count: int | fx.Node


@dataclass(frozen=True)
class RowRewrite:
    """Rewrites of one layer of a stage, stamped as a pass's ``match``-th place."""

    stage: Stage
    layers: Layers
    layer: int
    ctx: PassContext
    match: int
    prefix: str

    def emitter(self, place: fx.Node) -> Emitter:
        return Emitter.of_pass(self.ctx, self.stage, place, self.prefix, self.match)

    def choose_rows(
        self,
        modality: TokenModality,
        counts: Sequence[int],
        choose: Callable[..., tuple[Tensor, Tensor]],
        *values: fx.Node,
        others: bool = False,
    ) -> Rows:
        """Choose some tokens of each sample.

        Args:
            modality: of the tokens present.
            counts: tokens per sample.
            others: ``counts`` is how many are not chosen.
            choose: ``(modality, count, *values) -> (slots, valid)``, see :class:`Rows`.
            values: of the stage, over the whole prompt, ``[batch, tokens, ...]``.
        """
        graph = self.stage.graph
        present = [modality.kept] if modality.kept is not None else []
        inputs = graph.find_nodes(op="placeholder")
        last = max([*inputs, modality.source, *present, *values])
        emit = self.emitter(last)
        with graph.inserting_before(last.next):
            here = modality.source
            if present:
                here = emit.trace(modality_of_kept, here, *present, names=("modality",))
                values = tuple(emit.trace(_present, value, *present) for value in values)
            tokens = here.meta["val"].shape[1]
            count: Any = tokens - min(counts) if others else max(counts)
            if not isinstance(count, int):
                size = emit.call(aten.sym_size.int, here, 1)
                count = emit.call(operator.sub, size, min(counts))
            slots, valid = emit.trace(choose, here, count, *values, names=("rows", "valid"))
        return Rows(here, slots, valid if len(set(counts)) > 1 else None, count)

    def skip_feed_forward(self, parts: Sublayers, rows: Rows) -> None:
        """Run the feed-forward network of the layer on ``rows`` only."""
        graph, end = self.stage.graph, parts.ffn_out
        middle = middle_of(self.layers, self.layer)
        width = (shape_of(middle)[2],)
        emit = self.emitter(middle)
        with graph.inserting_before(middle.next):
            start = emit.call(aten.alias.default, middle)  # apart from the residual connection
        for user in list(middle.users):
            if user not in (start, parts.out):
                user.replace_input_with(middle, start)
        dims: Dims = (self._batch(middle), (T,), width)
        axes = self._follow(start, dims, middle, end)
        with graph.inserting_before(start.next):
            shorter = gather_tokens(emit, start, dims, lambda _: rows.slots, name="ffn_rows")
        self._shorten(emit, axes, start, shorter, rows, end)

    def skip_attention(self, parts: Sublayers, rows: Rows, *, values: Values | None = None) -> None:
        """Let only ``rows`` attend; all tokens stay as keys and values.

        Args:
            values: what the values are replaced by, see :func:`without_values`.
        """
        attention = attention_of(self.layers, self.layer)
        heads, size = attention.meta["val"].shape[1], attention.meta["val"].shape[3]
        entry = self.layers.entries[self.layer]
        dims: Dims = (self._batch(entry), (int(heads),), (T,), (int(size),))
        axes = self._follow(attention, dims, entry, parts.attention_out)
        emit = self.emitter(attention)
        with self.stage.graph.inserting_before(attention):
            shorter = self._attend(emit, attention, rows, values)
        self._shorten(emit, axes, attention, shorter, rows, parts.attention_out)

    def divert_attention(self, rows: Rows, values: Values) -> None:
        """Let ``rows`` read other values than the other tokens do."""
        attention = attention_of(self.layers, self.layer)
        emit = self.emitter(attention)
        users = list(attention.users)
        with self.stage.graph.inserting_before(attention.next):
            some = self._attend(emit, attention, rows, values)
            whole = emit.trace(_put_heads_back, attention, rows.slots, rows.valid, some)
        for user in users:
            user.replace_input_with(attention, whole)

    def _attend(
        self, emit: Emitter, attention: fx.Node, rows: Rows, values: Values | None
    ) -> fx.Node:
        """The attention operator for ``rows``, inserted where ``emit`` inserts."""
        here = CutValues(self.stage, self.layers, self.layer, rows.modality, (), emit)
        query, key, value = attention.args[:3]
        (own,) = compute_rows(here, [query], slots=rows.slots, length=rows.count)
        if values is not None:
            value = emit.trace(values, value, rows.modality, names=("values",))
        mask = attention_mask(attention)
        if mask is not None:
            mask = emit.trace(mask_rows, mask, rows.slots, names=("mask",))
        elif is_causal(attention):
            mask = emit.trace(_causal_rows, rows.slots, rows.modality, names=("mask",))
        kept = {name: attention.kwargs[name] for name in _KEPT if name in attention.kwargs}
        target = attention.target
        return emit.call(target, own, key, value, mask, 0.0, False, name="attention", **kept)

    def _batch(self, hidden: fx.Node) -> tuple[Any, ...]:
        return (B,) if shape_of(hidden)[0] != 1 else (1,)

    def _follow(self, start: fx.Node, dims: Dims, hidden: fx.Node, end: fx.Node) -> TokenAxes:
        batch, tokens, _ = shape_of(hidden)
        return follow_tokens(
            self.stage.graph,
            {start: dims},
            tokens=tokens,
            batch=None if batch == 1 else batch,
            stops=[end],
        )

    def _shorten(
        self,
        emit: Emitter,
        axes: TokenAxes,
        start: fx.Node,
        shorter: fx.Node,
        rows: Rows,
        end: fx.Node,
    ) -> None:
        """Run what lies between on ``rows``; for the others ``end`` is zero."""
        reading = read_elsewhere(end, axes)
        run_on_rows(axes, emit, start, shorter, rows.slots, rows.count)
        with self.stage.graph.inserting_before(end.next):
            whole = self.emitter(end).trace(
                _among_zeros, rows.modality, rows.slots, rows.valid, end, names=("restored",)
            )
        for user in reading:
            user.replace_input_with(end, whole)


def run_on_rows(
    axes: TokenAxes,
    emit: Emitter,
    start: fx.Node,
    shorter: fx.Node,
    slots: fx.Node,
    count: int | fx.Node,
) -> None:
    """Run what :func:`follow_tokens` found between a value and its stops on some rows only.

    Args:
        axes: of ``start``.
        shorter: the rows ``slots`` of ``start``, int64 ``[batch, count]``.
    """

    def places(along: Any) -> fx.Node:
        place = axes.place((along,))
        if along == T or place is None:
            return slots
        size = int(axes.size((along,)))
        found: fx.Node = emit.trace(_with_others, slots, *place, size, names=("places",))
        return found

    frontier = {}
    for value, dims in axes.frontier.items():
        with emit.graph.inserting_before(value.next if value > shorter else shorter.next):
            frontier[value] = gather_tokens(emit, value, dims, places, name=f"rows_{value.name}")
    shorten_region(axes, emit, starts={start: shorter}, length=count, frontier=frontier)


def _with_others(slots: Tensor, start: int, stop: int, size: int) -> Tensor:
    """``slots`` of the tokens that stand at ``start`` to ``stop``, with all that share their axis.

    Returns:
        int64 ``[batch, others + count]``.
    """
    others = torch.arange(size, device=slots.device).expand(slots.shape[0], -1)
    return torch.cat([others[:, :start], slots + start, others[:, stop:]], 1)


def read_elsewhere(end: fx.Node, axes: TokenAxes) -> list[fx.Node]:
    """What reads the end of a region, outside of that region."""
    return [user for user in end.users if user not in axes.dims and user not in axes.ends]


_KEPT = ("scale", "enable_gqa")


def require_halves(stage: Stage, layers: Layers, places: Sequence[float], name: str) -> None:
    """Check that halves of layers can be computed for some tokens only.

    Args:
        places: n for attention of layer n, n.5 for its feed-forward network.
        name: of the pass, for errors.

    Raises:
        PreconditionError: there is no such half, or tokens are not in all of that layer.
    """
    for place in places:
        layer = int(place)
        if place % 0.5 or layer >= len(layers):
            raise PreconditionError(
                f"{name} cannot skip {place}: stage {stage.name} has layers 0 to {len(layers) - 1}",
                hint="name a layer n for its attention, n.5 for its feed-forward network",
            )
        for cut in stage.cuts:
            if cut.until is not None and cut.covers(layer):
                raise PreconditionError(
                    f"{name} cannot skip {place}: {cut.made_by} has already taken tokens out of "
                    "that layer",
                    hint="skip halves of other layers",
                )
            if cut.fillers and cut.covers(layer):
                raise PreconditionError(
                    f"{name} cannot skip {place}: how many tokens {cut.made_by} leaves there "
                    "depends on the prompt",
                    hint="skip halves of layers before that cut",
                )


def without_values(value: Tensor, modality: Tensor) -> Tensor:
    """Nothing is read from visual tokens: what attention pays to them is lost.

    Args:
        value: ``[batch, heads, tokens, size]``.
        modality: int64 ``[batch, tokens]``.
    """
    return value.masked_fill((modality == Modality.VISION)[:, None, :, None], 0)


def first_values(value: Tensor, modality: Tensor) -> Tensor:
    """All visual tokens read as the first of them: it gets what attention pays to any."""
    visual = (modality == Modality.VISION)[:, None, :, None]
    first = visual.long().argmax(2, keepdim=True).expand(*value.shape[:2], 1, value.shape[-1])
    return torch.where(visual, value.gather(2, first), value)


def without_vision(modality: Tensor, count: Any) -> tuple[Tensor, Tensor]:
    """Slots of the tokens that do not come from vision; fillers do."""
    return _first(modality != Modality.VISION, count)


def of_vision(modality: Tensor, count: Any) -> tuple[Tensor, Tensor]:
    """Slots of the tokens that come from vision; fillers do not."""
    return _first(modality == Modality.VISION, count)


def _first(wanted: Tensor, count: Any) -> tuple[Tensor, Tensor]:
    order = torch.sort(wanted.long(), dim=-1, descending=True, stable=True).indices
    slots = order[:, :count].sort(dim=-1).values
    return slots, wanted.gather(1, slots)


def _present(value: Tensor, kept: Tensor) -> Tensor:
    index = kept.clamp(min=0)[..., None].expand(-1, -1, value.shape[-1])
    return value.gather(1, index)


def _causal_rows(slots: Tensor, modality: Tensor) -> Tensor:
    place = torch.arange(modality.shape[1], device=slots.device)
    return (place <= slots[..., None])[:, None]


def _among_zeros(modality: Tensor, slots: Tensor, valid: Tensor | None, rows: Tensor) -> Tensor:
    zeros = rows.new_zeros(*modality.shape, rows.shape[-1])
    return put_back(zeros, slots, valid, rows)


def _put_heads_back(heads: Tensor, slots: Tensor, valid: Tensor | None, rows: Tensor) -> Tensor:
    """:func:`put_back` for ``[batch, heads, tokens, size]``."""
    whole = put_back(
        heads.transpose(1, 2).flatten(2), slots, valid, rows.transpose(1, 2).flatten(2)
    )
    return whole.unflatten(2, (heads.shape[1], heads.shape[3])).transpose(1, 2)
