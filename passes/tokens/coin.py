"""CoIn: keep visual tokens that are informative, and together cover much."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.ops.selection import greedy_log_det
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override


@dataclass(frozen=True, kw_only=True)
class CoIn(TokenDrop):
    """Keep visual tokens one by one, each for its information and for the volume it adds.

    Information is the norm of a token and its cosine with the mean of the text; volume is the
    determinant of the Gram matrix of the tokens kept. Acts on the embeddings that enter the
    language model; needs no attention.

    Reference: "CoIn: Coverage and Informativeness-Guided Token Reduction for Efficient Large
    Multimodal Models", CVPR 2026. How the paper scales the gain in volume is not public: here it
    is scaled to 0 .. 1 over the open tokens at each step (``norm=step``), or by the first step's
    extremes (``norm=global``).
    """

    name = "coin"
    example = "coin{keep=64}"
    reference = "CVPR 2026"
    reads = ("hidden", "text_mean", "valid", "count")
    compact = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.11,))
    positions: str = override(TokenDrop, "positions", "auto")
    alpha: float = option(0.5, "weight of volume against information", ge=0, le=1)
    beta: float = option(0.5, "weight of norm against alignment with the text", ge=0, le=1)
    ridge: float = option(1e-6, "added to the Gram matrix, times the mean squared norm", gt=0)
    norm: str = option("step", "how gains in volume are scaled", choices=("step", "global"))
    unit: bool = option(False, "volume of directions only, without norms")

    def score(  # type: ignore[override]
        self, hidden: Tensor, text_mean: Tensor, valid: Tensor, count: int
    ) -> Tensor:
        """Earlier picks score higher.

        Args:
            hidden: ``[batch, visual tokens, width]``.
            text_mean: mean embedding of the text, ``[batch, width]``.
            valid: bool ``[batch, visual tokens]``.
            count: picks.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        rows = hidden.float()
        if self.unit:
            rows = torch.nn.functional.normalize(rows, dim=-1)
        picks = greedy_log_det(
            rows,
            valid,
            self.information(hidden, text_mean, valid),
            self.alpha,
            self.ridge,
            count,
            self.norm == "step",
        )
        return select.by_order(picks, hidden.shape[1])

    def information(self, hidden: Tensor, text_mean: Tensor, valid: Tensor) -> Tensor:
        """Norm and alignment with the text, each scaled to 0 .. 1: float32 ``[batch, tokens]``."""
        rows = hidden.float()
        alignment = torch.nn.functional.cosine_similarity(rows, text_mean.float()[:, None], dim=-1)
        norm = select.min_max(rows.norm(dim=-1), valid)
        return self.beta * norm + (1 - self.beta) * select.min_max(alignment, valid)
