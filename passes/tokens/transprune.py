"""TransPrune: keep the visual tokens whose representation is in motion and that the text reads."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override

_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class TransPrune(TokenDrop):
    """Drop visual tokens by their transitions through the layers, and by instruction attention.

    The transition of a token through a half of a layer (attention, feed-forward network) is how
    much its length grows times how far its direction turns. Transitions are summed over the layers
    ``scored``; to their share is added the share of the attention that a token would get from the
    text after the image. Shares to keep are of the original visual tokens.

    Reference: "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model",
    arXiv 2507.20630. The sign of a turn follows the official code, ``abs_cos=true`` the paper.
    """

    name = "transprune"
    example = "transprune{layers=7,9,12 keep=0.875,0.625,0.125}"
    reference = "arXiv 2507.20630"
    first_layer = 1
    reads = ("history", "instruction_attention_ahead", "valid")
    layer_reads = ("real", "attention_in", "attention_out", "ffn_in", "ffn_out")
    compact = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (7, 9, 12), ge=1)
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.875, 0.625, 0.125))
    of: str = override(TokenDrop, "of", "original")
    positions: str = override(TokenDrop, "positions", "auto")
    scored: int = option(6, "layers whose transitions count: so many before the last cut", ge=1)
    alpha: float = option(0.5, "weight of transitions against attention", ge=0, le=1)
    abs_cos: bool = option(False, "take a reversed direction for none, as the paper writes it")

    def scored_layers(self) -> tuple[int, ...]:
        return tuple(range(max(0, self.layers[-1] - self.scored), self.layers[-1]))

    def layer_score(  # type: ignore[override]
        self,
        real: Tensor,
        attention_in: Tensor,
        attention_out: Tensor,
        ffn_in: Tensor,
        ffn_out: Tensor,
    ) -> Tensor:
        """Transitions through both halves of a layer.

        Args:
            real: bool ``[batch, tokens]``, False for padding, which takes no share.
            attention_in, ffn_in: what a half reads, after its norm, ``[batch, tokens, width]``.
            attention_out, ffn_out: what it adds to the residual stream.

        Returns:
            float32 ``[batch, tokens]``.
        """
        return self.transition(real, attention_in, attention_out) + self.transition(
            real, ffn_in, ffn_out
        )

    def transition(self, real: Tensor, before: Tensor, after: Tensor) -> Tensor:
        """Growth in length times turn of direction (a share of the turns of all tokens)."""
        before, after = before.float(), after.float()
        length, grown = before.norm(dim=-1), after.norm(dim=-1)
        cosine = (before * after).sum(-1) / (length * grown).clamp(min=_TINY)
        if self.abs_cos:
            cosine = cosine.abs()
        turn = (1 - cosine).masked_fill(~real, float("-inf"))
        return grown / length.clamp(min=_TINY) * torch.softmax(turn, dim=-1)

    def score(self, history: Tensor, attention: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """Share of the transitions plus share of the attention.

        Args:
            history: summed transitions, float32 ``[batch, visual tokens]``.
            attention: from the instruction, likewise.
            valid: bool, likewise.
        """
        parts = [torch.where(valid, part, 0.0) for part in (history, attention)]
        shares = [part / (part.sum(-1, keepdim=True) + 1e-8) for part in parts]
        return self.alpha * shares[0] + (1 - self.alpha) * shares[1]
