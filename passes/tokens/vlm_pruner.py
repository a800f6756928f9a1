"""VLM-Pruner: keep visual tokens outwards from a few pivots, and feed them the dropped ones."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.ops.selection import centrifugal, similarity
from vlmopt.passes.tokens.assign import absorbed
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.grids import rows_and_columns
from vlmopt.pipeline.options import option, override


@dataclass(frozen=True, kw_only=True)
class VlmPruner(TokenDrop):
    """Keep visual tokens that differ, near ones before far ones; merge the rest into them.

    From pivots that lie far apart in the keys of the layer before, a set grows in rounds: what
    resembles a pick waits, and longer the farther away it lies. A kept token then takes 0.7 of the
    weighted mean of the dropped tokens that resemble it most.

    Reference: "VLM-Pruner: Buffering for Spatial Sparsity in an Efficient VLM Centrifugal Token
    Pruning Paradigm", arXiv 2512.02700. Where the rounds end early, the official code keeps fewer
    tokens; here the least redundant ones fill up (``fill=true``), since shapes are static.
    """

    name = "vlm-pruner"
    example = "vlm-pruner{layers=2 keep=0.111}"
    reference = "arXiv 2512.02700"
    first_layer = 1
    reads = ("hidden", "previous_keys", "valid", "quota", "count")
    compact = True
    merges = True
    rounding = "round"

    layers: tuple[int, ...] = override(TokenDrop, "layers", (2,), ge=1)
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.111,))
    grid: tuple[int, ...] = option((), "rows and columns of an image's tokens; empty: a square")
    premerge: bool = option(
        False, "wrap lines at twice the columns, as the official Qwen code does by mistake"
    )
    pivots: int = option(4, "tokens that the set grows from", ge=1)
    channels: int = option(256, "channels that similarity looks at", ge=1)
    spatial: float = option(0.5, "how much distance adds to redundancy", ge=0)
    threshold: float = option(0.8, "redundancy below which tokens join, in the first round")
    step: float = option(0.1, "added to it in each round", gt=0)
    batch: int = option(16, "candidates looked at together", ge=1)
    own: float = option(0.3, "share of itself in a token that others join", ge=0, le=1)
    clamp: bool = option(True, "merge no token with negative weight")
    fill: bool = option(
        True, "where the rounds end early the least redundant tokens stay too; else the first ones"
    )

    def score(  # type: ignore[override]
        self, hidden: Tensor, keys: Tensor, valid: Tensor, quota: Tensor, count: int
    ) -> Tensor:
        """Earlier picks score higher.

        Args:
            hidden: ``[batch, visual tokens, width]``.
            keys: of the layer before, after RoPE, ``[batch, visual tokens, width of keys]``.
            valid: bool ``[batch, visual tokens]``.
            quota: int64 ``[batch, 1]``.
            count: the largest quota.

        Returns:
            float32 ``[batch, visual tokens]``; 0 for what was not picked.
        """
        # a prompt's images lie one below the other; without a grid there must be one
        tokens, several = hidden.shape[1], bool(self.grid)
        rows, columns = rows_and_columns(self.name, self.grid, tokens, images=several)
        if self.premerge:  # of patches, of which two by two make a token
            rows, columns = 2 * rows, 2 * columns
        place = torch.arange(hidden.shape[1], device=hidden.device)
        places = torch.stack([place % columns, place // columns], -1).float()
        picks = centrifugal(
            hidden,
            keys,
            places,
            valid,
            quota,
            count,
            self.pivots,
            self.channels,
            self.spatial,
            self.threshold,
            self.step,
            self.batch,
            math.hypot(rows, columns),
            self.fill,
        )
        rank = torch.arange(count, 0, -1, device=picks.device, dtype=torch.float32)
        rank = torch.where(picks >= 0, rank, 0.0)
        zeros = torch.zeros(hidden.shape[:2], device=hidden.device)
        return zeros.scatter_add(1, picks.clamp(min=0), rank)

    def merge(  # type: ignore[override]
        self,
        tokens: Tensor,
        score: Tensor,
        kept: Tensor,
        hidden: Tensor,
        keys: Tensor,
        valid: Tensor,
        quota: Tensor,
        count: int,
    ) -> Tensor:
        """Kept tokens with the dropped ones that resemble them most.

        Args:
            tokens, hidden: ``[batch, visual tokens, width]``.
            kept, valid: bool ``[batch, visual tokens]``.
            score, keys, quota, count: as for :meth:`score`; not used.
        """
        rows = tokens.float()
        alike = similarity(rows, self.channels, valid)
        best = alike.masked_fill(~kept[:, None], float("-inf")).max(-1)
        weight = best.values.clamp(min=0) if self.clamp else best.values
        weight = torch.where(valid & ~kept, weight, 0.0)
        return absorbed(rows, best.indices, weight, self.own)
