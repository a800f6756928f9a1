"""Dynamo's graphs in canonical form: functional pre-dispatch ATen, same inputs and outputs."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    dispatch_functionalize,
)
from torch.fx.experimental.proxy_tensor import disable_autocast_cache, make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from vlmopt.graph.canonical import simplify
from vlmopt.lowering.autocast import record_autocast, spell_out_casts
from vlmopt.lowering.vmap import without_vmap
from vlmopt.program import fetch_attr

aten = torch.ops.aten


def canonical_dynamo_graph(gm: fx.GraphModule) -> tuple[fx.GraphModule, list[str]]:
    """A graph of Dynamo's in canonical form.

    Module paths and source lines survive; sizes that Dynamo left open stay open.

    Returns:
        The graph, and the names of the inputs that the original writes into: this one does not.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta["example_value"] for node in placeholders]
    mode = next(
        value.fake_mode
        for node in gm.graph.nodes  # inputs alone may all be numbers
        for value in pytree.tree_leaves(node.meta.get("example_value"))
        if isinstance(value, FakeTensor)
    )
    written: list[str] = []
    # gradients are left to AOTAutograd, which differentiates the rewritten graph
    keep_gradients_out = torch.is_grad_enabled()
    sizes = mode.shape_env
    with torch.no_grad(), mode, sizes.ignore_fresh_unbacked_symbols() if sizes else nullcontext():
        retrace = _Retrace(without_vmap(gm, _settled), keep_gradients_out=keep_gradients_out)

        def run(*values: Any) -> Any:
            result = retrace.run(*values)
            written.extend(
                node.name
                for node, value in zip(placeholders, values, strict=True)
                if isinstance(value, FunctionalTensor)
                and torch._functionalize_has_data_mutation(value.elem)  # type: ignore[attr-defined]
            )
            return result

        functional = dispatch_functionalize(
            run, FunctionalTensorMode(pre_dispatch=True, export=True)
        )
        inputs = [_settled(value) for value in examples]
        with preserve_node_meta(), disable_autocast_cache():
            traced: fx.GraphModule = make_fx(functional, pre_dispatch=True)(*inputs)
    for node, source, value in zip(
        traced.graph.find_nodes(op="placeholder"), placeholders, inputs, strict=True
    ):
        # AOTAutograd reads off these which inputs are parameters
        node.meta = {**source.meta, "val": value, **node.meta}
        node._dynamo_source = getattr(source, "_dynamo_source", None)
    _tidy(traced, mode)
    with torch.no_grad(), torch._C._DisableAutocast():
        spell_out_casts(traced.graph, mode)
    traced.recompile()
    traced.meta.update(gm.meta)
    return traced, written


def _settled(value: Any) -> Any:
    """An input for the trace: open sizes that a guard has settled become plain integers."""
    if isinstance(value, torch.SymInt):
        return _settled_size(value)
    if not isinstance(value, torch.Tensor):
        return value
    sizes = (*value.shape, *value.stride())
    if not any(_settled_size(size) is not size for size in sizes):
        # a scalar that stands for a Python number must stay itself: it remembers its symbol
        return value.detach() if value.requires_grad else value
    return torch.empty_strided(
        [_settled_size(size) for size in value.shape],
        [_settled_size(step) for step in value.stride()],
        dtype=value.dtype,
        device=value.device,
    )


def _settled_size(size: Any) -> Any:
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size)
    return size


def _tidy(traced: fx.GraphModule, mode: FakeTensorMode) -> None:
    graph = traced.graph
    values = graph.output_node().args[0]
    graph.output_node().args = (tuple(values) if isinstance(values, (list, tuple)) else (values,),)
    graph.set_codegen(fx.graph.CodeGen())
    simplify(graph)
    used = set()
    for node in graph.find_nodes(op="get_attr"):
        used.add(str(node.target))
        constant = fetch_attr(traced, str(node.target))
        node.meta["val"] = mode.from_tensor(constant, static_shapes=True)  # the tracer has its own
    for name, value in list(vars(traced).items()):  # constants of the trace
        if isinstance(value, torch.Tensor):
            delattr(traced, name)
            if name in used:
                traced.register_buffer(name, value)
    for table in (traced._parameters, traced._buffers):
        for name in set(table) - used:
            del table[name]


class _Retrace(fx.Interpreter):
    """Runs Dynamo's graph; switches of autograd and autocast act, but are not recorded."""

    def __init__(self, gm: fx.GraphModule, *, keep_gradients_out: bool) -> None:
        super().__init__(gm)
        self.frozen: set[fx.Node] = set()
        enabled = keep_gradients_out
        for node in gm.graph.nodes:
            if node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            elif keep_gradients_out and not enabled:
                self.frozen.add(node)

    def run_node(self, n: fx.Node) -> Any:
        record_autocast(n)
        result = super().run_node(n)
        leaves = any(user not in self.frozen for user in n.users)
        if n in self.frozen and n.op.startswith("call") and leaves:
            # what a no_grad block computed must not pass gradients on
            return pytree.tree_map_only(torch.Tensor, aten.detach.default, result)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            return None
        if target in (_enter_autocast, _exit_autocast):
            with torch._C.DisableTorchFunction():
                return target(*args, **kwargs)
        return super().call_function(target, args, kwargs)


_enter_autocast = torch.amp.autocast_mode._enter_autocast
_exit_autocast = torch.amp.autocast_mode._exit_autocast
