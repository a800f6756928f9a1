"""Region rewrite: run everything after a cut on fewer tokens.

Given values whose token axis gets shorter, the rewrite gathers every frontier value with the
same indices, rewrites the sizes baked into shape arguments, and records all shapes anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import sympy
import torch
from torch import fx

from vlmopt.analysis.token_axes import (
    B1,
    B,
    Dims,
    Sorted,
    T,
    TokenAxes,
    has_tokens,
    is_batch,
    token_dims,
)
from vlmopt.errors import UnsupportedOperatorError
from vlmopt.rewrite.emit import Emitter, propagate

aten = torch.ops.aten

SIZE_ARGUMENTS = {
    aten.view.default: 1,
    aten._unsafe_view.default: 1,
    aten.reshape.default: 1,
    aten.expand.default: 1,
}
"""Operators that take the sizes of their result, and where."""


def shorten_region(
    axes: TokenAxes,
    emit: Emitter,
    *,
    starts: dict[fx.Node, fx.Node],
    length: int | fx.Node,
    frontier: dict[fx.Node, fx.Node],
) -> None:
    """Rewrite the region of ``axes`` in place for a token axis of ``length``.

    Args:
        axes: the analysis, on the graph as it was before anything was inserted.
        emit: inserter of the pass.
        starts: shorter value for each starting point; a point mapped to itself got shorter by
            itself (an input).
        length: new number of tokens, an int or a node holding one.
        frontier: shorter value for each frontier value.
    """
    graph = emit.graph
    region = set(axes.dims)
    replacements = {**starts, **frontier}
    known: dict[fx.Node, Dims] = {**axes.dims, **axes.frontier}
    known |= {replacements[node]: dims for node, dims in known.items() if node in replacements}
    for node in (*axes.dims, *axes.ends):
        if node in starts:
            continue
        for value in node.all_input_nodes:
            if replacements.get(value, value) is not value:
                node.replace_input_with(value, replacements[value])
        _rewrite_sizes(axes, emit, node, length, known)
    output = graph.output_node()
    for value, shorter in starts.items():
        if shorter is not value and value in output.all_input_nodes:
            output.replace_input_with(value, shorter)
    propagate(graph, (region | set(axes.ends)) - set(starts), emit.fake_mode)


def _rewrite_sizes(
    axes: TokenAxes,
    emit: Emitter,
    node: fx.Node,
    length: int | fx.Node,
    before: dict[fx.Node, Dims],
) -> None:
    if node.target in (aten.slice.Tensor, aten.select.int):
        source = before.get(node.args[0])  # type: ignore[arg-type]
        along = node.args[1] if len(node.args) > 1 else 0
        if source is not None and has_tokens(source[along]):  # type: ignore[index]
            dim = source[along]  # type: ignore[index]
            if dim != (T,) and node.target is aten.slice.Tensor and axes.place(dim) is not None:
                _move_part(axes, node, dim, length)
            else:
                _rewrite_part(node, axes.special)
        return
    if node.target is aten.split_with_sizes.default:
        source = before.get(node.args[0])  # type: ignore[arg-type]
        if source is not None and has_tokens(source[_split_dim(node)]):
            _rewrite_parts(axes, node, source[_split_dim(node)], length)
        return
    if node.target is aten.index_put.default and node in axes.dims:
        _rewrite_count(axes, emit, node, length)
        return
    position = SIZE_ARGUMENTS.get(cast("Any", node.target))
    if position is None or node not in axes.dims:
        return
    dims: Dims = axes.dims[node]
    sizes = list(node.args[position])  # type: ignore[arg-type]
    for index, dim in enumerate(dims):
        if has_tokens(dim) and sizes[index] != -1:
            with emit.graph.inserting_before(node):
                sizes[index] = _materialise(axes, emit, dim, length)
    node.update_arg(position, sizes)


def _rewrite_count(axes: TokenAxes, emit: Emitter, node: fx.Node, length: int | fx.Node) -> None:
    """The numbers ``0, 1, 2, ...`` that are written where sorted rows came from."""
    numbers = cast("fx.Node", node.args[2])
    with emit.graph.inserting_before(node):
        size = _materialise(axes, emit, axes.dims[node][0], length)
        fewer = emit.call(aten.arange.default, size, **numbers.kwargs, name="numbers")
    node.update_arg(2, fewer)


def _rewrite_part(node: fx.Node, special: int) -> None:
    """Ends that meant "the whole axis" must go on meaning it; "the last" stays the last.

    The ``special`` tokens at the front stay where they are.
    """
    if node.target is aten.select.int:
        if not 0 <= cast("int", node.args[2]) < special:
            node.update_arg(2, -1)
        return
    args = list(node.args) + [None] * (5 - len(node.args))
    start, end = args[2], args[3]
    if isinstance(end, int) and 0 <= end <= special:
        return
    if isinstance(end, int) and end >= 0:
        args[3] = 2**63 - 1
    if isinstance(start, int) and start > special:
        args[2] = -1
    if args[4] is None:
        args.pop()
    node.args = tuple(args)


def _move_part(axes: TokenAxes, node: fx.Node, dim: Any, length: int | fx.Node) -> None:
    """A slice of an axis that tokens share with others goes on meaning tokens, or these others."""
    place = axes.place(dim)
    assert place is not None
    if not isinstance(length, int):
        raise UnsupportedOperatorError(
            "tokens share an axis with others, and how many are left is not known",
            node=node,
            hint="capture with a static prompt length",
        )
    fewer = place[1] - place[0] - length
    args = list(node.args) + [None] * (4 - len(node.args))
    for at in (2, 3):
        bound = args[at]
        if isinstance(bound, int) and place[1] <= bound < 2**62:
            args[at] = bound - fewer
    node.args = tuple(args)


def _split_dim(node: fx.Node) -> int:
    given = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    return cast("int", given)


def _rewrite_parts(axes: TokenAxes, node: fx.Node, dim: Any, length: int | fx.Node) -> None:
    """Sizes of a split that parts tokens from others."""
    place = axes.place(dim)
    if place is None or not isinstance(length, int):
        raise UnsupportedOperatorError(
            "an axis is split that tokens share with others, and where they stand is not known",
            node=node,
            hint="capture with a static prompt length",
        )
    sizes: list[int] = []
    start = 0
    for size in cast("list[int]", node.args[1]):
        sizes.append(length if (start, start + size) == place else size)
        start += size
    node.update_arg(1, sizes)


def _materialise(axes: TokenAxes, emit: Emitter, dim: tuple[Any, ...], length: Any) -> Any:
    """The size of a dimension as an int, or as a node where the graph computes with sizes."""
    total: Any = 1
    for factor in dim:
        total = total * factor
    expression = sympy.expand(sympy.sympify(total).subs({B1: 1}))
    if axes.batch is not None:
        expression = expression.subs({B: axes.batch})
    if isinstance(length, int):
        expression = expression.subs({T: length})
        if expression.is_number:
            return int(expression)
        raise UnsupportedOperatorError(
            f"a size is {expression}, which is not known when the graph is rewritten",
            hint="capture with a static batch and prompt length",
        )
    expression = sympy.expand(expression.replace(Sorted, lambda size, _: size))
    slope = expression.coeff(T, 1)
    offset = expression.coeff(T, 0)
    if not (slope.is_number and offset.is_number):
        raise UnsupportedOperatorError(f"a size is {expression}, not a multiple of the tokens")
    result: Any = length
    if slope != 1:
        result = emit.call(operator.mul, result, int(slope))
    if offset != 0:
        result = emit.call(operator.add, result, int(offset))
    return result


def gather_tokens(
    emit: Emitter,
    value: fx.Node,
    dims: Dims,
    index: Callable[[Any], fx.Node] | tuple[int, ...],
    *,
    name: str,
) -> fx.Node:
    """``value`` with only the chosen tokens along each of its token axes.

    Args:
        dims: dimensions of ``value``, possibly with more leading ones over which it broadcasts.
        index: for the expression of a token axis (``T``, ``T + 1``, ...) the node that holds the
            chosen positions, int64 ``[batch, chosen]``. Or the positions themselves, the same in
            all samples: then slices are enough.

    Raises:
        UnsupportedOperatorError: it cannot be told which sample the tokens of ``value`` belong to.
    """
    flat = tuple(factor for dim in dims for factor in (dim if has_tokens(dim) else (dim,)))
    atoms = [factor if isinstance(factor, tuple) else (factor,) for factor in flat]
    along = token_dims(tuple(atoms))
    samples = [position for position, dim in enumerate(atoms) if is_batch(dim)]
    fixed = index if isinstance(index, tuple) else ()
    chosen = [index(atoms[at][0]) for at in along] if callable(index) else []
    batch = chosen[0].meta["val"].shape[0] if chosen else 1
    if batch != 1 and len(samples) != 1:
        raise UnsupportedOperatorError(
            f"%{value.name} has tokens but no batch dimension that they belong to",
            node=value,
            hint="run with a batch of one, or report the model",
        )
    lead = len(dims) - value.meta["val"].ndim
    groups = [len(dim) if has_tokens(dim) else 1 for dim in dims[lead:]]
    sizes: list[int | None] = [
        factor if isinstance(factor, int) else None
        for dim in dims[lead:]
        for factor in _factors(dim)
    ]
    batch_dim = samples[0] if batch != 1 else None
    if batch == 1:  # nothing to align: the index is the same for whatever broadcasts
        along = [position - lead for position in along]
        lead = 0

    def take(tensor: torch.Tensor, *indices: torch.Tensor) -> torch.Tensor:
        if lead:
            tensor = tensor[(None,) * lead]
        tensor = _split_axes(tensor, [1] * lead + groups, [*[None] * lead, *sizes], batch)
        for dim in along if fixed else ():
            tensor = take_fixed(tensor, fixed, dim)
        for dim, positions in zip(along, indices, strict=False):
            tensor = take_along(tensor, positions, dim, batch_dim)
        return _join_axes(tensor, [1] * lead + groups)

    result: fx.Node = emit.trace(take, value, *chosen, names=(name,))
    return result


_RUNS = 8
"""Slices that are still better than one gather."""


def take_fixed(tensor: torch.Tensor, positions: tuple[int, ...], dim: int) -> torch.Tensor:
    """``positions``, ascending, along ``dim``: by slices where a few will do."""
    runs = _even_runs(positions)
    if len(runs) > _RUNS:
        return tensor.index_select(dim, torch.tensor(positions, device=tensor.device))
    parts = [torch.ops.aten.slice(tensor, dim, start, stop, step) for start, stop, step in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _even_runs(positions: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """``(start, stop, step)`` of slices that list the positions, each as long as it can be."""
    runs: list[tuple[int, int, int]] = []
    at = 0
    while at < len(positions):
        end = at + 1
        step = positions[end] - positions[at] if end < len(positions) else 1
        while end < len(positions) and positions[end] - positions[end - 1] == step:
            end += 1
        if end - at == 2 and step != 1:  # two that have nothing to do with each other
            end, step = at + 1, 1
        runs.append((positions[at], positions[end - 1] + 1, step))
        at = end
    return runs


def take_along(
    tensor: torch.Tensor, positions: torch.Tensor, dim: int, batch_dim: int | None
) -> torch.Tensor:
    """Gather ``positions[b]`` along ``dim`` for each sample ``b``.

    Args:
        tensor: any shape; size one along ``batch_dim`` broadcasts.
        positions: int64 ``[batch, chosen]``; ``[1, chosen]`` when ``batch_dim`` is ``None``.
    """
    full = list(tensor.shape)
    view = [1] * tensor.ndim
    view[dim] = full[dim] = positions.shape[1]
    if batch_dim is not None:
        view[batch_dim] = full[batch_dim] = positions.shape[0]
        if tensor.shape[batch_dim] == 1:
            tensor = tensor.expand([full[i] if i == batch_dim else -1 for i in range(len(full))])
        if dim < batch_dim:
            positions = positions.t()
    return tensor.gather(dim, positions.reshape(view).expand(full))


def _factors(dim: tuple[Any, ...]) -> tuple[Any, ...]:
    return dim if has_tokens(dim) else (None,)


def _split_axes(
    tensor: torch.Tensor, groups: list[int], sizes: list[int | None], batch: Any
) -> torch.Tensor:
    """``[batch * tokens, ...]`` as ``[batch, tokens, ...]``, for each flattened dimension."""
    if all(group == 1 for group in groups):
        return tensor
    shape: list[Any] = []
    remaining = iter(sizes)
    for group, size in zip(groups, tensor.shape, strict=True):
        factors = [next(remaining) for _ in range(group)]
        if group == 1:
            shape.append(size)
        else:  # sympy factors are the batch (first) and the tokens
            shape.extend(
                factor if factor is not None else batch if at == 0 else -1
                for at, factor in enumerate(factors)
            )
    return tensor.reshape(shape)


def _join_axes(tensor: torch.Tensor, groups: list[int]) -> torch.Tensor:
    if all(group == 1 for group in groups):
        return tensor
    shape: list[Any] = []
    sizes = list(tensor.shape)
    for group in groups:
        total: Any = 1
        for size in sizes[:group]:
            total = total * size
        shape.append(total)
        del sizes[:group]
    return tensor.reshape(shape)
