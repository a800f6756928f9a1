"""HAWK: keep what the instruction looks for, by attention without positions, head by head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt import artifacts
from vlmopt.errors import ArtifactError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Hawk(TokenDrop):
    """Keep the visual tokens that the instruction matches in the first layer, positions aside.

    The mean query of the text after the image meets the keys of layer 0 without rotary positions;
    each head's scores are normalised over the visual tokens and weighted by how much the head
    matters, an offline artifact (``vlmopt calibrate``). Without one all heads weigh the same.

    Reference: "HAWK: Head Importance-Aware Visual Token Pruning in Multimodal Models",
    arXiv 2604.07812.
    """

    name = "hawk"
    example = "hawk{keep=0.2}"
    reference = "arXiv 2604.07812"
    reads = ("instruction_logits_unrotated", "valid")
    compact = True
    rounding = "ceil"

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.2,))
    norm: str = option("l2", "over visual tokens, per head", choices=("l2", "softmax", "minmax"))
    weights: str = option("", "JSON file with a weight per head; empty for equal weights")

    def requires(self, program: Program) -> None:
        super().requires(program)
        if self.weights:
            artifacts.read(self.weights, self.name, program)

    def score(self, logits: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """Weighted sum over heads.

        Args:
            logits: mean over the instruction of query times key, scaled, float32
                ``[batch, visual tokens, heads]``.
            valid: bool ``[batch, visual tokens]``.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        logits = torch.nan_to_num(logits.float(), nan=0.0, posinf=0.0, neginf=0.0)
        there = valid[..., None]
        if self.norm == "softmax":
            share = torch.softmax(logits.masked_fill(~there, float("-inf")), dim=1)
        elif self.norm == "minmax":
            heads_first = logits.transpose(1, 2)
            share = select.min_max(heads_first, valid[:, None]).transpose(1, 2)
        else:
            known = logits * there
            share = known / known.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return (share * self._weights(logits.shape[-1]).to(logits.device)).sum(-1)

    def _weights(self, heads: int) -> Tensor:
        if not self.weights:
            return torch.full((heads,), 1.0 / heads)
        values = artifacts.read(self.weights, self.name)["weights"]
        if len(values) != heads:
            raise ArtifactError(
                f"{self.weights} weighs {len(values)} heads, this model has {heads}",
                hint="calibrate on this model",
            )
        return torch.tensor(values, dtype=torch.float32)
