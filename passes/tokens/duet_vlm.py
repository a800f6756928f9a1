"""DUET-VLM, second stage: in the language model, keep what the text after the image attends to."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import override


@dataclass(frozen=True, kw_only=True)
class DuetVlm(TokenDrop):
    """Drop visual tokens in the language model by the attention of the whole instruction.

    At the entry of each chosen layer ``k``, a token's score is the attention that it would get in
    layer ``k`` from the text after the image, mean over heads and over that text. Shares are of the
    original visual tokens, and 0 drops all. Positions are renumbered, as in the official LLaVA
    code, except where they have several axes.

    Reference: "DUET-VLM: Dual stage Unified Efficient Token reduction for VLM Training and
    Inference", arXiv 2602.18846.
    """

    name = "duet-vlm"
    example = "duet-vlm{layers=16,24 keep=0.5,0}"
    reference = "arXiv 2602.18846"
    reads = ("instruction_attention_ahead",)
    least = 0

    layers: tuple[int, ...] = override(TokenDrop, "layers", (16, 24))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.5, 0.0))
    of: str = override(TokenDrop, "of", "original")
    positions: str = override(TokenDrop, "positions", "auto")

    @staticmethod
    def score(instruction_attention_ahead: Tensor) -> Tensor:  # type: ignore[override]
        """The attention itself.

        Args:
            instruction_attention_ahead: float32 ``[batch, tokens]``.
        """
        return instruction_attention_ahead
