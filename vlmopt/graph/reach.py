"""What nodes of a graph can be reached from others."""

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
