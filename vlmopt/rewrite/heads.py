"""Changing attention head by head."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from vlmopt.program import Stage
from vlmopt.rewrite.emit import Emitter

aten = torch.ops.aten


def scale_heads(stage: Stage, attention: fx.Node, factors: Sequence[float]) -> None:
    """Multiply what each head of an attention operator returns, in place.

    Args:
        attention: a ``scaled_dot_product_attention`` of the stage, ``[batch, heads, ...]``.
        factors: one per head; 0 silences it.
    """
    emit = Emitter(
        stage.graph,
        stamp=lambda node: None,
        place=attention,
        prefix="heads",
        fake_mode=stage.fake_mode(),
    )

    def scale(values: Tensor) -> Tensor:
        factor = torch.tensor(factors, dtype=values.dtype, device=values.device)
        return values * factor[:, None, None]

    users = list(attention.users)
    with stage.graph.inserting_before(attention.next):
        scaled = emit.trace(scale, attention, names=("scaled",))
    for user in users:
        user.replace_input_with(attention, scaled)
    stage.graph_module.recompile()
