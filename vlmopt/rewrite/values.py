"""What a method may read where tokens are cut: values of the graph, found or computed by name."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

import vlmopt.ops  # noqa: F401 - registers vlmopt::attention_rows
from vlmopt.analysis.layers import Layers
from vlmopt.analysis.sublayers import attention_of
from vlmopt.analysis.token_axes import B, Dims, T, follow_tokens
from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_mask, is_causal
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Modality, Program, Role, Stage, fetch_attr
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.encoded import encoded_input, encoding_of, give_rows
from vlmopt.rewrite.positions import carries_positions
from vlmopt.rewrite.projector import find_projector
from vlmopt.rewrite.region import gather_tokens, shorten_region

aten = torch.ops.aten


@dataclass
class CutValues:
    """Values at the entry of a layer, emitted at the insertion point when first asked for.

    Attributes:
        modality: int64 ``[batch, tokens]`` of the tokens present.
        visual: visual tokens present, per sample.
        carried: per-token values that the pass has carried along since an earlier layer.
        program, ctx: what the stage is part of and who rewrites it, for values of other stages.
        kept: slots of the tokens present, ``None`` before the first cut.
    """

    stage: Stage
    layers: Layers
    layer: int
    modality: fx.Node
    visual: tuple[int, ...]
    emit: Emitter
    carried: Mapping[str, fx.Node] = field(default_factory=dict)
    program: Program | None = None
    ctx: PassContext | None = None
    kept: fx.Node | None = None
    _made: dict[str, fx.Node] = field(default_factory=dict)

    def __getitem__(self, name: str) -> fx.Node:
        if name in self.carried:
            return self.carried[name]
        if name not in VALUES:
            raise KeyError(f"no value at a cut is called {name}")
        if name not in self._made:
            self._made[name] = VALUES[name](self)
        return self._made[name]

    # what the functions below use -------------------------------------------------------------

    @property
    def hidden(self) -> fx.Node:
        return self.layers.entries[self.layer]

    def entry(self, layer: int) -> fx.Node:
        """Residual stream entering an earlier layer that saw the same tokens.

        Raises:
            PreconditionError: there is none.
        """
        node = self.layers.entries[layer] if layer >= 0 else None
        if node is None or node.meta["val"].shape[1] != self.hidden.meta["val"].shape[1]:
            raise PreconditionError(
                f"layer {self.layer} cannot be compared with layer {layer}: they see different "
                "tokens",
                node=self.hidden,
                hint="cut at layers that lie further apart",
            )
        return node

    def mask_of(self, attention: fx.Node) -> fx.Node | None:
        """The mask that an attention operator takes, where it can be read before the cut."""
        mask = attention_mask(attention)
        if mask is None:
            return None
        copies = _copy_up_to(self.emit, [mask], {self.hidden: self.hidden})
        return copies.get(mask, mask)

    def weight(self, node: Any) -> Tensor:
        """The tensor behind a weight of the graph."""
        return fetch_attr(self.stage.graph_module, str(node.target))

    def previous_attention(self) -> fx.Node:
        """The attention operator of the layer before."""
        self.entry(self.layer - 1)
        return attention_of(self.layers, self.layer - 1)


def last_place(where: Tensor) -> Tensor:
    """Slot of the last token of each sample that ``where`` marks, -1 for none: ``[batch, 1]``."""
    place = torch.arange(where.shape[1], device=where.device)
    return torch.where(where, place, -1).amax(-1, keepdim=True)


def last_slot(modality: Tensor) -> Tensor:
    """Slot of the last token of each sample that is not padding: ``[batch, 1]``."""
    return last_place(modality != Modality.PADDING)


def _last_row(modality: Tensor) -> tuple[Tensor, Tensor]:
    """That slot, and its weight among query rows."""
    last = last_slot(modality)
    return last, torch.ones_like(last, dtype=torch.float32)


def _instruction_rows(modality: Tensor, count: Any) -> tuple[Tensor, Tensor]:
    """Slots and weights of the text after the last visual token: the mean over these rows.

    Where nothing follows the image, the sample's last token stands in. Weights of a sample sum to
    one; the other rows weigh nothing.

    Args:
        count: rows, at least the tokens of any sample that are not visual.
    """
    place = torch.arange(modality.shape[1], device=modality.device)
    last_visual, last = last_place(modality == Modality.VISION), last_slot(modality)
    after = (modality == Modality.TEXT) & (place > last_visual)
    wanted = after | ((last_visual == last) & (place == last))
    # wanted ones first, in order; then whatever else
    order = torch.sort(wanted.long(), dim=-1, descending=True, stable=True).indices
    slots = order[:, :count].sort(dim=-1).values
    weights = wanted.gather(1, slots).float()
    return slots, weights / weights.sum(-1, keepdim=True)


def _rows(values: CutValues, which: str) -> tuple[fx.Node, fx.Node, Any]:
    """Slots, weights and number of some query rows."""
    if which == "last":
        slots, weights = values.emit.trace(_last_row, values.modality, names=("row", "weight"))
        return slots, weights, 1
    # what is no part of the instruction counts as padding there
    modality = values.carried.get("instruction", values.modality)
    tokens = modality.meta["val"].shape[1]
    # a sample whose image ends its prompt needs one row more than it has text
    count: Any = max(1, tokens - min(values.visual))
    if isinstance(tokens, torch.SymInt):
        size = values.emit.call(aten.sym_size.int, modality, 1)
        count = values.emit.call(operator.sub, size, min(values.visual))
    slots, weights = values.emit.trace(
        _instruction_rows, modality, count, names=("rows", "weights")
    )
    return slots, weights, count


def mask_rows(mask: Tensor, slots: Tensor) -> Tensor:
    """The rows ``slots`` of an attention mask ``[batch or 1, heads or 1, queries or 1, keys]``."""
    if mask.shape[2] == 1:
        return mask
    batch, rows = slots.shape
    index = slots[:, None, :, None].expand(batch, mask.shape[1], rows, mask.shape[3])
    return mask.expand(batch, -1, -1, -1).gather(2, index)


def _mean_attention(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    slots: Tensor | None,
    scale: Any,
    weights: Tensor,
) -> Tensor:
    """Mean over heads and (weighted) rows of the attention of a few rows: ``[batch, tokens]``."""
    rows = torch.ops.vlmopt.attention_rows(query, key, mask, slots, scale)
    return (rows.mean(1) * weights[..., None]).sum(1)


def _mean_logits(query: Tensor, key: Tensor, scale: Any) -> Tensor:
    """Mean over heads of the scaled products of one row: float32 ``[batch, tokens]``."""
    rows, keys = query.float().transpose(1, 2), key.float()
    groups = rows.shape[2] // keys.shape[1]
    mean = rows.unflatten(2, (keys.shape[1], groups)).mean(3)
    product = torch.einsum("brkd,bktd->bt", mean, keys) / keys.shape[1]
    return product * (scale if scale is not None else keys.shape[-1] ** -0.5)


def _last_logits(values: CutValues) -> fx.Node:
    attention = values.previous_attention()
    slots, _, _ = _rows(values, "last")
    query, key = attention.args[:2]
    row = values.emit.trace(_take_rows, query, slots)
    given = (row, key, attention.kwargs.get("scale"))
    result: fx.Node = values.emit.trace(_mean_logits, *given, names=("logits",))
    return result


def _take_rows(query: Tensor, slots: Tensor) -> Tensor:
    index = slots[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)


def _behind(which: str) -> Callable[[CutValues], fx.Node]:
    """Attention that rows paid in the layer before the cut."""

    def compute(values: CutValues) -> fx.Node:
        attention = values.previous_attention()
        slots, weights, _ = _rows(values, which)
        query, key = attention.args[:2]
        rows = values.emit.trace(_take_rows, query, slots)
        return _score_rows(values, attention, rows, key, slots, weights)

    return compute


def _ahead(which: str) -> Callable[[CutValues], fx.Node]:
    """Attention that rows would pay in the layer at whose entry the cut is."""

    def compute(values: CutValues) -> fx.Node:
        attention = attention_of(values.layers, values.layer)
        slots, weights, count = _rows(values, which)
        query, key = attention.args[:2]
        (rows,) = compute_rows(values, [query], slots=slots, length=count)
        (keys,) = compute_rows(values, [key])
        return _score_rows(values, attention, rows, keys, slots, weights)

    return compute


def _score_rows(
    values: CutValues,
    attention: fx.Node,
    rows: fx.Node,
    key: Any,
    slots: fx.Node,
    weights: fx.Node,
) -> fx.Node:
    mask = values.mask_of(attention)
    if mask is not None:
        mask = values.emit.trace(mask_rows, mask, slots)
    result: fx.Node = values.emit.trace(
        _mean_attention,
        rows,
        key,
        mask,
        slots if is_causal(attention) else None,
        attention.kwargs.get("scale"),
        weights,
        names=("attention",),
    )
    return result


def compute_rows(
    values: CutValues,
    targets: Iterable[Any],
    *,
    slots: fx.Node | None = None,
    length: Any = None,
    positions: fx.Node | None = None,
    rows: fx.Node | None = None,
) -> list[fx.Node]:
    """Compute values of the layer at whose entry the cut is, before the cut.

    Args:
        targets: values of that layer that depend on its entry.
        slots: int64 ``[batch, length]``; only these tokens, all of them otherwise.
        positions: int64 ``[batch, length]``: slots whose positions the tokens take, their own
            otherwise.
        rows: what stands in the residual stream in place of these tokens,
            ``[batch, length, width]``.
    """
    emit, graph, hidden = values.emit, values.emit.graph, values.hidden
    val = hidden.meta["val"]
    batch, tokens = val.shape[0], val.shape[1]
    start = emit.call(aten.alias.default, hidden)
    copies = _copy_up_to(emit, list(targets), {hidden: start})
    results = [copies.get(target, target) for target in targets]
    if slots is None and positions is None:
        return results
    dims: Dims = ((B,) if batch != 1 else (1,), (T,), (int(val.shape[2]),))
    axes = follow_tokens(
        graph,
        {start: dims},
        tokens=_expression(tokens),
        batch=None if batch == 1 else _expression(batch),
        absorb=False,
    )
    chosen = slots if slots is not None else positions
    assert chosen is not None
    shorter = start
    if slots is not None:
        with graph.inserting_before(start.next):
            taken = gather_tokens(emit, start, dims, lambda _: slots, name="rows")
        shorter = taken if rows is None else rows
    first = next(iter(copies.values()))
    frontier = {}
    for value, found in axes.frontier.items():
        index = positions if positions is not None and carries_positions(value) else slots
        if index is not None:
            with graph.inserting_before(value.next if value > first else first):
                frontier[value] = gather_tokens(
                    emit, value, found, _always(index), name=f"rows_{value.name}"
                )
    shorten_region(
        axes,
        emit,
        starts={start: shorter},
        length=tokens if slots is None else length,
        frontier=frontier,
    )
    return results


def _always(index: fx.Node) -> Callable[[Any], fx.Node]:
    return lambda _: index


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else int(size)


def _copy_up_to(
    emit: Emitter, targets: list[fx.Node], known: dict[fx.Node, fx.Node]
) -> dict[fx.Node, fx.Node]:
    """Copies, at the insertion point, of what ``targets`` are computed from after ``known``.

    What does not depend on ``known`` is copied too: the nodes themselves may be part of what is
    about to run on fewer tokens.
    """
    limit = next(iter(known))
    needed: set[fx.Node] = set()
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node not in needed and node > limit:
            needed.add(node)
            stack.extend(node.all_input_nodes)
    copies: dict[fx.Node, fx.Node] = {}
    for node in [node for node in emit.graph.nodes if node in needed]:
        copies[node] = emit.copy(node, {**known, **copies})
    return copies


def _previous_keys(values: CutValues) -> fx.Node:
    """Keys of the layer before, after RoPE, key heads side by side: ``[batch, tokens, width]``."""
    port = next(
        port for port in values.stage.find_outputs(Role.KEY) if port.layer == values.layer - 1
    )

    def lay_out(key: Tensor) -> Tensor:
        return key.transpose(1, 2).flatten(2)

    result: fx.Node = values.emit.trace(lay_out, values.stage.output_node(port), names=("keys",))
    return result


def encoded(name: str) -> Callable[[CutValues], fx.Node]:
    """A value of the vision encoder, for the tokens present."""

    def compute(values: CutValues) -> fx.Node:
        assert values.program is not None
        assert values.ctx is not None
        whole = encoded_input(values.program, values.stage, name, values.ctx)
        if values.kept is None:
            return whole
        result: fx.Node = values.emit.trace(_rows_kept, whole, values.kept, names=(name,))
        return result

    return compute


def _features_or_hidden(values: CutValues) -> fx.Node:
    assert values.program is not None
    projector = encoding_of(values.program)["projector"]
    return values["hidden" if projector is None else "encoded_features"]


def _rows_of_tokens(values: CutValues) -> fx.Node:
    assert values.program is not None
    projector = find_projector(values.program)
    if projector.is_whole:  # they enter the stage
        return values["encoded_features"]
    assert values.ctx is not None
    give_rows(projector.stage, projector.entry, projector.order, values.ctx)
    return encoded("rows")(values)


def _rows_kept(whole: Tensor, kept: Tensor) -> Tensor:
    index = kept.clamp(min=0).view(*kept.shape, *[1] * (whole.ndim - 2))
    return whole.gather(1, index.expand(*kept.shape, *whole.shape[2:]))


def _text_mean(values: CutValues) -> fx.Node:
    def mean(hidden: Tensor, modality: Tensor) -> Tensor:
        text = (modality == Modality.TEXT).float()
        return (hidden.float() * text[..., None]).sum(1) / text.sum(1, keepdim=True).clamp(min=1)

    result: fx.Node = values.emit.trace(mean, values.hidden, values.modality, names=("text_mean",))
    return result


def _unrotated_logits(values: CutValues) -> fx.Node:
    attention = attention_of(values.layers, values.layer)
    slots, weights, count = _rows(values, "instruction")
    query, key = attention.args[:2]
    emit = values.emit
    # queries and keys that all stand at one place are rotated by the same angle, as if not at all
    here, there = (
        emit.trace(torch.zeros_like, node, names=("place",)) for node in (slots, values.modality)
    )
    (rows,) = compute_rows(values, [query], slots=slots, length=count, positions=here)
    (keys,) = compute_rows(values, [key], positions=there)
    scale: Any = attention.kwargs.get("scale")

    def logits(rows: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        mean = (rows.float() * weights[:, None, :, None]).sum(2)
        keys = keys.float()
        groups = mean.shape[1] // keys.shape[1]
        grouped = mean.unflatten(1, (keys.shape[1], groups))
        product = torch.einsum("bkgd,bktd->btkg", grouped, keys).flatten(2)
        scaled: Tensor = product * (scale if scale is not None else mean.shape[-1] ** -0.5)
        return scaled

    result: fx.Node = emit.trace(logits, rows, keys, weights, names=("logits",))
    return result


VALUES: dict[str, Callable[[CutValues], fx.Node]] = {
    "hidden": lambda values: values.hidden,
    "previous_hidden": lambda values: values.entry(values.layer - 1),
    "previous_keys": _previous_keys,
    "last_attention": _behind("last"),
    "last_logits": _last_logits,
    "last_attention_ahead": _ahead("last"),
    "instruction_attention_ahead": _ahead("instruction"),
    "instruction_logits_unrotated": _unrotated_logits,
    "text_mean": _text_mean,
    "encoded_attention": encoded("attention"),
    "encoded_keys": encoded("keys"),
    "encoded_features": encoded("features"),
    "encoded_rows": _rows_of_tokens,
    "encoded_pixels": encoded("pixels"),
    "encoded_kept": encoded("kept"),
    "encoded_features_or_hidden": _features_or_hidden,
}
"""By name; tokens along the second dimension, unless said otherwise:

