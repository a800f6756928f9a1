"""Merging tokens between the attention and the feed-forward network of an encoder's blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.encoder import Encoder
from vlmopt.analysis.sublayers import attention_of, middle_of
from vlmopt.analysis.token_axes import B, Dims, T, TokenAxes, follow_tokens, has_tokens
from vlmopt.errors import PreconditionError, UnsupportedOperatorError
from vlmopt.pipeline.passes import PassContext
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.exits import mark_exits, remove_exit, restore_rows
from vlmopt.rewrite.region import gather_tokens, shorten_region

aten = torch.ops.aten


class BlockMerging:
    """Rewrites one encoder, from its first block that merges to its last.

    Args:
        ctx: of the pass.
        prefix: first part of the names of new nodes.
        first: first block that will merge.
        restore: whether rows come back behind the blocks: ``true``, ``false``, or ``auto`` for
            wherever more is read there than the special tokens.

    Attributes:
        merges: what was done, for the facts of the stage.

    Raises:
        PreconditionError: ``restore`` is ``false``, and the language model reads all rows.
    """

    def __init__(
        self, encoder: Encoder, ctx: PassContext, *, prefix: str, first: int, restore: str
    ) -> None:
        self.encoder = encoder
        self.ctx = ctx
        self.prefix = prefix
        self.graph = encoder.stage.graph
        self.merges: list[dict[str, Any]] = []
        self._state: dict[str, fx.Node] = {}
        self._sizes: dict[int, fx.Node] = {}  # after each block that merges
        self._exits: dict[fx.Node, tuple[fx.Node, Dims] | None] = {}
        if restore == "true" or not self._can_stay_short(first, restore == "false"):
            middle = middle_of(encoder.layers, first)
            aliases = mark_exits(self.graph, encoder.layers, middle, self._emitter)
            self._exits |= dict.fromkeys(aliases)

    def merge(self, block: int, count: int, step: Callable[..., dict[str, Tensor]]) -> None:
        """Merge ``count`` tokens of each image in a block.

        Args:
            step: ``(tokens, query, key, scale, state)``, the values between the two halves of the
                block and what the step before returned, empty at first. Returns ``tokens``, the
                rows that are left; ``slots``, int64 ``[batch, left]``, where they were; ``size``,
                float32 ``[batch, left]``, how many original tokens each stands for; ``places``,
                int64 ``[batch, original]``, what became of these; and what else it carries along.
        """
        middle = middle_of(self.encoder.layers, block)
        attention = attention_of(self.encoder.layers, block)
        query, key = attention.args[:2]
        tokens = middle.meta["val"].shape[1]
        self._require_whole(attention, tokens)
        axes = self._follow(block)
        scale: Any = attention.kwargs.get("scale")
        known = list(self._state)
        found: list[str] = []

        def flat(tokens: Tensor, query: Tensor, key: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            after = step(tokens, query, key, scale, dict(zip(known, state, strict=True)))
            found[:] = after
            return tuple(after.values())

        anchor = middle.next
        emit = self._emitter(middle)
        with self.graph.inserting_before(anchor):
            given = (middle, query, key, *self._state.values())
            values = emit.trace(flat, *given, names=("out", "slots", "size", "places", "carried"))
        self._state = dict(zip(found, values, strict=True))
        rows, slots = self._state.pop("tokens"), self._state.pop("slots")
        frontier: dict[fx.Node, fx.Node] = {}
        for value, dims in axes.frontier.items():
            with self.graph.inserting_before(value.next if value > anchor else anchor):
                frontier[value] = gather_tokens(
                    emit, value, dims, lambda of: self._slots(emit, slots, of), name=value.name
                )
        shorten_region(axes, emit, starts={middle: rows}, length=tokens - count, frontier=frontier)
        self._sizes[block] = self._state["size"]
        for alias in self._exits.keys() & axes.dims.keys():
            self._exits[alias] = self._state["places"], axes.dims[alias]
        self.merges.append(
            {"block": block, "tokens": [tokens, tokens - count], "by": self.ctx.spec}
        )

    def bias_attention(self) -> None:
        """Attend to each token in proportion to its size: add the log to the scores of its key."""

        def log_size(size: Tensor, query: Tensor) -> Tensor:
            return size.log().to(query.dtype)[:, None, None]

        biases: dict[fx.Node, fx.Node] = {}
        for node, block in self.encoder.layers.of.items():
            earlier = [merged for merged in self._sizes if merged < block]
            if node.target is not aten.scaled_dot_product_attention.default or not earlier:
                continue
            size = self._sizes[max(earlier)]
            query, key, value = node.args[:3]
            if size not in biases:
                with self.graph.inserting_before(node):
                    emit = self._emitter(node)
                    biases[size] = emit.trace(log_size, size, query, names=("log_size",))
            node.args = (query, key, value, biases[size])

    def bring_back(self) -> None:
        """Give each original token a row again, that of what became of it, behind the blocks."""
        for alias, found in self._exits.items():
            restored = alias.all_input_nodes[0]
            if found is not None:  # else it is from before the first merge
                restored = restore_rows(alias, *found, self._emitter(alias))
            remove_exit(alias, restored)

    # -- where rows come back ------------------------------------------------------------------

    def _can_stay_short(self, first: int, must: bool) -> bool:
        """Whether nothing behind the blocks reads more than the special tokens.

        Args:
            must: complain about what stands against it.
        """
        try:
            axes = self._follow(first)
        except UnsupportedOperatorError:
            if must:
                raise
            return False
        outputs = self.graph.output_node().all_input_nodes
        seen = any(has_tokens(dim) for node in outputs for dim in axes.dims.get(node, ()))
        stage = self.encoder.stage
        if must and seen and stage.name == "vision_encoder":
            raise PreconditionError(
                f"{self.prefix} cannot leave out rows of stage {stage.name}: the language model "
                "has a place for each patch",
                hint="use restore=auto",
            )
        pooled = [node for node in axes.ends if not _reads_special(node, axes.special)]
        return must or not (seen or pooled)

    # -- pieces --------------------------------------------------------------------------------

    def _follow(self, block: int) -> TokenAxes:
        middle = middle_of(self.encoder.layers, block)
        batch, tokens, width = middle.meta["val"].shape
        return follow_tokens(
            self.graph,
            {middle: ((B,) if batch != 1 else (1,), (T,), (width,))},
            tokens=tokens,
            batch=batch if batch != 1 else None,
            stops=self._exits,
            special=self.encoder.special,
        )

    def _slots(self, emit: Emitter, slots: fx.Node, counted: Any) -> fx.Node:
        """Slots along an axis that leaves out the first few special tokens."""
        missing = int(T - counted)
        if not missing:
            return slots
        result: fx.Node = emit.trace(lambda slots: slots[:, missing:] - missing, slots)
        return result

    def _require_whole(self, attention: fx.Node, tokens: int) -> None:
        shapes = [value.meta["val"].shape for value in attention.args[:2]]  # type: ignore[union-attr]
        if any(len(s) != 4 or s[0] != self.encoder.batch or s[2] != tokens for s in shapes):
            raise PreconditionError(
                f"{self.prefix} needs blocks in which all tokens of an image attend to all: "
                f"queries and keys here are {[list(shape) for shape in shapes]}, for "
                f"{self.encoder.batch} images of {tokens} tokens",
                node=attention,
            )

    def _emitter(self, place: fx.Node) -> Emitter:
        match = len(self.merges) + 1
        return Emitter.of_pass(self.ctx, self.encoder.stage, place, self.prefix, match)


def _reads_special(node: fx.Node, special: int) -> bool:
    """Whether an operator at which the token axis ends takes special tokens alone."""
    if node.target is aten.select.int:
        return 0 <= int(node.args[2]) < special  # type: ignore[arg-type]
    if node.target is aten.slice.Tensor:
        stop = node.args[3] if len(node.args) > 3 else None
        return isinstance(stop, int) and 0 <= stop <= special
    return False
