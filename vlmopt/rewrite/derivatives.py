"""Forward derivatives of operators that work on each row on its own, as operators again.

``torch.func.jvp`` under ``make_fx`` would know more operators, but its traces write in place, hold
products with tangents of weights that are all zero, and repeat each direction for every row.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.errors import PreconditionError

aten = torch.ops.aten

Rule = Callable[[Any, Any, Any], Any]
"""``(tangents of the arguments or None, arguments, keyword arguments) -> tangent``.

A tangent has one dimension more than its value, the first, for directions; and may be 1 long where
it is the same along a dimension of the value.
"""


def derivative_of(node: fx.Node) -> Rule:
    """The rule of an operator.

    Raises:
        PreconditionError: there is none.
    """
    rule = _RULES.get(node.target)
    if rule is None:
        raise PreconditionError(
            f"the derivative of {node.target}, an operator of the projector, is not known here",
            node=node,
            hint="use a pass that needs no derivative, for example divprune or score",
        )
    return rule


def is_linear(node: fx.Node, moving: Collection[fx.Node]) -> bool:
    """Whether the tangent of an operator does not depend on the values that move.

    Args:
        moving: values that have a tangent.
    """
    if node.target in _BILINEAR:
        first, second = (value in moving for value in node.args[:2])
        return not second if node.target is aten.div.Tensor else not (first and second)
    return node.target in _LINEAR


def _behind(dim: int, value: Tensor) -> int:
    """A dimension counted from the end, where one more in front does not matter."""
    return dim if dim < 0 else dim - value.ndim


# -- linear operators: the same is done to the tangent --------------------------------------------


def _linear(moved: Any, args: Any, kwargs: Any) -> Tensor:
    return torch.nn.functional.linear(moved[0], args[1])


def _matmul(moved: Any, args: Any, kwargs: Any) -> Tensor:
    return torch.matmul(moved[0], args[1])


def _addmm(moved: Any, args: Any, kwargs: Any) -> Tensor:
    return torch.matmul(moved[1], args[2])


def _same(moved: Any, args: Any, kwargs: Any) -> Tensor:
    return moved[0]  # type: ignore[no-any-return]


def _to(dtype_of: Callable[[Any, Any], torch.dtype]) -> Rule:
    return lambda moved, args, kwargs: moved[0].to(dtype_of(args, kwargs))


def _view(moved: Any, args: Any, kwargs: Any) -> Tensor:
    whole = moved[0].expand(-1, *args[0].shape)
    return whole.reshape(len(whole), *args[1])  # type: ignore[no-any-return]


def _permute(moved: Any, args: Any, kwargs: Any) -> Tensor:
    rank = args[0].ndim
    return moved[0].permute(0, *(dim % rank + 1 for dim in args[1]))  # type: ignore[no-any-return]


def _along(target: Any, at: int, default: int) -> Rule:
    """An operator that works along one dimension, its argument number ``at``."""

    def rule(moved: Any, args: Any, kwargs: Any) -> Any:
        given = [*args[1:at], kwargs.get("dim", default), *args[at + 1 :]]
        if len(args) > at:
            given[at - 1] = args[at]
        given[at - 1] = _behind(given[at - 1], args[0])
        return target(moved[0].expand(-1, *args[0].shape), *given)

    return rule


def _transpose(moved: Any, args: Any, kwargs: Any) -> Tensor:
    one, two = (_behind(dim, args[0]) for dim in args[1:3])
    return moved[0].transpose(one, two)  # type: ignore[no-any-return]


def _unsqueeze(moved: Any, args: Any, kwargs: Any) -> Tensor:
    dim = args[1] if args[1] < 0 else args[1] - args[0].ndim - 1
    return moved[0].unsqueeze(dim)  # type: ignore[no-any-return]


def _cat(moved: Any, args: Any, kwargs: Any) -> Tensor:
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    count = max(len(part) for part in moved[0] if part is not None)
    parts = [
        torch.zeros_like(value).expand(count, *value.shape)
        if part is None
        else part.expand(-1, *value.shape)
        for part, value in zip(moved[0], args[0], strict=True)
    ]
    return torch.cat(parts, _behind(dim, args[0][0]))


def _reduce(function: Callable[..., Tensor]) -> Rule:
    def rule(moved: Any, args: Any, kwargs: Any) -> Tensor:
        dims = [_behind(dim, args[0]) for dim in args[1]]
        keep = args[2] if len(args) > 2 else kwargs.get("keepdim", False)
        return function(moved[0].expand(-1, *args[0].shape), dims, keepdim=keep)

    return rule


def _sum(moved: Any, args: Any, kwargs: Any) -> Tensor:
    parts = _ranked(moved, args)
    scale = kwargs.get("alpha", 1)
    if parts[1] is not None and scale != 1:
        parts[1] = parts[1] * scale
    return _total(parts)


def _difference(moved: Any, args: Any, kwargs: Any) -> Tensor:
    first, second = _ranked(moved, args)
    return _total([first, None if second is None else -kwargs.get("alpha", 1) * second])


# -- others -----------------------------------------------------------------------------------


def _product(moved: Any, args: Any, kwargs: Any) -> Tensor:
    first, second = _ranked(moved, args)
    return _total(
        [
            None if first is None else first * args[1],
            None if second is None else second * args[0],
        ]
    )


def _quotient(moved: Any, args: Any, kwargs: Any) -> Tensor:
    first, second = _ranked(moved, args)
    return _total(
        [
            None if first is None else first / args[1],
            None if second is None else -second * args[0] / (args[1] * args[1]),
        ]
    )


def _total(parts: list[Tensor | None]) -> Tensor:
    first, second = parts
    if first is None or second is None:
        there = second if first is None else first
        assert there is not None, "one of the arguments moves"
        return there
    return first + second


def _ranked(moved: Any, args: Any) -> list[Tensor | None]:
    """Tangents of two values that broadcast, directions in front of all other dimensions."""
    rank = max(value.ndim for value in args[:2] if isinstance(value, Tensor))
    return [
        None
        if part is None
        else part.reshape(len(part), *[1] * (rank - value.ndim), *part.shape[1:])
        for part, value in zip(moved[:2], args[:2], strict=True)
    ]


def _precise(value: Tensor) -> Tensor:
    """At least in single precision."""
    return value if value.dtype is torch.float64 else value.float()


def _layer_norm(moved: Any, args: Any, kwargs: Any) -> Tensor:
    dims = [*range(-len(args[1]), 0)]
    value, weight = _precise(args[0]), args[2] if len(args) > 2 else None
    centred = value - value.mean(dims, keepdim=True)
    inverse = torch.rsqrt(centred.square().mean(dims, keepdim=True) + (args[4:] or [1e-5])[0])
    unit = centred * inverse
    turned = _precise(moved[0])
    turned = turned - turned.mean(dims, keepdim=True)
    turned = (turned - unit * (unit * turned).mean(dims, keepdim=True)) * inverse
    turned = turned.to(moved[0].dtype)
    return turned if weight is None else turned * weight


def _rms_norm(moved: Any, args: Any, kwargs: Any) -> Tensor:
    dims = [*range(-len(args[1]), 0)]
    value, weight = _precise(args[0]), args[2] if len(args) > 2 else None
    given = args[3] if len(args) > 3 else None
    least = torch.finfo(args[0].dtype).eps if given is None else given
    inverse = torch.rsqrt(value.square().mean(dims, keepdim=True) + least)
    unit = value * inverse
    turned = _precise(moved[0])
    turned = (turned - unit * (unit * turned).mean(dims, keepdim=True)) * inverse
    turned = turned.to(moved[0].dtype)
    return turned if weight is None else turned * weight


def _softmax(moved: Any, args: Any, kwargs: Any) -> Tensor:
    dim = _behind(args[1], args[0])
    share = torch.softmax(args[0], dim)
    turned = share * moved[0]
    return turned - share * turned.sum(dim, keepdim=True)


def _power(moved: Any, args: Any, kwargs: Any) -> Tensor:
    value, exponent = args[:2]
    return moved[0] * exponent * value ** (exponent - 1)  # type: ignore[no-any-return]


def _each(slope: Callable[..., Tensor]) -> Rule:
    """A function of each number: its slope there."""
    return lambda moved, args, kwargs: moved[0] * slope(*args, **kwargs)


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


_LINEAR: dict[Any, Rule] = {
    aten.linear.default: _linear,
    aten.matmul.default: _matmul,
    aten.mm.default: _matmul,
    aten.addmm.default: _addmm,
    aten.add.Tensor: _sum,
    aten.add.Scalar: _sum,
    aten.sub.Tensor: _difference,
    aten.neg.default: lambda moved, args, kwargs: -moved[0],
    aten.mean.dim: _reduce(torch.mean),
    aten.sum.dim_IntList: _reduce(torch.sum),
    aten.split.Tensor: _along(aten.split.Tensor, 2, 0),
    aten.split_with_sizes.default: _along(aten.split_with_sizes.default, 2, 0),
    aten.chunk.default: _along(aten.chunk.default, 2, 0),
    aten.slice.Tensor: _along(aten.slice.Tensor, 1, 0),
    aten.squeeze.dim: _along(aten.squeeze.dim, 1, 0),
    aten.cat.default: _cat,
    operator.getitem: lambda moved, args, kwargs: moved[0][args[1]],
    aten.permute.default: _permute,
    aten.transpose.int: _transpose,
    aten.unsqueeze.default: _unsqueeze,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.to.dtype: _to(lambda args, kwargs: args[1]),
    aten._to_copy.default: _to(lambda args, kwargs: kwargs.get("dtype") or args[0].dtype),
    aten.type_as.default: _to(lambda args, kwargs: args[1].dtype),
    aten.alias.default: _same,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.detach.default: _same,
    aten.dropout.default: _same,
}

_BILINEAR: dict[Any, Rule] = {
    aten.mul.Tensor: _product,
    aten.mul.Scalar: _product,
    aten.div.Tensor: _quotient,
}

_BENT: dict[Any, Rule] = {
    aten.layer_norm.default: _layer_norm,
    aten.rms_norm.default: _rms_norm,
    aten.pow.Tensor_Scalar: _power,
    aten.rsqrt.default: _each(lambda x: -0.5 * torch.rsqrt(x) / x),
    aten.gelu.default: _each(_gelu_slope),
    aten.silu.default: _each(_silu_slope),
    aten.relu.default: _each(lambda x: (x > 0).to(x.dtype)),
    aten.sigmoid.default: _each(lambda x: torch.sigmoid(x) * (1 - torch.sigmoid(x))),
    aten.tanh.default: _each(lambda x: 1 - torch.tanh(x).square()),
    aten.softmax.int: _softmax,
}

_RULES = {**_LINEAR, **_BILINEAR, **_BENT}
