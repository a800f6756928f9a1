"""FastV: drop the visual tokens that the last token attends to least."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import override


@dataclass(frozen=True, kw_only=True)
class FastV(TokenDrop):
    """Drop the visual tokens that the last token of the prompt attends to least.

    At the entry of layer ``k``, a token's score is the attention that it got from the prompt's
    last token in layer ``k - 1``, mean over heads. Only that one row of attention is computed.

    Reference: "An Image is Worth 1/2 Tokens After Layer 2: Plug-and-Play Inference Acceleration
    for Large Vision-Language Models", arXiv 2403.06764.
    """

    name = "fastv"
    example = "fastv{layers=2 keep=0.5}"
    reference = "arXiv 2403.06764"
    first_layer = 1
    reads = ("last_attention",)

    layers: tuple[int, ...] = override(TokenDrop, "layers", (2,), ge=1)

    @staticmethod
    def score(last_attention: Tensor) -> Tensor:  # type: ignore[override]
        """The attention itself.

        Args:
            last_attention: float32 ``[batch, tokens]``.
        """
        return last_attention
