"""Which nodes of a draft are worth the target's time: those that it is likely to reach.

"EAGLE-2: Faster Inference of Language Models with Dynamic Draft Trees", arXiv 2406.16858.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.speculative.tree import PAD


def likeliest_subtree(parents: Tensor, reached: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` nodes that are most likely reached; of equal ones, those in front.

    Args:
        parents: int64 ``[nodes]``, see :mod:`vlmopt.speculative.tree`.
        reached: ``[nodes]``, logarithms of the products of the drafter's chances on the path to
            each node, the root's the highest. None exceeds its parent's, so that no node is kept
            without it.
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
    kept = reached.sort(descending=True, stable=True).indices[:count].sort().values
    places = torch.full_like(parents, PAD)
    places[kept] = torch.arange(count, device=parents.device)
    before = parents[kept]
    return kept, torch.where(before == PAD, PAD, places[before])
