"""Values that tell tokens their places: rotary tables, and position ids themselves.

A method may let the tokens that stay keep their positions, or number them anew. Either way a
token's place in the cache is another matter.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlmopt.program import Modality, Role, Stage

aten = torch.ops.aten

_TABLES = {aten.cos.default, aten.sin.default, aten.polar.default}

# beyond these a value holds features, whatever positions went into them
_FEATURES = {
    aten.linear.default,
    aten.embedding.default,
    aten.convolution.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.scaled_dot_product_attention.default,
    aten.masked_scatter.default,
    aten.index_put.default,
}


def carries_positions(value: fx.Node) -> bool:
    """Whether ``value`` is a rotary table, or made of one."""
    seen, stack = {value}, [value]
    while stack:
        node = stack.pop()
        if node.target in _TABLES:
            return True
        if node.target in _FEATURES:
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return False


def has_one_axis(stage: Stage) -> bool:
    """Whether positions are one number per token, and not three as in M-RoPE."""
    ports = stage.find_inputs(Role.POSITION_IDS)
    return all(stage.placeholder(port).meta["val"].ndim <= 2 for port in ports)


def renumbered(modality: Tensor, slots: Tensor, valid: Tensor | None) -> Tensor:
    """Where in the sequence before a cut to find the position that a token gets by renumbering.

    Args:
        modality: int64 ``[batch, tokens]`` before the cut; fillers of an earlier one are padding.
        slots: int64 ``[batch, length]`` ascending, the tokens that stay.
        valid: bool ``[batch, length]``, False for fillers; ``None`` where there are none.

    Returns:
        int64 ``[batch, length]``: the first token that is not padding takes the place of the first
        such one before, and so on.
    """
    real = modality != Modality.PADDING
    stays = real.gather(1, slots)
    if valid is not None:
        stays = stays & valid
    before = torch.sort((~real).long(), dim=-1, stable=True).indices
    place = before.gather(1, (stays.long().cumsum(-1) - 1).clamp(min=0))
    return torch.where(stays, place, slots)


def dropped_before(mask: Tensor, kept: Tensor, prompt: int) -> Tensor:
    """Tokens of the prompt that are gone, padding apart; int64 ``[batch, 1]``.

    Args:
        mask: ``[batch, tokens seen]``, 0 for padding.
        kept: int64 ``[batch, kept]``, original slots, -1 for fillers.
        prompt: tokens of the prompt.
    """
    real = (mask != 0).long()
    left = real.gather(1, kept.clamp(min=0)) * (kept >= 0)
    return real[:, :prompt].sum(1, keepdim=True) - left.sum(1, keepdim=True)
