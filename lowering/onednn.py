"""Linear layers by oneDNN, on weights packed once.

Inductor hands float32 products to MKL, which packs the weight anew in every call and knows the
vector units of one vendor only; in bfloat16 it has oneDNN do the packing, in every call too. What
that costs grows as tokens are dropped: the fewer the rows, the less work per packed weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.utils.weak import WeakTensorKeyDictionary

from vlmopt.errors import PreconditionError
from vlmopt.ops.packed import is_available, pack
from vlmopt.program import attach_attr, copy_graph, fetch_attr

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)

_packed = WeakTensorKeyDictionary()
"""What was made of a weight, and its version then: stages share it, and it lives as long as the
weight does."""


def with_packed_weights(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which linear layers with weights of their own run on packed ones.

    Each weight is packed once, whatever the number of graphs that hold it, and takes its memory a
    second time. ``gm`` is not changed; weights that change later are not seen.

    Raises:
        PreconditionError: there is nothing that oneDNN could run: other devices or types, or a
            PyTorch without it.
    """
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    found = 0
    for node in result.graph.find_nodes(op="call_function", target=aten.linear.default):
        source = node.args[1]
        if isinstance(source, fx.Node) and source.op == "get_attr":
            found += _pack(result, node, str(source.target))
    if not found:
        raise PreconditionError(
            "no linear layer here can run on packed weights: that takes float32 or bfloat16 on the "
            "CPU, and a PyTorch with oneDNN",
            hint="use backend='inductor'",
        )
    result.graph.eliminate_dead_code()
    result.delete_all_unused_submodules()
    result.recompile()
    return result


def _pack(gm: fx.GraphModule, node: fx.Node, path: str) -> bool:
    weight = fetch_attr(gm, path)
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or not is_available():
        return False
    name = f"packed.{path}"
    attach_attr(gm, name, packed(weight))
    rows, _, bias = (*node.args, None)[:3]
    with gm.graph.inserting_before(node):
        given = gm.graph.get_attr(name)
        call = gm.graph.call_function(torch.ops.vlmopt.packed_linear.default, (rows, given, bias))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    return True


def packed(weight: Tensor) -> Tensor:
    """What :func:`vlmopt.ops.packed.pack` makes of a weight, kept until the weight changes."""
    found = _packed.get(weight)
    if found is None or found[0] != weight._version:
        found = _packed[weight] = (weight._version, pack(weight))
    result: Tensor = found[1]
    return result
