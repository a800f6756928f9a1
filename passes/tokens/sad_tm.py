"""SAD-TM: merge the patches that neither the class token nor the loss gradient singles out."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vlmopt import artifacts
from vlmopt.calibration import Calibrated, Measure, Sample
from vlmopt.errors import OptionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.merge import Match
from vlmopt.passes.tokens.saliency import common_saliency
from vlmopt.passes.tokens.vit import MergePoint, TokenMerge, encoder_of, evenly
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class SadTM(TokenMerge, Calibrated):
    """Merge patches of low class attention and low saliency prior, after the first blocks.

    A patch's importance is ``alpha`` times the attention that the class token pays to it (without
    one: the attention that it gets on average) plus ``1 - alpha`` times a prior of its place, both
    rescaled to 0 to 1. In each block after the first ``tau`` a share ``mr`` of the original patches
    goes: those of least importance, each into the most similar (cosine) of the others, weighted by
    importance. The prior, an offline artifact (``vlmopt calibrate``), is how much the loss gradient
    in a patch correlates with that in the others, mean over samples.

    Reference: "Saliency-Driven Token Merging for Vision Transformers", CVPR 2026.
    """

    name = "sad-tm"
    example = "sad-tm{mr=0.05 alpha=1}"
    reference = "CVPR 2026"

    mr: float = option(0.05, "share of the original patches that goes in a block", ge=0, le=1)
    tau: int = option(-1, "blocks at the start that do not merge; -1: a quarter of all", ge=-1)
    alpha: float = option(0.5, "weight of class attention; the rest is the prior's", ge=0, le=1)
    prior: str = option("", "JSON file with the prior, needed unless alpha is 1")
    prop_attn: bool = override(TokenMerge, "prop_attn", False)

    def requires(self, program: Program) -> None:
        if self.alpha < 1:
            if not self.prior:
                raise OptionError(
                    f"{self.name}: alpha is {self.alpha:g}, but there is no prior for the rest",
                    hint=f"vlmopt calibrate MODEL -p {self.name} --data ... -o prior.json; or "
                    "merge by class attention alone: alpha=1",
                )
            artifacts.read(self.prior, self.name, program)
        super().requires(program)

    def measure(self, model: Any, program: Program, sample: Sample) -> Measure:
        patches = encoder_of(program).patches
        return lambda other: common_saliency(model, other, patches).tolist()

    def conclude(self, rows: Tensor) -> dict[str, Any]:
        """The mean over samples."""
        return {"prior": [round(value, 6) for value in rows.mean(0).tolist()]}

    def blocks(self, depth: int) -> range:
        return range(depth // 4 if self.tau < 0 else self.tau, depth)

    def wanted(self, patches: int, blocks: int) -> list[int]:
        return evenly(patches, patches * Fraction(str(self.mr)), blocks)

    def initial(self) -> Tensor | None:
        if self.alpha == 1:
            return None
        return torch.tensor(artifacts.read(self.prior, self.name)["prior"], dtype=torch.float32)

    def match(self, at: MergePoint) -> tuple[Match, Tensor]:
        importance = self.importance(at)
        order = torch.sort(importance, dim=-1, stable=True).indices + at.special
        sources, candidates = order[:, : at.count], order[:, at.count :].sort(dim=-1).values
        unit = torch.nn.functional.normalize(at.tokens.float(), dim=-1)
        similarity = select.take(unit, sources) @ select.take(unit, candidates).transpose(1, 2)
        destinations = candidates.gather(1, similarity.argmax(-1))
        special = torch.arange(at.special, device=order.device).expand(order.shape[0], -1)
        kept = torch.cat([special, candidates], dim=1)
        whole = torch.ones_like(at.size[:, : at.special])
        weights = torch.cat([whole, importance + 1e-6], dim=1)
        return Match(sources, destinations, kept), weights

    def importance(self, at: MergePoint) -> Tensor:
        """Importance of each patch: float32 ``[batch, patches]``, from 0 to 1."""
        every = torch.ones_like(at.size[:, at.special :], dtype=torch.bool)
        total = torch.zeros_like(at.size[:, at.special :])
        if self.alpha:
            total = total + self.alpha * select.min_max(at.attention(), every)
        if at.carried is not None:
            total = total + (1 - self.alpha) * select.min_max(at.carried[:, at.special :], every)
        return total
