"""Analysis ``branches``: what each module of a diffusion transformer adds to a residual stream.

A residual stream is known by what is done to it: something computed from it is added to it. There
may be several, as of image and text, which one attention reads and adds to, and which are joined or
cut apart on the way. A branch is cut before its gate: what is kept of it is to be used under the
gate of another step.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vlmopt.analysis.layers import layer_of
from vlmopt.denoising.plan import Site
from vlmopt.errors import BlockMismatchError
from vlmopt.graph.attention import attention_arguments
from vlmopt.graph.reach import reached, sources, users
from vlmopt.program import Stage

aten = torch.ops.aten

CASTS = frozenset(
    {
        aten.to.dtype,
        aten._to_copy.default,
        aten.type_as.default,
        aten.alias.default,
        aten.clone.default,
        aten.contiguous.default,
    }
)
"""Operators that leave a value what it is, but for its type."""

_LAYOUT = CASTS | {
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.slice.Tensor,
    aten.split_with_sizes.default,
    operator.getitem,
    aten.cat.default,
    aten.clamp.default,
}
"""Operators behind which a stream is still the same stream, or a part, or several side by side."""


@dataclass(frozen=True)
class Branch:
    """What one module adds to one stream.

    Attributes:
        value: ``[batch, tokens, width]``, before the gate.
        added: the sum.
        stream: the other summand.
        region: all that ``value`` is computed from behind the streams, itself included.
        main: the stream is computed from the sample that is denoised.
        reads: what the first projections read, ``[batch, tokens, width]``, of attention those to
            queries; ``None`` where that is not as long as ``value``.
        keys: projections to keys and values of the rows of its stream, as ``("key_0", linear)`` of
            the first attention operator.
    """

    value: fx.Node
    added: fx.Node
    stream: fx.Node
    region: frozenset[fx.Node]
    main: bool
    reads: fx.Node | None
    keys: tuple[tuple[str, fx.Node], ...]

    @property
    def tokens(self) -> int:
        return int(self.value.meta["val"].shape[1])


@dataclass(frozen=True)
class BranchSite:
    """The branches of one module, or of those of one kind in a block, in order of execution.

    Attributes:
        attention: attention operators among what they are computed from.
    """

    site: Site
    branches: tuple[Branch, ...]
    attention: tuple[fx.Node, ...]

    @property
    def rows(self) -> tuple[Branch, ...]:
        """The branches to the stream that holds the sample; to any, where none holds it."""
        main = [branch for branch in self.branches if branch.main] or self.branches
        tokens = max(branch.tokens for branch in main)
        return tuple(branch for branch in main if branch.tokens == tokens)

    @property
    def tokens(self) -> int:
        """How many rows :attr:`rows` have."""
        return self.rows[0].tokens


def find_branches(stage: Stage) -> tuple[BranchSite, ...]:
    """The residual branches of a stage's blocks, in order of execution.

    Blocks are counted over all containers of repeated modules, in order of execution. Branches of a
    block are one site if they are of the same kind: attention of a block that adds to two streams
    is one, and so are the networks of both. What holds attention and a network, side by side behind
    one projection, is attention. Attention is ``cross_attention`` where no key depends on a stream.

    Raises:
        BlockMismatchError: there are no blocks, or one is built otherwise: where and why.
    """
    streams = _Streams(stage)
    order = {node: at for at, node in enumerate(stage.graph.nodes)}
    moving = reached(streams.roots, users)
    sample = reached([stage.placeholder(stage.inputs[0])], users)
    found: dict[Site, list[tuple[Branch, list[fx.Node]]]] = {}
    layers = _numbers(streams.sums, order)
    for added, (stream, summand) in streams.sums.items():
        value = _before_gate(summand, moving)
        region = _region(value, streams.passed, moving)
        attention = sorted((n for n in region if _attends(n)), key=order.__getitem__)
        site = Site(layers[layer_of(added)], _kind(attention, moving))
        main = streams.holds(stream, sample)

        def own(value: Any, main: bool = main) -> bool:
            return streams.feed(value, sample) == main

        reads = next(filter(own, _reads(value, region, attention, order)), None)
        keys = [(name, linear) for name, linear in _keys(attention, region) if own(linear)]
        branch = Branch(value, added, stream, frozenset(region), main, reads, tuple(keys))
        found.setdefault(site, []).append((branch, attention))
    _require_all_attention(stage, found.values())
    sites = []
    for site, each in found.items():
        each.sort(key=lambda pair: order[pair[0].value])
        attention = sorted({n for _, nodes in each for n in nodes}, key=order.__getitem__)
        sites.append(BranchSite(site, tuple(branch for branch, _ in each), tuple(attention)))
    return tuple(sorted(sites, key=lambda one: order[one.branches[0].value]))


@dataclass(frozen=True)
class BlockEnds:
    """The streams where the first block ends, and the one with the sample at both ends of blocks.

    Attributes:
        entry: the stream with the sample as it enters the first block.
        first: as it leaves it.
        others: the other streams that leave it.
        last: the stream with the sample as it leaves the last block, as long as ``first``.
    """

    entry: fx.Node
    first: fx.Node
    others: tuple[fx.Node, ...]
    last: fx.Node


def find_ends(stage: Stage) -> BlockEnds:
    """Where the first block of a denoiser ends, and the last.

    Raises:
        BlockMismatchError: there is one block only, or the sample does not pass all of them in one
            stream.
    """
    streams = _Streams(stage)
    order = {node: at for at, node in enumerate(stage.graph.nodes)}
    sample = reached([stage.placeholder(stage.inputs[0])], users)
    blocks = _numbers(streams.sums, order)
    read = reached(stage.graph.output_node().all_input_nodes, sources)
    leaving: dict[int, list[fx.Node]] = {number: [] for number in blocks.values()}
    for node in sorted(streams.passed & read, key=order.__getitem__):
        place = layer_of(node)
        if place in blocks and any(layer_of(user) != place for user in node.users if user in read):
            leaving[blocks[place]].append(node)
    ends = leaving[0], leaving[max(leaving)]
    main = [[node for node in nodes if streams.holds(node, sample)] for nodes in ends]
    shapes = [node.meta["val"].shape for nodes in main for node in nodes]
    if len(leaving) < 2 or list(map(len, main)) != [1, 1] or shapes[0] != shapes[1]:
        raise BlockMismatchError(
            f"stage {stage.name} has no stream with the sample that enters the blocks behind the "
            "first one, and leaves the last one as it entered",
            node=next((node for nodes in ends for node in nodes), None),
            hint="reuse branches instead, for example with fixed-interval",
        )
    (first,), (last,) = main
    entry = first
    while layer_of(entry) == layer_of(first):
        before = [streams.sums[entry][0]] if entry in streams.sums else _before(entry)
        if len(before) != 1:
            raise BlockMismatchError(
                "the stream with the sample begins, or is joined, within the first block",
                node=entry,
                hint="reuse branches instead, for example with fixed-interval",
            )
        (entry,) = before
    return BlockEnds(entry, first, tuple(n for n in ends[0] if n is not first), last)


class _Streams:
    """The residual streams of a stage, followed back from where they leave each block.

    Attributes:
        sums: by each sum in a block, ``(stream, what is added to it)``.
        passed: all values that are a stream, before and behind the sums.
        roots: where the streams begin.
    """

    def __init__(self, stage: Stage) -> None:
        self.sums: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
        self.passed: set[fx.Node] = set()
        self.roots: list[fx.Node] = []
        self._above: dict[fx.Node, set[fx.Node]] = {}
        inside = {n: p for n in stage.graph.nodes if n.op == "call_function" and (p := layer_of(n))}
        for node, place in inside.items():
            if any(inside.get(user) != place for user in node.users) and _is_stream(node):
                self._follow(node)
        if not self.sums:
            raise BlockMismatchError(
                f"stage {stage.name} has no blocks that add to a residual stream what they compute "
                "from it",
                hint="capture a diffusion transformer, the module that a diffusers pipeline calls "
                "transformer",
            )

    def _follow(self, leaving: fx.Node) -> None:
        stack = [leaving]
        while stack:
            node = stack.pop()
            if node in self.passed:
                continue
            self.passed.add(node)
            found = self._residual(node) if layer_of(node) is not None else None
            if found is not None:
                self.sums[node] = found
                stack.append(found[0])
            elif before := _before(node):
                stack.extend(before)
            else:
                self.roots.append(node)

    def holds(self, stream: fx.Node, sample: set[fx.Node]) -> bool:
        """Whether a stream, apart from all that was added to it, is one of these values."""
        if stream in self.sums:
            return self.holds(self.sums[stream][0], sample)
        if stream in self.roots:
            return stream in sample
        return any(self.holds(source, sample) for source in _before(stream))

    def feed(self, value: fx.Node, sample: set[fx.Node]) -> bool:
        """Whether a value is computed from a stream that holds the sample."""
        above = reached([value], lambda n: () if n in self.passed else n.all_input_nodes)
        return any(self.holds(node, sample) for node in above & self.passed)

    def _residual(self, node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """``(stream, what is added)`` where one summand is computed from the other."""
        if node.target is not aten.add.Tensor or node.kwargs:
            return None
        one, two = node.args[:2]
        if not (_is_stream(one) and _is_stream(two)):
            return None
        if one.meta["val"].shape != two.meta["val"].shape:  # type: ignore[union-attr]
            return None
        for stream, summand in ((one, two), (two, one)):
            if self._reads(summand, stream):  # type: ignore[arg-type]
                return stream, summand  # type: ignore[return-value]
        return None

    def _reads(self, summand: fx.Node, stream: fx.Node) -> bool:
        """Whether ``summand`` is computed from a stream, as it is or as it was before sums."""
        if summand not in self._above:
            self._above[summand] = reached([summand], sources)
        above = self._above[summand]
        while True:
            stream = _without_casts(stream)
            if stream in above:
                return stream is not summand
            found = self._residual(stream)
            if found is None:
                return False
            stream = found[0]


def _is_stream(value: Any) -> bool:
    """Whether a value may be a residual stream: ``[batch, tokens, width]``, of floats."""
    val = value.meta.get("val") if isinstance(value, fx.Node) else None
    return isinstance(val, torch.Tensor) and val.ndim == 3 and val.is_floating_point()


def _before(stream: fx.Node) -> list[fx.Node]:
    """What a stream is a part of, or joined from; nothing, where it begins."""
    if stream.target is aten.cat.default:
        return stream.all_input_nodes
    return stream.all_input_nodes[:1] if stream.target in _LAYOUT else []


def _without_casts(value: fx.Node) -> fx.Node:
    while value.target in CASTS:
        value = value.all_input_nodes[0]
    return value


def _before_gate(value: fx.Node, moving: set[fx.Node]) -> fx.Node:
    """What is multiplied by gates that do not depend on a stream, in the type it was made in."""
    while True:
        inner = _without_casts(value)
        factors = inner.args[:2] if inner.target is aten.mul.Tensor else ()
        ungated = [factor for factor in factors if factor in moving]
        if len(ungated) != 1 or ungated[0].meta["val"].shape != value.meta["val"].shape:  # type: ignore[union-attr]
            break
        value = ungated[0]  # type: ignore[assignment]
    narrower = inner.meta["val"].dtype.itemsize < value.meta["val"].dtype.itemsize
    return inner if narrower else value


def _region(value: fx.Node, streams: set[fx.Node], moving: set[fx.Node]) -> set[fx.Node]:
    def step(node: fx.Node) -> Iterable[fx.Node]:
        return [n for n in node.all_input_nodes if n in moving and n not in streams]

    return reached([value], step)


def _reads(
    value: fx.Node,
    region: set[fx.Node],
    attention: list[fx.Node],
    order: Mapping[fx.Node, int],
) -> list[fx.Node]:
    """Values as long as a branch that its first projections read."""
    if attention:
        queries = [attention_arguments(node)["query"] for node in attention]
        first = [linear for query in queries for linear in projections(query, region)]
    else:
        linear = [node for node in region if node.target is aten.linear.default]
        first = sorted(linear, key=order.__getitem__)[:1]
    rows = value.meta["val"].shape[:2]
    read: list[Any] = [node.args[0] for node in first]
    return [one for one in dict.fromkeys(read) if one.meta["val"].shape[:2] == rows]


def _keys(attention: list[fx.Node], region: set[fx.Node]) -> Iterator[tuple[str, fx.Node]]:
    for at, node in enumerate(attention):
        given = attention_arguments(node)
        for name in ("key", "value"):
            for linear in projections(given[name], region):
                yield f"{name}_{at}", linear


def projections(value: fx.Node, region: Collection[fx.Node]) -> list[fx.Node]:
    """The linear operators of a region that a query, key or value is made by: one per stream."""

    def step(node: fx.Node) -> Iterable[fx.Node]:
        if node.target is aten.linear.default:
            return []
        return [source for source in node.all_input_nodes if source in region]

    found = reached([value], step) if value in region else set()
    return [node for node in found if node.target is aten.linear.default]


def _attends(node: fx.Node) -> bool:
    return node.target is aten.scaled_dot_product_attention.default


def _kind(attention: list[fx.Node], moving: set[fx.Node]) -> str:
    if not attention:
        return "mlp"
    own = any(attention_arguments(node)["key"] in moving for node in attention)
    return "attention" if own else "cross_attention"


def _numbers(sums: Mapping[fx.Node, Any], order: Mapping[fx.Node, int]) -> dict[Any, int]:
    """The number of each block, by container and index."""
    first = sorted(sums, key=order.__getitem__)
    return {place: at for at, place in enumerate(dict.fromkeys(map(layer_of, first)))}


def _require_all_attention(stage: Stage, found: Iterable[list[tuple[Branch, Any]]]) -> None:
    """All attention within blocks is added to a stream."""
    covered = {node for each in found for branch, _ in each for node in branch.region}
    for node in stage.graph.nodes:
        if _attends(node) and layer_of(node) is not None and node not in covered:
            raise BlockMismatchError(
                "attention of a block is not added to the residual stream that it is computed from",
                node=node,
                hint="blocks must be built as x + gate * module(norm(x)), each part",
            )
