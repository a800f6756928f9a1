"""Stages that read and write drafts: trees of tokens behind what their buffers hold."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_mask, is_causal
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.graph.reach import is_weight
from vlmopt.program import Port, Role, Stage
from vlmopt.rewrite.buffers import keep_in_buffers
from vlmopt.rewrite.tokens import remove_unused

aten = torch.ops.aten


def drafted_stage(stage: Stage, capacity: int, name: str) -> Stage:
    """A stage that reads as many tokens as ``stage`` does, of which each has its own past.

    Its inputs are those of ``stage`` but for the attention mask, with ``position_ids`` as the
    caller says, and those of :func:`~vlmopt.rewrite.buffers.keep_in_buffers` with given masks and
    one group, 0. Hidden states before the head are among its outputs.

    Args:
        stage: a prefill stage of prompts without padding; it is not changed.
        capacity: rows of the buffers.
        name: of the new stage.

    Raises:
        PreconditionError: attention of ``stage`` is not causal, it takes no positions, its hidden
            states cannot be told, or ``capacity`` is less than the tokens that it reads.
    """
    stage = replace(stage.clone(), name=name)
    tokens = int(stage.facts["tokens"])
    if not stage.find_inputs(Role.POSITION_IDS):
        raise PreconditionError(
            "the model takes no position_ids, and siblings of a tree share a position",
            hint="choose a model with rotary positions",
        )
    if capacity < tokens:
        raise PreconditionError(
            f"{tokens} tokens do not fit in buffers of {capacity} rows",
            hint="larger buffers, or smaller drafts",
        )
    if not stage.find_outputs(Role.HIDDEN_STATES):
        hidden = _before_head(stage)
        stage.add_output(Port("hidden_states", Role.HIDDEN_STATES), hidden)
    _require_causal(stage)
    layers = len(stage.find_outputs(Role.KEY))
    keep_in_buffers(stage, [0] * layers, [capacity], masks_given=True)
    for port in stage.inputs:
        node = stage.placeholder(port)
        if not node.users:
            stage.graph.erase_node(node)
            stage.inputs = tuple(one for one in stage.inputs if one is not port)
    stage.graph.lint()
    stage.graph_module.recompile()
    return stage


def _attentions(stage: Stage) -> list[fx.Node]:
    target = aten.scaled_dot_product_attention.default
    return list(stage.graph.find_nodes(op="call_function", target=target))


def _require_causal(stage: Stage) -> None:
    """Leave attention without masks, where these hide nothing but later tokens."""
    given = {}
    for port in stage.find_inputs(Role.ATTENTION_MASK):
        node = stage.placeholder(port)
        val = node.meta["val"]
        given[node] = torch.ones(val.shape, dtype=val.dtype)
    drop_constant_masks(stage.graph, given)
    remove_unused(stage)
    for attention in _attentions(stage):
        alone = stage.facts["tokens"] == 1  # nothing comes later
        if not (is_causal(attention) or alone) or attention_mask(attention) is not None:
            raise PreconditionError(
                "a token of a draft attends to what it descends from, and this attention of the "
                "model hides other tokens than later ones, or hides none",
                node=attention,
                hint="choose a causal language model whose layers attend to everything before",
            )


def _before_head(stage: Stage) -> fx.Node:
    """What the last linear operator before the logits reads."""
    port = stage.find_outputs(Role.LOGITS)[0]
    node = stage.output_node(port)
    while node.target is not aten.linear.default:
        before = [source for source in node.all_input_nodes if not is_weight(source)]
        if len(before) != 1:
            raise PreconditionError(
                "the logits are not computed from hidden states by one linear head", node=node
            )
        (node,) = before
    hidden = node.args[0]
    assert isinstance(hidden, fx.Node)
    if hidden.meta["val"].shape[:2] != (stage.facts["batch"], stage.facts["tokens"]):
        raise PreconditionError("the head does not read every token", node=hidden)
    return hidden