- ``hidden``: residual stream entering the layer, ``[batch, tokens, width]``;
- ``previous_hidden``: the one entering the layer before;
- ``previous_keys``: keys of the layer before, after RoPE, ``[batch, tokens, key heads * head]``;
- ``last_attention``: attention of each sample's last token in the layer before, mean over heads,
  float32 ``[batch, tokens]``;
- ``last_logits``: the products of query and keys behind it, scaled, mean over heads, float32;
- ``last_attention_ahead``: the attention in the layer at whose entry the cut is, before the cut;
- ``instruction_attention_ahead``: the same, mean over the text after the last visual token;
- ``instruction_logits_unrotated``: mean query of that text times each key of the layer at whose
  entry the cut is, without rotary positions, scaled, float32 ``[batch, tokens, heads]``;
- ``encoded_attention``: attention that a token's patches get in the last block of the vision
  encoder that tokens are made of, from the class token, or without one from all patches; mean over
  heads and over the patches of a token, float32 ``[batch, tokens]``;
- ``encoded_keys``: keys of that block, mean over heads and patches, float32;
- ``encoded_features``: what the projector makes a token of, float32;
- ``encoded_rows``: what makes one token each, behind all that merges patches, float32; see
  :func:`~vlmopt.rewrite.projector.find_projector`;
- ``encoded_pixels``: pixels of a token's patches, float32;
- ``encoded_kept``: 1 where its patches stayed in the encoder, -1 where they did not, float32;
- ``encoded_features_or_hidden``: the same, or ``hidden`` where tokens are made of several rows;
- ``text_mean``: mean of the residual stream over all text, float32 ``[batch, width]``.
"""

PER_SAMPLE = frozenset({"text_mean"})
"""Those that have no dimension for tokens."""
