"""Marking visual tokens for ``torch.compile`` in models whose code breaks into many graphs."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch


@cache
def mark_tokens_operator() -> Any:
    """``vlmopt::mark_tokens(embeds, mask, count)``: ``embeds``, and which rows come from vision.

    ``count`` is the number of True in ``mask``, of all samples together.
    """

    @torch.library.custom_op("vlmopt::mark_tokens", mutates_args=())
    def mark_tokens(embeds: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
        return embeds.clone()

    @mark_tokens.register_fake
    def _(embeds: torch.Tensor, mask: torch.Tensor, count: int) -> torch.Tensor:
        return torch.empty_like(embeds)

    mark_tokens.register_autograd(lambda ctx, gradient: (gradient, None, None))
    return torch.ops.vlmopt.mark_tokens.default
