"""Analysis ``sublayers``: attention and feed-forward network of each decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from vlmopt.analysis.layers import Layers
from vlmopt.errors import PreconditionError
from vlmopt.graph.reach import reached, sources

aten = torch.ops.aten

_LAYOUT = {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
}


@dataclass(frozen=True)
class Sublayers:
    """The two halves of a layer, ``[batch, tokens, width]`` each, as its residual stream is.

    Attributes:
        attention_in: what the projections of attention read, after the norm.
        attention_out: what is added to the residual stream for attention.
        ffn_in, ffn_out: likewise for the feed-forward network.
        out: residual stream after the layer; before the last norm of one that ends with it.
        middle: residual stream between the two; ``None`` where both read what enters the layer.
    """

    attention_in: fx.Node
    attention_out: fx.Node
    ffn_in: fx.Node
    ffn_out: fx.Node
    out: fx.Node
    middle: fx.Node | None


def attention_of(layers: Layers, layer: int) -> fx.Node:
    """The attention operator of a layer.

    Raises:
        PreconditionError: it has none, or several.
    """
    found = [
        node
        for node, index in layers.of.items()
        if index == layer and node.target is aten.scaled_dot_product_attention.default
    ]
    if len(found) != 1:
        raise PreconditionError(
            f"layer {layer} of {layers.container} has {len(found)} attention operators "
            "(scaled_dot_product_attention), not one",
            node=layers.entries[layer],
            hint="capture the model with attn_implementation='sdpa'",
        )
    return found[0]


def projection_of(value: fx.Node) -> fx.Node:
    """The linear operator that a query, key or value of attention comes from.

    Raises:
        PreconditionError: there is none, or its weight is computed.
    """
    seen, queue = {value}, [value]
    for node in queue:
        if node.target is aten.linear.default:
            if node.args[1].op == "get_attr":  # type: ignore[union-attr]
                return node
            break
        fresh = [source for source in node.all_input_nodes if source not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    raise PreconditionError(f"%{value.name} is not made by a projection with weights", node=value)


def sublayers(layers: Layers, layer: int) -> Sublayers:
    """The halves of a layer that adds attention and a feed-forward network to its input.

    The network reads the sum of input and attention, or that sum after a norm which then takes its
    place, or beside attention the input alone.

    Raises:
        PreconditionError: the layer is built otherwise.
    """
    attention = attention_of(layers, layer)
    inside = [node for node, index in layers.of.items() if index == layer]
    entry = layers.entries[layer]
    from_attention = _reached(attention, set(inside))
    beside = _reached(entry, set(inside)) - from_attention
    added = _residual(entry, inside, from_attention)
    if added is None:
        raise _built_otherwise(layers, layer)
    first_sum, attention_out = added
    attention_in = _first_linear_input(inside, beside & reached([attention], sources), entry)
    after = _reached(first_sum, set(inside)) - {first_sum}
    in_turn = _residual(first_sum, inside, after)
    if in_turn is not None:
        out, ffn_out = in_turn
        ffn_in = _first_linear_input(inside, after, first_sum)
        return Sublayers(attention_in, attention_out, ffn_in, ffn_out, out, first_sum)
    parallel = _residual(first_sum, inside, beside)
    if parallel is None and (normed := _residual_of_norm(first_sum, inside, after)) is not None:
        middle, out, ffn_out = normed
        ffn_in = _first_linear_input(inside, _reached(middle, set(inside)), middle)
        return Sublayers(attention_in, attention_out, ffn_in, ffn_out, out, middle)
    if parallel is not None:
        out, ffn_out = parallel
    else:  # both parts are summed before the input is added to them
        parts = _parts(attention_out, from_attention, beside)
        if parts is None:
            raise _built_otherwise(layers, layer)
        out, (attention_out, ffn_out) = first_sum, parts
    ffn_in = _first_linear_input(inside, beside & reached([ffn_out], sources), entry)
    return Sublayers(attention_in, attention_out, ffn_in, ffn_out, out, None)


def middle_of(layers: Layers, layer: int) -> fx.Node:
    """The residual stream between attention and the feed-forward network of a layer.

    Raises:
        PreconditionError: the layer has no such value.
    """
    middle = sublayers(layers, layer).middle
    if middle is None:
        raise PreconditionError(
            f"attention and feed-forward network of layer {layer} of {layers.container} are "
            "parallel: nothing lies between them",
            node=layers.entries[layer],
        )
    return middle


def _built_otherwise(layers: Layers, layer: int) -> PreconditionError:
    return PreconditionError(
        f"layer {layer} of {layers.container} does not add its parts to the residual stream",
        node=layers.entries[layer],
    )


def _parts(
    total: fx.Node, one: set[fx.Node], other: set[fx.Node]
) -> tuple[fx.Node, fx.Node] | None:
    """The summands of ``total``, one from each set."""
    if total.target is not aten.add.Tensor:
        return None
    for left, right in (total.args[:2], total.args[1::-1]):
        if left in one and right in other:
            return left, right  # type: ignore[return-value]
    return None


def _reached(start: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    seen, stack = {start}, [start]
    while stack:
        for user in stack.pop().users:
            if user in inside and user not in seen:
                seen.add(user)
                stack.append(user)
    return seen


def _residual(
    stream: fx.Node, inside: list[fx.Node], source: set[fx.Node]
) -> tuple[fx.Node, fx.Node] | None:
    """``(sum, what is added)`` of the addition to ``stream`` of something from ``source``."""
    for node in inside:
        if node.target is aten.add.Tensor and stream in node.args[:2]:
            other = node.args[1] if node.args[0] is stream else node.args[0]
            if isinstance(other, fx.Node) and other in source:
                return node, other
    return None


def _residual_of_norm(
    total: fx.Node, inside: list[fx.Node], after: set[fx.Node]
) -> tuple[fx.Node, fx.Node, fx.Node] | None:
    """``(stream, sum, what is added)`` where a norm of ``total`` is what a network is added to."""
    norms = [node for node in inside if node in after and node.target is aten.layer_norm.default]
    for stream in norms:
        found = _residual(stream, inside, after & _reached(stream, after) - {stream})
        if stream.args[0] is total and found is not None:
            return stream, *found
    return None


def _first_linear_input(inside: list[fx.Node], among: set[fx.Node], stream: fx.Node) -> fx.Node:
    """What the first projection reads, with as many dimensions as the residual stream has."""
    rank = stream.meta["val"].ndim
    for node in inside:
        if node in among and node.target is aten.linear.default:
            value = node.args[0]
            while isinstance(value, fx.Node) and value.meta["val"].ndim != rank:
                if value.target not in _LAYOUT:
                    break
                value = value.args[0]
            if isinstance(value, fx.Node) and value.meta["val"].ndim == rank:
                return value
    raise PreconditionError("a layer has no projection of its residual stream", node=stream)
