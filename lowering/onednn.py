"""Linear layers by oneDNN, on weights packed once.

Inductor hands float32 products to MKL, which packs the weight anew in every call and knows the
vector units of one vendor only; in bfloat16 it has oneDNN do the packing, in every call too. What
that costs grows as tokens are dropped: the fewer the rows, the less work per packed weight.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx

from vlmopt.errors import PreconditionError
from vlmopt.ops.packed import is_available, packed
from vlmopt.program import attach_attr, copy_graph, fetch_attr

aten = torch.ops.aten

DTYPES = (torch.float32, torch.bfloat16)


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
        found += _pack(result, node)
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


def _pack(gm: fx.GraphModule, node: fx.Node) -> bool:
    rows, source, bias = (*node.args, None)[:3]
    source, features = _part(cast("fx.Node", source))
    if source.op != "get_attr":
        return False
    path = str(source.target)
    weight = fetch_attr(gm, path)
    if not _is_packable(weight):
        return False
    start, stop, _ = features.indices(weight.shape[0])
    name = f"packed.{path}_{start}_{stop}" if features != slice(None) else f"packed.{path}"
    attach_attr(gm, name, packed(weight, start, stop))
    with gm.graph.inserting_before(node):
        given = gm.graph.get_attr(name)
        call = gm.graph.call_function(torch.ops.vlmopt.packed_linear.default, (rows, given, bias))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    gm.graph.erase_node(node)
    return True


def _part(source: fx.Node) -> tuple[fx.Node, slice]:
    """The weight of which output features side by side are taken, and which."""
    if source.target is not aten.slice.Tensor:
        return source, slice(None)
    weight, dim, start, stop, step = (*source.args, *[None] * 4)[:5]
    is_known = not any(isinstance(end, fx.Node) for end in (start, stop))
    if dim not in (None, 0, -2) or step not in (None, 1) or not is_known:
        return source, slice(None)
    return cast("fx.Node", weight), slice(start, stop)


def _is_packable(weight: Tensor) -> bool:
    return weight.device.type == "cpu" and weight.dtype in DTYPES and is_available()
