"""Linear layers and the products of experts by oneDNN, on weights packed once.

Inductor hands float32 products to MKL, which packs the weight anew in every call and knows the
vector units of one vendor only; in bfloat16 it has oneDNN do the packing, in every call too. What
that costs grows as tokens are dropped: the fewer the rows, the less work per packed weight.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx

from vlmopt.analysis.experts import GROUPED_PRODUCTS
from vlmopt.errors import PreconditionError
from vlmopt.ops.experts import pack_matrices
from vlmopt.ops.packed import is_available, packed
from vlmopt.program import attach_attr, copy_graph, fetch_attr

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)


def with_packed_weights(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which linear layers and experts with weights of their own run on packed ones.

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
    for target in GROUPED_PRODUCTS:
        for node in result.graph.find_nodes(op="call_function", target=target):
            found += _pack_experts(result, node)
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
    if not _is_packable(weight):
        return False
    name = f"packed.{path}"
    attach_attr(gm, name, packed(weight))
    rows, _, bias = (*node.args, None)[:3]
    with gm.graph.inserting_before(node):
        given = gm.graph.get_attr(name)
    _replace(node, torch.ops.vlmopt.packed_linear.default, rows, given, bias)
    return True


def _pack_experts(gm: fx.GraphModule, node: fx.Node) -> bool:
    rows, matrices, ends = cast("tuple[fx.Node, ...]", node.args[:3])
    transposed = matrices.target is aten.transpose.int and set(matrices.args[1:]) == {-2, -1}
    source = cast("fx.Node", matrices.args[0]) if transposed else matrices
    if source.op != "get_attr" or not _is_packable(weight := fetch_attr(gm, str(source.target))):
        return False
    pack_matrices(weight, transposed)  # now, and not in the first call
    _replace(node, torch.ops.vlmopt.packed_grouped_mm.default, rows, source, transposed, ends)
    return True


def _replace(node: fx.Node, target: Any, *args: Any) -> None:
    with node.graph.inserting_before(node):
        call = node.graph.call_function(target, args)
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    node.graph.erase_node(node)


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in DTYPES and is_available()
