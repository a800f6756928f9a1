"""A stage that reads drafts: trees of tokens behind what its buffers hold, all paths at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_mask, is_causal, replace_mask
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.graph.reach import is_weight
from vlmopt.program import Port, Role, Stage
from vlmopt.rewrite.buffers import keep_in_buffers
from vlmopt.rewrite.tokens import remove_unused

aten = torch.ops.aten

TREE_MASK = "tree_mask"
"""Name of the input that says what the tokens of a draft may attend to of one another."""


def verify_stage(prefill: Stage, capacity: int, name: str = "verify") -> Stage:
    """A stage that reads as many tokens as ``prefill`` does, of which each has its own past.

    Its inputs are those of ``prefill`` but for the attention mask, with ``position_ids`` as the
    caller says; :data:`TREE_MASK`, bool ``[tokens, tokens]``; and those of
    :func:`~vlmopt.rewrite.buffers.keep_in_buffers`, with one group, 0. Hidden states before the
    head are among its outputs.

    Every token sees all rows that are filled. The layers of the model must do so too, however far
    back they lie: see :func:`vlmopt.families.attention_kinds`.

    Args:
        prefill: a prefill stage of prompts without padding; it is not changed.
        capacity: rows of the buffers.

    Raises:
        PreconditionError: attention of ``prefill`` is not causal, the stage takes no positions, its
            hidden states cannot be told, or ``capacity`` is less than the tokens that it reads.
    """
    stage = replace(prefill.clone(), name=name)
    tokens = int(stage.facts["tokens"])
    if not stage.find_inputs(Role.POSITION_IDS):
        raise PreconditionError(
            f"stage {prefill.name} takes no position_ids, and siblings of a tree share a position",
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
    mask = stage.add_input(Port(TREE_MASK, Role.TREE_MASK), tokens, tokens, dtype=torch.bool)
    for attention in _attentions(stage):
        replace_mask(attention, mask)
    layers = len(stage.find_outputs(Role.KEY))
    keep_in_buffers(stage, [0] * layers, [capacity])
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
        if not is_causal(attention) or attention_mask(attention) is not None:
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
