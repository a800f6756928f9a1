"""Analysis ``arrangements``: where the elements of a value stand after operators that move them.

What a view, a transpose and a split do together is not read off the operators one by one: they are
run on the numbers of the elements.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vlmopt.graph.reach import reached

aten = torch.ops.aten

LAYOUT = frozenset(
    {
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.permute.default,
        aten.transpose.int,
        aten.unbind.int,
        aten.chunk.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.select.int,
        aten.slice.Tensor,
        aten.squeeze.dim,
        aten.unsqueeze.default,
        aten.clone.default,
        aten.contiguous.default,
        aten.alias.default,
        operator.getitem,
    }
)
"""What only arranges values anew."""

_VIEWS = (aten.view.default, aten._unsafe_view.default)


def arrangements(value: fx.Node) -> dict[fx.Node, Tensor]:
    """What arranges a value anew, or a part of it, in graph order.

    Returns:
        int64, shaped as each: which element of ``value``, laid out flat, each of its elements is.
    """
    shape = [int(size) for size in value.meta["val"].shape]
    known: dict[fx.Node, Any] = {value: torch.arange(math.prod(shape)).view(shape)}
    found = reached([value], _arranged)
    for node in value.graph.nodes:
        if node in found and node is not value:
            # numbers lie in memory in their order, whatever the strides of the values
            target: Any = aten.reshape.default if node.target in _VIEWS else node.target
            known[node] = target(*pytree.tree_map_only(fx.Node, known.__getitem__, node.args))
    del known[value]
    return {node: places for node, places in known.items() if isinstance(places, Tensor)}


def _arranged(node: fx.Node) -> Iterable[fx.Node]:
    """A step: what arranges a value anew."""
    return [user for user in node.users if user.target in LAYOUT and not user.kwargs]
