"""State that a stage leaves where it found it, in buffers that stay where they are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from vlmopt.program import copy_graph


def written_in_place(gm: fx.GraphModule, writes: Mapping[int, str]) -> fx.GraphModule:
    """A copy that writes outputs into inputs instead of returning them; ``gm`` is not changed.

    It is a graph of its own, not a function around one: functions of one source share the number
    of times that they may be compiled. Inductor lets operators write there that would make a copy.

    Args:
        writes: by number of the output, the name of the input; made, behind the others, where
            there is none.
    """
    graph = copy_graph(gm.graph)
    output = graph.output_node()
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    values: Any = output.args[0]
    for name in writes.values():
        if name not in inputs:
            with graph.inserting_after(next(reversed(inputs.values()))):
                inputs[name] = graph.placeholder(name)
    with graph.inserting_before(output):
        for at, name in writes.items():
            graph.call_function(torch.ops.aten.copy_.default, (inputs[name], values[at]))
    output.args = (tuple(value for at, value in enumerate(values) if at not in writes),)
    return fx.GraphModule(gm, graph)
