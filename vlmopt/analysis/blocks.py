"""Analysis ``blocks``: projections, attention and network of each block of a vision encoder.

A block is known by its structure: projections to queries, keys and values read the residual stream
(mostly after a norm), attention over all tokens of an image, a sum, a feed-forward network, a sum.
Scales and norms behind either half belong to it, and so does what is done to queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.arrangements import arrangements
from vlmopt.analysis.encoder import require_open
from vlmopt.analysis.layers import Layers, find_layers
from vlmopt.analysis.row_axes import RowAxes, part_behind
from vlmopt.analysis.sublayers import Sublayers, attention_of, projection_of, sublayers
from vlmopt.analysis.token_axes import B, Dims, T
from vlmopt.errors import BlockMismatchError, PreconditionError, UnsupportedOperatorError
from vlmopt.graph.attention import attention_arguments
from vlmopt.graph.reach import reached, users
from vlmopt.program import Stage

aten = torch.ops.aten

INSTEAD = "reduce tokens in the language model instead, for example with v2drop"
"""What to try where blocks cannot be rewritten."""


@dataclass(frozen=True)
class Projection:
    """Queries, keys or values of all heads side by side, as a linear operator gives them.

    Attributes:
        linear: the operator, ``[..., width]``.
        columns: which of its columns, ``(start, stop)``.
        value: what reads these columns and no others: ``linear`` itself, or an arrangement.
        order: how ``value`` is arranged: its dimensions in this order are rows, then columns.
    """

    linear: fx.Node
    columns: tuple[int, int]
    value: fx.Node
    order: tuple[int, ...] = ()

    @property
    def fused(self) -> bool:
        """Whether the operator has columns of other projections too."""
        return self.value is not self.linear

    @property
    def width(self) -> int:
        return self.columns[1] - self.columns[0]


@dataclass(frozen=True)
class EncoderBlock:
    """One block.

    Attributes:
        layer: number of the block.
        entry: residual stream that enters it, ``[images, tokens, width]``, or ``[images * tokens,
            width]``.
        attention: the operator.
        parts: the values where its halves begin and end; ``middle`` is never ``None``.
        images, tokens: how many images there are, and how many rows each has.
        window: consecutive rows that attend to each other; ``tokens`` where all do.
    """

    layer: int
    entry: fx.Node
    query: Projection
    key: Projection
    value: Projection
    attention: fx.Node
    parts: Sublayers
    images: int
    tokens: int
    window: int

    @property
    def middle(self) -> fx.Node:
        assert self.parts.middle is not None
        return self.parts.middle

    @property
    def dims(self) -> Dims:
        """What counts rows of the residual stream, and of whatever is as long."""
        width = (_shape(self.entry)[-1],)
        if self.entry.meta["val"].ndim == 2:
            return ((B, T) if self.images != 1 else (T,), width)
        return ((B,) if self.images != 1 else (1,), (T,), width)


def find_blocks(stage: Stage) -> tuple[EncoderBlock, ...]:
    """The blocks of an encoder, masks that hide nothing having been dropped.

    Raises:
        BlockMismatchError: some block is built otherwise: where and why.
        PreconditionError: the stage has no blocks, or some patches do not see some others.
    """
    layers = find_layers(stage)
    blocks = tuple(_block(stage, layers, layer) for layer in range(len(layers)))
    require_open(stage, layers)
    return _with_images(stage, blocks)


def _block(stage: Stage, layers: Layers, layer: int) -> EncoderBlock:
    entry = layers.entries[layer]
    if not all(isinstance(size, int) for size in entry.meta["val"].shape):
        raise BlockMismatchError(
            f"the number of patches in stage {stage.name} is not known when the graph is rewritten",
            node=entry,
            hint="capture with images of one size",
        )
    attention = _attention(layers, layer)
    try:
        parts = sublayers(layers, layer)
    except PreconditionError as error:
        raise BlockMismatchError(error.what, node=error.node, hint=error.hint or INSTEAD) from error
    if parts.middle is None:
        raise BlockMismatchError(
            f"attention and feed-forward network of block {layer} read the same rows: the network "
            "does not wait for attention",
            node=parts.out,
            hint=INSTEAD,
        )
    found = _projections(attention, parts.attention_in)
    heads = _shape(attention)
    block = EncoderBlock(layer, entry, *found, attention, parts, heads[0], heads[-2], heads[-2])
    _require_network_by_row(block)
    return block


def _attention(layers: Layers, layer: int) -> fx.Node:
    found = [
        node
        for node, index in layers.of.items()
        if index == layer and node.target is aten.scaled_dot_product_attention.default
    ]
    if len(found) > 1:
        raise BlockMismatchError(
            f"block {layer} of {layers.container} attends in {len(found)} parts, windows or images "
            "of different sizes",
            node=found[1],
            hint="capture with images of one size, or " + INSTEAD,
        )
    if not found:
        raise BlockMismatchError(
            f"block {layer} of {layers.container} has no attention operator "
            "(scaled_dot_product_attention)",
            node=layers.entries[layer],
            hint="capture the model with attn_implementation='sdpa'",
        )
    return attention_of(layers, layer)


def _with_images(stage: Stage, blocks: tuple[EncoderBlock, ...]) -> tuple[EncoderBlock, ...]:
    """The blocks, told how many images there are: in all of them as many.

    Where the patches of all images stand in one row, the block that attends in the fewest parts
    tells: its parts are the images.
    """
    lead = _shape(blocks[0].entry)[:-1]
    images = lead[0] if len(lead) == 2 else min(block.images for block in blocks)
    tokens = math.prod(lead) // images
    found = []
    for block in blocks:
        groups, window = block.images, block.tokens
        for value in block.attention.args[:3]:
            heads = _shape(value)
            inside = len(lead) == 1 and groups % images == 0 and groups * window == lead[0]
            whole = (groups, window) == (images, tokens)
            if len(heads) != 4 or (heads[0], heads[2]) != (groups, window) or not whole | inside:
                raise BlockMismatchError(
                    f"attention of block {block.layer} of stage {stage.name} works on {heads}, "
                    f"where {images} image{'s' if images > 1 else ''} of {tokens} patches enter: "
                    "not on all patches, nor on runs of them",
                    node=block.attention,
                    hint=INSTEAD,
                )
        found.append(replace(block, images=images, tokens=tokens, window=window))
    return tuple(found)


def _require_network_by_row(block: EncoderBlock) -> None:
    """The feed-forward network works on each row on its own."""
    graph = part_behind(block.middle, block.parts.ffn_out)
    if graph is None:
        raise BlockMismatchError(
            f"the feed-forward network of block {block.layer} reads other inputs than its rows",
            node=block.parts.ffn_out,
            hint=INSTEAD,
        )
    try:
        RowAxes(graph)
    except UnsupportedOperatorError as error:
        raise BlockMismatchError(
            f"the feed-forward network of block {block.layer}: {error.what}",
            node=block.parts.ffn_out,
            hint=INSTEAD,
        ) from error


# -- projections -------------------------------------------------------------------------------


def _projections(attention: fx.Node, rows: fx.Node) -> tuple[Projection, Projection, Projection]:
    given = attention_arguments(attention)
    values = [given[name] for name in ("query", "key", "value")]
    try:
        linear = [projection_of(value) for value in values]
    except PreconditionError as error:
        raise BlockMismatchError(error.what, node=error.node, hint=INSTEAD) from error
    for node in linear:
        if node.args[0] is not rows:
            raise BlockMismatchError(
                "queries, keys and values are not projections of the same rows",
                node=node,
                hint=INSTEAD,
            )
    if len(set(linear)) == 3:
        one, two, three = (Projection(node, (0, int(_shape(node)[-1])), node) for node in linear)
        return one, two, three
    if len(set(linear)) == 1:
        return _fused(linear[0], values)
    raise BlockMismatchError(
        "two of queries, keys and values share a projection, and the third has one of its own",
        node=attention,
        hint=INSTEAD,
    )


def _fused(linear: fx.Node, values: list[fx.Node]) -> tuple[Projection, Projection, Projection]:
    """What each of queries, keys and values takes of one projection to all three."""
    places = arrangements(linear)
    width = int(_shape(linear)[-1])
    found = []
    for value in values:
        others = [other for other in values if other is not value]
        for node, where in places.items():
            below = reached([node], users)
            columns = where % width
            start, stop = int(columns.min()), int(columns.max()) + 1
            own = value in below and not any(other in below for other in others)
            if not own or where.numel() != math.prod(_shape(linear)[:-1]) * (stop - start):
                continue
            order = _order(where, linear, (start, stop))
            if order is not None:
                found.append(Projection(linear, (start, stop), node, order))
                break
        else:
            raise BlockMismatchError(
                "queries, keys and values of one projection do not stand side by side in it",
                node=linear,
                hint=INSTEAD,
            )
    one, two, three = found
    return one, two, three


def _order(where: Tensor, linear: fx.Node, columns: tuple[int, int]) -> tuple[int, ...] | None:
    """Order of dimensions in which ``where`` lists rows and columns as ``linear`` does."""
    *lead, width = _shape(linear)
    elements = torch.arange(math.prod(lead) * width).view(-1, width)[:, slice(*columns)]
    for order in permutations(range(where.ndim)):
        if where.permute(order).flatten().equal(elements.flatten()):
            return order
    return None


def _shape(node: Any) -> list[int]:
    return [int(size) for size in node.meta["val"].shape]
