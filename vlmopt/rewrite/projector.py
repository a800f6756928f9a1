"""The projector inside the language model: rows that were merged before it must go through it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.token_axes import B, Dims, T, follow_tokens
from vlmopt.errors import PreconditionError, UnsupportedOperatorError
from vlmopt.program import Program, Role, Stage, attach_attr, fetch_attr
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.encoded import encoding_of

aten = torch.ops.aten


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
    """A projector that makes one token of each row, as a function of rows.

    Attributes:
        weights: paths of its weights in its stage, in order; :meth:`with_weights` binds them.
    """

    def __init__(self, stage: Stage, given: Sequence[Tensor] = ()) -> None:
        self.stage = stage
        self.given = given
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

    def with_weights(self, weights: Sequence[Tensor]) -> Projector:
        """The same, with the values of :attr:`weights`."""
        return Projector(self.stage, weights)

    def __call__(self, rows: Tensor) -> Tensor:
        """``[batch, rows, width]`` to ``[batch, rows, width of the language model]``."""
        return self._run(rows)[0]

    def derivatives(self, rows: Tensor, directions: Tensor) -> Tensor:
        """How far projections move as rows move: norms of ``J(row) direction``.

        Exact, by forward differentiation; a few directions at a time, so that not all of them
        times all rows are held at once.

        Args:
            rows: ``[batch, rows, width]``.
            directions: ``[directions, width]``.

        Returns:
            float32 ``[batch, rows]``, the mean over directions.

        Raises:
            PreconditionError: the projector has an operator whose derivative is not known here.
        """
        total = torch.zeros_like(rows[..., 0], dtype=torch.float32)
        for some in directions.split(_AT_ONCE):
            start = some[:, None, None].to(rows.dtype).expand(-1, *rows.shape)
            _, moved = self._run(rows, start)
            total = total + moved.float().norm(dim=-1).sum(0)
        return total / len(directions)

    def _run(self, rows: Tensor, tangent: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Value and tangent of the result; a tangent has one dimension more, for directions."""
        values: dict[fx.Node, Any] = {}
        tangents: dict[fx.Node, Tensor] = {}
        given = iter(self.given)
        dtype = next((weight.dtype for weight in self.given), rows.dtype)
        for node in self.stage.graph.nodes:
            if node.op == "placeholder":
                values[node] = rows.to(dtype)
                if tangent is not None:
                    tangents[node] = tangent.to(dtype)
            elif node.op == "get_attr":
                values[node] = next(given)
            elif node.op == "output":
                (result,) = node.args[0]
                return values[result], tangents.get(result, values[result])
            else:
                args = fx.map_arg(node.args, values.__getitem__)
                kwargs = fx.map_arg(node.kwargs, values.__getitem__)
                values[node] = node.target(*args, **kwargs)
                if tangents.keys() & set(node.all_input_nodes):
                    moved = [tangents.get(x) if isinstance(x, fx.Node) else None for x in node.args]
                    tangents[node] = _derivative(node)(moved, args, kwargs)
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


_AT_ONCE = 8
"""Directions of which derivatives are held at a time."""


def _derivative(node: fx.Node) -> Callable[..., Tensor]:
    rule = _RULES.get(node.target)
    if rule is None:
        raise PreconditionError(
            f"the derivative of {node.target}, an operator of the projector, is not known here",
            node=node,
            hint="use a pass that needs no derivative, for example divprune or score",
        )
    return rule


def _of_linear(moved: Any, args: Any, kwargs: Any) -> Tensor:
    return torch.nn.functional.linear(moved[0], args[1])


def _of_layer_norm(moved: Any, args: Any, kwargs: Any) -> Tensor:
    value, weight = args[0].float(), args[2] if len(args) > 2 else None
    centred = value - value.mean(-1, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(-1, keepdim=True) + (args[4:] or [1e-5])[0])
    unit = centred * inverse
    turned = moved[0].float() - moved[0].float().mean(-1, keepdim=True)
    turned = (turned - unit * (unit * turned).mean(-1, keepdim=True)) * inverse
    turned = turned.to(moved[0].dtype)
    return turned if weight is None else turned * weight


def _of_sum(moved: Any, args: Any, kwargs: Any) -> Tensor:
    first, second = moved[:2]
    if first is None or second is None:
        return second if first is None else first  # type: ignore[no-any-return]
    return first + second  # type: ignore[no-any-return]


def _of_product(moved: Any, args: Any, kwargs: Any) -> Tensor:
    parts = [m * other for m, other in zip(moved, reversed(args), strict=True) if m is not None]
    return parts[0] if len(parts) == 1 else parts[0] + parts[1]  # type: ignore[no-any-return]


def _of_each(slope: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def rule(moved: Any, args: Any, kwargs: Any) -> Tensor:
        return moved[0] * slope(*args, **kwargs)  # type: ignore[no-any-return]

    return rule


def _gelu_slope(x: Tensor, approximate: str = "none") -> Tensor:
    if approximate == "none":
        density = torch.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
        return 0.5 * (1 + torch.erf(x * 0.5**0.5)) + x * density
    inner = (2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)
    bent = torch.tanh(inner)
    slope = (2 / math.pi) ** 0.5 * (1 + 3 * 0.044715 * x * x)
    return 0.5 * (1 + bent) + 0.5 * x * (1 - bent * bent) * slope


def _silu_slope(x: Tensor) -> Tensor:
    share = torch.sigmoid(x)
    return share * (1 + x * (1 - share))


_SAME = {
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.dropout.default,
}

_RULES: dict[Any, Callable[..., Tensor]] = {
    aten.linear.default: _of_linear,
    aten.layer_norm.default: _of_layer_norm,
    aten.add.Tensor: _of_sum,
    aten.mul.Tensor: _of_product,
    aten.gelu.default: _of_each(_gelu_slope),
    aten.silu.default: _of_each(_silu_slope),
    aten.relu.default: _of_each(lambda x: (x > 0).to(x.dtype)),
    aten.sigmoid.default: _of_each(lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x))),
    aten.tanh.default: _of_each(lambda x: 1 - torch.tanh(x).square()),
    **dict.fromkeys(_SAME, lambda moved, args, kwargs: moved[0]),
}
"""``(tangents of the arguments or None, arguments, keyword arguments) -> tangent``."""
