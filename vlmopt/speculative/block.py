"""What one forward of the target reads: tokens that wait for it, and a draft behind them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.speculative.tree import chain, depths, tree_mask


@dataclass(frozen=True)
class Block:
    """Tokens of one forward, in a fixed number of places.

    Committed tokens that the target has not seen come first, then a draft tree, then fillers, which
    see only themselves and which no one sees.

    Attributes:
        mask: bool ``[places, places]``, queries first.
        offsets: int64 ``[places]``, positions behind the last token that the target has seen.
        pending: how many committed tokens there are.
        size: how many places are no fillers.
    """

    mask: Tensor
    offsets: Tensor
    pending: int
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
    mask = torch.eye(places, dtype=torch.bool, device=parents.device)
    offsets = torch.zeros(places, dtype=torch.int64, device=parents.device)
    if pending:
        mask[:pending, :pending] = tree_mask(chain(pending)).to(mask.device)
        mask[pending:size, :pending] = True
        offsets[:pending] = torch.arange(pending, device=offsets.device)
    mask[pending:size, pending:size] = tree_mask(parents)
    offsets[pending:size] = depths(parents) + pending
    return Block(mask, offsets, pending, size)
