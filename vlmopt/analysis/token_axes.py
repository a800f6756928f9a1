"""Analysis ``token_axes``: which dimensions of which values count tokens.

A dimension is a tuple of factors in memory order (``[batch * tokens, width]`` is ``((B, T),
(width,))``); a factor is an integer or a sympy expression in ``T``, the number of tokens, and
``B``, the batch. Facts start at a few values and flow forward through one rule per kind of
operator. Where an operator combines a value that has a token axis with one computed elsewhere,
the rule says which of its dimensions must be the same axis: that is the *frontier*.

Rows may be sorted on the way, as by mixtures of experts: the sorted axis is an axis of its own, and
values that hold row numbers are known by the dimension that they number. Reading rows by such
numbers changes their order and nothing else, so that a token stays with its rows.

An operator without a rule stops the analysis: guessing is how silent wrong answers are made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import sympy
import torch
from torch import fx

import vlmopt.ops  # noqa: F401 - registers vlmopt::grouped_mm
from vlmopt.errors import UnsupportedOperatorError
from vlmopt.graph import operators  # noqa: F401 - registers vlmopt::kept_tokens

aten = torch.ops.aten

T = sympy.Symbol("T", integer=True, positive=True)
"""number of tokens of the stream that is followed"""
B = sympy.Symbol("B", integer=True, positive=True)
"""batch"""
B1 = sympy.Symbol("B1", integer=True, positive=True)
"""a dimension of size one that broadcasts over the batch"""


class Sorted(sympy.Function):  # type: ignore[misc]
    """``Sorted(size, sort)``: an axis of ``size`` rows in the order of the operator ``sort``."""

    nargs = 2

    @classmethod
    def eval(cls, size: Any, _sort: Any) -> Any:
        """Where the size is known, a sorted axis is as long as any other."""
        return None if size.has(T, B) else size

    @property
    def sort(self) -> str:
        """Name of the operator that sorted."""
        return str(self.args[1])


Factor = Any  # int | sympy.Expr
Dim = tuple[Factor, ...]
Dims = tuple[Dim, ...]


def has_tokens(dim: Dim) -> bool:
    """Whether a dimension counts tokens."""
    return any(isinstance(factor, sympy.Expr) and factor.has(T) for factor in dim)


def is_sorted(dim: Dim) -> bool:
    """Whether rows stand in an order of their own along a dimension."""
    return any(isinstance(factor, sympy.Expr) and factor.has(Sorted) for factor in dim)


def is_batch(dim: Dim) -> bool:
    """Whether a dimension is the batch, or broadcasts over it."""
    return dim in ((B,), (B1,))


def token_dims(dims: Dims) -> list[int]:
    """Positions of the dimensions that count tokens."""
    return [index for index, dim in enumerate(dims) if has_tokens(dim)]


@dataclass
class TokenAxes:
    """Result of the analysis.

    Attributes:
        tokens, batch: sizes of ``T`` and ``B`` as recorded in the graph (int or sympy); ``batch``
            is ``None`` when it is not followed (batch of one).
        dims: for every value with a token axis, its dimensions; for operators with several
            results, a list with ``None`` for results without one.
        ends: operators that take a value with a token axis and give one without.
        frontier: values computed outside that share a token axis, with their dimensions. These
            may have more leading dimensions than the value: then it broadcasts over the batch.
        special: tokens at the front that stay in their places, so that they may be read by place.
        numbers: for values that hold row numbers, the dimension that they number.
        fronts: for an axis that tokens share with others, ``T + 6``, how many of the others stand
            before them; ``None`` where it is not the same everywhere.
    """

    tokens: Factor
    batch: Factor | None
    dims: dict[fx.Node, Any] = field(default_factory=dict)
    ends: list[fx.Node] = field(default_factory=list)
    frontier: dict[fx.Node, Dims] = field(default_factory=dict)
    special: int = 0
    numbers: dict[fx.Node, Dim] = field(default_factory=dict)
    fronts: dict[Factor, int | None] = field(default_factory=dict)

    def size(self, dim: Dim) -> Factor:
        """How long an axis was when it was traced."""
        total: Factor = 1
        for factor in dim:
            total = total * factor
        if isinstance(total, sympy.Expr):
            substitutes = {T: self.tokens, B1: 1}
            if self.batch is not None:
                substitutes[B] = self.batch
            total = sympy.expand(total.subs(substitutes))
            if total.is_number:
                return int(total)
        return total

    def place(self, dim: Dim) -> tuple[int, int] | None:
        """Where the tokens begin and end along an axis, if that was known when it was traced."""
        front = 0 if dim == (T,) else self.fronts.get(dim[0]) if len(dim) == 1 else None
        if front is None or not isinstance(self.tokens, int):
            return None
        return front, front + self.tokens

    @property
    def region(self) -> list[fx.Node]:
        """Values with a token axis that are computed from the starting points, in order."""
        return list(self.dims)


def follow_tokens(
    graph: fx.Graph,
    starts: Mapping[fx.Node, Dims],
    *,
    tokens: Factor,
    batch: Factor | None,
    absorb: bool = True,
    stops: Collection[fx.Node] = (),
    special: int = 0,
) -> TokenAxes:
    """Follow token axes from ``starts`` (value -> its dimensions) to the end of ``graph``.

    Args:
        absorb: move the frontier up through views that only the region uses.
        stops: values at which the region ends; what uses them is not looked at.
        special: tokens at the front that stay in their places.

    Raises:
        UnsupportedOperatorError: a token axis reaches an operator that has no rule, or that mixes
            tokens by position.
    """
    axes = TokenAxes(tokens, batch, dict(starts), special=special)
    for node in graph.nodes:
        if node.op != "call_function" or node in starts:
            continue
        if any(value in axes.dims and value not in stops for value in node.all_input_nodes):
            dims = _Rule(axes, node).apply()
            if dims is not None:
                axes.dims[node] = dims
            else:
                axes.ends.append(node)
    for value in graph.output_node().all_input_nodes:
        if value not in stops and any(map(is_sorted, _dims_of(axes, value))):
            raise UnsupportedOperatorError(
                f"%{value.name} leaves the graph with its tokens in another order",
                node=value,
                hint="put them back in their places first, or report the model",
            )
    if absorb:
        _absorb_layout(axes, starts)
    order = {node: index for index, node in enumerate(graph.nodes)}
    axes.dims = dict(sorted(axes.dims.items(), key=lambda item: order[item[0]]))
    axes.frontier = dict(sorted(axes.frontier.items(), key=lambda item: order[item[0]]))
    return axes


def _dims_of(axes: TokenAxes, value: fx.Node) -> Dims:
    dims = axes.dims.get(value, ())
    return () if isinstance(dims, list) else dims


def _size(value: Any) -> Factor:
    """An int or sympy expression for a size recorded in metadata."""
    if isinstance(value, torch.SymInt):
        node = value.node
        return int(node.expr) if node.expr.is_number else node.expr
    return int(value)


def shape_of(node: fx.Node) -> list[Factor]:
    """Recorded sizes of a tensor value."""
    return [_size(size) for size in node.meta["val"].shape]


class _Rule:
    """Application of the rule of one operator to one node."""

    def __init__(self, axes: TokenAxes, node: fx.Node) -> None:
        self.axes = axes
        self.node = node

    # what rules use ---------------------------------------------------------------------------

    def refuse(self, why: str) -> UnsupportedOperatorError:
        return UnsupportedOperatorError(
            f"{self.node.target}: {why}",
            node=self.node,
            hint="cut after this operator (a later layer), or report the model",
        )

    def inside(self, value: Any) -> bool:
        return isinstance(value, fx.Node) and value in self.axes.dims

    def dims(self, value: fx.Node) -> Dims:
        known = self.axes.dims.get(value)
        if known is None:
            return tuple((size,) for size in shape_of(value))
        return known  # type: ignore[no-any-return]

    def demand(self, value: Any, dims: Dims) -> None:
        """``value`` must have these dimensions; noted when it comes from outside."""
        if self.inside(value):
            for have, want in zip(self.dims(value)[::-1], dims[::-1], strict=False):
                if has_tokens(want) and have != want and self._volume(have) != 1:
                    raise self.refuse(f"%{value.name} has tokens along other dimensions")
            return
        if not any(map(has_tokens, dims)):
            return
        if any(map(is_sorted, dims)):
            raise self.refuse(f"%{value.name} would have to be sorted as the tokens are")
        earlier = self.axes.frontier.get(value)
        if earlier is not None and _strip(earlier) != _strip(dims):
            raise self.refuse(f"%{value.name} is used with tokens along different dimensions")
        if earlier is None or len(dims) > len(earlier):
            self.axes.frontier[value] = dims

    def number(self, position: int, name: str, default: Any = None) -> Any:
        args = self.node.args
        return args[position] if len(args) > position else self.node.kwargs.get(name, default)

    def axis(self, value: fx.Node, dim: int) -> int:
        return dim % max(1, len(self.dims(value)))

    def _volume(self, dim: Dim) -> Factor:
        return self.axes.size(dim)

    def same_size(self, one: Any, two: Any) -> bool:
        return bool(sympy.simplify(sympy.sympify(one) - sympy.sympify(two)) == 0)

    # driver -----------------------------------------------------------------------------------

    def apply(self) -> Any:
        target = self.node.target
        rule = _RULES.get(target)
        if rule is None and torch.Tag.pointwise in getattr(target, "tags", ()):
            rule = _pointwise
        if rule is None:
            raise self.refuse("a token axis reaches this operator, which has no rule")
        result = rule(self)
        if isinstance(result, list):
            counted = any(part is not None and any(map(has_tokens, part)) for part in result)
            return result if counted else None
        if result is None or not any(map(has_tokens, result)):
            return None
        self._check(result)
        return result

    def _check(self, dims: Dims) -> None:
        """The facts must agree with the shapes that were recorded when the graph was traced."""
        shape = shape_of(self.node)
        sizes = [self._volume(dim) for dim in dims]
        if len(shape) != len(sizes) or not all(map(self.same_size, shape, sizes)):
            raise self.refuse(f"recorded shape {shape} disagrees with token axes {dims}")


def _strip(dims: Dims) -> Dims:
    """Dimensions without the leading ones that broadcasting adds."""
    start = next((i for i, dim in enumerate(dims) if dim not in ((1,), (B1,))), len(dims))
    return dims[start:]


# -- rules -------------------------------------------------------------------------------------

Rule = Callable[[_Rule], Any]
_RULES: dict[Any, Rule] = {}


def _rule(*targets: Any) -> Callable[[Rule], Rule]:
    def register(function: Rule) -> Rule:
        for target in targets:
            _RULES[target] = function
        return function

    return register


def _tensors(values: Iterable[Any]) -> list[fx.Node]:
    return [
        value
        for value in values
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
    ]


def _broadcast(rule: _Rule, values: list[fx.Node], rank: int) -> Dims:
    """Dimensions of values combined element by element; the ones from outside get demands."""
    result: list[Dim] = []
    for position in range(rank):
        labels: dict[Dim, None] = {}
        plain: Dim = (1,)
        for value in values:
            dims = rule.dims(value)
            index = position - (rank - len(dims))
            if index < 0:
                continue
            dim = dims[index]
            if has_tokens(dim) or is_batch(dim):
                labels[dim] = None
            elif rule._volume(dim) != 1:
                plain = dim
        tokens = [dim for dim in labels if has_tokens(dim)]
        if len(tokens) > 1:
            raise rule.refuse(f"combines different token axes: {tokens}")
        if (B,) in labels:
            labels.pop((B1,), None)
        result.append(tokens[0] if tokens else next(iter(labels), plain))
    for value in values:
        if rule.inside(value):
            continue
        shape = shape_of(value)
        lead = rank - len(shape)
        wanted: list[Dim] = [(B1,) if is_batch(dim) else (1,) for dim in result[:lead]]
        for dim, size in zip(result[lead:], shape, strict=True):
            if size == 1:
                wanted.append((B1,) if is_batch(dim) else (1,))
            else:
                wanted.append(dim if has_tokens(dim) or is_batch(dim) else (size,))
        rule.demand(value, tuple(wanted))
    return tuple(result)


@_rule(
    aten.copy.default,
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.__and__.Tensor,
    aten.__or__.Tensor,
)
def _pointwise(rule: _Rule) -> Dims:
    values = _tensors(rule.node.all_input_nodes)
    return _broadcast(rule, values, len(shape_of(rule.node)))


@_rule(
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.to.dtype,
    aten.type_as.default,
    aten._to_copy.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.dropout.default,
    aten._softmax.default,
    aten.softmax.int,
    aten._log_softmax.default,
    aten.log_softmax.int,
    aten._safe_softmax.default,
    aten._assert_tensor_metadata.default,
)
def _same(rule: _Rule) -> Dims | None:
    if rule.node.meta.get("val") is None:
        return None
    return rule.dims(rule.node.args[0])  # type: ignore[arg-type]


@_rule(aten.sym_size.int, aten._assert_async.msg)
def _no_tensor(rule: _Rule) -> None:
    """Sizes read off a value follow it by themselves."""


@_rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default)
def _view(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    factors = [factor for dim in source for factor in dim if factor not in (1, B1)]
    result: list[Dim] = []
    for size in shape_of(rule.node):
        dim: list[Factor] = []
        while not rule.same_size(rule._volume(tuple(dim)), size):
            if not factors:
                raise rule.refuse("cannot tell how the dimensions are regrouped")
            factor = factors.pop(0)
            missing = _quotient(size, rule._volume(tuple(dim)))
            if _quotient(missing, rule._volume((factor,))) is None:
                rest = _quotient(factor, missing) if isinstance(factor, int) else None
                if rest is None:
                    raise rule.refuse("splits a token axis")
                factors.insert(0, rest)
                factor = missing
            dim.append(factor)
        result.append(tuple(dim) or (1,))
    return tuple(result)


def _quotient(size: Factor | None, divisor: Factor) -> Factor | None:
    """``size / divisor`` when it is whole, else ``None``."""
    if size is None:
        return None
    ratio = sympy.cancel(sympy.sympify(size) / sympy.sympify(divisor))
    if sympy.fraction(ratio)[1] != 1:
        return None
    return int(ratio) if ratio.is_number else ratio


@_rule(aten.expand.default)
def _expand(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    shape = shape_of(rule.node)
    lead = len(shape) - len(source)
    result: list[Dim] = [(size,) for size in shape[:lead]]
    for dim, size in zip(source, shape[lead:], strict=True):
        grows = rule._volume(dim) == 1 and size != 1
        if grows and dim == (B1,):
            result.append((B,))
        else:
            result.append((size,) if grows else dim)
    return tuple(result)


@_rule(torch.ops.vlmopt.kept_tokens.default)
def _kept_tokens(rule: _Rule) -> Dims:
    return rule.dims(rule.node.args[0])[:2]  # type: ignore[arg-type]


@_rule(aten.permute.default)
def _permute(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    return tuple(source[dim] for dim in rule.node.args[1])  # type: ignore[union-attr, index]


@_rule(aten.transpose.int)
def _transpose(rule: _Rule) -> Dims:
    source = list(rule.dims(rule.node.args[0]))  # type: ignore[arg-type]
    one, two = rule.node.args[1:3]
    source[one], source[two] = source[two], source[one]  # type: ignore[index]
    return tuple(source)


@_rule(aten.t.default, aten.numpy_T.default, aten.mT.default)
def _matrix_transpose(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    return (*source[:-2], *source[-2:][::-1])


@_rule(aten.unsqueeze.default)
def _unsqueeze(rule: _Rule) -> Dims:
    source = list(rule.dims(rule.node.args[0]))  # type: ignore[arg-type]
    source.insert(rule.number(1, "dim") % (len(source) + 1), (1,))
    return tuple(source)


@_rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def _squeeze(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    dims = rule.number(1, "dim")
    chosen = range(len(source)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(source) for dim in chosen if rule._volume(source[dim]) == 1}
    return tuple(dim for index, dim in enumerate(source) if index not in gone)


@_rule(aten.view_as_complex.default)
def _view_as_complex(rule: _Rule) -> Dims:
    return rule.dims(rule.node.args[0])[:-1]  # type: ignore[arg-type]


@_rule(aten.view_as_real.default)
def _view_as_real(rule: _Rule) -> Dims:
    return (*rule.dims(rule.node.args[0]), (2,))  # type: ignore[arg-type]


@_rule(aten.slice.Tensor)
def _slice(rule: _Rule) -> Dims:
    source = list(rule.dims(rule.node.args[0]))  # type: ignore[arg-type]
    dim = rule.axis(rule.node.args[0], rule.number(1, "dim", 0))  # type: ignore[arg-type]
    size = shape_of(rule.node)[dim]
    if not has_tokens(source[dim]):
        if not rule.same_size(rule._volume(source[dim]), size):
            source[dim] = (size,)
        return tuple(source)
    if rule.same_size(rule._volume(source[dim]), size):
        return tuple(source)
    if size == 1 and _is_last(rule, rule.number(2, "start"), source[dim]):
        source[dim] = (1,)
        return tuple(source)
    start, stop, step = (rule.number(at, name) for at, name in enumerate(_SLICE, start=2))
    place = rule.axes.place(source[dim])
    if place is not None and source[dim] != (T,) and step in (None, 1):
        start = start or 0
        if isinstance(start, int):
            first = start if start >= 0 else start + rule._volume(source[dim])
            source[dim] = _part(rule, place, first, first + size)
            return tuple(source)
    if source[dim] == (T,) and step in (None, 1):
        start, special = start or 0, rule.axes.special
        if isinstance(stop, int) and 0 <= start < stop <= special:
            source[dim] = (size,)
            return tuple(source)
        if 0 < start <= special and rule.same_size(rule._volume((T,)) - start, size):
            source[dim] = (T - start,)
            return tuple(source)
    raise rule.refuse("takes a part of the token axis by position")


_SLICE = ("start", "end", "step")


def _part(rule: _Rule, place: tuple[int, int], start: int, stop: int) -> Dim:
    """A run of an axis that tokens share with others: all of them, or none."""
    if (start, stop) == place:
        return (T,)
    if stop <= place[0] or start >= place[1]:
        return (stop - start,)
    raise rule.refuse("takes a part of the token axis by position")


def _is_last(rule: _Rule, index: Any, dim: Dim) -> bool:
    if is_sorted(dim):
        return False
    return index == -1 or (isinstance(index, int) and rule._volume(dim) == index + 1)


@_rule(aten.select.int)
def _select(rule: _Rule) -> Dims:
    source = list(rule.dims(rule.node.args[0]))  # type: ignore[arg-type]
    dim = rule.axis(rule.node.args[0], rule.node.args[1])  # type: ignore[arg-type]
    if has_tokens(source[dim]) and not _is_last(rule, rule.node.args[2], source[dim]):
        index: Any = rule.node.args[2]
        if source[dim] != (T,) or not 0 <= index < rule.axes.special:
            raise rule.refuse("takes one token by position")
    del source[dim]
    return tuple(source)


@_rule(
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.topk.default,
    aten.max.dim,
    aten.min.dim,
    aten.var_mean.correction,
)
def _several(rule: _Rule) -> list[Dims | None]:
    """Results with the source's dimensions except along one, which must not count tokens."""
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    target = rule.node.target
    if target in (aten.topk.default, aten.split.Tensor, aten.split_with_sizes.default):
        dim = rule.number(2, "dim", -1 if target is aten.topk.default else 0)
    elif target is aten.chunk.default:
        dim = rule.number(2, "dim", 0)
    elif target is aten.sort.stable:
        dim = rule.number(2, "dim", -1)
    elif target is aten.unbind.int:
        dim = rule.number(1, "dim", 0)
    else:
        dim = rule.number(1, "dim", -1)
    chosen = [dim] if isinstance(dim, int) else list(dim)
    if target is aten.split_with_sizes.default and has_tokens(source[dim]):
        place = rule.axes.place(source[dim])
        if place is not None:
            return _split_others_off(rule, source, dim % len(source), place)
    if any(has_tokens(source[d]) for d in chosen):
        raise rule.refuse("works along the token axis")
    results: list[Dims | None] = []
    for val in rule.node.meta["val"]:
        if val.ndim == len(source):
            sizes = [_size(size) for size in val.shape]
            results.append(
                tuple(
                    (size,) if d in [c % len(source) for c in chosen] else have
                    for d, (have, size) in enumerate(zip(source, sizes, strict=True))
                )
            )
        else:
            gone = {c % len(source) for c in chosen}
            results.append(tuple(have for d, have in enumerate(source) if d not in gone))
    return results


