"""Attention masks that are the same for every prompt, said in one word instead of a tensor.

Hugging Face leaves the mask of an unpadded prompt out, ``is_causal=True`` says all of it; while
tracing for export it cannot know that prompts will be unpadded, and builds a ``[tokens, tokens]``
mask. A specialised graph does know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from vlmopt.graph.attention import ARGUMENTS, attention_arguments

aten = torch.ops.aten

LARGEST = 2**28
"""Elements of a mask that are looked at; a larger one stays as it is."""


def drop_constant_masks(
    graph: fx.Graph, given: Mapping[fx.Node, torch.Tensor] | None = None
) -> int:
    """Replace constant masks of attention by ``is_causal=True``, or by nothing if all is visible.

    Only masks computed from numbers alone are looked at: none that an input or a weight has a part
    in. Attention whose mask hides anything else than later tokens stays as it is.

    Args:
        graph: changed in place.
        given: inputs that always have these values.

    Returns:
        Number of attention nodes changed.
    """
    known: dict[fx.Node, Any] = dict(given or {})
    kinds: dict[fx.Node, str | None] = {}
    changed = 0
    for node in graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    ):
        arguments = attention_arguments(node)
        mask = arguments.pop("attn_mask", None)
        if not isinstance(mask, fx.Node) or arguments.get("is_causal"):
            continue
        if mask not in kinds:
            kinds[mask] = _kind(
                _value(mask, known), queries=_length(node, 0), keys=_length(node, 1)
            )
        if kinds[mask] is None:
            continue
        if kinds[mask] == "causal":
            arguments["is_causal"] = True
        node.args = tuple(arguments.pop(name) for name in ARGUMENTS[:3])
        node.kwargs = {name: arguments[name] for name in ARGUMENTS if name in arguments}
        changed += 1
    if changed:
        graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    return changed


def _length(node: fx.Node, operand: int) -> Any:
    value: Any = node.args[operand]
    return value.meta["val"].shape[-2]


def _kind(mask: torch.Tensor | None, *, queries: Any, keys: Any) -> str | None:
    """``causal``, ``open`` (hides nothing), or ``None`` for anything else."""
    if mask is None or mask.ndim < 2:
        return None
    if mask.dtype == torch.bool:
        visible = mask
    else:  # added to the scores
        visible = mask == 0
        if not bool((visible | (mask <= torch.finfo(mask.dtype).min)).all()):
            return None
    if bool(visible.all()):
        return "open"
    square = mask.shape[-2:] == (queries, keys) and queries == keys
    lower = torch.ones(mask.shape[-2:], dtype=torch.bool).tril()
    return "causal" if square and bool((visible == lower).all()) else None


def _value(node: fx.Node, known: dict[fx.Node, Any]) -> torch.Tensor | None:
    """What a node that depends on numbers alone computes; ``None`` for others."""
    needed: list[fx.Node] = []
    waiting = [node]
    while waiting:
        current = waiting.pop()
        if current in known or current in needed:
            continue
        if not _is_constant(current):
            return None
        needed.append(current)
        waiting.extend(current.all_input_nodes)
    wanted = set(needed)
    with torch.no_grad():
        for current in node.graph.nodes:  # in order, so that operands come first
            if current in wanted:
                args, kwargs = pytree.tree_map_only(
                    fx.Node, known.__getitem__, (current.args, current.kwargs)
                )
                if "device" in kwargs:  # wherever the graph runs
                    kwargs = {**kwargs, "device": torch.device("cpu")}
                target: Any = current.target
                known[current] = target(*args, **kwargs)
    result = known[node]
    return result if isinstance(result, torch.Tensor) else None


def _is_constant(node: fx.Node) -> bool:
    """Whether a node, given constant operands, always has the same value, and a small one."""
    target, value = node.target, node.meta.get("val")
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and not target._schema.is_mutable
        and torch.Tag.nondeterministic_seeded not in target.tags
        and "empty" not in target._schema.name
        and isinstance(value, torch.Tensor)
        and all(isinstance(size, int) for size in value.shape)
        and value.numel() <= LARGEST
    )
