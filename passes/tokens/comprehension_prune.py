"""Comprehension-aware pruning: once the model has understood, drop what it does not look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.rewrite.values import CutValues


@dataclass(frozen=True, kw_only=True)
class ComprehensionPrune(TokenDrop):
    """Keep the visual tokens that the last token of the prompt attends to above a threshold.

    At the entry of layer ``k``, a token's score is the attention that it got from the prompt's last
    token in layer ``k - 1``, times the number of visual tokens: 1 is an even share. Those of at
    least ``tau_att`` stay, the best ``keep`` at most; where fewer do, what fills up their places is
    masked. The paper chooses the layer for each prompt, the first behind which the norm of the last
    token reaches a threshold: graphs need one layer for all, such as the median.

    Reference: "DocPrune: Efficient Document Question Answering via Background, Question, and
    Comprehension-aware Token Pruning", arXiv 2604.22281. What its attention score is exactly is not
    public.
    """

    name = "comprehension-prune"
    example = "comprehension-prune{layers=16 keep=0.5 tau_att=0.5}"
    reference = "arXiv 2604.22281"
    first_layer = 1
    reads = ("row", "visual")
    bounded = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (16,), ge=1)
    tau_att: float = option(0.5, "attention that a token needs to stay; 1 is an even share", ge=0)
    attention: str = option(
        "logit_mean",
        "mean over heads of logits, then softmax over visual tokens; or of softmax over all tokens",
        choices=("logit_mean", "prob_mean"),
    )

    def read(self, values: CutValues, name: str) -> fx.Node:
        if name != "row":
            return super().read(values, name)
        return values["last_logits" if self.attention == "logit_mean" else "last_attention"]

    def score(self, row: Tensor, visual: Tensor) -> Tensor:  # type: ignore[override]
        """Attention to each token, in even shares.

        Args:
            row: logits or attention of the last token, float32 ``[batch, tokens]``.
            visual: bool, likewise.
        """
        if self.attention == "logit_mean":
            row = torch.softmax(row.masked_fill(~visual, float("-inf")), dim=-1)
        return torch.where(visual, row, 0.0) * visual.sum(-1, keepdim=True)

    def passing(self, score: Tensor) -> Tensor:
        return score >= self.tau_att
