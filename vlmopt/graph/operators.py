"""The operators of vlmopt's own that stand in graphs. None of them reaches a backend.

Both say something about tokens and compute nothing: they are markers that survive tracing.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


@torch.library.custom_op("vlmopt::mark_tokens", mutates_args=())
def mark_tokens(embeds: Tensor, mask: Tensor, counts: Sequence[int]) -> Tensor:
    """``embeds``, and which of its rows come from vision.

    Args:
        embeds: ``[batch, tokens, width]``, any float dtype.
        mask: bool ``[batch, tokens]``.
        counts: number of True in each row of ``mask``.
    """
    return embeds.clone()


@mark_tokens.register_fake
def _(embeds: Tensor, mask: Tensor, counts: Sequence[int]) -> Tensor:
    return torch.empty_like(embeds)


mark_tokens.register_autograd(lambda ctx, gradient: (gradient, None, None))


@torch.library.custom_op("vlmopt::kept_tokens", mutates_args=())
def kept_tokens(hidden: Tensor) -> Tensor:
    """Slots of the prompt that the rows of ``hidden`` belong to, int64 ``[batch, tokens]``.

    As an operator it answers "all, in order"; where tokens were dropped before, the rewritten
    graph holds the true slots in its place, -1 for fillers.

    Args:
        hidden: ``[batch, tokens, width]``.
    """
    batch, tokens = hidden.shape[:2]
    return torch.arange(tokens, device=hidden.device).repeat(batch, 1)


@kept_tokens.register_fake
def _(hidden: Tensor) -> Tensor:
    return hidden.new_empty(hidden.shape[:2], dtype=torch.int64)
