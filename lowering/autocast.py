"""Autocast spelled out: the casts that ``torch.autocast`` makes inside operators, as nodes.

Tracing before dispatch keeps attention whole, but records operators as they were called. Which
operators autocast makes run in which type is its own business: each is run on fake tensors, and
watched.
"""

from __future__ import annotations

from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from vlmopt.rewrite.emit import value_of

aten = torch.ops.aten


def record_autocast(node: fx.Node) -> None:
    """Note in the metadata of ``node``, and so of what is traced from it, where autocast is on."""
    types = {
        device: torch.get_autocast_dtype(device)
        for device in ("cpu", "cuda")
        if torch.is_autocast_enabled(device)
    }
    custom = {k: v for k, v in (node.meta.get("custom") or {}).items() if k != _NOTE}
    node.meta["custom"] = {**custom, _NOTE: types} if types else custom


_NOTE = "vlmopt_autocast"


def spell_out_casts(graph: fx.Graph, mode: Any) -> None:
    """Make the casts explicit that the operators of ``graph`` made while it was traced.

    Args:
        graph: nodes carry what :func:`record_autocast` noted; autocast is off.
        mode: fake mode of its values.
    """
    for node in list(graph.nodes):
        types = (node.meta.get("custom") or {}).pop(_NOTE, None)
        if node.op != "call_function" or not types:
            continue
        with mode:
            casts = _Casts.of(node, types)
            for operand, became in casts.items():
                with graph.inserting_before(node):
                    cast = graph.call_function(aten._to_copy.default, (operand,), {"dtype": became})
                cast.meta = {**node.meta, "val": operand.meta["val"].to(became)}
                node.replace_input_with(operand, cast)


class _Casts(TorchDispatchMode):
    """Watches which operands an operator casts first."""

    def __init__(self, operands: list[fx.Node]) -> None:
        super().__init__()
        self.operands = operands
        self.found: dict[fx.Node, torch.dtype] = {}
        self.others: list[torch.dtype] = []

    @classmethod
    def of(cls, node: fx.Node, types: dict[str, torch.dtype]) -> dict[fx.Node, torch.dtype]:
        """Casts that autocast adds to those that the operator makes by itself."""
        operands = [v for v in node.all_input_nodes if _is_float(v.meta.get("val"))]
        if not operands:
            return {}
        args, kwargs = pytree.tree_map(value_of, (node.args, node.kwargs))
        watched, plain = cls(operands), cls(operands)
        with ExitStack() as stack:
            for device, dtype in types.items():
                stack.enter_context(torch.autocast(device, dtype, cache_enabled=False))
            with watched:
                node.target(*args, **kwargs)  # type: ignore[operator]
        if not watched.found and not watched.others:
            return {}
        with plain, suppress(RuntimeError):  # it may need the casts
            node.target(*args, **kwargs)  # type: ignore[operator]
        casts = {v: dtype for v, dtype in watched.found.items() if v not in plain.found}
        if len(watched.others) > len(plain.others):  # of views of its operands, in an inner step
            became = watched.others[-1]
            casts |= {v: became for v in operands if v.meta["val"].dtype != became}
        return casts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._to_copy.default and _is_float(args[0]) and "dtype" in kwargs:
            casted = [v for v in self.operands if v.meta["val"] is args[0]]
            self.found |= dict.fromkeys(casted, kwargs["dtype"])
            if not casted:
                self.others.append(kwargs["dtype"])
        return func(*args, **kwargs)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
