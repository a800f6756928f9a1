"""A fixed number of pairs of token and expert: no other rows are in the graph at all.

Where the number of pairs that stay depends on values, shapes stay those of all pairs, and only a
kernel can leave rows out. Here the number is part of the graph: rows, products, what is between
them and weights are of that many pairs, on every target and with static shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, cast

import torch
from torch import Tensor, fx

import vlmopt.ops  # noqa: F401 - registers vlmopt::grouped_mm
from vlmopt.analysis.experts import CASTS, INSTEAD, Dispatch, ExpertBlock
from vlmopt.errors import ExpertMismatchError
from vlmopt.graph.reach import reached, sources
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.experts import (
    judged_by,
    matrices,
    operand,
    squeezed,
    summed,
    works_by_row,
)

aten = torch.ops.aten

Select = Callable[..., tuple[Tensor, Tensor]]
"""``(weights, ids, *values) -> (pairs, chosen)``: places in the flat ``[tokens * k]`` pairs, int64
``[count]``, none twice; and which of them are computed, bool ``[count]``: the others fill up."""


def best_pairs(score: Tensor, stays: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` pairs of highest score among those that stay, filled up with any others.

    Args:
        score: float32 ``[tokens, k]``; ties go to the earlier token, then to the earlier choice.
        stays: bool ``[tokens, k]``.
    """
    ranked = torch.where(stays, score, torch.full_like(score, float("-inf"))).reshape(-1)
    pairs = torch.sort(ranked, descending=True, stable=True).indices[:count]
    return pairs, stays.reshape(-1)[pairs]


