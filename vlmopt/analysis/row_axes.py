"""Analysis ``row_axes``: a part of a graph that works on each row on its own, and where rows are.

Rows are what all dimensions of a value but the last count. Unlike ``token_axes``, which lets tokens
attend to each other, this asks that no row depends on another; then the part runs on any rows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from vlmopt.analysis.token_axes import Dims, T, follow_tokens, has_tokens
from vlmopt.errors import UnsupportedOperatorError
from vlmopt.graph.reach import reached, sources, users
from vlmopt.program import Stage

aten = torch.ops.aten

PRODUCTS = {
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.mm.default: 0,
    aten.addmm.default: 1,
}
"""Products with a matrix: which argument holds the rows."""

VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}

_BY_ROW = {
    *PRODUCTS,
    *VIEWS,
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.softmax.int,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.cat.default,
    aten.permute.default,
    aten.transpose.int,
    aten.to.dtype,
    aten._to_copy.default,
    aten.type_as.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.dropout.default,
}
"""Beside pointwise operators; along which dimensions they work is looked at."""


def may_work_by_row(node: fx.Node) -> bool:
    """Whether an operator works on each row on its own, along the right dimensions."""
    if node.op != "call_function":
        return False
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or node.target in _BY_ROW or not hasattr(node.target, "_schema")


def computed_from(node: fx.Node) -> Iterable[fx.Node]:
    """A step: the values that a node depends on, not those that only tell its type."""
    return node.all_input_nodes[:1] if node.target is aten.type_as.default else sources(node)


def part_behind(entry: fx.Node, out: fx.Node) -> fx.Graph | None:
    """What computes ``out`` from ``entry`` and weights, as a graph of its own.

    Returns:
        ``None`` where other inputs of the stage have a part in it. The placeholder and the weights
        keep the metadata of what they stand for.
    """
    inside = reached([out], lambda node: [] if node is entry else computed_from(node))
    if any(node.op == "placeholder" and node is not entry for node in inside):
        return None
    graph = fx.Graph()
    start = graph.placeholder("rows")
    start.meta = dict(entry.meta)
    copies = {entry: start}
    for node in out.graph.nodes:
        if node not in inside or node is entry:
            continue
        if node.target is aten.type_as.default:
            dtype = node.meta["val"].dtype
            source: Any = node.args[0]
            copied = graph.call_function(aten.to.dtype, (copies[source], dtype))
        else:
            copied = graph.node_copy(node, copies.__getitem__)
        copied.meta = dict(node.meta)
        copies[node] = copied
    graph.output((copies[out],))
    return graph


class RowAxes:
    """Where the rows of a graph's one input stand in each of its values.

    Attributes:
        labels: by value and dimension, numbers of the dimensions of the input that it counts.

    Args:
        graph: one input ``[..., width]``, weights, one output ``[..., width]``.

    Raises:
        UnsupportedOperatorError: some row of the result depends on several rows, or on its place.
    """

    def __init__(self, graph: fx.Graph) -> None:
        (start,) = graph.find_nodes(op="placeholder")
        self._lead = [int(size) for size in start.meta["val"].shape[:-1]]
        self._counted = [dim for dim, size in enumerate(self._lead) if size != 1]
        self.labels: dict[fx.Node, list[list[int]]] = {}
        self._below = reached([start], users)
        self._require_products_with_weights(graph)
        for dim in self._counted:
            self._follow(graph, start, dim)
        (out,) = graph.output_node().all_input_nodes
        order = [label for labels in self.labels.get(out, []) for label in labels]
        if not self._counted or order != self._counted or not self.is_row(out):
            raise UnsupportedOperatorError("rows leave in another order", node=out)

    def is_row(self, node: fx.Node) -> bool:
        """Whether all dimensions of a value but the last count rows, and the last does not."""
        *lead, last = self.labels.get(node, [[0]])
        sizes = node.meta["val"].shape[:-1]
        counted = all(
            size == math.prod(self._lead[label] for label in labels)
            for labels, size in zip(lead, sizes, strict=True)
        )
        return counted and not last

    def sizes(self, lead: Sequence[Any]) -> list[Any]:
        """Sizes of the dimensions of the input that count rows, for rows ``[*lead, width]``."""
        sizes: list[Any] = [1] * len(self._lead)
        if len(self._counted) >= len(lead):
            for dim, size in zip(self._counted, lead, strict=False):
                sizes[dim] = size
        else:
            sizes[self._counted[0]] = math.prod(lead)
        return sizes

    def shape(self, node: fx.Node, sizes: Sequence[Any]) -> list[Any]:
        """Shape of a value when the dimensions of the input that count rows have ``sizes``."""
        shape = []
        for size, labels in zip(node.meta["val"].shape, self.labels[node], strict=True):
            rest = int(size) // math.prod(self._lead[label] for label in labels)
            shape.append(rest * math.prod(sizes[label] for label in labels))
        return shape

    def _follow(self, graph: fx.Graph, start: fx.Node, dim: int) -> None:
        """Label the dimensions that count along one dimension of the input."""
        shape = start.meta["val"].shape
        dims: Dims = tuple((T,) if at == dim else (int(n),) for at, n in enumerate(shape))
        axes = follow_tokens(graph, {start: dims}, tokens=int(shape[dim]), batch=None, absorb=False)
        mixing = [*axes.ends, *axes.frontier]
        if mixing:
            raise UnsupportedOperatorError("combines rows with each other", node=mixing[0])
        for node, found in axes.dims.items():
            if isinstance(found, list):
                continue
            labels = self.labels.setdefault(node, [[] for _ in found])
            for at, factors in enumerate(found):
                if not has_tokens(factors):
                    continue
                if T not in factors or _works_along(node, at):
                    raise UnsupportedOperatorError("combines rows with each other", node=node)
                # before it stand, as numbers, the dimensions that count more slowly
                before = math.prod(factors[: factors.index(T)])
                slower = [label for label in labels[at] if label < dim]
                if before != math.prod(self._lead[label] for label in slower):
                    raise UnsupportedOperatorError("rows stand in another order", node=node)
                labels[at].append(dim)

    def _require_products_with_weights(self, graph: fx.Graph) -> None:
        for node in graph.nodes:
            at = PRODUCTS.get(node.target)
            if at is None or node not in self._below:
                continue
            others = [value for place, value in enumerate(node.args) if place != at]
            if any(value in self._below for value in others):
                raise UnsupportedOperatorError("multiplies rows with each other", node=node)


def _works_along(node: fx.Node, dim: int) -> bool:
    """Whether an operator that keeps dimensions mixes what stands along one of them."""
    if node.target is not aten.softmax.int:
        return False
    along: Any = node.args[1]
    return bool(along % node.meta["val"].ndim == dim)


def last_rows(stage: Stage, out: fx.Node, stops: Iterable[fx.Node]) -> Iterable[tuple[Any, Any]]:
    """Values from which ``out`` is computed row by row, each with the graph that does.

    Args:
        stops: no further back than these.

    Yields:
        ``(value, graph)``, the latest value first, ``out`` itself left out.
    """
    last = set(stops)
    moving = reached((stage.placeholder(port) for port in stage.inputs), users)
    above = reached([out], computed_from) & moving
    rows = math.prod(out.meta["val"].shape[:-1])
    for node in reversed([node for node in stage.graph.nodes if node in above]):
        val = node.meta["val"]
        if node is not out and isinstance(val, torch.Tensor) and val.is_floating_point():
            graph = part_behind(node, out) if math.prod(val.shape[:-1]) == rows else None
            if graph is not None and val.ndim > 1 and _works_by_row(graph):
                yield node, graph
        if node in last or not may_work_by_row(node):
            return


def _works_by_row(graph: fx.Graph) -> bool:
    try:
        RowAxes(graph)
    except UnsupportedOperatorError:
        return False
    return True
