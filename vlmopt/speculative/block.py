"""What one forward of the target reads: tokens that wait for it, and a draft behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.speculative.tree import tree_mask


@dataclass(frozen=True)
class Block:
    """Tokens of one forward, in a fixed number of places.

    Committed tokens that the target has not seen come first, then a draft tree, then fillers, which
    see only themselves and which no one sees.

    Attributes:
        mask: bool ``[places, earlier + places]``, queries first: which tokens of this block, and of
            blocks read before and not yet committed, a token attends to.
        offsets: int64 ``[places]``, positions behind the last token that is kept.
        size: how many places are no fillers.
    """

    mask: Tensor
    offsets: Tensor
    size: int

    def fill(self, tokens: Tensor) -> Tensor:
        """Tokens ``[..., size]`` in the places of the block, 0 in those of fillers."""
        return torch.nn.functional.pad(tokens, (0, len(self.mask) - tokens.shape[-1]))


def block_of(parents: Tensor, places: int, *, pending: int = 0) -> Block:
    """A block of ``pending`` committed tokens and a tree, whose root stands behind them.

    Args:
        parents: int64 ``[nodes]``, see :mod:`vlmopt.speculative.tree`.
        places: tokens that the stage reads.

    Raises:
        PreconditionError: they do not fit.
    """
    size = pending + len(parents)
    if size > places:
        raise PreconditionError(
            f"{pending} tokens and a tree of {len(parents)} do not fit in {places} places",
            hint="compile the stage for more tokens, or draft fewer",
        )
    inside = tree_mask(parents)
    mask = torch.eye(places, dtype=torch.bool, device=parents.device)
    mask[:pending, :pending] = torch.ones_like(mask[:pending, :pending]).tril()
    mask[pending:size, :pending] = True
    mask[pending:size, pending:size] = inside
    offsets = torch.zeros(places, dtype=torch.int64, device=parents.device)
    offsets[:pending] = torch.arange(pending, device=offsets.device)
    offsets[pending:size] = inside.sum(-1) - 1 + pending
    return Block(mask, offsets, size)
