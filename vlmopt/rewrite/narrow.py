"""Linear layers of whose results only some parts are read: the others are not computed.

A diffusion transformer makes scales, shifts and gates of a block by one layer and cuts its result
into parts. A step that reuses what the block added reads the gates alone.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.tokens import remove_unused

aten = torch.ops.aten


def narrow_linears(stage: Stage, ctx: PassContext) -> None:
    """Compute the parts of linear layers that are read on their own, in place.

    Done where no more than half of them are: each becomes a layer with some rows of the weight.
    """
    places = [
        split
        for split in stage.graph.find_nodes(op="call_function", target=aten.split.Tensor)
        if _is_of_features(split) and 2 * len(split.users) <= len(split.meta["val"])
    ]
    for match, split in enumerate(places, start=1):
        _narrow(stage, split, ctx, match)
    if places:
        remove_unused(stage)


def _is_of_features(split: fx.Node) -> bool:
    """Whether it cuts the features of a linear layer that nothing else reads."""
    whole, dim = split.args[0], split.args[2] if len(split.args) > 2 else 0
    return (
        isinstance(whole, fx.Node)
        and whole.target is aten.linear.default
        and len(whole.users) == 1
        and dim in (-1, whole.meta["val"].ndim - 1)
        and all(part.target is operator.getitem for part in split.users)
    )


def _narrow(stage: Stage, split: fx.Node, ctx: PassContext, match: int) -> None:
    whole = split.all_input_nodes[0]
    given, *weights = whole.all_input_nodes
    size = split.args[1]
    emit = Emitter.of_pass(ctx, stage, whole, "narrow", match)
    for part in list(split.users):
        at = part.args[1]
        assert isinstance(at, int) and isinstance(size, int)
        with stage.graph.inserting_before(split):
            rows = [emit.call(aten.slice.Tensor, w, 0, at * size, (at + 1) * size) for w in weights]
            narrow = emit.call(aten.linear.default, given, *rows, name=part.name)
        part.replace_all_uses_with(narrow)
