"""Analysis ``layers``: the repeated blocks of a stage and the value that enters each of them."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import fx

from vlmopt.errors import PreconditionError
from vlmopt.graph.reach import reached, users
from vlmopt.program import Stage

_INDEXED = re.compile(r"^(?P<container>(?:.*\.)?[A-Za-z_]\w*)\.(?P<index>\d+)$")


@dataclass(frozen=True)
class Layers:
    """The blocks of one container of repeated modules, in order.

    Attributes:
        container: module path of the container, such as ``model.layers``.
        entries: per layer, the value of the residual stream that enters it.
        of: layer of every node inside a block.
    """

    container: str
    entries: tuple[fx.Node, ...]
    of: dict[fx.Node, int]

    def __len__(self) -> int:
        return len(self.entries)


def exit_of(layers: Layers, layer: int) -> fx.Node:
    """The value that leaves a layer.

    Raises:
        PreconditionError: there is not just one.
    """
    inside = [node for node, index in layers.of.items() if index == layer]
    leaving = [node for node in inside if any(layers.of.get(user) != layer for user in node.users)]
    if len(leaving) != 1:
        names = ", ".join(f"%{node.name}" for node in leaving) or "nothing"
        raise PreconditionError(
            f"layer {layer} of {layers.container} is left by {names}, not by one residual stream",
            node=layers.entries[layer],
        )
    return leaving[0]


def module_paths(node: fx.Node) -> list[str]:
    """Module paths around a node, outermost first, as the tracer saw them."""
    stack = node.meta.get("nn_module_stack") or {}
    return [clean_path(path) for path, _ in stack.values() if path]


def clean_path(path: str) -> str:
    """A module path without the tracer's decoration: ``L['self']._modules['a'].b`` -> ``a.b``."""
    path = re.sub(r"\[['\"]?(\w+)['\"]?\]", r".\1", path)
    path = re.sub(r"\b_modules\.|\bL\.self\.?|\bself\.", "", path)
    return path.strip(".")


def layer_of(node: fx.Node) -> tuple[str, int] | None:
    """``(container, index)`` of the outermost repeated block around a node, if it is in one."""
    for path in module_paths(node):
        found = _INDEXED.match(path)
        if found is not None:
            return found["container"], int(found["index"])
    return None


def find_layers(stage: Stage, *, after: fx.Node | None = None) -> Layers:
    """The decoder (or encoder) layers of a stage.

    Args:
        after: only containers whose blocks depend on this node; tells the decoder of a graph that
            holds the vision encoder too.

    Raises:
        PreconditionError: the stage has no repeated blocks, or more than one value flows from
            block to block.
    """
    places = {
        node: place
        for node in stage.graph.nodes
        if node.op == "call_function" and (place := layer_of(node)) is not None
    }
    considered = places.keys() if after is None else places.keys() & reached([after], users)
    blocks: dict[str, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for node in considered:
        name, index = places[node]
        blocks[name][index] += 1
    repeated = {name: layers for name, layers in blocks.items() if len(layers) > 1}
    candidates = repeated or blocks
    if not candidates:
        raise PreconditionError(
            f"stage {stage.name} has no layers: no module path such as 'layers.3' in its nodes",
            hint="token passes need a model whose decoder is a ModuleList of blocks",
        )
    container = max(candidates, key=lambda name: (sum(candidates[name].values()), name))
    order = sorted(candidates[container])
    # with the part of each block that does not depend on ``after``
    of = {node: index for node, (name, index) in places.items() if name == container}
    entries = [
        _entry(stage, of, index, previous)
        for previous, index in zip([None, *order], order, strict=False)
    ]
    return Layers(container, tuple(entries), of)


def _entry(stage: Stage, of: dict[fx.Node, int], index: int, previous: int | None) -> fx.Node:
    """The one value that block ``index`` takes from what the block before it computed."""
    inside = [node for node in stage.graph.nodes if of.get(node) == index]
    outside = list(
        dict.fromkeys(
            value
            for node in inside
            for value in node.all_input_nodes
            if of.get(value) != index and value.op != "get_attr"
        )
    )
    streams = [value for value in outside if _feeds_residual(value, of, index)]
    if previous is not None:
        streams = [value for value in streams if _depends_on_layer(value, of, previous)]
    # [batch, tokens, width], or all rows of a batch behind each other
    found = [v for v in streams if v.meta["val"].ndim == 3] or streams
    if len(found) != 1:
        names = ", ".join(f"%{value.name}" for value in found) or "nothing"
        raise PreconditionError(
            f"layer {index} of stage {stage.name} is entered by {names}, not by one residual "
            "stream",
            node=inside[0],
        )
    return found[0]


def _feeds_residual(value: fx.Node, of: dict[fx.Node, int], index: int) -> bool:
    """Whether the block adds something to ``value``, as it does to the stream it updates."""
    val = value.meta.get("val")
    return (
        isinstance(val, torch.Tensor)
        and val.ndim in (2, 3)
        and val.is_floating_point()
        and any(
            of.get(user) == index and user.target is torch.ops.aten.add.Tensor
            for user in value.users
        )
    )


def _depends_on_layer(value: fx.Node, of: dict[fx.Node, int], layer: int) -> bool:
    """Whether ``value`` is computed from nodes of ``layer``, not looking into earlier layers."""
    seen: set[fx.Node] = set()
    stack = [value]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if of.get(node) == layer:
            return True
        if node in of:
            continue
        stack.extend(node.all_input_nodes)
    return False
