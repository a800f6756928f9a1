"""Attention whose logsumexp is asked for too: on the CPU one kernel gives both."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from vlmopt.graph.attention import attention_arguments
from vlmopt.program import copy_graph

aten = torch.ops.aten


def has_shared_attention(gm: fx.GraphModule) -> bool:
    """Whether :func:`with_shared_attention` finds anything."""
    return next(_pairs(gm.graph), None) is not None


def with_shared_attention(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which attention gives its own logsumexp where that is asked for; ``gm`` unchanged.

    Other attention, and that of other devices or of fewer key heads, stays as it is.
    """
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    for attention, sums in list(_pairs(result.graph)):
        query, key, mask, causal, scale = _asked(sums)
        with result.graph.inserting_before(attention):
            both = result.graph.call_function(
                torch.ops.vlmopt.attention_with_logsumexp.default,
                (query, key, attention.args[2], mask, causal, scale),
            )
            parts = [result.graph.call_function(operator.getitem, (both, at)) for at in (0, 1)]
        for node, part in zip((attention, sums), parts, strict=True):
            part.meta = dict(node.meta)
            node.replace_all_uses_with(part)
            result.graph.erase_node(node)
        both.meta = {**attention.meta, "val": tuple(part.meta["val"] for part in parts)}
    result.recompile()
    return result


def _pairs(graph: fx.Graph) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Attention, and its logsumexp."""
    target = torch.ops.vlmopt.attention_logsumexp.default
    for sums in graph.find_nodes(op="call_function", target=target):
        query, key, mask, causal, scale = _asked(sums)
        for attention in query.users:
            if attention.target is not aten.scaled_dot_product_attention.default:
                continue
            given = attention_arguments(attention)
            same = (given["query"], given["key"], given.get("attn_mask")) == (query, key, mask)
            how = (bool(given.get("is_causal")), given.get("scale")) == (causal, scale)
            if same and how and not given.get("dropout_p") and _fits(given, causal):
                yield attention, sums
                break


def _asked(sums: fx.Node) -> tuple[Any, ...]:
    """Query, key, mask, causal and scale; a trace leaves defaults out."""
    return (*sums.args, *(None, False, None)[len(sums.args) - 2 :])


def _fits(given: dict[str, Any], causal: bool) -> bool:
    query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
    mask = given["attn_mask"].meta["val"] if given.get("attn_mask") is not None else None
    return (
        query.device.type == "cpu"
        and query.ndim == 4
        and query.shape[1] == key.shape[1] == value.shape[1]
        and query.shape[3] == value.shape[3]
        and (not causal or query.shape[2] == key.shape[2])
        and (mask is None or mask.ndim == 4)
    )
