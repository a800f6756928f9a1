"""A denoising step in two parts: the first block, which tells how much changed, and the others."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from vlmopt.analysis.branches import find_ends
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Port, Role, Stage
from vlmopt.rewrite.branches import NEW
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.tokens import remove_unused

CHANGE = "change"
"""Output of the first part: float32, how much what the first block adds has changed since it was
kept, as a share of that."""

FIRST = "first_block"
"""State: what the first block added to the stream with the sample, at a step in full."""

OTHERS = "other_blocks"
"""State: likewise, all other blocks together."""

STREAM = "stream"
"""First part of the names of streams between the two parts, the one with the sample first."""


def split_first_block(stage: Stage, ctx: PassContext) -> tuple[Stage, Stage, Stage]:
    """Three stages of one step.

    Args:
        stage: one step, as captured; left as it is.

    Returns:
        The first block, which gives the streams behind it, :data:`CHANGE` and :data:`FIRST`; the
        other blocks, which take the streams and give what the step gives, and :data:`OTHERS`; and
        what adds the latter instead of computing it.

    Raises:
        BlockMismatchError: blocks cannot be told apart from the first one.
    """
    return _first(stage.clone(), ctx), _others(stage.clone(), ctx), _reused(stage.clone(), ctx)


def _first(stage: Stage, ctx: PassContext) -> Stage:
    ends = find_ends(stage)
    state = _take(stage, ctx, Port(FIRST, Role.BRANCH, 0), ends.first)
    emit = Emitter.of_pass(ctx, stage, ends.first, FIRST)
    with stage.graph.inserting_before(stage.graph.output_node()):
        given = ends.first, ends.entry, state
        added, change = emit.trace(_change, *given, names=("added", CHANGE))
    streams = {f"{STREAM}_{at}": node for at, node in enumerate((ends.first, *ends.others))}
    stage.graph.output_node().args = ((*streams.values(), change, added),)
    stage.outputs = (
        *(Port(name, Role.HIDDEN_STATES) for name in streams),
        Port(CHANGE),
        Port(FIRST + NEW, Role.BRANCH, 0),
    )
    remove_unused(stage)
    return stage


def _others(stage: Stage, ctx: PassContext) -> Stage:
    stage = replace(stage, name=f"{stage.name}_others")
    last = find_ends(stage).last
    stream = _take_streams(stage, ctx)
    emit = Emitter.of_pass(ctx, stage, last, OTHERS)
    with stage.graph.inserting_before(stage.graph.output_node()):
        added = emit.call(torch.ops.aten.sub.Tensor, last, stream, name="added")
    stage.add_output(Port(OTHERS + NEW, Role.BRANCH), added)
    remove_unused(stage)
    return stage


def _reused(stage: Stage, ctx: PassContext) -> Stage:
    stage = replace(stage, name=f"{stage.name}_reused")
    last = find_ends(stage).last
    state = _take(stage, ctx, Port(OTHERS, Role.BRANCH), last)
    stream = _take_streams(stage, ctx)
    emit = Emitter.of_pass(ctx, stage, last, OTHERS)
    users = list(last.users)
    with stage.graph.inserting_before(last.next):
        total = emit.call(torch.ops.aten.add.Tensor, state, stream, name="total")
    for user in users:
        user.replace_input_with(last, total)
    remove_unused(stage)
    return stage


def _take_streams(stage: Stage, ctx: PassContext) -> fx.Node:
    """Let the streams behind the first block enter the stage; returns the one with the sample."""
    ends = find_ends(stage)
    taken = []
    for at, node in enumerate((ends.first, *ends.others)):
        port = Port(f"{STREAM}_{at}", Role.HIDDEN_STATES)
        taken.append(_take(stage, ctx, port, node))
        node.replace_all_uses_with(taken[-1])
    return taken[0]


def _take(stage: Stage, ctx: PassContext, port: Port, like: fx.Node) -> fx.Node:
    val = like.meta["val"]
    node = stage.add_input(port, *val.shape, dtype=val.dtype)
    ctx.stamp(node, 1)
    return node


def _change(stream: Tensor, entry: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """What a block added, and how much that differs from ``before``."""
    added = stream - entry
    distance = (added - before).float().abs().mean()
    return added, distance / before.float().abs().mean()
