"""NAEE: skip experts that weigh little beside the first."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.passes.experts.base import ExpertSkip
from vlmopt.pipeline.options import option
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Naee(ExpertSkip):
    """Skip an expert whose weight is less than a share of the token's largest weight.

    The paper's dynamic skipping, which compares the second of two experts with the first, for any
    number of experts, and without renormalising what is left.

    Reference: "Not All Experts are Equal: Efficient Expert Pruning and Skipping for
    Mixture-of-Experts Large Language Models", arXiv 2402.14800.
    """

    name = "naee"
    example = "naee{beta=0.5}"
    reference = "arXiv 2402.14800"

    beta: float = option(0.5, "share of the largest weight", ge=0, le=1)

    def is_neutral(self, program: Program) -> bool:
        return self.beta == 0

    def stays(self, weights: Tensor, classes: Tensor) -> Tensor:  # type: ignore[override]
        return weights >= self.beta * weights.amax(-1, keepdim=True)
