"""Which nodes of a draft are worth the target's time: those that it is likely to reach.

"EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees", arXiv 2406.16858.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.speculative.tree import PAD, tree_mask


def likeliest_subtree(parents: Tensor, chances: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` nodes that are most likely reached; of equal ones, those in front.

    A node is reached with the product of the chances on its path, so it is never kept without its
    parent.

    Args:
        parents: int64 ``[nodes]``, see :mod:`vlmopt.speculative.tree`.
        chances: ``[nodes]``, logarithms of what the drafter gives each node behind its parent; that
            of the root does not count.
        count: so many nodes stay, the root among them.

    Returns:
        int64 ``[count]``, the nodes that stay, ascending; and their parents in the new numbering.

    Raises:
        PreconditionError: the tree has fewer nodes.
    """
    if not 1 <= count <= len(parents):
        raise PreconditionError(
            f"{count} nodes cannot be chosen from a tree of {len(parents)}",
            hint="draft more tokens per node, or deeper",
        )
    mask = tree_mask(parents)
    steps = chances.float().index_fill(0, torch.zeros(1, dtype=torch.int64).to(mask.device), 0.0)
    sums = steps.expand_as(mask).masked_fill(~mask, 0.0).sum(-1)
    # sums of one path may be rounded otherwise than those of another: none exceeds its parent's
    reached = sums.expand_as(mask).masked_fill(~mask, torch.inf).min(-1).values
    kept = reached.sort(descending=True, stable=True).indices[:count].sort().values
    places = torch.full_like(parents, PAD)
    places[kept] = torch.arange(count, device=parents.device)
    before = parents[kept]
    return kept, torch.where(before == PAD, PAD, places[before])
