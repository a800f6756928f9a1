"""Inserting operators and traced functions into a graph, with metadata and provenance."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from vlmopt.errors import UnsupportedOperatorError
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Stage, fetch_attr


def value_of(node: Any) -> Any:
    """The fake value recorded for a node; any other argument is its own value."""
    return node.meta["val"] if isinstance(node, fx.Node) else node


_LIFTS = {
    torch.ops.aten.lift_fresh.default,
    torch.ops.aten.lift_fresh_copy.default,
    torch.ops.aten.detach_.default,
}
"""What ``torch.tensor(...)`` leaves behind in a trace beside the constant itself."""


class Emitter:
    """Adds nodes at one place of a graph.

    Every node gets the fake value of its result, the module path of the place, and the stamp of
    the pass.

    Args:
        graph: the graph to add to.
        stamp: called with each new node, to record which pass made it.
        place: node whose module path and source line the new nodes take over.
        prefix: first part of the names of the new nodes.
    """

    def __init__(
        self,
        graph: fx.Graph,
        *,
        stamp: Callable[[fx.Node], None],
        place: fx.Node,
        prefix: str,
        fake_mode: Any,
    ) -> None:
        self.graph = graph
        self.stamp = stamp
        self.place = place
        self.prefix = prefix
        self.fake_mode = fake_mode
        self.made: list[fx.Node] = []

    @classmethod
    def of_pass(
        cls, ctx: PassContext, stage: Stage, place: fx.Node, prefix: str, match: int = 1
    ) -> Emitter:
        """One whose nodes are stamped as made by a pass, at its ``match``-th place."""
        return cls(
            stage.graph,
            stamp=lambda node: ctx.stamp(node, match),
            place=place,
            prefix=prefix.replace("-", "_"),
            fake_mode=stage.fake_mode(),
        )

    def call(self, target: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        """One operator, inserted at the current insertion point of the graph."""
        node = self.graph.create_node(
            "call_function", target, args, kwargs, name=f"{self.prefix}_{name}" if name else None
        )
        with self.fake_mode:
            value = target(*pytree.tree_map(value_of, args), **pytree.tree_map(value_of, kwargs))
        self._finish(node, value)
        return node

    def copy(self, node: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """``node`` once more, on other arguments of the same shapes."""
        copied = self.graph.node_copy(node, lambda value: mapping.get(value, value))
        copied.name = self._unique(f"{self.prefix}_{node.name}")
        self._finish(copied, node.meta.get("val"))
        return copied

    def trace(self, function: Callable[..., Any], *args: Any, names: tuple[str, ...] = ()) -> Any:
        """The operators of ``function(*args)``, traced on fake tensors and inserted in place.

        Args:
            args: nodes, or constants that the function takes.
            names: names of the results, in order.

        Returns:
            The node, or tuple of nodes, that holds the result.
        """
        tensors = [arg for arg in args if isinstance(arg, fx.Node)]

        def closed(*values: Any) -> Any:
            remaining = iter(values)
            return function(*(next(remaining) if isinstance(arg, fx.Node) else arg for arg in args))

        with self.fake_mode:
            traced = make_fx(closed, pre_dispatch=True)(*(arg.meta["val"] for arg in tensors))
        for node in [node for node in traced.graph.nodes if node.target in _LIFTS]:
            node.replace_all_uses_with(node.args[0])
            traced.graph.erase_node(node)
        traced.graph.eliminate_dead_code()
        mapping: dict[fx.Node, Any] = {}
        placeholders = iter(tensors)
        result: Any = None
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                mapping[node] = next(placeholders)
            elif node.op == "output":
                result = pytree.tree_map(
                    lambda value: mapping[value] if isinstance(value, fx.Node) else value,
                    node.args[0],
                )
            elif node.op == "get_attr":
                mapping[node] = self.constant(fetch_attr(traced, str(node.target)))
            else:
                copied = self.graph.node_copy(node, mapping.__getitem__)
                copied.name = self._unique(f"{self.prefix}_{node.name}")
                self._finish(copied, node.meta.get("val"))
                mapping[node] = copied
        results = result if isinstance(result, (tuple, list)) else (result,)
        for node, name in zip(results, names, strict=False):
            if node in self.made:
                node.name = self._unique(f"{self.prefix}_{name}")
        return result

    def constant(self, tensor: torch.Tensor) -> fx.Node:
        """A tensor known when the graph is rewritten, stored in the module as a buffer."""
        module: Any = self.graph.owning_module
        name = self._unique(f"{self.prefix}_constant")
        module.register_buffer(name, tensor)
        node = self.graph.get_attr(name)
        with self.fake_mode:
            self._finish(node, self.fake_mode.from_tensor(tensor, static_shapes=True))
        return node

    def adopt(self, node: fx.Node, value: Any) -> None:
        """Record the fake value of a node that was made by hand, and who made it."""
        self._finish(node, value)

    def _unique(self, name: str) -> str:
        return self.graph._graph_namespace.create_name(name, None)

    def _finish(self, node: fx.Node, value: Any) -> None:
        node.meta = {
            key: self.place.meta[key]
            for key in ("nn_module_stack", "stack_trace")
            if key in self.place.meta
        }
        node.meta["val"] = value
        self.stamp(node)
        self.made.append(node)


def propagate(graph: fx.Graph, nodes: set[fx.Node], fake_mode: Any) -> None:
    """Record anew the fake values of ``nodes``, in graph order.

    Raises:
        UnsupportedOperatorError: an operator cannot run on what its arguments are now.
    """
    with fake_mode:
        for node in graph.nodes:
            if node in nodes and node.op == "call_function":
                args = pytree.tree_map(value_of, node.args)
                kwargs = pytree.tree_map(value_of, node.kwargs)
                try:
                    node.meta["val"] = node.target(*args, **kwargs)
                except RuntimeError as error:
                    raise UnsupportedOperatorError(
                        f"{node.target} cannot run on fewer tokens: {error}",
                        node=node,
                        hint="capture with a batch of one, or report the model",
                    ) from error
