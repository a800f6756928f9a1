"""Frozen records of a program: what a diff needs, detached from graphs that passes then rewrite."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from vlmopt.analysis.cost import StageCost, stage_cost
from vlmopt.analysis.layers import layer_of
from vlmopt.graph.text import (
    argument_text,
    call_text,
    dtype_text,
    module_path,
    op_text,
    source_location,
    value_text,
)
from vlmopt.program import Cut, Port, Program, Stage


@dataclass(frozen=True, order=True)
class Provenance:
    """The place in a pipeline where a node was made: which pass, and which of its matches."""

    index: int
    match: int
    pass_name: str

    def __str__(self) -> str:
        return f"{self.pass_name} #{self.match}"


@dataclass(frozen=True)
class Ref:
    """An argument that is the value of another node."""

    name: str

    def __str__(self) -> str:
        return f"%{self.name}"


@dataclass(frozen=True)
class TypeRecord:
    """Type of one tensor; a symbolic size is its text."""

    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class NodeRecord:
    """One node.

    Attributes:
        kind: fx's ``op``: ``placeholder``, ``get_attr``, ``call_function`` or ``output``.
        target: full name of the operator or path of the weight; ``op`` is the short one.
        arguments: every leaf of the arguments in order, with where it stands (``arg 1[0]``).
        types: type of the value, or of each tensor of a tuple; empty when it is no tensor.
        call, type: the two columns of the node's line of text.
        layer: ``(container, index)`` of the repeated block that the node is in.
        made_by: the pass that made the node, if one did.
    """

    name: str
    kind: str
    op: str
    target: str
    arguments: tuple[tuple[str, Ref | int | str], ...]
    types: tuple[TypeRecord, ...]
    call: str
    type: str
    module: str = ""
    source: str | None = None
    layer: tuple[str, int] | None = None
    made_by: Provenance | None = None

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the nodes whose values this one reads."""
        return tuple(leaf.name for _, leaf in self.arguments if isinstance(leaf, Ref))

    @property
    def sizes(self) -> tuple[int | str, ...]:
        """All dimensions of all tensors of the value."""
        return tuple(size for type_ in self.types for size in type_.shape)


@dataclass(frozen=True)
class StageRecord:
    """One stage. ``outputs`` and ``inputs`` pair each port with the name of its node."""

    name: str
    nodes: Mapping[str, NodeRecord]
    inputs: tuple[tuple[Port, str], ...]
    outputs: tuple[tuple[Port, str], ...]
    cuts: tuple[Cut, ...]
    facts: Mapping[str, Any]
    cost: StageCost

    def calls(self) -> Iterator[NodeRecord]:
        """Nodes that compute, in order."""
        return (node for node in self.nodes.values() if node.kind == "call_function")


@dataclass(frozen=True)
class Snapshot:
    """A program at one moment."""

    stages: Mapping[str, StageRecord]
    model_type: str
    passes: tuple[str, ...] = field(default=())


def snapshot(program: Program) -> Snapshot:
    """Record a program, so that it can be compared with what passes make of it."""
    stages = {stage.name: _stage(stage) for stage in program}
    return Snapshot(stages, program.model_type, program.passes)


def _stage(stage: Stage) -> StageRecord:
    nodes = {node.name: _node(node) for node in stage.graph.nodes}
    values: Any = stage.graph.output_node().args[0]
    return StageRecord(
        stage.name,
        nodes,
        tuple((port, port.name) for port in stage.inputs),
        tuple((port, node.name) for port, node in zip(stage.outputs, values, strict=True)),
        stage.cuts,
        dict(stage.facts),
        stage_cost(stage),
    )


def _node(node: fx.Node) -> NodeRecord:
    arguments = [pair for i, value in enumerate(node.args) for pair in _leaves(f"arg {i}", value)]
    for key, value in node.kwargs.items():
        arguments += _leaves(key, value)
    value = node.meta.get("val")
    return NodeRecord(
        node.name,
        node.op,
        op_text(node),
        str(node.target),
        tuple(arguments),
        tuple(_types(value)),
        call_text(node),
        "" if node.op == "output" else value_text(value),
        module_path(node),
        source_location(node),
        layer_of(node),
        provenance(node),
    )


def provenance(node: fx.Node) -> Provenance | None:
    """Which pass made a node, as stamped by :meth:`vlmopt.pipeline.passes.PassContext.stamp`."""
    stamp = (node.meta.get("custom") or {}).get("vlmopt")
    if not stamp:
        return None
    return Provenance(int(stamp["index"]), int(stamp["match"]), str(stamp["pass"]))


def _leaves(where: str, value: Any) -> Iterator[tuple[str, Ref | int | str]]:
    if isinstance(value, fx.Node):
        yield where, Ref(value.name)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _leaves(f"{where}[{index}]", item)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield where, value
    else:
        yield where, argument_text(value)


def _types(value: Any) -> Iterator[TypeRecord]:
    if isinstance(value, torch.Tensor):
        sizes: tuple[Any, ...] = tuple(value.shape)
        shape = tuple(size if isinstance(size, int) else str(size) for size in sizes)
        yield TypeRecord(dtype_text(value.dtype), shape)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _types(item)
