"""PyramidDrop: in stages, keep the visual tokens that the last instruction token attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import override


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(TokenDrop):
    """Drop visual tokens in stages, by what the last instruction token would attend to next.

    At the entry of each chosen layer ``k``, a token's score is the attention that it would get
    from the prompt's last token in layer ``k``, mean over heads: one row, computed with that
    layer's own norm and projections before anything is dropped. Shares are of the original visual
    tokens, as in the paper's stages of ratio 0.5.

    Reference: "PyramidDrop: Accelerating Your Large Vision-Language Models via Pyramid Visual
    Redundancy Reduction", arXiv 2410.17247.
    """

    name = "pyramid-drop"
    example = "pyramid-drop{layers=8,16,24 keep=0.5,0.25,0.125}"
    reference = "arXiv 2410.17247"
    reads = ("last_attention_ahead",)

    layers: tuple[int, ...] = override(TokenDrop, "layers", (8, 16, 24))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.5, 0.25, 0.125))
    of: str = override(TokenDrop, "of", "original")

    @staticmethod
    def score(last_attention_ahead: Tensor) -> Tensor:  # type: ignore[override]
        """The attention itself.

        Args:
            last_attention_ahead: float32 ``[batch, tokens]``.
        """
        return last_attention_ahead
