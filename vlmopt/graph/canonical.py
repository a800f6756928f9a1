"""From a ``torch.export`` program to the canonical graph of a stage.

Canonical: functional ATen without decomposing composite operators, weights as ``get_attr``, no
run-time asserts, no concatenation with nothing, no squeeze of nothing, masked row updates in dense
form, grouped products under one name, and what is written part by part into an empty tensor as a
concatenation.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import fx
from torch.export.graph_signature import InputKind, OutputKind
from torch.fx.experimental.symbolic_shapes import statically_known_true

import vlmopt.ops  # noqa: F401 - registers vlmopt::grouped_mm
from vlmopt import families
from vlmopt.errors import CaptureError
from vlmopt.program import attach_attr

aten = torch.ops.aten


def canonical_graph(
    exported: torch.export.ExportedProgram,
) -> tuple[fx.GraphModule, list[str | None]]:
    """The canonical graph of an exported program.

    Returns:
        The graph module, and for each leaf of the program's pytree inputs (in order) the name of
        its placeholder, or ``None`` where the leaf is a constant that the graph does not take.

    Raises:
        CaptureError: the graph mutates a buffer or an input.
    """
    exported = exported.run_decompositions(_TAKEN_APART)
    lifted = exported.graph_module
    root = torch.nn.Module()
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    leaves: list[str | None] = []
    specs = {spec.arg.name: spec for spec in exported.graph_signature.input_specs}
    for spec in exported.graph_signature.output_specs:
        if spec.kind not in (OutputKind.USER_OUTPUT, OutputKind.LOSS_OUTPUT):
            raise CaptureError(
                f"the model changes {spec.target or spec.arg} while it runs ({spec.kind.name})",
                hint="capture it in eval mode, or make the update an output",
            )
    for node in lifted.graph.nodes:
        spec = specs.get(node.name) if node.op == "placeholder" else None
        if spec is None or spec.kind is InputKind.USER_INPUT:
            if spec is not None:
                is_tensor = isinstance(node.meta.get("val"), torch.Tensor)
                leaves.append(node.name if is_tensor else None)
                if not is_tensor and not node.users:
                    continue
            copied = graph.node_copy(node, mapping.__getitem__)
        else:
            path = spec.target or f"constants.{node.name}"
            attach_attr(root, path, _tensor_of(exported, spec))
            copied = graph.get_attr(path)
        copied.name = node.name
        copied.meta = dict(node.meta)
        mapping[node] = copied
    graph.set_codegen(fx.graph.CodeGen())
    simplify(graph)
    return fx.GraphModule(root, graph), leaves  # takes over only the weights that are read


def _tensor_of(exported: torch.export.ExportedProgram, spec: Any) -> torch.Tensor:
    if spec.kind is InputKind.PARAMETER:
        return exported.state_dict[spec.target]
    if spec.kind is InputKind.BUFFER and spec.target in exported.state_dict:
        return exported.state_dict[spec.target]
    return exported.constants[spec.target]


def simplify(graph: fx.Graph) -> None:
    """Bring ``graph`` into canonical form, in place. Values are unchanged, bit for bit."""
    for node in list(graph.nodes):
        if node.op == "call_function":
            rule = _RULES.get(node.target)
            if rule is not None:
                rule(graph, node)
            elif getattr(node.target, "_name", None) in families.GROUPED_PRODUCTS:
                node.target = torch.ops.vlmopt.grouped_mm.default
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    graph.lint()


def _erase(graph: fx.Graph, node: fx.Node) -> None:
    graph.erase_node(node)


def _drop_empty_operands(graph: fx.Graph, node: fx.Node) -> None:
    """``cat([empty, x])`` is how a cache layer starts: x."""
    parts: Any = node.args[0]
    # a number of rows that depends on data may turn out to be anything
    operands = [v for v in parts if not statically_known_true(v.meta["val"].numel() == 0)]
    if len(operands) != 1:
        return
    only, like = operands[0], node.meta["val"]
    if only.meta["val"].dtype != like.dtype:  # the empty one decided the type
        with graph.inserting_before(node):
            cast = graph.call_function(aten._to_copy.default, (only,), {"dtype": like.dtype})
        cast.meta = dict(node.meta)
        only = cast
    node.replace_all_uses_with(only)
    graph.erase_node(node)


def _dense_masked_update(graph: fx.Graph, node: fx.Node) -> None:
    """``x[mask] = x[mask] + rows`` becomes ``x + (zeros with rows at mask)``.

    The packed form has one row per True of the whole batch: its length is only known at run time,
    and a token axis cannot be followed through it.
    """
    arguments = cast("tuple[Any, ...]", node.args)
    base, indices, values = arguments[:3]
    accumulate = arguments[3] if len(arguments) > 3 else False
    if accumulate or len(indices) != 1 or indices[0] is None:
        return
    mask = indices[0]
    if mask.meta["val"].dtype != torch.bool or values.target is not aten.add.Tensor:
        return
    read: list[Any] = [
        a for a in values.args if isinstance(a, fx.Node) and a.target is aten.index.Tensor
    ]
    if len(read) != 1 or values.kwargs:
        return
    source, source_indices = read[0].args[:2]
    same = _origin(source) is _origin(base) and len(source_indices) == 1
    if not same or source_indices[0] is not mask:
        return
    rows = values.args[1] if values.args[0] is read[0] else values.args[0]
    like = node.meta["val"]
    with graph.inserting_before(node), like.fake_mode:
        # zeros come from the mask, not from base: they must not look like a function of the stream
        column = graph.call_function(aten.unsqueeze.default, (mask, -1))
        spread = graph.call_function(aten.expand.default, (column, [-1, -1, like.shape[-1]]))
        zeros = graph.call_function(aten.zeros_like.default, (spread,), {"dtype": like.dtype})
        dense = graph.call_function(aten.masked_scatter.default, (zeros, spread, rows))
        total = graph.call_function(aten.add.Tensor, (base, dense))
        column.meta = {**node.meta, "val": mask.meta["val"].unsqueeze(-1)}
        spread.meta = {**node.meta, "val": column.meta["val"].expand(-1, -1, like.shape[-1])}
        for made in (zeros, dense, total):
            made.meta = {**node.meta, "val": torch.empty_like(like)}
    node.replace_all_uses_with(total)
    graph.erase_node(node)


def _drop_void_squeeze(graph: fx.Graph, node: fx.Node) -> None:
    """Squeezing a dimension that is longer than one changes nothing; ONNX has no word for it."""
    source = cast("fx.Node", node.args[0])
    if source.meta["val"].ndim == node.meta["val"].ndim:
        node.replace_all_uses_with(source)
        graph.erase_node(node)


_EMPTY = (aten.new_empty.default, aten.empty.memory_format, aten.empty_like.default)


def _join_written_parts(graph: fx.Graph, node: fx.Node) -> None:
    """``x = empty(...); x[..., :n] = a; x[..., n:] = b`` is ``cat([a, b])``.

    The empty tensor has sizes of its own, in which a token axis cannot be told from others.
    """
    dim = _written(node)[0]
    if any(_is_write(user) and user.args[0] is node for user in node.users):
        return  # not the last part
    parts: list[tuple[int, Any, fx.Node]] = []
    base: Any = node
    while _is_write(base) and _written(base)[0] == dim:
        parts.append((*_written(base)[1:], base.args[1]))
        base = base.args[0]
    parts.sort(key=lambda part: part[0])
    size = node.meta["val"].shape[dim]
    ends = [start for start, _, _ in parts[1:]] + [size]
    if (
        base.target not in _EMPTY
        or parts[0][0] != 0
        or any(min(stop, size) != end for (_, stop, _), end in zip(parts, ends, strict=True))
    ):
        return
    with graph.inserting_before(node), node.meta["val"].fake_mode:
        values = [_copied(graph, part) for _, _, part in parts]
        whole = graph.call_function(aten.cat.default, (values, dim))
    whole.meta = dict(node.meta)
    node.replace_all_uses_with(whole)
    graph.erase_node(node)


def _is_write(node: fx.Node) -> bool:
    return node.target is aten.slice_scatter.default


def _written(node: fx.Node) -> tuple[int, int, Any]:
    """Dimension, start and end of what a ``slice_scatter`` writes; an end of -1 is no place."""
    args = [*node.args, *[None] * (6 - len(node.args))]
    dim = cast("int", args[2] or 0) % node.meta["val"].ndim
    start, end, step = args[3] or 0, args[4], args[5]
    end = 2**63 - 1 if end is None else end
    if not isinstance(start, int) or not isinstance(end, int) or start < 0 or step not in (None, 1):
        return dim, -1, -1
    return dim, start, end


def _copied(graph: fx.Graph, part: fx.Node) -> fx.Node:
    """What ``copy(target, value)`` gives, without the target."""
    if part.target is not aten.copy.default:
        return part
    value = cast("fx.Node", part.args[1])
    like, have = part.meta["val"], value.meta["val"]
    if have.ndim != like.ndim:
        return part
    if have.dtype != like.dtype:
        value = graph.call_function(aten._to_copy.default, (value,), {"dtype": like.dtype})
        value.meta = {**part.meta, "val": have.to(like.dtype)}
    sizes = [
        -1 if statically_known_true(old == new) else new
        for old, new in zip(have.shape, like.shape, strict=True)
    ]
    if all(size == -1 for size in sizes):
        return value
    spread = graph.call_function(aten.expand.default, (value, sizes))
    spread.meta = {**part.meta, "val": value.meta["val"].expand(sizes)}
    return spread


def _origin(value: Any) -> Any:
    while isinstance(value, fx.Node) and value.target in (aten.clone.default, aten.alias.default):
        value = value.args[0]
    return value


_RULES: dict[Any, Callable[[fx.Graph, fx.Node], None]] = {
    aten._assert_tensor_metadata.default: _erase,
    aten._assert_scalar.default: _erase,
    aten.sym_constrain_range_for_size.default: _erase,
    aten.sym_constrain_range.default: _erase,
    aten.cat.default: _drop_empty_operands,
    aten.index_put.default: _dense_masked_update,
    aten.slice_scatter.default: _join_written_parts,
    aten.squeeze.dim: _drop_void_squeeze,
}


_TAKEN_APART = {
    op: torch.export.default_decompositions()[op]
    for op in (aten.einsum.default, aten.repeat_interleave.self_int)
}
"""Composite operators whose parts are easier to follow than they are."""

SYMBOLIC_FUNCTIONS = frozenset(
    {
        operator.add,
        operator.sub,
        operator.mul,
        operator.floordiv,
        operator.mod,
        operator.neg,
        operator.eq,
        operator.ge,
        operator.le,
        operator.gt,
        operator.lt,
        operator.getitem,
        torch.sym_max,
        torch.sym_min,
        torch.sym_not,
    }
)
"""Targets that compute with sizes, not tensors; legal beside ATen operators."""
