"""Skipping pairs of token and expert: they sort last, and no product computes their rows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

import vlmopt.ops  # noqa: F401 - registers vlmopt::grouped_mm
from vlmopt.analysis.experts import Dispatch, ExpertBlock
from vlmopt.errors import ExpertMismatchError
from vlmopt.graph.reach import is_weight, reached, sources
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Stage
from vlmopt.rewrite.emit import Emitter

aten = torch.ops.aten

Stays = Callable[..., Tensor]
"""``(weights, ids, *values) -> bool [tokens, k]``: the pairs that are computed."""


def skip_pairs(
    stage: Stage,
    block: ExpertBlock,
    stays: Stays,
    values: tuple[fx.Node, ...],
    ctx: PassContext,
    *,
    prefix: str,
    match: int,
) -> fx.Node:
    """Compute only the pairs of a block that stay; the others weigh nothing.

    Args:
        stays: a pure function; it gets the weights in float32.
        values: further arguments of ``stays``, known before the block.
        prefix: first part of the names of new nodes.
        match: number of this block among those rewritten, from 1.

    Returns:
        Which pairs are computed, bool ``[tokens, k]``.

    Raises:
        ExpertMismatchError: the rows of the experts cannot be sorted.
    """
    if block.dispatch is Dispatch.BATCHED:
        block = sort_rows(stage, block, ctx, prefix=prefix, match=match)
    graph = stage.graph
    emit = Emitter.of_pass(ctx, stage, block.ids_user, prefix, match)
    first = min(block.ids_user, block.weights_user)
    if first < block.ids or first < block.weights:
        raise ExpertMismatchError("ids of experts are read before their weights", node=first)

    def skipped(weights: Tensor, ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        kept = stays(weights.float(), ids, *given)
        # no expert has this number: histograms leave it out, and rows behind all groups are not
        # computed
        nobody = torch.full_like(ids, block.experts)
        lighter = torch.where(kept, weights, torch.zeros_like(weights))
        return torch.where(kept, ids, nobody), lighter, kept

    with graph.inserting_before(first):
        given = block.weights, block.ids, *values
        ids, weights, kept = emit.trace(skipped, *given, names=("ids", "weights", "kept"))
    block.ids_user.replace_input_with(block.ids, ids)
    block.weights_user.replace_input_with(block.weights, weights)
    assert block.order is not None, "rows are sorted"
    _keep_in_bounds(emit, block, block.order)
    # what the kernel leaves in rows that it does not compute is no number: 0 * NaN is NaN
    later = list(block.weighted.users)
    with graph.inserting_after(block.weighted):
        end = graph.call_function(aten.alias.default, (block.weighted,))
    with graph.inserting_before(end):
        computed = emit.trace(
            _computed_rows, block.weighted, block.order, block.experts, names=("computed",)
        )
    graph.erase_node(end)
    for user in later:
        user.replace_input_with(block.weighted, computed)
    return cast("fx.Node", kept)


def bypass_experts(
    stage: Stage,
    block: ExpertBlock,
    classes: fx.Node,
    kind: int,
    ctx: PassContext,
    *,
    prefix: str,
    normed_input: bool,
) -> None:
    """Leave the routed experts of a block out for the tokens of one class.

    Args:
        classes: of all tokens, int64 ``[batch, tokens]``; ``kind``: the class.
        normed_input: their result is what the experts read, and not zero.
    """
    graph = stage.graph
    result = _summed(block)
    users = list(result.users)
    with graph.inserting_after(result):
        end = graph.call_function(aten.alias.default, (result,))

    def replaced(result: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        instead = rows.to(result.dtype) if normed_input else torch.zeros_like(result)
        return torch.where((classes == kind).reshape(-1, 1), instead, result)

    with graph.inserting_before(end):
        emit = Emitter.of_pass(ctx, stage, block.weighted, prefix)
        given = result, block.rows, classes
        bypassed = emit.trace(replaced, *given, names=("bypassed",))
    graph.erase_node(end)
    for user in users:
        user.replace_input_with(result, bypassed)


def _summed(block: ExpertBlock) -> fx.Node:
    """The sum over the experts of each token, ``[tokens, width]``."""
    below = reached([block.weighted], lambda node: () if _sums(node) else node.users)
    for node in sorted(below):
        if _sums(node) and list(node.meta["val"].shape) == list(block.rows.meta["val"].shape):
            return node
    raise ExpertMismatchError("the experts' results are not summed up", node=block.weighted)


def _sums(node: fx.Node) -> bool:
    return node.target is aten.sum.dim_IntList


def _computed_rows(rows: Tensor, order: Tensor, experts: int) -> Tensor:
    return torch.where((order < experts)[:, None], rows, torch.zeros_like(rows))


def _keep_in_bounds(emit: Emitter, block: ExpertBlock, order: fx.Node) -> None:
    """What is looked up by expert, such as a bias, is looked up for skipped pairs too."""
    looked_up = [user for user in order.users if user.target is aten.index.Tensor]
    if looked_up:
        with emit.graph.inserting_after(order):
            inside = emit.call(aten.clamp.default, order, None, block.experts - 1, name="inside")
        for user in looked_up:
            user.replace_input_with(order, inside)


def sort_rows(
    stage: Stage, block: ExpertBlock, ctx: PassContext, *, prefix: str, match: int
) -> ExpertBlock:
    """The products of a block that copies weights for each row, as grouped products.

    Returns:
        The block as it is now.

    Raises:
        ExpertMismatchError: between the products is something that does not work row by row.
    """
    graph = stage.graph
    first, last = block.products
    emit = Emitter.of_pass(ctx, stage, first, prefix, match)
    between = _between(block)
    result = _squeezed(last)
    with graph.inserting_before(result.next):
        flat = emit.call(aten.view.default, block.ids, [-1], name="expert_of_row")
        ordered = emit.call(aten.sort.default, flat)
        order = emit.call(operator.getitem, ordered, 0, name="order")
        places = emit.call(operator.getitem, ordered, 1, name="places")
        token = emit.call(aten.floor_divide.default, places, block.k)
        rows = emit.call(aten.index.Tensor, block.rows, [token], name="rows")
        ends = emit.trace(_ends, order, block.experts, names=("ends",))
        known: dict[fx.Node, fx.Node] = {}
        known[_squeezed(first)] = emit.call(
            torch.ops.vlmopt.grouped_mm.default, rows, _matrices(emit, first), ends
        )
        for node in between:
            given = [known.get(value, value) for value in node.all_input_nodes]
            mapping = dict(zip(node.all_input_nodes, given, strict=True))
            args: Any = fx.map_arg(node.args, mapping.__getitem__)
            if _looks_up_expert(node):
                args = (node.args[0], [order])
            kwargs: Any = node.kwargs
            known[node] = emit.call(node.target, *args, **kwargs)
        entering = known[_operand(last)]
        product = emit.call(
            torch.ops.vlmopt.grouped_mm.default, entering, _matrices(emit, last), ends
        )
        nowhere = emit.call(aten.empty_like.default, places)
        numbers = emit.call(aten.arange.default, places.meta["val"].shape[0])
        back = emit.call(aten.index_put.default, nowhere, [places], numbers, name="back")
        restored = emit.call(aten.index.Tensor, product, [back], name="restored")
    result.replace_all_uses_with(restored)
    # skipped pairs are told apart before rows go back to their places
    return replace(
        block,
        dispatch=Dispatch.GROUPED,
        ids_user=flat,
        order=order,
        products=(known[_squeezed(first)], product),
        weighted=product,
    )


def _ends(order: Tensor, experts: int) -> Tensor:
    counts = torch.histc(order.float(), bins=experts, min=0, max=experts - 1)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)


def _squeezed(product: fx.Node) -> fx.Node:
    """Rows of a product of one-row matrices."""
    user = next(iter(product.users))
    if len(product.users) != 1 or user.target not in (aten.squeeze.dim, aten.squeeze.dims):
        raise ExpertMismatchError("products of single rows are read as matrices", node=product)
    return user


def _side(product: fx.Node) -> int:
    """Which argument of a product holds the copied weights."""
    return 0 if cast("fx.Node", product.args[0]).target is aten.index.Tensor else 1


def _operand(product: fx.Node) -> fx.Node:
    """The rows that a product takes."""
    value = cast("fx.Node", product.args[1 - _side(product)])
    if value.target is not aten.unsqueeze.default:
        raise ExpertMismatchError("products of single rows take matrices", node=product)
    return cast("fx.Node", value.args[0])


def _matrices(emit: Emitter, product: fx.Node) -> fx.Node:
    """The weights of all experts, ``[experts, width, result width]``."""
    side = _side(product)
    stacked = cast("fx.Node", cast("fx.Node", product.args[side]).args[0])
    return emit.call(aten.transpose.int, stacked, -2, -1) if side == 0 else stacked


def _looks_up_expert(node: fx.Node) -> bool:
    return node.target is aten.index.Tensor and is_weight(cast("fx.Node", node.args[0]))


def _between(block: ExpertBlock) -> list[fx.Node]:
    """What happens to each row between the two products."""
    first, last = block.products
    start = _squeezed(first)

    def inside(node: fx.Node) -> Any:
        return () if node is start or _looks_up_expert(node) else sources(node)

    found = [node for node in sorted(reached([_operand(last)], inside)) if node is not start]
    computed = {start}
    for node in found:
        if is_weight(node) or _looks_up_expert(node):
            continue
        tags = getattr(node.target, "tags", ())
        by_row = torch.Tag.pointwise in tags or node.target in (
            operator.getitem,
            aten.split.Tensor,
            aten.chunk.default,
            aten.slice.Tensor,
        )
        if not by_row or not computed & set(node.all_input_nodes):
            raise ExpertMismatchError("not all of an expert works row by row", node=node)
        computed.add(node)
    return [node for node in found if node in computed or _looks_up_expert(node)]
