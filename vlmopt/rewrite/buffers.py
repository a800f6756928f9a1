"""A prefill stage that goes on from what it saw before: keys and values in buffers of fixed size.

Each layer writes its keys and values into rows of a buffer, and attends to the rows that hold
tokens seen before, and to its own as the model would. Where in a buffer a token lies makes no
difference: rotary positions are in the keys already.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_arguments, attention_mask, is_causal, replace_mask
from vlmopt.program import Port, Role, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.tokens import remove_unused

aten = torch.ops.aten

_SAME_ROWS = {
    aten.unsqueeze.default,
    aten.expand.default,
    aten.reshape.default,
    aten.view.default,
    aten._unsafe_view.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.slice.Tensor,
    aten.alias.default,
}
"""What may lie between keys as they are cached and as attention takes them: one copy for each head
that shares them."""


def keep_in_buffers(
    stage: Stage, groups: Sequence[int], capacities: Sequence[int], *, masks_given: bool = False
) -> None:
    """Let each layer attend to what its buffers hold, and give them back with its own rows.

    The stage gets the inputs ``slots_<group>``, int64 ``[tokens]``, rows of the buffers that it
    writes; ``filled_<group>``, bool ``[capacity]``, those that hold tokens seen before; and
    ``past_key_<layer>`` and ``past_value_<layer>``, ``[batch, heads, capacity, width]``. Its
    outputs of keys and values become those buffers.

    Args:
        stage: a prefill stage, changed in place.
        groups: of each layer; layers that hold the same tokens form a group.
        capacities: rows of the buffers of each group.
        masks_given: attention sees what ``visible_<group>`` says, bool ``[batch, 1, tokens,
            capacity]``, an input in place of ``filled_<group>``; what the model hid of the tokens
            from one another is left out.

    Raises:
        PreconditionError: attention of a layer does not read the keys that it gives back.
    """
    keys, values = stage.find_outputs(Role.KEY), stage.find_outputs(Role.VALUE)
    place = stage.output_node(keys[0])
    emit = Emitter(
        stage.graph,
        stamp=lambda node: None,
        place=place,
        prefix="past",
        fake_mode=stage.fake_mode(),
    )
    ports: dict[int, tuple[fx.Node, fx.Node]] = {}
    masks: dict[tuple[int, fx.Node | bool], fx.Node] = {}
    results: dict[str, fx.Node] = {}
    for key_port, value_port in zip(keys, values, strict=True):
        layer = key_port.layer
        assert layer is not None
        group = groups[layer]
        nodes = stage.output_node(key_port), stage.output_node(value_port)
        attention = _attention_on(stage, *nodes)
        if group not in ports:
            ports[group] = _group_inputs(
                stage, group, nodes[0], capacities[group], masks_given=masks_given
            )
        slots, rows_seen = ports[group]
        shares = _shares_heads(attention, *nodes)
        for role, port, node in zip(_PAST, (key_port, value_port), nodes, strict=True):
            shape = [*node.meta["val"].shape]
            shape[2] = capacities[group]
            past = stage.add_input(
                Port(f"past_{role}_{layer}", role, layer), *shape, dtype=node.meta["val"].dtype
            )
            emit.place = attention
            with stage.graph.inserting_before(attention):
                results[port.name] = emit.trace(_written, past, slots, node, names=(f"{role}s",))
        mask = attention_mask(attention)
        causal = is_causal(attention)
        key = (group, mask if isinstance(mask, fx.Node) else causal)
        seen = rows_seen if masks_given else masks.get(key)
        if seen is None:
            with stage.graph.inserting_before(attention):
                seen = emit.trace(
                    _visible, rows_seen, slots, mask, nodes[0].meta["val"].shape[2], causal,
                    names=("visible",),
                )  # fmt: skip
            masks[key] = seen
        new = (results[port.name] for port in (key_port, value_port))
        attention.args = (attention.args[0], *new, *attention.args[3:])
        replace_mask(attention, seen)
        if shares:  # copies of a whole buffer would cost more than attention
            attention.kwargs = {**attention.kwargs, "enable_gqa": True}
    output = stage.graph.output_node()
    output.args = (
        tuple(
            results.get(port.name, node)
            for port, node in zip(stage.outputs, output.args[0], strict=True)  # type: ignore[arg-type]
        ),
    )
    stage.outputs = tuple(
        replace(port, kept=None) if port.name in results else port for port in stage.outputs
    )
    remove_unused(stage)


_PAST = (Role.KEY, Role.VALUE)


def _group_inputs(
    stage: Stage, group: int, key: fx.Node, capacity: int, *, masks_given: bool
) -> tuple[fx.Node, fx.Node]:
    batch, _, tokens, _ = key.meta["val"].shape
    slots = stage.add_input(Port(f"slots_{group}", Role.SLOTS), tokens, dtype=torch.int64)
    if masks_given:
        port, shape = Port(f"visible_{group}", Role.VISIBLE), [batch, 1, tokens, capacity]
    else:
        port, shape = Port(f"filled_{group}", Role.FILLED), [capacity]
    return slots, stage.add_input(port, *shape, dtype=torch.bool)


def _attention_on(stage: Stage, key: fx.Node, value: fx.Node) -> fx.Node:
    """The one attention that takes these, or copies of them for each head."""
    found = [
        node
        for node in stage.graph.find_nodes(
            op="call_function", target=aten.scaled_dot_product_attention.default
        )
        if _origin(node.args[1], key) and _origin(node.args[2], value)
    ]
    if len(found) != 1:
        raise PreconditionError(
            f"{len(found)} attentions read the keys that this layer gives back, and just one must, "
            "for earlier tokens to be put in front of them",
            node=key,
            hint="leave out passes that compute attention otherwise",
        )
    return found[0]


def _origin(value: fx.Node, wanted: fx.Node) -> bool:
    while value is not wanted:
        if value.target not in _SAME_ROWS:
            return False
        value = value.args[0]  # type: ignore[assignment]
    return True


def _shares_heads(attention: fx.Node, *cached: fx.Node) -> bool:
    """Whether attention takes each of the keys and values for several heads in a row.

    Raises:
        PreconditionError: in another order.
    """
    shares = bool(attention_arguments(attention).get("enable_gqa"))
    for before, taken in zip(cached, attention.args[1:3], strict=True):
        assert isinstance(taken, fx.Node)
        shape = before.meta["val"].shape
        copies = taken.meta["val"].shape[1] // shape[1]
        numbers = torch.arange(shape[1]).view(1, -1, 1, 1).expand(shape)
        if not _copied(taken, before, numbers).equal(numbers.repeat_interleave(copies, 1)):
            raise PreconditionError("heads share keys in an order that is not known", node=taken)
        shares = shares or copies > 1
    return shares


def _copied(value: fx.Node, source: fx.Node, given: Tensor) -> Tensor:
    """What ``value`` is where ``source`` is ``given``; nothing but copies lies between."""
    if value is source:
        return given
    target: Any = value.target
    return target(_copied(value.args[0], source, given), *value.args[1:], **value.kwargs)  # type: ignore[arg-type]


def _written(past: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    return aten.index_put.default(past, [None, None, slots], rows)  # type: ignore[no-any-return]


def _visible(
    filled: Tensor, slots: Tensor, mask: Tensor | None, tokens: int, causal: bool
) -> Tensor:
    """What attention may look at: what was there, and of the tokens at ``slots`` what it could."""
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=filled.device)
        mask = mask.tril() if causal else mask
    if mask.dtype == torch.bool:
        past = filled
    else:
        past = torch.zeros(filled.shape, dtype=mask.dtype, device=filled.device)
        past = past.masked_fill(~filled, torch.finfo(mask.dtype).min)
    rows = mask.reshape(-1, tokens)
    wide = aten.index_put.default(past.expand(rows.shape[0], -1), [None, slots], rows)
    return wide.reshape(*mask.shape[:-1], len(filled))
