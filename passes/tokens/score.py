"""SCoRe: keep visual tokens that are salient to the encoder and far from each other."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.ops.selection import farthest_point
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.rewrite.encoded import NEEDS_ROUTES


@dataclass(frozen=True, kw_only=True)
class SCoRe(TokenDrop):
    """Keep the visual tokens of a greedy k-center weighted by attention in the vision encoder.

    First the most salient token, then always the one of largest product of its cosine distance to
    those picked and ``salience ** alpha``. Salience is the attention that a token's patches get
    from the class token, or from all patches where there is none; distances are between the
    features that enter the projector, or embeddings where it makes a token of several rows.
    ``alpha=0`` is farthest-point sampling, a large one ranks by salience. All images of a sample
    share one budget.

    Reference: "SCoRe: Salience-Coverage Reduction for Vision Token Pruning in Vision-Language
    Models", CVPR 2026.
    """

    name = "score"
    example = "score{keep=64 alpha=0.8}"
    reference = "CVPR 2026"
    reads = ("encoded_attention", "encoded_features_or_hidden", "valid", "count")
    compact = True
    needs_capture = NEEDS_ROUTES

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.11,))
    positions: str = override(TokenDrop, "positions", "auto")
    alpha: float = option(0.8, "how much salience counts against distance", ge=0)

    def score(self, attention: Tensor, features: Tensor, valid: Tensor, count: int) -> Tensor:  # type: ignore[override]
        """Earlier picks score higher.

        Args:
            attention: float32 ``[batch, visual tokens]``, at least 0.
            features: ``[batch, visual tokens, width]``.
            valid: bool ``[batch, visual tokens]``.
            count: picks.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        salience = attention.float().clamp(min=0)
        start = salience.masked_fill(~valid, -1.0).argmax(-1)
        picks = farthest_point(features, valid, salience**self.alpha, start, count, "cosine")
        return select.by_order(picks, features.shape[1])
