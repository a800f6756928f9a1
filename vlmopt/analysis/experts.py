"""Analysis ``experts``: mixtures of experts, from the router to the weighted sum.

A block is found by what it computes, not by its name: scores of all experts for each token, the
best of them with their ids and weights, products with the weights of those experts, and a sum of
the results by those weights.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import torch
from torch import fx

import vlmopt.ops  # noqa: F401 - registers vlmopt::grouped_mm
from vlmopt.analysis.layers import layer_of
from vlmopt.errors import ExpertMismatchError
from vlmopt.graph.reach import is_weight, reached, sources
from vlmopt.program import Stage

aten = torch.ops.aten

GROUPED_PRODUCTS = (aten._grouped_mm.default, torch.ops.vlmopt.grouped_mm.default)

_SOFTMAX = (aten.softmax.int, aten._softmax.default)
_SORTS = (aten.sort.default, aten.sort.stable)
_PROJECTIONS = (aten.linear.default, aten.mm.default, aten.matmul.default, aten.addmm.default)
_VIEWS = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
)
CASTS = (aten._to_copy.default, aten.to.dtype, aten.type_as.default)
_SPREADS = (aten.scatter.src, aten.scatter.value)
_COMPARES = (aten.eq.Scalar, aten.one_hot.default)
INSTEAD = (
    "choose another implementation before capturing: model.set_experts_implementation('grouped_mm')"
)


class Dispatch(StrEnum):
    """How tokens reach their experts."""

    GROUPED = "grouped"
    """Rows sorted by expert, one grouped product for all."""
    BATCHED = "batched"
    """For each row a copy of the weights of its expert."""
    LOOP = "loop"
    """One expert after the other, each for the tokens that chose it."""


@dataclass(frozen=True)
class Router:
    """How experts are chosen.

    Attributes:
        logits: ``[tokens, experts]``, what the router's projection gives.
        score: ``softmax`` or ``sigmoid``, what makes weights of logits.
        corrected: experts are chosen by other scores than those that weigh them, as where a bias
            balances their load.
        limited: experts are chosen among the best groups of them.
        renormalised: the weights of the chosen sum to 1.
        scale: factor of the weights after that.
    """

    logits: fx.Node
    score: str
    corrected: bool
    limited: bool
    renormalised: bool
    scale: float


@dataclass(frozen=True)
class ExpertBlock:
    """One mixture of experts.

    Attributes:
        layer: of the stage.
        dispatch: form of what follows the router.
        router: how experts are chosen.
        experts, k: how many there are, and how many each token takes.
        stream: what the experts read, ``[batch, tokens, width]``; ``rows``: the same,
            ``[batch * tokens, width]``.
        ids, weights: of the chosen, int64 and float ``[batch * tokens, k]``, ``weights`` before
            the router's ``scale``.
        ids_users, weights_users: what reads them on the way to the experts: there they can be
            replaced.
        order, places: sorted ids and where each stood before, int64 ``[batch * tokens * k]``, where
            rows are sorted.
        products: products with the weights of experts, in order.
        weighted: results of the experts times weights, one row per token and chosen expert; of a
            loop, their sum for each token.
    """

    layer: int
    dispatch: Dispatch
    router: Router
    experts: int
    k: int
    stream: fx.Node
    rows: fx.Node
    ids: fx.Node
    weights: fx.Node
    ids_users: tuple[fx.Node, ...]
    weights_users: tuple[fx.Node, ...]
    order: fx.Node | None
    places: fx.Node | None
    products: tuple[fx.Node, ...]
    weighted: fx.Node


@dataclass(frozen=True)
class Experts:
    """What a stage has of mixtures of experts.

    Attributes:
        blocks: in order.
        misses: what routes tokens to experts and is built otherwise: why, with the node.
    """

    blocks: tuple[ExpertBlock, ...]
    misses: tuple[ExpertMismatchError, ...]


def find_experts(stage: Stage) -> Experts:
    """The mixtures of experts in the layers of a stage."""
    blocks, misses = [], []
    for chosen in stage.graph.find_nodes(op="call_function", target=aten.topk.default):
        logits = _logits(chosen)
        if logits is None or layer_of(chosen) is None:
            continue
        ids = _result(chosen, 1)
        if ids is None or not _calls_experts(ids, _shape(logits)[-1]):
            continue  # limits the choice to groups, or chooses something else
        try:
            blocks.append(_block(chosen, logits, ids))
        except ExpertMismatchError as miss:
            misses.append(miss)
    return Experts(tuple(blocks), tuple(misses))


# -- the router --------------------------------------------------------------------------------


def _logits(chosen: fx.Node) -> fx.Node | None:
    """The projection to as many values as ``chosen`` chooses among, if that is what it does."""
    experts = _shape(chosen.args[0])[-1]
    queue = [chosen.args[0]]
    for node in queue:
        if not isinstance(node, fx.Node) or node.op != "call_function":
            continue
        if node.target in _PROJECTIONS:
            fixed = any(map(is_weight, _untransposed(node.all_input_nodes)))
            return node if fixed and _shape(node)[-1] == experts else None
        queue.extend(value for value in node.all_input_nodes if value not in queue)
    return None


def _untransposed(values: Iterable[fx.Node]) -> Iterable[fx.Node]:
    for value in values:
        if value.target in (aten.t.default, aten.transpose.int, *CASTS):
            yield cast("fx.Node", value.args[0])
        yield value


def _calls_experts(ids: fx.Node, experts: int) -> bool:
    """Whether what is chosen steers products with stacked weights, as no other choice does."""
    steered = (*GROUPED_PRODUCTS, aten.bmm.default, aten.index_add.default)
    if any(node.target in steered for node in _computed_from(ids)):
        return True
    place = layer_of(ids)
    return any(user.target in _SPREADS for user in ids.users) and any(
        layer_of(node) == place and any(_is_stacked(value, experts) for value in node.args)
        for node in ids.graph.find_nodes(op="call_function", target=aten.bmm.default)
    )


def _router(chosen: fx.Node, logits: fx.Node, weights: fx.Node, scale: float) -> Router:
    def inside(node: fx.Node) -> Iterable[fx.Node]:
        return () if node is logits else sources(node)

    weighing = reached([weights], inside)
    if logits not in weighing:
        raise ExpertMismatchError(
            "the weights of experts do not come from the router", node=weights
        )
    choosing = reached([chosen], inside)
    after = {node for node in weighing if chosen in reached([node], inside)}
    # scores made of the chosen logits alone sum to 1 as they are
    soft = [node for node in weighing if node.target in _SOFTMAX]
    sigmoid = [node for node in weighing if node.target is aten.sigmoid.default]
    if not soft and not sigmoid:
        raise ExpertMismatchError(
            "the weights of experts are neither a softmax nor a sigmoid of the router's logits",
            node=weights,
        )
    divided = any(
        node.target is aten.div.Tensor
        and isinstance(node.args[1], fx.Node)
        and any(s.target is aten.sum.dim_IntList for s in reached([node.args[1]], inside))
        for node in weighing
    )
    return Router(
        logits,
        "softmax" if soft else "sigmoid",
        corrected=any(node.target is aten.gather.default for node in weighing)
        and any(node.target in (aten.add.Tensor, aten.sub.Tensor) for node in choosing),
        limited=sum(node.target is aten.topk.default for node in choosing) > 1,
        renormalised=divided or any(node in after for node in soft),
        scale=scale,
    )


def _unscaled(
    weights: fx.Node, readers: tuple[fx.Node, ...]
) -> tuple[fx.Node, tuple[fx.Node, ...], float]:
    """Weights before a factor that is the same for all, what reads them there, and the factor."""
    found, scale = (weights, readers), 1.0
    while set(weights.users) <= set(readers):
        factor = weights.args[1] if len(weights.args) > 1 else None
        scaled = weights.target is aten.mul.Tensor and isinstance(factor, (int, float))
        if not scaled and weights.target not in CASTS:
            break
        readers, weights = (weights,), cast("fx.Node", weights.args[0])
        if scaled:
            scale *= float(cast("float", factor))
            found = weights, readers
    return *found, scale


# -- dispatch ----------------------------------------------------------------------------------


def _block(chosen: fx.Node, logits: fx.Node, ids: fx.Node) -> ExpertBlock:
    experts = _shape(logits)[-1]
    if len(_shape(ids)) != 2:
        raise ExpertMismatchError(
            f"ids of experts have {len(_shape(ids))} dimensions, not tokens and choices", node=ids
        )
    flat = [user for user in ids.users if user.target in _VIEWS and len(_shape(user)) == 1]
    sorts = [user for view in flat for user in view.users if user.target in _SORTS]
    copies = [
        user
        for view in flat
        for user in view.users
        if user.target is aten.index.Tensor and _is_stacked(user.args[0], experts)
    ]
    if len(flat) == 1 and len(sorts) == 1:
        return _grouped(chosen, logits, ids, flat[0], sorts[0])
    if len(flat) == 1 and copies:
        return _batched(chosen, logits, ids, flat[0], copies)
    if any(user.target in _SPREADS for user in ids.users):
        raise ExpertMismatchError(
            f"all {experts} experts compute all tokens, whatever the router chooses",
            node=ids,
            hint="nothing can be skipped unless tokens are sent to their experts; choose another "
            "implementation of the experts before capturing, if the model has one",
        )
    indexed = (
        user.target is aten.index.Tensor and user.args[0] in flat
        for view in flat
        for user in view.users
    )
    if any(user.target is aten.where.self for user in ids.users) or any(indexed):
        raise ExpertMismatchError(
            "a pass has skipped some of these experts already",
            node=ids,
            hint="use one such pass",
        )
    compared = tuple(user for user in ids.users if user.target in _COMPARES)
    if compared:
        return _looped(chosen, logits, ids, compared)
    raise ExpertMismatchError(
        "it cannot be told how tokens reach their experts", node=ids, hint=INSTEAD
    )


def _grouped(
    chosen: fx.Node, logits: fx.Node, ids: fx.Node, flat: fx.Node, sort: fx.Node
) -> ExpertBlock:
    experts, k = _shape(logits)[-1], _shape(ids)[-1]
    order, places = _result(sort, 0), _result(sort, 1)
    if order is None or places is None:
        raise ExpertMismatchError("rows are not put in the order of their experts", node=sort)
    ends = _ends(order, experts)
    products = tuple(
        node for node in ends.users if node.target in GROUPED_PRODUCTS and node.args[2] is ends
    )
    if len(products) < 2:
        raise ExpertMismatchError("experts are not two products of sorted rows", node=ends)
    for product in products:
        if _shape(product.args[1])[0] != experts:
            raise ExpertMismatchError(
                f"the router chooses among {experts} experts, and there are weights of "
                f"{_shape(product.args[1])[0]}",
                node=product,
            )
    taken = [user for user in places.users if user.target is aten.index.Tensor]
    weighing = [
        user for user in taken if len(_shape(user)) == 1 and user.meta["val"].is_floating_point()
    ]
    if len(weighing) != 1:
        raise ExpertMismatchError(
            "weights are not put in the order of their experts, so it cannot be told where the "
            "experts' results are weighed",
            node=places,
        )
    weighted = _weighted(weighing[0], products[-1])
    rows = _uncast(products[0].args[0])
    if rows.target is not aten.index.Tensor:
        raise ExpertMismatchError("experts do not read rows of tokens in their order", node=rows)
    return _finished(
        chosen,
        logits,
        Dispatch.GROUPED,
        (experts, k),
        cast("fx.Node", rows.args[0]),
        (ids, (flat,)),
        _by_token(cast("fx.Node", weighing[0].args[0])),
        (order, places),
        products,
        weighted,
    )


def _ends(order: fx.Node, experts: int) -> fx.Node:
    """Where the rows of each expert end, from their sorted ids."""
    counts = next(
        (
            node
            for value in (order, *(user for user in order.users if user.target in CASTS))
            for node in value.users
            if node.target is aten.histc.default
        ),
        None,
    )
    if counts is None:
        raise ExpertMismatchError("the rows of each expert are not counted (histc)", node=order)
    if counts.args[1:] != (experts, 0, experts - 1):
        raise ExpertMismatchError(
            f"rows are counted in {counts.args[1]} groups, and there are {experts} experts",
            node=counts,
        )
    for node in _computed_from(counts):
        if node.target is aten.cumsum.default:
            cast_totals = [user for user in node.users if user.target in CASTS]
            return cast_totals[0] if cast_totals else node
    raise ExpertMismatchError("where the rows of each expert end is not summed up", node=counts)


def _batched(
    chosen: fx.Node, logits: fx.Node, ids: fx.Node, flat: fx.Node, copies: list[fx.Node]
) -> ExpertBlock:
    experts, k = _shape(logits)[-1], _shape(ids)[-1]
    products = tuple(
        user for copy in copies for user in copy.users if user.target is aten.bmm.default
    )
    if len(products) < 2:
        raise ExpertMismatchError("experts are not two products of rows", node=copies[0])
    each = next(
        value for value in cast("tuple[fx.Node, ...]", products[0].args) if value not in copies
    )
    # rows before they are repeated for each choice
    rows = each
    while each.target in (aten.unsqueeze.default, aten.expand.default, *_VIEWS, *CASTS):
        each = cast("fx.Node", each.args[0])
        if _shape(each)[:-1] == _shape(ids)[:1]:
            rows = each
    weighted, weights = _weighing(products[-1])
    return _finished(
        chosen,
        logits,
        Dispatch.BATCHED,
        (experts, k),
        rows,
        (ids, (flat,)),
        _by_token(weights),
        (None, None),
        products,
        weighted,
    )


def _looped(
    chosen: fx.Node, logits: fx.Node, ids: fx.Node, compared: tuple[fx.Node, ...]
) -> ExpertBlock:
    experts, k = _shape(logits)[-1], _shape(ids)[-1]
    called = sorted(user.args[1] for user in compared)  # type: ignore[type-var]
    # no class of one_hot may be missing for pairs that no expert computes
    by_class = [user.target for user in compared] == [aten.one_hot.default] and called[0] > experts
    if not by_class and called != list(range(experts)):
        raise ExpertMismatchError(
            f"experts are called in a loop, but not each of {experts} once by its number",
            node=compared[0],
            hint=INSTEAD,
        )
    results = _computed_from(ids)
    sums = [node for node in results if node.target is aten.index_add.default]
    reads = [node for node in results if node.target is aten.index.Tensor]
    weighing = tuple(node for node in reads if _shape(node.args[0]) == _shape(ids))
    taking = [n for n in reads if n not in weighing and n.args[0] not in results]
    weights = {node.args[0] for node in weighing}
    rows = {cast("fx.Node", node.args[0]) for node in taking}
    if not sums or len(weights) != 1 or len(rows) != 1:
        raise ExpertMismatchError(
            "experts are called in a loop that does not take rows of tokens, weigh the results and "
            "add them up (index_add)",
            node=compared[0],
            hint=INSTEAD,
        )
    return _finished(
        chosen,
        logits,
        Dispatch.LOOP,
        (experts, k),
        rows.pop(),
        (ids, compared),
        (cast("fx.Node", weights.pop()), weighing),
        (None, None),
        tuple(node for node in results if node.target in _PROJECTIONS),
        sums[-1],
    )


def _weighing(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Where the results of the last product meet a number for each row, and those numbers."""
    results = _computed_from(product)
    for node in results:
        if node.target is not aten.mul.Tensor or len(_shape(node)) != 2:
            continue
        for value in node.all_input_nodes:
            while value.target in (aten.unsqueeze.default, *CASTS):
                value = cast("fx.Node", value.args[0])
            if value not in results and len(_shape(value)) == 1:
                return node, value
    raise ExpertMismatchError("the experts' results are not weighed", node=product)


