"""Stride drop: keep every n-th visual token, the cheapest baseline."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.passes.tokens.base import TokenDrop


@dataclass(frozen=True, kw_only=True)
class StrideDrop(TokenDrop):
    """Keep visual tokens at even distances, whatever they hold: a baseline beside random-drop."""

    name = "stride-drop"
    example = "stride-drop{layers=2 keep=0.33}"
    reads = ("ordinal", "quota", "present")

    @staticmethod
    def score(ordinal: Tensor, quota: Tensor, present: Tensor) -> Tensor:  # type: ignore[override]
        """1 for as many tokens as stay, evenly spread.

        Args:
            ordinal: int64 ``[batch, tokens]``, number of each visual token among its sample's.
            quota, present: int64 ``[batch, 1]``, visual tokens that stay, and that there are.
        """
        there = present.clamp(min=1)
        before = torch.div(ordinal * quota, there, rounding_mode="floor")
        after = torch.div((ordinal + 1) * quota, there, rounding_mode="floor")
        return (after > before).float()
