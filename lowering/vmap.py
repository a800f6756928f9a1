"""Dynamo's record of ``torch.vmap`` as plain operators.

Dynamo keeps a ``vmap`` as calls that enter and leave a batching level. Mask functions of Hugging
Face models use it. Functional tensors cannot be batched that way, so each such region is traced on
its own, where batching rules turn it into ATen operators.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._functorch import predispatch
from torch.fx.experimental.proxy_tensor import make_fx

from vlmopt.program import copy_graph, fetch_attr


def without_vmap(gm: fx.GraphModule, example: Callable[[Any], Any]) -> fx.GraphModule:
    """A graph of Dynamo's in which each region under ``vmap`` is replaced by what it computes.

    Fake tensors of the graph's own mode must be active. Without such regions it is ``gm`` itself.

    Args:
        example: from the value that Dynamo recorded for a node to one to trace with.
    """
    if not gm.graph.find_nodes(op="call_function", target=predispatch._vmap_increment_nesting):
        return gm
    plain = fx.GraphModule(gm, copy_graph(gm.graph))
    for region in _regions(plain.graph):
        _replace(plain, region, example)
    plain.graph.lint()
    plain.recompile()
    return plain


def _regions(graph: fx.Graph) -> list[list[fx.Node]]:
    regions: list[list[fx.Node]] = []
    depth = 0
    for node in graph.nodes:
        if node.target is predispatch._vmap_increment_nesting:
            if depth == 0:
                regions.append([])
            depth += 1
        if depth > 0:
            regions[-1].append(node)
        if node.target is predispatch._vmap_decrement_nesting:
            depth -= 1
    return regions


def _replace(gm: fx.GraphModule, region: list[fx.Node], example: Callable[[Any], Any]) -> None:
    members = set(region)
    given = list(
        dict.fromkeys(v for node in region for v in node.all_input_nodes if v not in members)
    )
    results = [node for node in region if any(user not in members for user in node.users)]
    inner = fx.Graph()
    mapping: dict[fx.Node, Any] = {node: inner.placeholder(node.name) for node in given}
    for node in region:
        mapping[node] = inner.node_copy(node, mapping.__getitem__)
    inner.output(tuple(mapping[node] for node in results))
    run = fx.Interpreter(fx.GraphModule(gm, inner)).run
    traced = make_fx(run)(*(example(node.meta["example_value"]) for node in given))
    traced.graph.eliminate_dead_code()

    first = region[0]
    values = dict(zip(traced.graph.find_nodes(op="placeholder"), given, strict=True))
    with gm.graph.inserting_before(first):
        for node in traced.graph.nodes:
            if node.op == "get_attr":
                values[node] = _constant(gm, fetch_attr(traced, str(node.target)))
            elif node.op == "call_function":
                values[node] = gm.graph.node_copy(node, values.__getitem__)
                values[node].meta = dict(first.meta)
    outputs: Any = traced.graph.output_node().args[0]
    for node, value in zip(results, outputs, strict=True):
        node.replace_all_uses_with(values[value], lambda user: user not in members)
    for node in reversed(region):
        gm.graph.erase_node(node)


def _constant(gm: fx.GraphModule, tensor: torch.Tensor) -> fx.Node:
    name = gm.graph._graph_namespace.create_name("vmap_constant", None)
    gm.register_buffer(name, tensor, persistent=False)
    return gm.graph.get_attr(name)
