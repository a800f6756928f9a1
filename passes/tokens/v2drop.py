"""V2Drop: drop the visual tokens whose hidden state changes least across one layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override


@dataclass(frozen=True, kw_only=True)
class V2Drop(TokenDrop):
    """Drop the visual tokens that change least from one layer to the next.

    At the entry of each chosen layer ``k``, a token's score is the L2 norm, in float32, of the
    residual stream entering layer ``k`` minus the one entering layer ``k - 1``; or another distance
    that the paper tries (``metric``). Needs no attention scores and no calibration.

    Reference: "Variation-aware Vision Token Dropping for Faster Large Vision-Language Models",
    arXiv 2509.01552.
    """

    name = "v2drop"
    example = "v2drop{layers=3,17,22 keep=0.5,0.5,0}"
    reference = "arXiv 2509.01552"
    first_layer = 1
    reads = ("hidden", "previous_hidden")

    layers: tuple[int, ...] = override(TokenDrop, "layers", (3, 17, 22), ge=1)
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.5, 0.5, 0.0))
    metric: str = option("l2", "distance between the two", choices=("l2", "l1", "cosine"))

    def score(self, hidden: Tensor, previous_hidden: Tensor) -> Tensor:  # type: ignore[override]
        """How far a layer moves each token.

        Args:
            hidden, previous_hidden: ``[batch, tokens, width]``, entering layers ``k`` and
                ``k - 1``, any float dtype.

        Returns:
            float32 ``[batch, tokens]``; higher stays.
        """
        after, before = hidden.float(), previous_hidden.float()
        if self.metric == "cosine":
            return 1 - torch.nn.functional.cosine_similarity(after, before, dim=-1)
        return (after - before).norm(p=1 if self.metric == "l1" else 2, dim=-1)