def _weighted(weights: fx.Node, product: fx.Node) -> fx.Node:
    """Where ``weights`` meet the results of the last product."""
    results = _computed_from(product)
    stretched = [weights]
    for value in stretched:
        stretched += [u for u in value.users if u.target in (aten.unsqueeze.default, *CASTS)]
    for node in results:
        if node.target is aten.mul.Tensor and any(v in stretched for v in node.all_input_nodes):
            return node
    raise ExpertMismatchError(
        "the experts' results are not multiplied by the weights of their sorted rows", node=weights
    )


def _finished(
    chosen: fx.Node,
    logits: fx.Node,
    dispatch: Dispatch,
    counts: tuple[int, int],
    rows: fx.Node,
    ids: tuple[fx.Node, tuple[fx.Node, ...]],
    weights: tuple[fx.Node, tuple[fx.Node, ...]],
    sort: tuple[fx.Node | None, fx.Node | None],
    products: tuple[fx.Node, ...],
    weighted: fx.Node,
) -> ExpertBlock:
    if _shape(weights[0]) != _shape(ids[0]):
        raise ExpertMismatchError("weights are not those of the chosen experts", node=weights[0])
    unscaled, weights_users, scale = _unscaled(*weights)
    stream = rows
    while stream.target in _VIEWS and len(_shape(stream)) != 3:
        stream = cast("fx.Node", stream.args[0])
    if len(_shape(stream)) != 3:
        raise ExpertMismatchError("it cannot be told which tokens the rows are", node=rows)
    router = _router(chosen, logits, unscaled, scale)
    place = layer_of(chosen)
    assert place is not None, "chosen inside a layer"
    return ExpertBlock(
        place[1],
        dispatch,
        router,
        *counts,
        stream,
        rows,
        ids[0],
        unscaled,
        ids[1],
        weights_users,
        *sort,
        products,
        weighted,
    )


