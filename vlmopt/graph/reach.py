"""What nodes of a graph can be reached from others, and which hold weights."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

Step = Callable[[fx.Node], Iterable[fx.Node]]


def reached(starts: Iterable[fx.Node], step: Step) -> set[fx.Node]:
    """``starts``, and all nodes that repeated steps lead to from there."""
    seen = set(starts)
    stack = list(seen)
    while stack:
        new = set(step(stack.pop())) - seen
        seen |= new
        stack.extend(new)
    return seen


def sources(node: fx.Node) -> Iterable[fx.Node]:
    """A step: what a node is computed from."""
    return node.all_input_nodes


def users(node: fx.Node) -> Iterable[fx.Node]:
    """A step: what is computed from a node."""
    return node.users


def is_weight(node: fx.Node) -> bool:
    """Whether a node holds a weight: an attribute, or an input that Dynamo took from a module."""
    if node.op == "placeholder":
        return "_dynamo_static_input_type" in (node.meta.get("tensor_dict") or {})
    return node.op == "get_attr"
