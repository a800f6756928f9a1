"""Graphs as text: one line per node, ``%name = op(args)  dtype[shape]``, grouped by module path.

The text is a stable function of the graph: it holds no addresses, no absolute paths and nothing
that depends on the width of a terminal, so that two of them can be compared by ``diff``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import PureWindowsPath
from typing import Any

import torch
from torch import fx

from vlmopt.analysis.layers import module_paths
from vlmopt.program import Port, Stage

_DTYPES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "b8",
    torch.complex64: "c64",
    torch.complex128: "c128",
}
_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+)')
_TORCH_FILE = re.compile(r"[/\\]torch[/\\](nn|utils|_\w+|functional\.py)")

WIDEST_CALL = 72
"""Columns are aligned up to this width; a longer call pushes only its own type to the right."""


def dtype_text(dtype: torch.dtype) -> str:
    """``bf16``, ``f32``, ``i64``, ``b8`` (bool); torch's own name for the rare ones."""
    return _DTYPES.get(dtype, str(dtype).removeprefix("torch."))


def value_text(value: object) -> str:
    """Type of a node's value: ``f32[1,640,4096]``, ``(f32[2], i64[2])``, ``int s0``."""
    if isinstance(value, torch.Tensor):
        return f"{dtype_text(value.dtype)}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(value_text, value))})"
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return f"{type(value).__name__.removeprefix('Sym').lower()} {value}"
    return "-" if value is None else f"{type(value).__name__} {value}"


def op_text(node: fx.Node) -> str:
    """Short name of what a node does: ``linear`` for ``aten.linear.default``."""
    if node.op != "call_function":
        return {"placeholder": "input", "get_attr": "weight"}.get(node.op, node.op)
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition("::")[2]
    return str(getattr(target, "__name__", target))


def argument_text(argument: Any, name_of: Callable[[fx.Node], str] | None = None) -> str:
    """An argument of a node: ``%x``, ``[1, -1, 16]``, ``bf16``, ``1e-06``."""
    if isinstance(argument, fx.Node):
        return f"%{argument.name if name_of is None else name_of(argument)}"
    if isinstance(argument, (list, tuple)):
        return f"[{', '.join(argument_text(item, name_of) for item in argument)}]"
    if isinstance(argument, torch.dtype):
        return dtype_text(argument)
    if isinstance(argument, (torch.memory_format, torch.layout)):
        return str(argument).removeprefix("torch.")
    if isinstance(argument, slice):
        parts = (argument.start, argument.stop, argument.step)
        return ":".join("" if part is None else argument_text(part, name_of) for part in parts)
    return repr(argument) if isinstance(argument, str) else str(argument)


def call_text(node: fx.Node) -> str:
    """The left part of a node's line: ``%name = op(args)``."""
    if node.op == "placeholder":
        return f"%{node.name} = input()"
    if node.op == "get_attr":
        return f"%{node.name} = weight({node.target})"
    values = node.args[0] if node.op == "output" else node.args
    arguments = [argument_text(value) for value in values]  # type: ignore[union-attr]
    arguments += [f"{key}={argument_text(value)}" for key, value in node.kwargs.items()]
    call = f"{op_text(node)}({', '.join(arguments)})"
    return call if node.op == "output" else f"%{node.name} = {call}"


def node_text(node: fx.Node) -> str:
    """A node on one line: ``%add_1 = add(%add, %linear_2)  f32[1,6,16]``."""
    if node.op == "output":
        return call_text(node)
    return f"{call_text(node)}  {value_text(node.meta.get('val'))}"


def align(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Two columns as lines, the second starting where the widest first one ends."""
    rows = list(rows)
    width = max((len(left) for left, _ in rows if len(left) <= WIDEST_CALL), default=0)
    return [f"{left:<{width}}  {right}".rstrip() for left, right in rows]


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node belongs to; empty when it is in none."""
    paths = module_paths(node)
    return paths[-1] if paths else ""


def source_location(node: fx.Node) -> str | None:
    """``file.py:line`` of the user's code that made a node."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    users = [frame for frame in frames if not _TORCH_FILE.search(frame[0])]
    if not frames:
        return None
    file, line = (users or frames)[-1]
    return f"{PureWindowsPath(file).name}:{line}"  # takes both kinds of slash


def port_text(port: Port) -> str:
    """Role of a port with what qualifies it: ``key of layer 3, tokens as in kept_3``."""
    text = str(port.role)
    if port.layer is not None:
        text += f" of layer {port.layer}"
    return f"{text}, tokens as in {port.kept}" if port.kept is not None else text


def graph_text(graph: fx.Graph, *, depth: int | None = None) -> str:
    """All computing nodes of a graph, consecutive nodes of one module under one header.

    Args:
        depth: headers show that many components of the module path, and nodes are grouped so.
    """
    calls = [node for node in graph.nodes if node.op in ("call_function", "output")]
    lines: list[str] = []
    for path, members in groupby(calls, lambda node: _truncate(module_path(node), depth)):
        nodes = list(members)
        place = source_location(nodes[0])
        lines.append(f"@@ {path or '(top)'}" + (f"  {place}" if place else ""))
        rows = [(call_text(node), _type_of(node)) for node in nodes]
        lines += [f"  {line}" for line in align(rows)]
    return "\n".join(lines)


def stage_text(stage: Stage, *, depth: int | None = None) -> str:
    """A stage as text: its ports, then its graph. Weights are counted, not listed."""
    weights = stage.graph.find_nodes(op="get_attr")
    calls = sum(node.op == "call_function" for node in stage.graph.nodes)
    head = f"stage {stage.name}: {calls} nodes, {len(weights)} weights"
    return "\n".join([head, *_ports(stage), graph_text(stage.graph, depth=depth)])


def _ports(stage: Stage) -> Iterator[str]:
    rows = []
    for port in stage.inputs:
        value = value_text(stage.placeholder(port).meta.get("val"))
        rows.append((f"  in   %{port.name}", f"{value}  {port_text(port)}"))
    outputs: Sequence[Any] = stage.graph.output_node().args[0]  # type: ignore[assignment]
    for port, node in zip(stage.outputs, outputs, strict=True):
        value = value_text(node.meta.get("val"))
        rows.append((f"  out  {port.name} = %{node.name}", f"{value}  {port_text(port)}"))
    yield from align(rows)


def _type_of(node: fx.Node) -> str:
    return "" if node.op == "output" else value_text(node.meta.get("val"))


def _truncate(path: str, depth: int | None) -> str:
    return path if depth is None else ".".join(path.split(".")[:depth])