def best_of_each(weights: Tensor, stays: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` pairs of highest weight of each token; those that do not stay fill up.

    Args:
        weights: float32 ``[tokens, chosen]``; ties go to the earlier choice.
        stays: bool ``[tokens, chosen]``.
    """
    tokens, chosen = weights.shape
    best = torch.sort(weights, dim=-1, descending=True, stable=True).indices[:, :k]
    first = torch.arange(tokens, device=weights.device) * chosen
    return (first[:, None] + best).reshape(-1), stays.gather(1, best).reshape(-1)


def compute_pairs(
    stage: Stage,
    block: ExpertBlock,
    select: Select,
    values: tuple[fx.Node, ...],
    ctx: PassContext,
    *,
    prefix: str,
    match: int,
    scored: bool = False,
) -> fx.Node:
    """Compute the pairs of a block that ``select`` chooses, always the same number of them.

    Args:
        select: a pure function; it gets the weights in float32.
        values: further arguments of ``select``, known before the block.
        scored: see :func:`~vlmopt.rewrite.experts.judged_by`.
        prefix: first part of the names of new nodes.
        match: number of this block among those rewritten, from 1.

    Returns:
        Which pairs are computed, bool ``[tokens, k]``.

    Raises:
        ExpertMismatchError: an expert does something that does not work row by row.
    """
    if block.dispatch is Dispatch.LOOP:
        raise ExpertMismatchError(
            "experts are called in a loop: the number of rows of each depends on data",
            node=block.weighted,
            hint=INSTEAD,
        )
    graph = stage.graph
    result = summed(block)
    by_choice = cast("fx.Node", result.args[0])
    tokens, width = block.rows.meta["val"].shape
    if list(by_choice.meta["val"].shape) != [tokens, block.k, width]:
        raise ExpertMismatchError("results are not summed up over choices", node=result)
    emit = Emitter.of_pass(ctx, stage, block.weighted, prefix, match)

    def dispatch(
        judged: Tensor, ids: Tensor, rows: Tensor, row_weights: Tensor, *given: Tensor
    ) -> tuple[Tensor, ...]:
        pairs, chosen = select(judged.float(), ids, *given)
        count = pairs.shape[0]
        flat = ids.reshape(-1)
        # no expert has this number: such rows sort last, behind all groups
        owner = torch.where(chosen, flat[pairs], torch.full_like(pairs, block.experts))
        order, places = torch.sort(owner, stable=True)
        pairs = pairs[places]
        experts = torch.arange(block.experts, device=ids.device)
        ends = (order[:, None] <= experts).sum(0).to(torch.int32)
        real = order < block.experts
        row = torch.arange(count, device=ids.device)
        nowhere = torch.full_like(flat, count)
        slots = nowhere.index_put((pairs,), torch.where(real, row, torch.full_like(row, count)))
        kept = (slots < count).view(ids.shape)
        taken = rows[torch.div(pairs, block.k, rounding_mode="floor")]
        inside = order.clamp(max=block.experts - 1)
        return taken, row_weights[pairs], inside, ends, slots, kept

    with graph.inserting_before(result):
        row_weights = _row_weights(block)
        taken, weights, order, ends, slots, kept = emit.trace(
            dispatch,
            *(judged_by(emit, block, scored), block.ids, block.rows, row_weights, *values),
            names=("rows", "weights", "order", "ends", "slots", "kept"),
        )
        new = _replaced(emit, block, row_weights, taken, weights, order)
        weighted = _on_rows(emit, block, new, ends)
        if weighted.meta["val"].dtype != by_choice.meta["val"].dtype:
            weighted = emit.call(aten._to_copy.default, weighted, dtype=by_choice.meta["val"].dtype)
        given = weighted, slots, ends, block.k
        total = emit.call(torch.ops.vlmopt.summed_rows.default, *given, name="summed")
    result.replace_all_uses_with(total)
    return cast("fx.Node", kept)


def _row_weights(block: ExpertBlock) -> fx.Node:
    """Weights with the router's factor, one for each pair, ``[tokens * k]``."""
    (node,) = block.weights_users
    while len(node.meta["val"].shape) != 1:
        (node,) = node.users
    return node


def _replaced(
    emit: Emitter,
    block: ExpertBlock,
    row_weights: fx.Node,
    rows: fx.Node,
    weights: fx.Node,
    order: fx.Node,
) -> dict[fx.Node, fx.Node]:
    """What an expert reads of all pairs, and the same of those that are computed."""
    if block.dispatch is Dispatch.BATCHED:
        entering = operand(block.products[0])
        old = entering.meta["val"].dtype
        if rows.meta["val"].dtype != old:
            rows = emit.call(aten._to_copy.default, rows, dtype=old)
        return {entering: rows, row_weights: weights, block.ids_users[0]: order}
    entering = cast("fx.Node", block.products[0].args[0])
    while entering.target in CASTS:
        entering = cast("fx.Node", entering.args[0])
    assert block.order is not None, "rows are sorted"
    weighing = [user for user in row_weights.users if user.target is aten.index.Tensor]
    return {entering: rows, block.order: order, **dict.fromkeys(weighing, weights)}


def _on_rows(
    emit: Emitter, block: ExpertBlock, new: dict[fx.Node, fx.Node], ends: fx.Node
) -> fx.Node:
    """All that an expert computes, once more, on other rows.

    Args:
        new: by value of all pairs, that of the rows.

    Returns:
        What ``block.weighted`` is of all pairs.
    """
    batched = block.dispatch is Dispatch.BATCHED
    products = {squeezed(one) if batched else one: one for one in block.products}

    def entering(node: fx.Node) -> fx.Node:
        return operand(products[node]) if batched else cast("fx.Node", products[node].args[0])

    def inside(node: fx.Node) -> Iterable[fx.Node]:
        if node in new:
            return ()
        return (entering(node),) if node in products else sources(node)

    known = dict(new)
    fixed: set[fx.Node] = set()
    for node in sorted(reached([block.weighted], inside)):
        inputs = node.all_input_nodes
        if node in known:
            continue
        if node in products:
            stacked = matrices(emit, products[node]) if batched else products[node].args[1]
            known[node] = emit.call(
                torch.ops.vlmopt.grouped_mm.default, known[entering(node)], stacked, ends
            )
        elif node.op == "get_attr" or (inputs and fixed.issuperset(inputs)):
            fixed.add(node)
        elif known.keys() & set(inputs) and (
            works_by_row(node)
            or (node.target is aten.index.Tensor and node.args[0] in fixed)  # a bias of each expert
        ):
            mapped: Any = [
                fx.map_arg(part, lambda value: known.get(value, value))
                for part in (node.args, node.kwargs)
            ]
            known[node] = emit.call(node.target, *mapped[0], **mapped[1])
        else:
            raise ExpertMismatchError("not all of an expert works row by row", node=node)
    return known[block.weighted]
