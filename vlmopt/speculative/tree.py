"""Draft trees: what a node of one descends from.

A tree is a tensor of parents, int64 ``[nodes]``: node 0 is the root, whose parent is -1, and every
other node comes behind its parent. Trees of one size give tensors of one shape.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from vlmopt.errors import PreconditionError

PAD = -1
"""Where a path has ended."""


def chain(length: int) -> Tensor:
    """The tree that is one path of ``length`` nodes."""
    return torch.arange(-1, length - 1)


def full(widths: tuple[int, ...]) -> Tensor:
    """The tree whose nodes of depth ``d`` have ``widths[d]`` children each, level by level."""
    levels = [torch.zeros(1, dtype=torch.int64)]
    parents = [torch.full((1,), PAD)]
    for width in widths:
        parents.append(levels[-1].repeat_interleave(width))
        first = int(levels[-1][-1]) + 1
        levels.append(torch.arange(first, first + len(parents[-1])))
    return torch.cat(parents)


def require_tree(parents: Tensor) -> None:
    """Raise a PreconditionError where ``parents`` describes no tree."""
    fits = parents.ndim == 1 and len(parents) > 0 and int(parents[0]) == PAD
    places = torch.arange(len(parents), device=parents.device)
    if not fits or not bool(((parents >= 0) & (parents < places))[1:].all()):
        raise PreconditionError(
            f"{parents.tolist()} are the parents of no tree",
            hint="node 0 is the root, its parent -1; all others come behind their parents",
        )


def tree_mask(parents: Tensor) -> Tensor:
    """What the nodes of a tree may attend to: themselves, and what they descend from.

    Returns:
        bool ``[nodes, nodes]``, queries first.
    """
    seen = np.eye(len(parents), dtype=bool)
    for node, parent in enumerate(parents[1:].tolist(), 1):
        seen[node] |= seen[parent]
    return torch.from_numpy(seen).to(parents.device)


def paths(parents: Tensor) -> Tensor:
    """The nodes from the root to each leaf.

    Returns:
        int64 ``[leaves, depth + 1]``, leaves ascending, :data:`PAD` behind the end of a path.
    """
    mask = tree_mask(parents)
    inner = torch.zeros(len(parents), dtype=torch.bool, device=parents.device)
    inner[parents[1:]] = True
    rows = mask[~inner]
    lengths = rows.sum(-1, keepdim=True)
    longest = int(lengths.max())
    # those that a leaf descends from, in their order, which is from the root down
    nodes = rows.to(torch.uint8).sort(dim=-1, descending=True, stable=True).indices[:, :longest]
    return nodes.masked_fill(torch.arange(longest, device=nodes.device) >= lengths, PAD)


def candidates(tokens: Tensor, rows: Tensor) -> Tensor:
    """The tokens along each path.

    Args:
        tokens: int64 ``[nodes]``.
        rows: int64 ``[paths, length]``, see :func:`paths`.

    Returns:
        int64 ``[paths, length]``, :data:`PAD` where ``rows`` has it.
    """
    return torch.where(rows == PAD, PAD, tokens[rows.clamp(min=0)])


def tree_of(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tree of some paths, which share the nodes of what they have in common in front.

    Args:
        rows: int64 ``[paths, length]``, tokens; the first column is the root, :data:`PAD` stands
            behind the end of a path.

    Returns:
        int64: the tokens ``[nodes]``, numbered as they appear, path by path; their parents
        ``[nodes]``; and the nodes of each path, ``[paths, length]``.

    Raises:
        PreconditionError: the paths do not begin with one root, or go on behind their end.
    """
    ended = rows == PAD
    if bool((rows[:, 0] != rows[0, 0]).any()) or bool((ended[:, :-1] & ~ended[:, 1:]).any()):
        raise PreconditionError(
            "these paths are not those of one tree",
            hint="begin each with the same root, and put -1 behind its end only",
        )
    known: dict[tuple[int, ...], int] = {}
    tokens: list[int] = []
    parents: list[int] = []
    nodes = torch.full_like(rows, PAD)
    for at, row in enumerate(rows.tolist()):
        for depth, token in enumerate(row):
            if token == PAD:
                break
            place = tuple(row[: depth + 1])
            if place not in known:
                known[place] = len(tokens)
                tokens.append(token)
                parents.append(known.get(place[:-1], PAD))
            nodes[at, depth] = known[place]
    return rows.new_tensor(tokens), rows.new_tensor(parents), nodes
