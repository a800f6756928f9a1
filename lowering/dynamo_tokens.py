"""Where a graph of Dynamo's shows visual tokens, told by structure alone."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from vlmopt.analysis.layers import layer_of
from vlmopt.errors import PreconditionError
from vlmopt.graph import operators  # noqa: F401 - registers vlmopt::mark_tokens
from vlmopt.graph.reach import is_weight, reached, sources, users
from vlmopt.rewrite.emit import value_of

aten = torch.ops.aten
MARK = torch.ops.vlmopt.mark_tokens.default
KEPT = torch.ops.vlmopt.kept_tokens.default


@dataclass(frozen=True)
class VisualTokens:
    """Where a graph holds the embeddings of text and vision together.

    Attributes:
        anchor: the embeddings, ``[batch, tokens, width]``.
        masks: bool, which of them come from vision (any of the masks); ``[batch, tokens]``, or
            with a last dimension along which they are constant.
        counts: visual tokens of each sample, where the graph says so.
        total: visual tokens of all samples.
        enters_layers: the decoder's layers follow in the same graph.
    """

    anchor: fx.Node
    masks: tuple[fx.Node, ...]
    counts: tuple[Any, ...]
    total: Any
    enters_layers: bool

    @property
    def batch(self) -> Any:
        """Samples: a number, or a ``SymInt`` where Dynamo left it open."""
        return self.anchor.meta["val"].shape[0]

    @property
    def marked(self) -> bool:
        """The tokens were marked by :func:`vlmopt.annotate`."""
        return self.anchor.target is MARK


def may_hold_visual_tokens(gm: fx.GraphModule, *, marked: bool) -> bool:
    """A glance at a graph as Dynamo made it; most graphs are spared the tracing.

    Args:
        marked: only marked tokens count.
    """
    writers = _MARKERS if marked else (*_MARKERS, *_WRITERS)
    return any(
        any(writer in _target_name(node) for writer in writers)
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method")
    )


def may_choose_experts(gm: fx.GraphModule) -> bool:
    """A glance at a graph as Dynamo made it: routers take the best of their scores."""
    return any("topk" in _target_name(n) for n in gm.graph.nodes if n.op.startswith("call"))


def embeds_ids(stream: fx.Node) -> bool:
    """Whether a residual stream is made of ids of text alone: nothing else is fed in."""
    below = reached([stream], sources)
    return any(
        node.target is aten.embedding.default and is_weight(cast("fx.Node", node.args[0]))
        for node in below
    ) and not any(
        node.op == "placeholder" and not is_weight(node) and _is_floating(value_of(node))
        for node in below
    )


def _is_floating(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


_MARKERS = ("mark_tokens",)
_WRITERS = ("masked_scatter", "index_put", "setitem")


def _target_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", None) or str(node.target)


def find_visual_tokens(graph: fx.Graph) -> VisualTokens | None:
    """The marked tokens of a canonical graph, else those that features are written into.

    The last place that does not follow on the layers that it leads into: a decoder may go on to
    write features into its hidden states, an encoder may write into patches of its own.
    """
    for mark in graph.find_nodes(op="call_function", target=MARK):
        mask, counts = mark.args[1:]
        counts = tuple(value_of(count) for count in counts)
        return VisualTokens(mark, (mask,), counts, sum(counts), bool(_layers_after(mark)))
    writes = {node: write for node in graph.nodes if (write := _write_of(node)) is not None}
    outside: VisualTokens | None = None
    while writes:
        anchor = node = next(reversed(writes))
        masks, total = [], 0
        while node in writes:  # images, then videos, into the same embeddings
            mask, rows = writes.pop(node)
            masks.append(mask)
            total = total + rows
            node = _through_copies(node.args[0])
        after, before = _layers_after(anchor), _layers_before(anchor)
        found = VisualTokens(anchor, tuple(masks), (), total, bool(after))
        if after - before:
            return found
        if not before:
            outside = outside or found
    return outside


def _write_of(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """``(mask, number of rows)`` if ``node`` writes rows into ``[batch, tokens, width]``."""
    if node.target is aten.masked_scatter.default:
        base, mask, source = node.args
    elif node.target is aten.index_put.default and len(node.args[1]) == 1:  # type: ignore[arg-type]
        base, (mask,), source = cast("Any", node.args[:3])
    else:
        return None
    if not all(isinstance(value, fx.Node) for value in (base, mask, source)):
        return None
    if _through_copies(base).target is aten.zeros_like.default:
        return None  # features to be added, not embeddings
    embeds, where, rows = (value_of(value) for value in (base, mask, source))
    if embeds.ndim != 3 or not embeds.is_floating_point() or where.dtype != torch.bool:
        return None
    if node.target is aten.index_put.default:
        if where.ndim != 2 or rows.ndim != 2:
            return None
    elif where.ndim != 3 or not (where.shape[2] == 1 or where.stride(2) == 0):
        return None  # single elements are written, not whole rows
    return mask, rows.numel() // embeds.shape[2]  # type: ignore[return-value]


def _through_copies(value: Any) -> Any:
    while isinstance(value, fx.Node) and value.target in _COPIES:
        value = value.args[0]
    return value


_COPIES = (
    aten.clone.default,
    aten.alias.default,
    aten._to_copy.default,
    aten.to.dtype,
)


def _layers_after(anchor: fx.Node) -> set[str]:
    """Containers whose repeated blocks, from the first on, depend on ``anchor``."""
    places = _blocks(reached([anchor], users))
    return {container for container, index in places if index == 0}


def _layers_before(anchor: fx.Node) -> set[str]:
    """Containers with blocks that ``anchor`` depends on."""
    places = _blocks(reached([anchor], sources))
    return {container for container, _ in places}


def _blocks(nodes: Iterable[fx.Node]) -> set[tuple[str, int]]:
    places = {layer_of(node) for node in nodes if node.target is aten.linear.default}
    return {place for place in places if place is not None}


def fixed_counts(found: VisualTokens) -> list[int]:
    """Visual tokens of each sample as numbers; those left open become guards of Dynamo's.

    Raises:
        PreconditionError: without marks, samples do not all have equally many, or the number
            depends on data.
    """
    batch = int(found.batch)
    if found.counts:
        return [int(count) for count in found.counts]
    try:
        total = int(found.total)
    except GuardOnDataDependentSymNode as error:
        raise PreconditionError(
            "how many visual tokens this prompt has is known only when it runs",
            hint="call vlmopt.annotate(model) before torch.compile",
        ) from error
    if total % batch:
        raise PreconditionError(
            f"{total} visual tokens do not divide into {batch} samples of a batch",
            hint="call vlmopt.annotate(model) before torch.compile: then each sample may have "
            "its own number",
        )
    return [total // batch] * batch
