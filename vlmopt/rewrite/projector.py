"""What makes one token of each row: the end of the way from the vision encoder to the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.row_axes import PRODUCTS, VIEWS, RowAxes, last_rows, part_behind
from vlmopt.errors import PreconditionError
from vlmopt.graph.reach import reached, users
from vlmopt.program import Program, Role, Stage, attach_attr, fetch_attr
from vlmopt.rewrite.derivatives import derivative_of, is_linear
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.encoded import encoding_of

aten = torch.ops.aten


def projector_before(program: Program, entry: fx.Node) -> Projector | None:
    """The projector whose output a value holds as it is, where it takes one row for each token.

    Args:
        entry: what enters a layer of the language model.
    """
    ports = program["language_model"].find_inputs(Role.INPUTS_EMBEDS)
    if entry.op != "placeholder" or all(port.name != entry.name for port in ports):
        return None
    try:
        projector = find_projector(program)
    except PreconditionError:
        return None
    return projector if projector.is_whole else None


class Projector:
    """What makes one token of each row, as a function of rows.

    Attributes:
        stage: what it is the end of: ``projector``, or ``vision_encoder`` where patches are merged
            and projected in there.
        entry: the value of that stage that holds the rows, behind all that merges patches.
        order: the operator that brings the tokens made of them into another order, if one does.
        weights: paths of its weights in its stage, in order; :meth:`with_weights` binds them.
    """

    def __init__(
        self,
        stage: Stage,
        entry: fx.Node,
        graph: fx.Graph,
        order: fx.Node | None = None,
        given: Sequence[Tensor] = (),
    ) -> None:
        self.stage = stage
        self.entry = entry
        self.order = order
        self.graph = graph
        self.given = given
        self.weights = [str(n.target) for n in graph.find_nodes(op="get_attr")]

    @cached_property
    def _axes(self) -> RowAxes:
        return RowAxes(self.graph)

    @property
    def is_whole(self) -> bool:
        """Whether it is all of the stage ``projector``."""
        return self.stage.name == "projector" and self.entry.op == "placeholder"

    def in_stage(self, stage: Stage, emit: Emitter) -> list[fx.Node]:
        """Its weights as nodes of another stage, which shares them, at the insertion point."""
        nodes = []
        for source in self.graph.find_nodes(op="get_attr"):
            name = f"projector.{source.target}"
            tensor = fetch_attr(self.stage.graph_module, str(source.target))
            attach_attr(stage.graph_module, name, tensor)
            node = emit.graph.get_attr(name)
            val = source.meta["val"]
            with emit.fake_mode:
                emit.adopt(node, torch.empty(val.shape, dtype=val.dtype))
            nodes.append(node)
        return nodes

    def with_weights(self, weights: Sequence[Tensor]) -> Projector:
        """The same, with the values of :attr:`weights`."""
        return Projector(self.stage, self.entry, self.graph, self.order, weights)

    def __call__(self, rows: Tensor) -> Tensor:
        """``[batch, rows, width]`` to ``[batch, rows, width of the language model]``."""
        (out,) = self.graph.output_node().all_input_nodes
        value: Tensor = self._values(rows)[out]
        return value.reshape(*rows.shape[:-1], value.shape[-1])

    @cached_property
    def moving(self) -> fx.Node:
        """The value by which :meth:`derivatives` are taken, a node of :attr:`graph`.

        It is what enters the first product with a weight; or, where that is not all that the result
        depends on, the last value before with one row for each token that is.
        """
        axes = self._axes
        (out,) = self.graph.output_node().all_input_nodes
        found = self.graph.find_nodes(op="placeholder")[0]
        for node in self.graph.nodes:
            if node.target in PRODUCTS and node.args[PRODUCTS[node.target]] in axes.labels:
                break
            if node in axes.labels and axes.is_row(node) and part_behind(node, out) is not None:
                found = node
        return found

    @property
    def width(self) -> int:
        """Width of the rows of :attr:`moving`."""
        return int(self.moving.meta["val"].shape[-1])

    @property
    def is_linear(self) -> bool:
        """Whether :meth:`derivatives` are the same for all rows."""
        below = reached([self.moving], users) & self._axes.labels.keys()
        return all(node is self.moving or is_linear(node, below) for node in below)

    def derivatives(self, rows: Tensor, directions: Tensor) -> Tensor:
        """How far projections move as rows move: norms of ``J(row) direction``.

        Exact, by forward differentiation from :attr:`moving` on; a few directions at a time, so
        that not all of them times all rows are held at once. Where the projector is linear from
        there on, all rows get the same, to the bit.

        Args:
            rows: ``[batch, rows, width]``.
            directions: ``[directions, width]``, of the values that move.

        Returns:
            float32 ``[batch, rows]``, the mean over directions.

        Raises:
            PreconditionError: the projector has an operator whose derivative is not known here.
        """
        (out,) = self.graph.output_node().all_input_nodes
        values = self._values(rows)
        total = torch.zeros(1, dtype=torch.float32, device=rows.device)
        for some in directions.split(_AT_ONCE):
            moved = self._tangents(values, some)[out]
            total = total + moved.float().norm(dim=-1).sum(0)
        return (total / len(directions)).expand(values[out].shape[:-1]).reshape(rows.shape[:-1])

    def _values(self, rows: Tensor) -> dict[fx.Node, Any]:
        """All that the graph computes of ``rows``."""
        sizes = self._axes.sizes(rows.shape[:-1])
        given = iter(self.given)
        dtype = next((weight.dtype for weight in self.given), rows.dtype)
        values: dict[fx.Node, Any] = {}
        for node in self.graph.nodes:
            if node.op == "placeholder":
                values[node] = rows.to(dtype).reshape(self._axes.shape(node, sizes))
            elif node.op == "get_attr":
                values[node] = next(given)
            elif node.op == "call_function":
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                if node.target in VIEWS and node in self._axes.labels:
                    args = (args[0], self._axes.shape(node, sizes))
                values[node] = node.target(*args, **kwargs)
        return values

    def _tangents(self, values: dict[fx.Node, Any], directions: Tensor) -> dict[fx.Node, Any]:
        """How they move along ``directions``, ``[directions, *shape]`` each.

        What is the same for all rows is there once: 1 long.
        """
        lead = [1] * (values[self.moving].ndim - 1)
        start = directions.to(values[self.moving].dtype).reshape(len(directions), *lead, -1)
        tangents: dict[fx.Node, Any] = {self.moving: start}
        for node in self.graph.nodes:
            if node.op == "call_function" and tangents.keys() & set(node.all_input_nodes):
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                moved = pytree.tree_map(
                    lambda arg: tangents.get(arg) if isinstance(arg, fx.Node) else None,
                    tuple(node.args),
                )
                if node.target in VIEWS:
                    args = (args[0], values[node].shape)
                tangents[node] = derivative_of(node)(moved, args, kwargs)
        return tangents


def find_projector(program: Program) -> Projector:
    """The projector of a program.

    It is what leads from the vision encoder to the tokens, from behind the last operator on that
    gives to a token what does not stand in one row: a merger of patches, or pooling.

    Raises:
        PreconditionError: nothing that does so is part of a stage.
    """
    facts = encoding_of(program).get("tokens")
    hint = "use a pass that reads the language model only"
    if facts is None:
        raise PreconditionError(
            "tokens of the prompt are no rows that leave the vision encoder, or its projector, as "
            "they are",
            hint=hint,
        )
    stage = program[facts["stage"]]
    out = stage.output_node(facts["output"])
    order = out if _reorders_rows(out) else None
    made = out if order is None else order.all_input_nodes[0]
    blocks = find_layers(stage).of if stage.name == "vision_encoder" else ()
    found = [*last_rows(stage, made, blocks)]
    for entry, graph in reversed(found):
        reordered = order is None or entry.meta["val"].ndim == made.meta["val"].ndim
        if reordered and any(node.target in PRODUCTS for node in graph.nodes):
            return Projector(stage, entry, graph, order)
    raise PreconditionError(
        f"no linear layer of stage {stage.name} makes a token of one row",
        node=out,
        hint=hint,
    )


def _reorders_rows(node: fx.Node) -> bool:
    """Whether an operator reads rows ``[rows, width]`` by number, such as those of windows."""
    if node.target is not aten.index.Tensor:
        return False
    rows: Any = node.args[0]
    numbers: Any = node.args[1]
    return rows.meta["val"].ndim == 2 and len(numbers) == 1


_AT_ONCE = 8
"""Directions of which derivatives are held at a time."""
