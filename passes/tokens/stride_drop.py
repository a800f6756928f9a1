"""Stride drop: keep every n-th visual token, the cheapest baseline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option


@dataclass(frozen=True, kw_only=True)
class StrideDrop(TokenDrop):
    """Keep visual tokens at even distances, whatever they hold: a baseline beside random-drop."""

    name = "stride-drop"
    example = "stride-drop{layers=2 keep=0.33}"
    reads = ("ordinal", "quota", "present")

    fixed: bool = option(
        False, "choose when the graph is rewritten, for prompts of one layout: slices, no gathers"
    )

    def is_fixed(self) -> bool:
        return self.fixed

    @staticmethod
    def score(ordinal: Tensor, quota: Tensor, present: Tensor) -> Tensor:  # type: ignore[override]
        """1 for as many tokens as stay, evenly spread.

        Args:
            ordinal: int64 ``[batch, tokens]``, number of each visual token among its sample's.
            quota, present: int64 ``[batch, 1]``, visual tokens that stay, and that there are.
        """
        return select.strided(ordinal, quota, present)
