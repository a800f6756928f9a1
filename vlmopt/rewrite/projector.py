"""The projector inside the language model: rows that were merged before it must go through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.token_axes import B, Dims, T, follow_tokens
from vlmopt.errors import PreconditionError, UnsupportedOperatorError
from vlmopt.program import Program, Role, Stage, attach_attr, fetch_attr
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.encoded import encoding_of


def projector_before(program: Program, entry: fx.Node) -> Projector | None:
    """The projector whose output a value holds as it is, if there is one; see ``find_projector``.

    Args:
        entry: what enters a layer of the language model.
    """
    ports = program["language_model"].find_inputs(Role.INPUTS_EMBEDS)
    if entry.op != "placeholder" or all(port.name != entry.name for port in ports):
        return None
    try:
        return find_projector(program)
    except PreconditionError:
        return None


class Projector:
    """A projector that makes one token of each row, as a function of rows and weights."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self.weights = [str(n.target) for n in stage.graph.find_nodes(op="get_attr")]

    def in_stage(self, stage: Stage, emit: Emitter) -> list[fx.Node]:
        """Its weights as nodes of another stage, which shares them, at the insertion point."""
        nodes = []
        for path in self.weights:
            name = f"projector.{path}"
            tensor = fetch_attr(self.stage.graph_module, path)
            attach_attr(stage.graph_module, name, tensor)
            source = next(
                node for node in self.stage.graph.find_nodes(op="get_attr") if node.target == path
            )
            node = emit.graph.get_attr(name)
            val = source.meta["val"]
            with emit.fake_mode:
                emit.adopt(node, torch.empty(val.shape, dtype=val.dtype))
            nodes.append(node)
        return nodes

    def __call__(self, rows: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """``[batch, rows, width]`` to ``[batch, rows, width of the language model]``."""
        values: dict[fx.Node, Any] = {}
        given = iter(weights)
        dtype = next((w.dtype for w in weights), rows.dtype)
        for node in self.stage.graph.nodes:
            if node.op == "placeholder":
                values[node] = rows.to(dtype)
            elif node.op == "get_attr":
                values[node] = next(given)
            elif node.op == "output":
                return values[node.args[0][0]]  # type: ignore[no-any-return]
            else:
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)
        raise AssertionError("a graph ends with its output")


def find_projector(program: Program) -> Projector:
    """The projector of a program.

    Raises:
        PreconditionError: it has none that makes one token of each row that enters it, so that
            rows could be put through it one by one.
    """
    facts = encoding_of(program)
    hint = "use a pass that reads the language model only"
    if facts["projector"] is None:
        raise PreconditionError(
            "this model has no projector that makes one token of each row of its own", hint=hint
        )
    stage = program["projector"]
    start = stage.placeholder(stage.inputs[0])
    val = start.meta["val"]
    if len(stage.inputs) != 1 or val.ndim != 3:
        raise PreconditionError("the projector takes more than rows of features", hint=hint)
    batch, tokens, width = (int(size) for size in val.shape)
    dims: Dims = ((B,) if batch != 1 else (1,), (T,), (width,))
    try:
        axes = follow_tokens(
            stage.graph, {start: dims}, tokens=tokens, batch=None if batch == 1 else batch
        )
    except UnsupportedOperatorError as error:
        raise PreconditionError(f"the projector mixes rows: {error}", hint=hint) from error
    out = stage.output_node(stage.outputs[0])
    if axes.dims.get(out, ())[:2] != dims[:2] or axes.frontier:
        raise PreconditionError("the projector mixes rows", node=out, hint=hint)
    return Projector(stage)


def directional_derivatives(
    project: Callable[[Tensor], Tensor], rows: Tensor, directions: Tensor
) -> Tensor:
    """How far each row's projection moves along some directions: norms of ``J(row) direction``.

    Args:
        rows: ``[batch, rows, width]``.
        directions: ``[directions, width]``.

    Returns:
        float32 ``[batch, rows]``, the mean over directions. Exact, by forward differentiation; one
        direction at a time, so that nothing of size directions times rows is held.
    """
    total = torch.zeros_like(rows[..., 0], dtype=torch.float32)
    for direction in directions:
        _, moved = torch.func.jvp(project, (rows,), (direction.expand_as(rows),))
        total = total + moved.float().norm(dim=-1)
    return total / len(directions)
