"""DivPrune: keep the visual tokens that differ most from each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.ops.selection import farthest_point
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import override


@dataclass(frozen=True, kw_only=True)
class DivPrune(TokenDrop):
    """Keep a set of visual tokens whose smallest distance to each other is large.

    Greedy max-min diversity by cosine distance: first the token whose nearest neighbour is
    farthest away, then always the one farthest from all picked. Acts on the embeddings that enter
    the language model, unless ``layers`` says otherwise; needs no attention.

    Reference: "DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models",
    arXiv 2503.02175.
    """

    name = "divprune"
    example = "divprune{keep=0.098}"
    reference = "arXiv 2503.02175"
    reads = ("hidden", "valid", "count")
    compact = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.098,))

    @staticmethod
    def score(hidden: Tensor, valid: Tensor, count: int) -> Tensor:  # type: ignore[override]
        """Earlier picks score higher.

        Args:
            hidden: ``[batch, visual tokens, width]``.
            valid: bool ``[batch, visual tokens]``.
            count: picks.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        picks = farthest_point(hidden, valid, None, None, count, "cosine")
        return select.by_order(picks, hidden.shape[1])