def _by_token(flat: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """Weights of each token, of which ``flat`` is made, and what reads them for that."""
    user = flat
    while user.target in (*_VIEWS, *CASTS) and len(_shape(user.args[0])) == 1:
        user = cast("fx.Node", user.args[0])
    if user.target not in _VIEWS:
        raise ExpertMismatchError("weights are not those of the chosen experts", node=flat)
    return cast("fx.Node", user.args[0]), (user,)


# -- pieces ------------------------------------------------------------------------------------


def _shape(value: Any) -> list[Any]:
    return list(value.meta["val"].shape)


def _computed_from(node: fx.Node) -> list[fx.Node]:
    """What is computed from a value in its layer, in order."""
    place = layer_of(node)
    found = reached([node], lambda one: [user for user in one.users if layer_of(user) == place])
    return sorted(found)


def _result(node: fx.Node, index: int) -> fx.Node | None:
    """One result of an operator that has several, if anything reads it."""
    return next(
        (
            user
            for user in node.users
            if user.target is operator.getitem and user.args[1] == index and user.users
        ),
        None,
    )


def _is_stacked(value: Any, experts: int) -> bool:
    """Whether a value holds a matrix for each expert."""
    while isinstance(value, fx.Node) and value.target in (aten.transpose.int, *CASTS):
        value = value.args[0]
    return (
        isinstance(value, fx.Node)
        and is_weight(value)
        and len(_shape(value)) == 3
        and _shape(value)[0] == experts
    )


def _uncast(value: Any) -> fx.Node:
    while value.target in CASTS:
        value = value.args[0]
    return cast("fx.Node", value)