def _split_others_off(
    rule: _Rule, source: Dims, dim: int, place: tuple[int, int]
) -> list[Dims | None]:
    """Results of a split between tokens and others that share an axis with them."""
    results: list[Dims | None] = []
    start = 0
    for size in rule.node.args[1]:  # type: ignore[union-attr]
        part = _part(rule, place, start, start + int(size))  # type: ignore[arg-type]
        results.append((*source[:dim], part, *source[dim + 1 :]))
        start += int(size)  # type: ignore[arg-type]
    return results


def _getitem(rule: _Rule) -> Any:
    source, index = cast("tuple[fx.Node, int]", rule.node.args)
    numbered = rule.axes.numbers.get(source)
    if numbered is not None and index == 1:
        rule.axes.numbers[rule.node] = numbered
    return rule.axes.dims[source][index]


_RULES[operator.getitem] = _getitem


@_rule(aten.cat.default)
def _cat(rule: _Rule) -> Dims:
    values = list(rule.node.args[0])  # type: ignore[arg-type]
    rank = len(shape_of(rule.node))
    dim = rule.number(1, "dim", 0) % rank
    along = [rule.dims(value)[dim] for value in values]
    flat = [(*dims[:dim], *dims[dim + 1 :]) for dims in map(rule.dims, values)]
    result: list[Dim] = []
    for position in range(rank - 1):
        column = {dims[position] for dims in flat}
        labels = [d for d in column if has_tokens(d) or is_batch(d)]
        if sum(map(has_tokens, labels)) > 1:
            raise rule.refuse("joins different token axes")
        result.append(labels[0] if labels else flat[0][position])
    for value in values:
        if not rule.inside(value):
            rest = [*result[:dim], (shape_of(value)[dim],), *result[dim:]]
            rule.demand(value, tuple(rest))
    if any(map(has_tokens, along)):
        if any(len(d) > 1 and has_tokens(d) for d in along):
            raise rule.refuse("joins flattened token axes")
        total = sum((d[0] if len(d) == 1 else rule._volume(d)) for d in along)
        joined: Dim = (sympy.expand(total),)
        _note_front(rule, joined[0], along)
    else:
        joined = (shape_of(rule.node)[dim],)
    return (*result[:dim], joined, *result[dim:])


