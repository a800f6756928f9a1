"""Attention within windows as attention over whole images, with a mask: then any row can attend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.arrangements import LAYOUT, arrangements
from vlmopt.analysis.blocks import INSTEAD, EncoderBlock
from vlmopt.errors import BlockMismatchError
from vlmopt.graph.attention import attention_arguments
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.tokens import remove_unused

aten = torch.ops.aten


def widen_windows(
    stage: Stage, blocks: Sequence[EncoderBlock], ctx: PassContext
) -> tuple[EncoderBlock, ...]:
    """Let attention within windows be attention over images, whose mask hides other windows.

    Returns:
        The blocks as they are then; those without windows are left alone.

    Raises:
        BlockMismatchError: windows are not runs of the rows that enter.
    """
    windowed = [block for block in blocks if block.window != block.tokens]
    attention = {}
    for match, block in enumerate(blocks, start=1):
        if block in windowed:
            emit = Emitter.of_pass(ctx, stage, block.attention, "window", match)
            number = [row // block.window for row in range(block.tokens)]
            attention[block.layer] = _widen(block.attention, block.images, number, emit)
    if windowed:
        remove_unused(stage)
    return tuple(
        replace(block, attention=attention.get(block.layer, block.attention), window=block.tokens)
        for block in blocks
    )


def part_unevenly(stage: Stage, given: Mapping[str, Any]) -> None:
    """Let attention keep to the parts of one row of patches that the model's inputs tell.

    The exporter cuts the row into as many parts of equal length, images or windows, and only
    asserts that they are. Where they are not, attention runs over the whole row, and a mask hides
    the other parts.

    Args:
        given: what the encoder was traced with: ``cu_...`` holds where parts begin and end.
    """
    uneven = {}
    for name, ends in given.items():
        if name.startswith("cu_") and isinstance(ends, Tensor):
            lengths = ends.diff().tolist()
            if len(set(lengths)) > 1:
                uneven[len(lengths)] = lengths
    changed = False
    for node in stage.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        shape = node.meta["val"].shape
        lengths = uneven.get(shape[0], []) if len(shape) == 4 else []
        if lengths and sum(lengths) == shape[0] * shape[2]:
            number = [at for at, length in enumerate(lengths) for _ in range(length)]
            emit = Emitter(
                stage.graph,
                stamp=lambda node: None,
                place=node,
                prefix="parts",
                fake_mode=stage.fake_mode(),
            )
            _widen(node, 1, number, emit)
            changed = True
    if changed:
        remove_unused(stage)


def _widen(old: fx.Node, images: int, number: list[int], emit: Emitter) -> fx.Node:
    """Attention over whole images, where rows see those of their own window.

    Args:
        old: over windows, ``[windows, heads, rows, size]``, of all images one after the other.
        number: of the window of each row of an image.
    """
    tokens = len(number)
    given = attention_arguments(old)
    groups, _, window, size = (int(n) for n in old.meta["val"].shape)
    whole = [
        _rows_of(given[name], images * tokens, (groups, window))
        for name in ("query", "key", "value")
    ]
    result = _rows_from(old, images * tokens)
    extra = {name: old.kwargs[name] for name in ("scale", "enable_gqa") if name in old.kwargs}
    with emit.graph.inserting_before(old):
        mask = emit.trace(lambda rows: _same(number, rows.device), whole[0], names=("mask",))
        parts = []
        for value in whole:
            shape = [images, tokens, int(value.meta["val"].numel()) // (images * tokens * size)]
            parts.append(emit.call(aten.reshape.default, value, [*shape, size]))
        parts = [emit.call(aten.transpose.int, part, 1, 2) for part in parts]
        attention = emit.call(old.target, *parts, mask, 0.0, False, name="attention", **extra)
        back = emit.call(aten.transpose.int, attention, 1, 2)
        out = emit.call(aten.reshape.default, back, [int(n) for n in result.meta["val"].shape])
    result.replace_all_uses_with(out)
    return attention


def _rows_of(value: fx.Node, rows: int, windows: tuple[int, int]) -> fx.Node:
    """The value ``[rows, ...]`` that a query, key or value of windows is cut out of."""
    node: Any = value
    while node.target in LAYOUT and not _counts(node, rows):
        node = node.args[0]
    places = arrangements(node).get(value) if _counts(node, rows) else None
    if places is None:
        raise _mismatch(value)
    heads, size = value.meta["val"].shape[1], value.meta["val"].shape[3]
    wanted = torch.arange(places.numel()).view(*windows, heads, size).transpose(1, 2)
    if not wanted.equal(places):
        raise _mismatch(value)
    return node


def _rows_from(attention: fx.Node, rows: int) -> fx.Node:
    """The value ``[rows, ...]`` that the result of attention in windows is put together to."""
    shape = [int(n) for n in attention.meta["val"].shape]
    wanted = torch.arange(attention.meta["val"].numel()).view(shape).transpose(1, 2).flatten()
    for node, places in arrangements(attention).items():
        if _counts(node, rows) and wanted.equal(places.flatten()):
            return node
    raise _mismatch(attention)


def _counts(node: fx.Node, rows: int) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and int(value.shape[0]) == rows


def _same(number: list[int], device: torch.device) -> Tensor:
    """Bool ``[tokens, tokens]``: which rows have the same number."""
    numbers = torch.tensor(number, device=device)
    return numbers[:, None] == numbers


def _mismatch(node: fx.Node) -> BlockMismatchError:
    return BlockMismatchError(
        "windows of attention are not runs of consecutive patches", node=node, hint=INSTEAD
    )
