"""Changing attention head by head."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import Layers, find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.analysis.sublayers import attention_of
from vlmopt.program import Program, Stage
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


def without_each_head(program: Program, layer: int | None) -> list[Callable[[Program], None]]:
    """Rewrites that silence head 0, head 1, and so on, each in its own copy of ``program``.

    Args:
        layer: the one in which the head is silent; ``None`` for all.
    """
    heads = attention_of(_layers(token_stage(program)), layer or 0).meta["val"].shape[1]

    def silence(program: Program, head: int) -> None:
        stage = token_stage(program)
        layers = _layers(stage)
        for at in range(len(layers)) if layer is None else (layer,):
            factors = [float(other != head) for other in range(heads)]
            scale_heads(stage, attention_of(layers, at), factors)

    return [partial(silence, head=head) for head in range(heads)]


def _layers(stage: Stage) -> Layers:
    return find_layers(stage, after=modality_of_tokens(stage).anchor)