def _note_front(rule: _Rule, joined: Factor, along: list[Dim]) -> None:
    """Remember where the tokens stand along an axis that they share with others."""
    fronts = rule.axes.fronts
    tokens = [at for at, dim in enumerate(along) if has_tokens(dim)]
    front: int | None = None
    if len(tokens) == 1 and along[tokens[0]] == (T,):
        before = [rule._volume(dim) for dim in along[: tokens[0]]]
        front = sum(before) if all(isinstance(size, int) for size in before) else None
    fronts[joined] = front if fronts.get(joined, front) == front else None


@_rule(aten.stack.default)
def _stack(rule: _Rule) -> Dims:
    values = list(rule.node.args[0])  # type: ignore[arg-type]
    rank = len(shape_of(rule.node))
    dim = rule.number(1, "dim", 0) % rank
    result = list(_broadcast(rule, values, rank - 1))
    result.insert(dim, (len(values),))
    return tuple(result)


@_rule(aten.linear.default)
def _linear(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    if has_tokens(source[-1]) or any(rule.inside(arg) for arg in rule.node.args[1:]):
        raise rule.refuse("mixes tokens with fixed weights")
    return (*source[:-1], (shape_of(rule.node)[-1],))


@_rule(aten.addmm.default)
def _addmm(rule: _Rule) -> Dims:
    _bias, one, two = rule.node.args[:3]
    return _contract(rule, one, two)  # type: ignore[arg-type]


@_rule(aten.matmul.default, aten.mm.default, aten.bmm.default)
def _matmul(rule: _Rule) -> Dims:
    return _contract(rule, *rule.node.args[:2])  # type: ignore[arg-type]


def _contract(rule: _Rule, one: fx.Node, two: fx.Node) -> Dims:
    left, right = rule.dims(one), rule.dims(two)
    if len(left) < 2 or len(right) < 2:
        raise rule.refuse("multiplies a vector")
    shared = {dim for dim in (left[-1], right[-2]) if has_tokens(dim)}
    if len(shared) > 1:
        raise rule.refuse(f"contracts different token axes: {shared}")
    if shared:
        (dim,) = shared
        rule.demand(one, (*left[:-1], dim))
        rule.demand(two, (*right[:-2], dim, right[-1]))
    rank = len(shape_of(rule.node))
    batch: list[Dim] = []
    for position in range(rank - 2):
        column = []
        for dims in (left, right):
            index = position - (rank - len(dims))
            if index >= 0:
                column.append(dims[index])
        labels = {d for d in column if has_tokens(d) or is_batch(d)} - (
            {(B1,)} if (B,) in column else set()
        )
        if sum(map(has_tokens, labels)) > 1:
            raise rule.refuse("combines different token axes")
        sized = [d for d in column if rule._volume(d) != 1]
        batch.append(next(iter(labels), (sized or column)[0]))
    return (*batch, left[-2], right[-1])


@_rule(aten.scaled_dot_product_attention.default)
def _attention(rule: _Rule) -> Dims:
    query, key, value = (rule.node.args[i] for i in range(3))
    q, k, v = (rule.dims(node) for node in (query, key, value))  # type: ignore[arg-type]
    keys = {dim for dim in (k[-2], v[-2]) if has_tokens(dim)}
    if len(keys) > 1 or any(has_tokens(dims[-1]) for dims in (q, k, v)):
        raise rule.refuse("keys and values count different tokens")
    if keys:
        (along,) = keys
        rule.demand(key, (*k[:-2], along, k[-1]))
        rule.demand(value, (*v[:-2], along, v[-1]))
    mask = rule.number(3, "attn_mask")
    if mask is not None:
        rank = len(shape_of(rule.node))
        lead = [
            next((dim for dim in column if is_batch(dim)), (1,))
            for column in zip(q[:-2], k[:-2], v[:-2], strict=True)
        ]
        full = (*lead, q[-2], next(iter(keys), k[-2]))
        shape = shape_of(mask)
        wanted: list[Dim] = []
        if len(shape) < rank:
            wanted = [(B1,) if is_batch(d) else (1,) for d in full[: rank - len(shape)]]
        for dim, size in zip(full[rank - len(shape) :], shape, strict=True):
            if size == 1:
                wanted.append((B1,) if is_batch(dim) else (1,))
            else:
                wanted.append(dim if has_tokens(dim) or is_batch(dim) else (size,))
        rule.demand(mask, tuple(wanted))
    return (*q[:-1], v[-1])


@_rule(
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
    aten.any.dim,
    aten.all.dim,
    aten.prod.dim_int,
    aten.var.correction,
    aten.var.dim,
    aten.logsumexp.default,
    aten.linalg_vector_norm.default,
    aten.argmax.default,
    aten.argmin.default,
)
def _reduce(rule: _Rule) -> Dims:
    """Pooling over tokens pools over those that are left."""
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    names: dict[Any, tuple[int, int]] = {
        aten.linalg_vector_norm.default: (2, 3),
        aten.var.dim: (1, 3),
    }
    at, keep_at = names.get(rule.node.target, (1, 2))
    dims = rule.number(at, "dim")
    keep = rule.number(keep_at, "keepdim", False)
    if rule.node.target is aten.var.correction:
        keep = rule.node.kwargs.get("keepdim", False)
    chosen = range(len(source)) if dims is None else [dims] if isinstance(dims, int) else dims
    gone = {dim % len(source) for dim in chosen} or set(range(len(source)))
    if rule.node.target in (aten.argmax.default, aten.argmin.default) and any(
        has_tokens(source[dim]) for dim in gone
    ):
        raise rule.refuse("returns the position of a token")
    if keep:
        return tuple((1,) if index in gone else dim for index, dim in enumerate(source))
    return tuple(dim for index, dim in enumerate(source) if index not in gone)


@_rule(aten.sum.default, aten.mean.default, aten.max.default, aten.min.default)
def _reduce_all(rule: _Rule) -> Dims:
    return ()


@_rule(aten.layer_norm.default, aten.rms_norm.default, aten._fused_rms_norm.default)
def _norm(rule: _Rule) -> Dims | list[Dims | None]:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    normalised = len(rule.node.args[1])  # type: ignore[arg-type]
    if any(map(has_tokens, source[-normalised:])):
        raise rule.refuse("normalises over tokens")
    if isinstance(rule.node.meta["val"], (tuple, list)):
        return [source, None]
    return source


@_rule(aten.argsort.default, aten.argsort.stable)
def _argsort(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    stable = rule.node.target is aten.argsort.stable
    dim: Any = rule.node.kwargs.get("dim", -1) if stable else rule.number(1, "dim", -1)
    return (_sorted_axis(rule, source),) if has_tokens(source[dim]) else source


@_rule(aten.sort.default, aten.sort.stable)
def _sort(rule: _Rule) -> list[Dims | None]:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    at = 2 if rule.node.target is aten.sort.stable else 1
    if not has_tokens(source[rule.number(at, "dim", -1)]):
        return _several(rule)
    return [(_sorted_axis(rule, source),)] * 2


def _sorted_axis(rule: _Rule, source: Dims) -> Dim:
    """The axis that all rows of all tokens stand along after this operator."""
    if len(source) != 1 or is_sorted(source[0]):
        raise rule.refuse("returns the position of a token")
    rule.axes.numbers[rule.node] = source[0]
    return _order_by(source[0], rule.node)


def _order_by(dim: Dim, sort: fx.Node) -> Dim:
    return (Sorted(sympy.prod(dim), sympy.Symbol(sort.name)),)


@_rule(aten.floor_divide.default)
def _floor_divide(rule: _Rule) -> Dims:
    value, by = rule.node.args
    numbered = rule.axes.numbers.get(value)  # type: ignore[arg-type]
    if numbered is not None and by == 1:
        rule.axes.numbers[rule.node] = numbered
    elif numbered is not None and len(numbered) > 1 and numbered[-1] == by:
        rule.axes.numbers[rule.node] = numbered[:-1]  # rows of a token: number of the token
    return _pointwise(rule)


@_rule(aten.index_put.default)
def _index_put(rule: _Rule) -> Dims:
    """``empty[numbers] = 0, 1, 2, ...``: where each row went."""
    base, indices, values = cast("tuple[fx.Node, Any, fx.Node]", rule.node.args[:3])
    numbers = cast("fx.Node", indices[0])
    along = rule.axes.numbers.get(numbers)
    if (
        len(indices) != 1
        or along is None
        or not _is_order(rule, numbers, along)
        or not rule.inside(base)
        or len(rule.dims(base)) != 1
        or not _counts_up(values)
        or rule.number(3, "accumulate", False)
    ):
        raise rule.refuse("writes tokens by position")
    rule.axes.numbers[rule.node] = rule.dims(numbers)[0]
    return (along,)


def _is_order(rule: _Rule, numbers: fx.Node, along: Dim) -> bool:
    """Whether ``numbers`` holds each row number of ``along`` once."""
    dims = rule.dims(numbers)
    factor = dims[0][0] if len(dims) == 1 and len(dims[0]) == 1 else None
    return isinstance(factor, Sorted) and bool(factor.args[0] == sympy.prod(along))


def _counts_up(value: fx.Node) -> bool:
    return value.target is aten.arange.default


@_rule(aten.histc.default)
def _histogram(rule: _Rule) -> Dims:
    """Counts the tokens that are left."""
    return ((rule.number(1, "bins", 100),),)


@_rule(aten._grouped_mm.default, torch.ops.vlmopt.grouped_mm.default)
def _grouped_product(rule: _Rule) -> Dims:
    """Every row meets the matrix of its expert: its group must be that of the sort."""
    rows, weights, ends = cast("tuple[fx.Node, ...]", rule.node.args[:3])
    have = rule.dims(rows)
    if rule.inside(weights) or len(have) != 2 or has_tokens(have[1]):
        raise rule.refuse("mixes tokens with fixed weights")
    factor = have[0][0]
    keys = _counted(ends, shape_of(weights)[0])
    if not isinstance(factor, Sorted) or not _is_sorted_by(keys, factor):
        raise rule.refuse("takes tokens in groups that are not those that they were sorted into")
    return (have[0], (shape_of(rule.node)[-1],))


def _counted(ends: fx.Node, groups: Any) -> fx.Node | None:
    """The values, from 0 to ``groups - 1``, of which ``ends`` has the running totals."""
    value = _uncast(ends)
    if value.target is not aten.cumsum.default or value.args[1] not in (0, -1):
        return None
    counts = _uncast(value.args[0])
    if counts.target is not aten.histc.default or counts.args[1:] != (groups, 0, groups - 1):
        return None
    return _uncast(counts.args[0])


def _is_sorted_by(keys: fx.Node | None, order: Sorted) -> bool:
    """Whether ``keys`` is what the rows of an axis were sorted by, before or after sorting."""
    if keys is None:
        return False
    if keys.target is operator.getitem and keys.args[1] == 0:
        return cast("fx.Node", keys.args[0]).name == order.sort
    return any(user.name == order.sort and user.args[0] is keys for user in keys.users)


def _uncast(value: Any) -> fx.Node:
    while value.target in (aten._to_copy.default, aten.to.dtype, aten.clone.default):
        value = value.args[0]
    return cast("fx.Node", value)


@_rule(aten.glu.default)
def _glu(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    axis = rule.number(1, "dim", -1) % len(source)
    if has_tokens(source[axis]):
        raise rule.refuse("works along the token axis")
    return (*source[:axis], (shape_of(rule.node)[axis],), *source[axis + 1 :])


@_rule(aten.index_select.default)
def _index_select(rule: _Rule) -> Dims:
    source, dim, index = rule.node.args[:3]
    axis = rule.axis(source, dim)  # type: ignore[arg-type]
    have = rule.dims(source)  # type: ignore[arg-type]
    if has_tokens(have[axis]) or rule.inside(index):
        raise rule.refuse("reads tokens by position")
    return (*have[:axis], (shape_of(rule.node)[axis],), *have[axis + 1 :])


@_rule(aten.cumsum.default, aten.cumprod.default, aten.flip.default, aten.roll.default)
def _ordered(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    dims = rule.number(2 if rule.node.target is aten.roll.default else 1, "dim")
    for dim in [dims] if isinstance(dims, int) else dims:
        if has_tokens(source[dim]):
            raise rule.refuse("depends on the place of each token among all")
    return source


@_rule(aten.embedding.default)
def _embedding(rule: _Rule) -> Dims:
    table, index = rule.node.args[:2]
    if rule.inside(table):
        raise rule.refuse("looks up tokens by position")
    return (*rule.dims(index), (shape_of(rule.node)[-1],))  # type: ignore[arg-type]


@_rule(aten.gather.default)
def _gather(rule: _Rule) -> Dims:
    source, dim, index = rule.node.args[:3]
    axis = rule.axis(source, dim)  # type: ignore[arg-type]
    have, at = rule.dims(source), rule.dims(index)  # type: ignore[arg-type]
    if has_tokens(have[axis]):
        raise rule.refuse("reads tokens by position")
    result = []
    for position in range(len(at)):
        column = {at[position]} | ({have[position]} if position != axis else set())
        labels = [d for d in column if has_tokens(d) or is_batch(d)]
        result.append(labels[0] if labels else at[position])
    others = [*result[:axis], have[axis], *result[axis + 1 :]]
    rule.demand(source, tuple(others))
    rule.demand(index, tuple(result))
    return tuple(result)


@_rule(aten.index.Tensor)
def _index(rule: _Rule) -> Dims:
    source, indices = cast("tuple[fx.Node, list[fx.Node | None]]", rule.node.args[:2])
    have = rule.dims(source)
    tensors = [index for index in indices if index is not None]
    if any(index.meta["val"].dtype == torch.bool for index in tensors):
        raise rule.refuse("chooses a number of rows that is known only at run time")
    positions = [at for at, index in enumerate(indices) if index is not None]
    counted = [at for at in positions if has_tokens(have[at])]
    if counted and (len(tensors) > 1 or rule.axes.numbers.get(tensors[0]) != have[counted[0]]):
        raise rule.refuse("reads tokens by position")
    if positions != list(range(positions[0], positions[-1] + 1)):
        raise rule.refuse("has indices that are not adjacent")
    rank = max(len(rule.dims(index)) for index in tensors)
    middle = _broadcast(rule, tensors, rank)
    return (*have[: positions[0]], *middle, *have[positions[-1] + 1 :])


@_rule(torch.ops.vlmopt.computed_rows.default)
def _computed_rows(rule: _Rule) -> Dims:
    places = cast("fx.Node", rule.node.args[0])
    numbered = rule.axes.numbers.get(places)
    if numbered is not None:
        rule.axes.numbers[rule.node] = numbered
    return rule.dims(places)


@_rule(torch.ops.vlmopt.restored_rows.default, torch.ops.vlmopt.summed_rows.default)
def _restored_rows(rule: _Rule) -> Dims:
    """Each row goes back to where it came from, or to the sum of its token."""
    rows, back = cast("tuple[fx.Node, ...]", rule.node.args[:2])
    have, (along,) = rule.dims(rows), rule.dims(back)
    if has_tokens(have[0]) and rule.axes.numbers.get(back) != have[0]:
        raise rule.refuse("reads tokens by position")
    if rule.node.target is torch.ops.vlmopt.summed_rows.default:
        if along[-1] != rule.node.args[3]:
            raise rule.refuse("sums up rows of different tokens")
        along = along[:-1]
    return (along, *have[1:])


@_rule(aten.slice_scatter.default, aten.select_scatter.default)
def _scatter_part(rule: _Rule) -> Dims:
    base, part = rule.node.args[:2]
    have = rule.dims(base)  # type: ignore[arg-type]
    at = 2
    dim = rule.number(at, "dim", 0) % len(have)
    if has_tokens(have[dim]):
        raise rule.refuse("writes tokens by position")
    piece = rule.dims(part)  # type: ignore[arg-type]
    if rule.node.target is aten.select_scatter.default:
        piece = (*piece[:dim], have[dim], *piece[dim:])
    merged = tuple(
        d if has_tokens(d) else (p if has_tokens(p) else d)
        for d, p in zip(have, piece, strict=True)
    )
    rule.demand(base, merged)
    whole = rule.node.target is aten.slice_scatter.default
    wanted = merged if whole else (*merged[:dim], *merged[dim + 1 :])
    if not rule.inside(part):
        sized = [
            (size,) if not (has_tokens(d) or is_batch(d)) else d
            for d, size in zip(wanted, shape_of(part), strict=True)  # type: ignore[arg-type]
        ]
        rule.demand(part, tuple(sized))
    return merged


@_rule(aten.scatter.value, aten.scatter.src)
def _scatter(rule: _Rule) -> Dims:
    """Each token writes into its own row."""
    base, dim, index, source = cast("tuple[fx.Node, int, fx.Node, Any]", rule.node.args[:4])
    axis = rule.axis(base, dim)
    values = [base, index, *([source] if rule.node.target is aten.scatter.src else [])]
    rows = list(map(rule.dims, values))
    if any(has_tokens(dims[axis]) for dims in rows):
        raise rule.refuse("writes tokens by position")
    result: list[Dim] = []
    for position, column in enumerate(zip(*rows, strict=True)):
        labels = {dim for dim in column if has_tokens(dim) or is_batch(dim)}
        if position != axis and len({rule._volume(dim) for dim in column}) > 1:
            raise rule.refuse("writes into the first rows only")
        if sum(map(has_tokens, labels)) > 1:
            raise rule.refuse("combines different token axes")
        result.append(next(iter(labels), column[0]))
    for value, dims in zip(values, rows, strict=True):
        rule.demand(value, (*result[:axis], dims[axis], *result[axis + 1 :]))
    return tuple(result)


@_rule(aten.repeat.default)
def _repeat(rule: _Rule) -> Dims:
    source = rule.dims(rule.node.args[0])  # type: ignore[arg-type]
    times = list(rule.node.args[1])  # type: ignore[arg-type]
    lead = len(times) - len(source)
    result: list[Dim] = [(count,) for count in times[:lead]]
    for dim, count in zip(source, times[lead:], strict=True):
        if count != 1 and has_tokens(dim):
            result.append((count, *dim))
        else:
            result.append(dim if count == 1 else (rule._volume(dim) * count,))
    return tuple(result)


@_rule(aten.constant_pad_nd.default, aten.pad.default)
def _pad(rule: _Rule) -> Dims:
    source = list(rule.dims(rule.node.args[0]))  # type: ignore[arg-type]
    amounts = list(rule.node.args[1])  # type: ignore[arg-type]
    shape = shape_of(rule.node)
    for pair in range(len(amounts) // 2):
        dim = len(source) - 1 - pair
        if amounts[2 * pair] or amounts[2 * pair + 1]:
            if has_tokens(source[dim]):
                raise rule.refuse("pads the token axis")
            source[dim] = (shape[dim],)
    return tuple(source)


@_rule(aten.cross_entropy_loss.default)
def _cross_entropy(rule: _Rule) -> Dims:
    logits, target = rule.node.args[:2]
    have = rule.dims(logits)  # type: ignore[arg-type]
    if len(have) != 2 or has_tokens(have[-1]):
        raise rule.refuse("expects logits [rows, classes]")
    rule.demand(target, (have[0],))
    rank = len(shape_of(rule.node))
    return (have[0],) * rank


# -- frontier ----------------------------------------------------------------------------------

_LAYOUT = {
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.clone.default,
    aten.contiguous.default,
    aten._to_copy.default,
    aten.to.dtype,
    aten.alias.default,
}


def _absorb_layout(axes: TokenAxes, starts: Mapping[fx.Node, Dims]) -> None:
    """Move the frontier up through views that only the region uses.

    Models reshape cos, sin and masks anew in every layer; reducing their common source needs one
    gather instead of one per layer. Views from before the starting points stay: what the method
    selects is not known there yet.
    """
    changed = True
    while changed:
        changed = False
        for node, wanted in list(axes.frontier.items()):
            if node.target not in _LAYOUT or len(wanted) != len(shape_of(node)):
                continue
            if any(node < start for start in starts):
                continue
            if not all(u in axes.dims or u in starts or u in axes.ends for u in node.users):
                continue
            source = node.args[0]
            if not isinstance(source, fx.Node) or source in axes.dims:
                continue
            guess = _source_dims(axes, node, source, wanted)
            earlier = axes.frontier.get(source)
            if guess is None or (earlier is not None and earlier != guess):
                continue
            del axes.frontier[node]
            axes.frontier[source] = guess
            axes.dims[node] = wanted
            changed = True


def _source_dims(axes: TokenAxes, node: fx.Node, source: fx.Node, wanted: Dims) -> Dims | None:
    """Dimensions of ``source`` from which the rule of ``node`` gives ``wanted``, if any."""
    choices: list[list[Dim]] = []
    wanted_tokens = list(dict.fromkeys(dim for dim in wanted if has_tokens(dim)))
    for size in shape_of(source):
        rule = _Rule(axes, node)
        options = [dim for dim in wanted_tokens if rule.same_size(rule._volume(dim), size)]
        if axes.batch is not None and size == axes.batch and (B,) in wanted:
            options.append((B,))
        if axes.batch is not None and size == 1:
            options.append((B1,))
        options.append((size,))
        choices.append(options)
    trials: list[list[Dim]] = [[]]
    for options in choices:
        trials = [[*trial, option] for trial in trials for option in options]
        if len(trials) > 64:
            return None
    close: Dims | None = None
    for trial in trials:
        attempt = TokenAxes(axes.tokens, axes.batch, {source: tuple(trial)}, special=axes.special)
        try:
            result = _Rule(attempt, node).apply()
        except UnsupportedOperatorError:
            continue
        if result == wanted:
            return tuple(trial)
        # a dimension over which samples broadcast must not be lost: a gather needs it
        lost = any(map(is_batch, wanted)) and not any(map(is_batch, trial))
        if close is None and not lost and result and _plain(result) == _plain(wanted):
            close = tuple(trial)
    return close


def _plain(dims: Dims) -> Dims:
    return tuple((1,) if dim == (B1,) else dim for dim in dims)
