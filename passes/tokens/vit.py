"""What all methods that merge tokens inside a vision transformer share.

A method states how many tokens go in each block, and which become one there; the rest is here:
cutting between a block's attention and its MLP, running everything after on fewer tokens,
attention in proportion to size, and giving back all rows where what follows wants them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.encoder import Encoder, encoder_stage, find_encoder
from vlmopt.analysis.sublayers import attention_of, middle_of
from vlmopt.analysis.token_axes import B, Dims, T, TokenAxes, follow_tokens, has_tokens
from vlmopt.errors import PreconditionError, UnsupportedOperatorError
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.passes.tokens.merge import Match, source_map, targets
from vlmopt.passes.tokens.select import take
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Program, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.region import gather_tokens, shorten_region
from vlmopt.rewrite.tokens import remove_unused

aten = torch.ops.aten


@dataclass(frozen=True)
class MergePoint:
    """What a method may read between the attention and the MLP of a block.

    Attributes:
        tokens: residual stream after attention, ``[batch, tokens, width]``.
        query, key: of the block's attention, ``[batch, heads, tokens, size]``.
        scale: of their products, ``None`` for ``size ** -0.5``.
        size: patches that each token stands for, float32 ``[batch, tokens]``.
        bias: log of ``size`` where attention is in proportion to it, else ``None``.
        carried: what :meth:`TokenMerge.initial` gave, merged as tokens were, ``[batch, tokens]``.
        count: tokens to merge.
        special: tokens at the front that are never merged; the class token comes first.
    """

    tokens: Tensor
    query: Tensor
    key: Tensor
    scale: float | None
    size: Tensor
    bias: Tensor | None
    carried: Tensor | None
    count: int
    special: int


@dataclass(frozen=True, kw_only=True)
class TokenMerge(Pass):
    """Base of the methods that merge similar patches of a vision transformer, block by block.

    Subclasses give ``counts`` and ``match``. Learned tokens in front of the patches (class token,
    registers) are found in the graph and never merged.
    """

    family = "tokens"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY

    keep: float | int = option(
        0,
        "patches left after the last block: a share (up to 1), or a count (2 and up); 0: as many "
        "as the other options leave",
        ge=0,
    )
    prop_attn: bool = option(
        True, "tokens are attended to in proportion to the patches that they stand for"
    )
    restore: str = option(
        "auto",
        "give each patch a row again, that of the token it became part of: true, false, or auto: "
        "wherever more is read behind the blocks than the class token",
        choices=("auto", "true", "false"),
    )

    @abstractmethod
    def counts(self, encoder: Encoder) -> dict[int, int]:
        """Tokens to merge in each block, by number of the block."""

    @abstractmethod
    def match(self, at: MergePoint) -> tuple[Match, Tensor]:
        """Which tokens become one, and their weights therein: float32 ``[batch, tokens]``.

        Afterwards tokens stand in the order of ``kept``, the special ones at the front.
        """

    def initial(self) -> Tensor | None:
        """A value for each patch that is merged along with the tokens, float32 ``[patches]``."""
        return None

    def left(self, patches: int) -> int:
        """Patches left of so many, by ``keep``."""
        if self.keep > 1:
            return min(int(self.keep), patches)
        return max(1, round(patches * Fraction(str(self.keep))))

    def requires(self, program: Program) -> None:
        stage = encoder_stage(program)
        if stage.facts.get("merges"):
            raise PreconditionError(
                f"{self.name} cannot merge in stage {stage.name}: {stage.facts['merges'][0]['by']} "
                "has already",
                hint="merge in each encoder with one pass",
            )
        self.counts(_encoder(stage.clone()))

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = encoder_stage(program)
        wanted = self.counts(_encoder(stage.clone()))
        counts = {block: count for block, count in sorted(wanted.items()) if count}
        if not counts:
            ctx.remark("no token is to be merged in any block", stage=stage.name)
            return PassResult(False, len(wanted), {"tokens_merged": 0})
        encoder = _encoder(stage)
        merging = _Merging(self, encoder, ctx, min(counts))
        for block, count in counts.items():
            merging.merge(block, count)
        merging.finish()
        remove_unused(stage)
        merged = sum(counts.values())
        ctx.remark(f"{encoder.tokens} tokens, {encoder.tokens - merged} after the last block")
        return PassResult(True, len(counts), {"tokens_merged": merged})


def _encoder(stage: Stage) -> Encoder:
    drop_constant_masks(stage.graph)
    return find_encoder(stage)


class _Merging:
    """A run of one pass on one encoder: its state from block to block."""

    def __init__(self, method: TokenMerge, encoder: Encoder, ctx: PassContext, first: int) -> None:
        self.method = method
        self.encoder = encoder
        self.ctx = ctx
        self.graph = encoder.stage.graph
        self.state: dict[str, fx.Node] = {}
        self.sizes: dict[int, fx.Node] = {}  # after each block that merges
        self.merges: list[dict[str, Any]] = []
        self.exits: dict[fx.Node, tuple[fx.Node, Dims] | None] = {}
        axes = self._follow_all(first)
        self.restores = method.restore == "true" or (method.restore == "auto" and axes is None)
        if self.restores:
            self._mark_exits(first)

    # where rows come back ---------------------------------------------------------------------

    def _follow_all(self, first: int) -> TokenAxes | None:
        """The token axis from the first merge to the end; ``None`` where all patches are read."""
        try:
            axes = self._follow(first)
        except UnsupportedOperatorError:
            if self.method.restore == "false":
                raise
            return None
        outputs = self.graph.output_node().all_input_nodes
        seen = any(has_tokens(dim) for node in outputs for dim in axes.dims.get(node, ()))
        stage = self.encoder.stage
        if seen and self.method.restore == "false" and stage.name == "vision_encoder":
            raise PreconditionError(
                f"{self.method.name} cannot leave out rows of stage {stage.name}: the language "
                "model has a place for each patch",
                hint="use restore=auto",
            )
        pooled = [node for node in axes.ends if not _reads_special(node, axes.special)]
        return None if seen or pooled else axes

    def _mark_exits(self, first: int) -> None:
        """Put an alias between the blocks and whatever comes behind them."""
        blocks = self.encoder.layers.of
        before_blocks: set[fx.Node] = set()
        stack = list(blocks)
        while stack:
            for value in stack.pop().all_input_nodes:
                if value not in before_blocks:
                    before_blocks.add(value)
                    stack.append(value)
        inner = before_blocks | blocks.keys()
        merged = {middle_of(self.encoder.layers, first)}
        for node in list(self.graph.nodes):
            if node not in inner or not merged & {node, *node.all_input_nodes}:
                continue
            merged.add(node)
            users = [user for user in node.users if user not in inner]
            if not users or not isinstance(node.meta["val"], Tensor):
                continue
            with self.graph.inserting_after(node):
                alias = self._emitter(node).call(aten.alias.default, node)
            for user in users:
                user.replace_input_with(node, alias)
            self.exits[alias] = None

    def finish(self) -> None:
        """What is left to do when all blocks have merged."""
        if self.method.prop_attn:
            self._bias_attention()
        for alias, found in self.exits.items():
            if found is None:  # from before the first merge
                restored = alias.all_input_nodes[0]
            else:
                places, dims = found
                with self.graph.inserting_before(alias):
                    emit = self._emitter(alias)
                    source = alias.all_input_nodes[0]
                    restored = gather_tokens(emit, source, dims, lambda _: places, name="restored")  # noqa: B023
            alias.replace_all_uses_with(restored)
            self.graph.erase_node(alias)
        self.encoder.stage.facts["merges"] = self.merges

    # merging ----------------------------------------------------------------------------------

    def merge(self, block: int, count: int) -> None:
        """Merge ``count`` tokens between the attention and the MLP of a block."""
        method, encoder = self.method, self.encoder
        middle = middle_of(encoder.layers, block)
        attention = attention_of(encoder.layers, block)
        query, key = attention.args[:2]
        tokens = middle.meta["val"].shape[1]
        self._require_whole(attention, tokens)
        axes = self._follow(block)
        names = list(self.state)
        scale: Any = attention.kwargs.get("scale")

        def step(tokens: Tensor, query: Tensor, key: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
            state = dict(zip(names, given, strict=True)) or _start(method, tokens, encoder.special)
            size = state["size"]
            bias = size.log() if method.prop_attn and names else None
            carried = state.get("carried")
            point = (query, key, scale, size, bias, carried, count, encoder.special)
            match, weights = method.match(MergePoint(tokens, *point))
            places = source_map(targets(match), match.kept)
            joined = places.gather(1, match.sources)
            after = {
                "size": _total(size, match, joined),
                "places": places.gather(1, state["places"]) if names else places,
            }
            if carried is not None:
                after["carried"] = _mean(carried[..., None], weights, match, joined)[..., 0]
            return _mean(tokens, weights, match, joined), match.kept, *after.values()

        anchor = middle.next
        emit = self._emitter(middle)
        with self.graph.inserting_before(anchor):
            given = (middle, query, key, *self.state.values())
            found = [*_STATE] if method.initial() is not None else [*_STATE[:2]]
            rows, slots, *state = emit.trace(step, *given, names=("out", "slots", *found))
        frontier: dict[fx.Node, fx.Node] = {}
        for value, dims in axes.frontier.items():
            with self.graph.inserting_before(value.next if value > anchor else anchor):
                frontier[value] = gather_tokens(
                    emit, value, dims, lambda of: self._slots(emit, slots, of), name=value.name
                )
        shorten_region(axes, emit, starts={middle: rows}, length=tokens - count, frontier=frontier)
        self.state = dict(zip(found, state, strict=True))
        self.sizes[block] = self.state["size"]
        for alias in self.exits.keys() & axes.dims.keys():
            self.exits[alias] = self.state["places"], axes.dims[alias]
        self.merges.append(
            {"block": block, "tokens": [tokens, tokens - count], "by": self.ctx.spec}
        )

    def _follow(self, block: int) -> TokenAxes:
        middle = middle_of(self.encoder.layers, block)
        batch, tokens, width = middle.meta["val"].shape
        return follow_tokens(
            self.graph,
            {middle: ((B,) if batch != 1 else (1,), (T,), (width,))},
            tokens=tokens,
            batch=batch if batch != 1 else None,
            stops=self.exits,
            special=self.encoder.special,
        )

    def _slots(self, emit: Emitter, slots: fx.Node, counted: Any) -> fx.Node:
        """Slots along an axis that leaves out the first few special tokens."""
        missing = int(T - counted)
        if not missing:
            return slots
        result: fx.Node = emit.trace(lambda slots: slots[:, missing:] - missing, slots)
        return result

    def _bias_attention(self) -> None:
        """Add the log of its size to what each token is attended with, after the first merge."""

        def log_size(size: Tensor, query: Tensor) -> Tensor:
            return size.log().to(query.dtype)[:, None, None]

        biases: dict[fx.Node, fx.Node] = {}
        for node, block in self.encoder.layers.of.items():
            earlier = [merged for merged in self.sizes if merged < block]
            if node.target is not aten.scaled_dot_product_attention.default or not earlier:
                continue
            size = self.sizes[max(earlier)]
            query, key, value = node.args[:3]
            if size not in biases:
                with self.graph.inserting_before(node):
                    emit = self._emitter(node)
                    biases[size] = emit.trace(log_size, size, query, names=("log_size",))
            node.args = (query, key, value, biases[size])

    def _require_whole(self, attention: fx.Node, tokens: int) -> None:
        shapes = [value.meta["val"].shape for value in attention.args[:2]]  # type: ignore[union-attr]
        if any(len(s) != 4 or s[0] != self.encoder.batch or s[2] != tokens for s in shapes):
            raise PreconditionError(
                f"{self.method.name} needs blocks in which all tokens of an image attend to all: "
                f"queries and keys here are {[list(shape) for shape in shapes]}, for "
                f"{self.encoder.batch} images of {tokens} tokens",
                node=attention,
            )

    def _emitter(self, place: fx.Node) -> Emitter:
        match = len(self.merges) + 1
        return Emitter(
            self.graph,
            stamp=lambda node: self.ctx.stamp(node, match),
            place=place,
            prefix=self.method.name.replace("-", "_"),
            fake_mode=self.encoder.stage.fake_mode(),
        )


def _total(values: Tensor, match: Match, joined: Tensor) -> Tensor:
    """Each token that stays plus those that join it: ``[batch, kept, ...]``.

    Args:
        joined: the place among ``kept`` that each of ``sources`` joins.
    """
    moved = take(values, match.sources)
    index = joined.reshape(*joined.shape, *[1] * (values.ndim - 2)).expand_as(moved)
    return take(values, match.kept).scatter_add(1, index, moved)


def _mean(values: Tensor, weights: Tensor, match: Match, joined: Tensor) -> Tensor:
    """As :func:`_total`, the mean by float32 ``weights``; computed in float32."""
    weighted = _total(values.float() * weights[..., None], match, joined)
    return (weighted / _total(weights, match, joined)[..., None]).to(values.dtype)


_STATE = ("size", "places", "carried")


def _start(method: TokenMerge, tokens: Tensor, special: int) -> Mapping[str, Tensor]:
    """State before the first merge: each token stands for itself."""
    state = {"size": torch.ones(tokens.shape[:2], device=tokens.device)}
    initial = method.initial()
    if initial is not None:
        row = torch.cat([torch.zeros(special), initial]).to(tokens.device)
        state["carried"] = row.expand(tokens.shape[0], -1)
    return state


def _reads_special(node: fx.Node, special: int) -> bool:
    """Whether an operator at which the token axis ends takes special tokens alone."""
    if node.target is aten.select.int:
        return 0 <= int(node.args[2]) < special  # type: ignore[arg-type]
    if node.target is aten.slice.Tensor:
        stop = node.args[3] if len(node.args) > 3 else None
        return isinstance(stop, int) and 0 <= stop <= special
    return False
