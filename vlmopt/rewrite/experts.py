"""Skipping pairs of token and expert: they sort last, and no product computes their rows."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, fx

import vlmopt.ops  # noqa: F401 - registers vlmopt::grouped_mm
from vlmopt.analysis.experts import CASTS, GROUPED_PRODUCTS, Dispatch, ExpertBlock
from vlmopt.errors import ExpertMismatchError
from vlmopt.graph.reach import is_weight, reached, sources
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Stage
from vlmopt.rewrite.emit import Emitter

aten = torch.ops.aten

_OPS = torch.ops.vlmopt
_COPIES = (aten.alias.default, aten.clone.default, aten.contiguous.default)
_PIECES = (aten.split.Tensor, aten.chunk.default, aten.slice.Tensor, aten.unsqueeze.default)
_LOOKS_UP = (aten.index.Tensor, aten.floor_divide.default, *GROUPED_PRODUCTS)

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
    scored: bool = False,
) -> fx.Node:
    """Compute only the pairs of a block that stay; the others weigh nothing.

    Args:
        stays: a pure function; it gets the weights in float32.
        values: further arguments of ``stays``, known before the block.
        scored: see :func:`judged_by`.
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
    first = min(*block.ids_users, *block.weights_users)
    emit = Emitter.of_pass(ctx, stage, first, prefix, match)
    if first < block.ids or first < block.weights:
        raise ExpertMismatchError("ids of experts are read before their weights", node=first)

    def skipped(judged: Tensor, weights: Tensor, ids: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        kept = stays(judged.float(), ids, *given)
        # no expert has this number: histograms leave it out, and rows behind all groups are not
        # computed
        nobody = torch.full_like(ids, block.experts)
        lighter = torch.where(kept, weights, torch.zeros_like(weights))
        return torch.where(kept, ids, nobody), lighter, kept

    with graph.inserting_before(first):
        given = judged_by(emit, block, scored), block.weights, block.ids, *values
        ids, weights, kept = emit.trace(skipped, *given, names=("ids", "weights", "kept"))
    for user in block.ids_users:
        user.replace_input_with(block.ids, ids)
    for user in block.weights_users:
        user.replace_input_with(block.weights, weights)
    if block.dispatch is Dispatch.GROUPED:  # a loop asks for no row of that number
        _leave_rows_out(emit, block)
    return cast("fx.Node", kept)


def judged_by(emit: Emitter, block: ExpertBlock, scored: bool) -> fx.Node:
    """What methods judge pairs by, ``[tokens, k]``: their weights.

    Args:
        scored: by what the router makes of all logits instead, before it renormalises anything.
    """
    if not scored:
        return block.weights
    given = block.router.logits, block.ids, block.router.score == "softmax"
    return cast("fx.Node", emit.trace(_scores, *given, names=("scores",)))


def _scores(logits: Tensor, ids: Tensor, soft: bool) -> Tensor:
    scores = logits.float().softmax(-1) if soft else logits.float().sigmoid()
    return scores.gather(-1, ids)


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
    result = summed(block)
    users = list(result.users)

    def replaced(result: Tensor, rows: Tensor, classes: Tensor) -> Tensor:
        instead = rows.to(result.dtype) if normed_input else torch.zeros_like(result)
        return torch.where((classes == kind).reshape(-1, 1), instead, result)

    with graph.inserting_before(result.next):
        emit = Emitter.of_pass(ctx, stage, block.weighted, prefix)
        given = result, block.rows, classes
        bypassed = emit.trace(replaced, *given, names=("bypassed",))
    for user in users:
        user.replace_input_with(result, bypassed)


def summed(block: ExpertBlock) -> fx.Node:
    """The sum over the experts of each token, ``[tokens, width]``."""
    if block.dispatch is Dispatch.LOOP:
        return block.weighted
    below = reached([block.weighted], lambda node: () if _sums(node) else node.users)
    for node in sorted(below):
        if _sums(node) and list(node.meta["val"].shape) == list(block.rows.meta["val"].shape):
            return node
    raise ExpertMismatchError("the experts' results are not summed up", node=block.weighted)


def _sums(node: fx.Node) -> bool:
    return node.target is aten.sum.dim_IntList


def _leave_rows_out(emit: Emitter, block: ExpertBlock) -> None:
    """Mark which of the sorted rows are computed, and put none of the others back."""
    graph, order, places = emit.graph, block.order, block.places
    assert order is not None, "rows are sorted"
    assert places is not None, "rows are sorted"
    (flat,) = block.ids_users
    ends = cast("fx.Node", block.products[0].args[2])
    start = max(order, places)
    counted = reached([ends], lambda node: [one for one in sources(node) if one > order])
    for node in sorted(counted, reverse=True):
        start.append(node)  # rows are known as soon as they are counted
    with graph.inserting_after(ends):
        computed = emit.call(_OPS.computed_rows.default, places, ends, name="computed")
    for user in [user for user in places.users if _enters(user, places)]:
        user.replace_input_with(places, computed)
    # what is looked up by expert, such as a bias
    for user in [user for user in order.users if user.target is aten.index.Tensor]:
        with graph.inserting_before(user):
            expert = emit.call(aten.index.Tensor, flat, [computed])
            inside = emit.call(aten.clamp.default, expert, None, block.experts - 1, name="inside")
        user.replace_input_with(order, inside)
    on_rows = reached([computed], lambda node: () if node is block.weighted else node.users)
    for node in sorted(on_rows - {computed}):
        if node.target not in _LOOKS_UP and not works_by_row(node):
            raise ExpertMismatchError("not all of an expert works row by row", node=node)
    for user in list(block.weighted.users):
        if user.target is not aten.index.Tensor or len(cast("Any", user.args[1])) != 1:
            raise ExpertMismatchError(
                "the results of experts are not put back in the order of tokens", node=user
            )
        given = block.weighted, cast("Any", user.args[1])[0], ends
        total = _sum_of(user, block.k)
        with graph.inserting_before(user):
            if total is None:
                found = emit.call(_OPS.restored_rows.default, *given, name="restored")
            else:
                found = emit.call(_OPS.summed_rows.default, *given, block.k, name="summed")
        (total or user).replace_all_uses_with(found)


def _sum_of(restored: fx.Node, k: int) -> fx.Node | None:
    """The sum over the rows of each token, if that is all that is done with them."""
    users = list(restored.users)
    if len(users) != 1 or users[0].target is not aten.view.default:
        return None
    rows, width = restored.meta["val"].shape
    total = next(iter(users[0].users))
    if list(users[0].meta["val"].shape) != [rows // k, k, width] or len(users[0].users) != 1:
        return None
    return total if total.target is aten.sum.dim_IntList and total.args[1:] == ([1],) else None


def _enters(user: fx.Node, places: fx.Node) -> bool:
    """Whether sorted rows are read by their places, and not where each row goes."""
    by_place = user.target is aten.index.Tensor and places in cast("Any", user.args[1])
    return by_place or user.target is aten.floor_divide.default


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
    result = squeezed(last)
    with graph.inserting_before(result.next):
        flat = emit.call(aten.view.default, block.ids, [-1], name="expert_of_row")
        ordered = emit.call(aten.sort.default, flat)
        order = emit.call(operator.getitem, ordered, 0, name="order")
        places = emit.call(operator.getitem, ordered, 1, name="places")
        token = emit.call(aten.floor_divide.default, places, block.k)
        rows = emit.call(aten.index.Tensor, block.rows, [token], name="rows")
        ends = emit.trace(_ends, order, block.experts, names=("ends",))
        known: dict[fx.Node, fx.Node] = {}
        known[squeezed(first)] = emit.call(
            _OPS.grouped_mm.default, rows, matrices(emit, first), ends
        )
        for node in between:
            given = [known.get(value, value) for value in node.all_input_nodes]
            mapping = dict(zip(node.all_input_nodes, given, strict=True))
            args: Any = fx.map_arg(node.args, mapping.__getitem__)
            if _looks_up_expert(node):
                args = (node.args[0], [order])
            kwargs: Any = node.kwargs
            known[node] = emit.call(node.target, *args, **kwargs)
        entering = known[operand(last)]
        product = emit.call(_OPS.grouped_mm.default, entering, matrices(emit, last), ends)
        nowhere = emit.call(aten.empty_like.default, places)
        numbers = emit.call(aten.arange.default, places.meta["val"].shape[0])
        back = emit.call(aten.index_put.default, nowhere, [places], numbers, name="back")
        restored = emit.call(aten.index.Tensor, product, [back], name="restored")
    result.replace_all_uses_with(restored)
    # skipped pairs are told apart before rows go back to their places
    return replace(
        block,
        dispatch=Dispatch.GROUPED,
        ids_users=(flat,),
        order=order,
        places=places,
        products=(known[squeezed(first)], product),
        weighted=product,
    )


def _ends(order: Tensor, experts: int) -> Tensor:
    counts = torch.histc(order.float(), bins=experts, min=0, max=experts - 1)
    return torch.cumsum(counts, dim=0, dtype=torch.int32)


def squeezed(product: fx.Node) -> fx.Node:
    """Rows of a product of one-row matrices."""
    user = next(iter(product.users))
    if len(product.users) != 1 or user.target not in (aten.squeeze.dim, aten.squeeze.dims):
        raise ExpertMismatchError("products of single rows are read as matrices", node=product)
    return user


def _side(product: fx.Node) -> int:
    """Which argument of a product holds the copied weights."""
    return 0 if cast("fx.Node", product.args[0]).target is aten.index.Tensor else 1


def operand(product: fx.Node) -> fx.Node:
    """The rows that a product takes."""
    value = cast("fx.Node", product.args[1 - _side(product)])
    if value.target is not aten.unsqueeze.default:
        raise ExpertMismatchError("products of single rows take matrices", node=product)
    return cast("fx.Node", value.args[0])


def matrices(emit: Emitter, product: fx.Node) -> fx.Node:
    """The weights of all experts, ``[experts, width, result width]``."""
    side = _side(product)
    stacked = cast("fx.Node", cast("fx.Node", product.args[side]).args[0])
    return emit.call(aten.transpose.int, stacked, -2, -1) if side == 0 else stacked


def _looks_up_expert(node: fx.Node) -> bool:
    return node.target is aten.index.Tensor and is_weight(cast("fx.Node", node.args[0]))


def _between(block: ExpertBlock) -> list[fx.Node]:
    """What happens to each row between the two products."""
    first, last = block.products
    start = squeezed(first)

    def inside(node: fx.Node) -> Any:
        return () if node is start or _looks_up_expert(node) else sources(node)

    found = [node for node in sorted(reached([operand(last)], inside)) if node is not start]
    computed = {start}
    for node in found:
        if is_weight(node) or _looks_up_expert(node):
            continue
        if not works_by_row(node) or not computed & set(node.all_input_nodes):
            raise ExpertMismatchError("not all of an expert works row by row", node=node)
        computed.add(node)
    return [node for node in found if node in computed or _looks_up_expert(node)]


def works_by_row(node: fx.Node) -> bool:
    """Whether each row of the result, and of each part of it, is made of that row alone."""
    if node.target in (operator.getitem, *CASTS, *_COPIES):
        return True
    if node.target in _PIECES:
        at = 2 if node.target in (aten.split.Tensor, aten.chunk.default) else 1
        dim: Any = node.args[at] if len(node.args) > at else node.kwargs.get("dim", 0)
        rank = cast("fx.Node", node.args[0]).meta["val"].ndim
        return bool(dim % (rank + (node.target is aten.unsqueeze.default)) != 0)
    return torch.Tag.pointwise in getattr(node.target, "tags", ())
