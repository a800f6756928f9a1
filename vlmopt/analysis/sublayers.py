"""Analysis ``sublayers``: attention and feed-forward network of each decoder layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from vlmopt.analysis.layers import Layers
from vlmopt.errors import PreconditionError

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
    """The two halves of a layer, ``[batch, tokens, width]`` each.

    Attributes:
        attention_in: what the projections of attention read, after the norm.
        attention_out: what is added to the residual stream for attention.
        middle: residual stream between the two.
        ffn_in, ffn_out: likewise for the feed-forward network.
        out: residual stream after the layer.
    """

    attention_in: fx.Node
    attention_out: fx.Node
    middle: fx.Node
    ffn_in: fx.Node
    ffn_out: fx.Node
    out: fx.Node


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
    """The halves of a layer that adds attention, then a feed-forward network, to its input.

    Raises:
        PreconditionError: the layer is built otherwise.
    """
    attention = attention_of(layers, layer)
    inside = [node for node, index in layers.of.items() if index == layer]
    entry = layers.entries[layer]
    from_attention = _reached(attention, set(inside))
    middle, attention_out = _residual(entry, inside, from_attention, layers, layer)
    after = _reached(middle, set(inside)) - {middle}
    out, ffn_out = _residual(middle, inside, after, layers, layer)
    return Sublayers(
        _first_linear_input(inside, _reached(entry, set(inside)) - from_attention, entry),
        attention_out,
        middle,
        _first_linear_input(inside, after, middle),
        ffn_out,
        out,
    )


def _reached(start: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    seen, stack = {start}, [start]
    while stack:
        for user in stack.pop().users:
            if user in inside and user not in seen:
                seen.add(user)
                stack.append(user)
    return seen


def _residual(
    stream: fx.Node, inside: list[fx.Node], source: set[fx.Node], layers: Layers, layer: int
) -> tuple[fx.Node, fx.Node]:
    """``(sum, what is added)`` of the addition to ``stream`` of something from ``source``."""
    for node in inside:
        if node.target is aten.add.Tensor and stream in node.args[:2]:
            other = node.args[1] if node.args[0] is stream else node.args[0]
            if isinstance(other, fx.Node) and other in source:
                return node, other
    raise PreconditionError(
        f"layer {layer} of {layers.container} does not add its parts to the residual stream",
        node=layers.entries[layer],
    )


def _first_linear_input(inside: list[fx.Node], among: set[fx.Node], stream: fx.Node) -> fx.Node:
    """What the first projection reads, with the tokens in a dimension of their own."""
    for node in inside:
        if node in among and node.target is aten.linear.default:
            value = node.args[0]
            while isinstance(value, fx.Node) and value.meta["val"].ndim != 3:
                if value.target not in _LAYOUT:
                    break
                value = value.args[0]
            if isinstance(value, fx.Node) and value.meta["val"].ndim == 3:
                return value
    raise PreconditionError("a layer has no projection of its residual stream", node=stream)
