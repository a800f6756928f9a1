"""Encoder blocks that compute some rows of a frame, and take the others from a reference frame.

One encoder becomes two stages: one computes a frame in full and gives what it remembers of the last
frame it saw, the other takes that, and computes the rows that are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from vlmopt.analysis.blocks import INSTEAD, EncoderBlock, Projection
from vlmopt.analysis.token_axes import Dims, follow_tokens
from vlmopt.errors import BlockMismatchError
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Port, Role, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.region import gather_tokens
from vlmopt.rewrite.rows import read_elsewhere, run_on_rows
from vlmopt.rewrite.tokens import put_back, remove_unused
from vlmopt.rewrite.windows import widen_windows

aten = torch.ops.aten

STATE = (
    Role.REFERENCE_KEY,
    Role.REFERENCE_VALUE,
    Role.REFERENCE_ATTENTION,
    Role.REFERENCE_FFN,
)
"""What is remembered of each block of a frame."""

REUSE = "reuse"
"""Among the facts of both stages: ``interval`` of chunks from one reference to the next, ``frames``
of a chunk, ``rows`` of a frame that are computed, ``stages``, the names of both, and the pass
``by`` which they were made."""

CHANGED = "changed_rows"
"""Output of the second stage, where asked for: int64 ``[frames]``, the most rows of a frame that
differ from the reference frame in any block: behind the first, also those computed though they did
not change. With more than fit, some that changed were not computed."""

Choose = Callable[[Tensor, Tensor], tuple[Tensor, Tensor, Tensor | None]]
"""``(key [frames, tokens, width], reference [tokens, width])``: the rows to compute, int64
``[frames, rows]``, ascending; how much a frame resembles the reference, float32 ``[frames]``; and
how many of its rows differ, int64 ``[frames]``, if that is to be known."""


def give_state(stage: Stage, blocks: Sequence[EncoderBlock], ctx: PassContext) -> None:
    """Let an encoder give what it remembers of its last frame, see :data:`STATE`."""
    for match, block in enumerate(blocks, start=1):
        parts, images = block.parts, block.images
        values = (block.key, block.value, parts.attention_out, parts.ffn_out)
        emit = Emitter.of_pass(ctx, stage, parts.out, "reference", match)
        for role, value in zip(STATE, values, strict=True):
            columns = value.columns if isinstance(value, Projection) else None
            rows = value.linear if isinstance(value, Projection) else value
            name = f"{role.value}_{block.layer}"
            with stage.graph.inserting_before(stage.graph.output_node()):
                last = emit.trace(
                    partial(_last_frame, images=images, columns=columns), rows, names=(name,)
                )
            stage.add_output(Port(name, role, block.layer), last)


def reuse_rows(
    stage: Stage, blocks: Sequence[EncoderBlock], choose: Choose, ctx: PassContext
) -> None:
    """Let an encoder take its state, and compute the chosen rows of each block only.

    Keys are computed for all rows, and so are norms on the way to them. All else is computed for
    the chosen rows: queries, attention, values and the feed-forward network. Where attention is
    within windows, a mask says so: rows are chosen among those of the whole frame.

    Raises:
        BlockMismatchError: some part of a block mixes rows.
    """
    blocks = widen_windows(stage, blocks, ctx)
    found = [
        _BlockReuse(stage, block, ctx, match).rewrite(choose)
        for match, block in enumerate(blocks, start=1)
    ]
    likeness, changed = zip(*found, strict=True)
    emit = Emitter.of_pass(ctx, stage, likeness[-1], "reuse", len(blocks))
    for role, name, values, combine in (
        (Role.FRAME_SIMILARITY, Role.FRAME_SIMILARITY.value, likeness, _mean),
        (Role.COUNTS, CHANGED, changed, _most),
    ):
        if values[0] is not None:
            with stage.graph.inserting_before(stage.graph.output_node()):
                of_all = emit.trace(combine, *values, names=(name,))
            stage.add_output(Port(name, role), of_all)
    remove_unused(stage)


@dataclass(frozen=True)
class _BlockReuse:
    """The rewrite of one block, stamped as the ``match``-th place."""

    stage: Stage
    block: EncoderBlock
    ctx: PassContext
    match: int

    def rewrite(self, choose: Choose) -> tuple[fx.Node, fx.Node | None]:
        """Rewrite the block; how much each frame resembles the reference, how many rows differ."""
        parts = self.block.parts
        query, key, value = self._projections()
        shape = self.block.images, self.block.tokens, key.width
        widths = key.width, value.width, *[int(parts.out.meta["val"].shape[-1])] * 2
        reference = [self._state(role, w) for role, w in zip(STATE, widths, strict=True)]

        def chosen(key: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            return choose(key.view(shape), reference)

        graph, emit = self.stage.graph, self._emitter(key.linear)
        with graph.inserting_before(key.linear.next):
            given = chosen, key.linear, reference[0]
            slots, likeness, changed = emit.trace(*given, names=("slots", "likeness", "changed"))
            rows = gather_tokens(
                emit, parts.attention_in, self._dims(parts.attention_in), lambda _: slots, name="u"
            )
        self._run(parts.attention_in, [value.linear], value.linear, slots, reference[1], rows)
        self._run(
            parts.attention_in, [query.linear], parts.attention_out, slots, reference[2], rows
        )
        reading = [user for user in self.block.middle.users if user is not parts.out]
        self._run(self.block.middle, reading, parts.ffn_out, slots, reference[3])
        return likeness, changed

    def _run(
        self,
        start: fx.Node,
        reading: list[fx.Node],
        end: fx.Node,
        slots: fx.Node,
        reference: fx.Node,
        rows: fx.Node | None = None,
    ) -> None:
        """Run what ``reading`` do with ``start``, up to ``end``, on the rows ``slots`` only.

        Args:
            reference: what ``end`` is for the others.
            rows: the rows of ``start``, where they are known.
        """
        graph, emit = self.stage.graph, self._emitter(end)
        dims = self._dims(start)
        with graph.inserting_before(start.next):
            alias = emit.call(aten.alias.default, start)  # apart from what needs all rows
        for user in reading:
            user.replace_input_with(start, alias)
        axes = follow_tokens(
            graph,
            {alias: dims},
            tokens=self.block.tokens,
            batch=self.block.images if self.block.images != 1 else None,
            stops=[end],
        )
        if axes.ends:
            raise BlockMismatchError(
                f"block {self.block.layer} combines rows of an image outside of attention",
                node=axes.ends[0],
                hint=INSTEAD,
            )
        if rows is None:
            with graph.inserting_before(alias.next):
                rows = gather_tokens(emit, alias, dims, lambda _: slots, name="rows")
        others = read_elsewhere(end, axes)
        count = int(slots.meta["val"].shape[1])
        run_on_rows(axes, emit, alias, rows, slots, count)
        with graph.inserting_before(end.next):
            whole = emit.trace(_with_rows, reference, slots, end, names=("whole",))
        for user in others:
            user.replace_input_with(end, whole)

    def _projections(self) -> tuple[Projection, Projection, Projection]:
        """Those of the block as operators of their own, that of keys before the others."""
        block = self.block
        key = self._separate(block.key)
        if not block.key.fused:
            _move_behind(block.parts.attention_in, key.linear)
        return self._separate(block.query), key, self._separate(block.value)

    def _separate(self, part: Projection) -> Projection:
        """The operator that gives these columns alone, with a part of the same weight."""
        if not part.fused:
            return part
        emit = self._emitter(part.linear)
        rows, *weights = part.linear.args
        start, stop = part.columns
        sizes = [int(part.value.meta["val"].shape[dim]) for dim in part.order]
        back = [part.order.index(dim) for dim in range(len(part.order))]
        with self.stage.graph.inserting_before(part.linear):
            own = [
                weight and emit.call(aten.slice.Tensor, weight, 0, start, stop)
                for weight in weights
            ]
            linear = emit.call(aten.linear.default, rows, *own, name="linear")
            value = emit.call(aten.view.default, linear, sizes)
            value = emit.call(aten.permute.default, value, back)
        part.value.replace_all_uses_with(value)
        return Projection(linear, (0, part.width), linear)

    def _state(self, role: Role, width: int) -> fx.Node:
        port = Port(f"{role.value}_{self.block.layer}", role, self.block.layer)
        dtype = self.block.entry.meta["val"].dtype
        node = self.stage.add_input(port, self.block.tokens, width, dtype=dtype)
        self.ctx.stamp(node, self.match)
        return node

    def _dims(self, rows: fx.Node) -> Dims:
        return (*self.block.dims[:-1], (int(rows.meta["val"].shape[-1]),))

    def _emitter(self, place: fx.Node) -> Emitter:
        return Emitter.of_pass(self.ctx, self.stage, place, "reuse", self.match)


def _mean(*each: Tensor) -> Tensor:
    return torch.stack(each).mean(0)


def _most(*each: Tensor) -> Tensor:
    return torch.stack(each).amax(0)


def _move_behind(value: fx.Node, node: fx.Node) -> None:
    """Compute ``node`` as soon as ``value`` is there."""
    late = [source for source in node.all_input_nodes if source > value]
    for moved in (node, *late):
        value.append(moved)


def _last_frame(rows: Tensor, *, images: int, columns: tuple[int, int] | None) -> Tensor:
    """Rows of the last of several images, ``[tokens, width]``."""
    last = rows[-1] if rows.ndim == 3 else rows.unflatten(0, (images, -1))[-1]
    return last if columns is None else last[:, slice(*columns)]


def _with_rows(reference: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """``reference`` ``[tokens, width]`` with other rows at ``slots``, for each frame."""
    frames, count = slots.shape
    whole = put_back(reference.expand(frames, -1, -1), slots, None, rows.reshape(frames, count, -1))
    return whole if rows.ndim == 3 else whole.flatten(0, 1)
