"""How much of a draft is taken over without asking the target.

"VVS: Accelerating Speculative Decoding for Visual Autoregressive Generation via Partial
Verification Skipping", arXiv 2511.13587.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.speculative.tree import PAD


@dataclass(frozen=True)
class Taken:
    """What a step without verification commits.

    Attributes:
        tokens: int64 ``[taken]``: the root, and drafts behind it.
        root: int64 scalar, the draft that is the root of the next tree.
    """

    tokens: Tensor
    root: Tensor


def taken_length(candidates: Tensor, row: int) -> int:
    """How many tokens of a path are taken: fewer than it has, and than paths have on average.

    Args:
        candidates: int64 ``[paths, length]``, tokens, root first; -1 behind the end of a path.
        row: the path.

    Raises:
        PreconditionError: some path is no more than the root.
    """
    lengths = (candidates != PAD).sum(-1)
    if int(lengths.min()) < 2:
        raise PreconditionError(
            "a path of this draft is no more than its root, and the next root would come from it",
            hint="draft at least one token behind the root",
        )
    return min(int(lengths[row]), int(lengths.sum()) // len(lengths)) - 1


def take_path(candidates: Tensor, row: int) -> Taken:
    """The front of a path, and the token behind it; see :func:`taken_length`."""
    length = taken_length(candidates, row)
    return Taken(candidates[row, :length], candidates[row, length])
