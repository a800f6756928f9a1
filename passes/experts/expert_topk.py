"""expert-topk: fewer experts for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.analysis.cost import Pairs
from vlmopt.analysis.experts import find_experts
from vlmopt.passes.experts.base import ExpertSkip
from vlmopt.pipeline.options import option
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class ExpertTopK(ExpertSkip):
    """Compute only the few experts of each token that weigh most.

    The simplest way to skip experts, for others to be compared with. Of experts of equal weight
    the one that the router ranks first stays.
    """

    name = "expert-topk"
    example = "expert-topk{k=2}"

    k: int = option(1, "experts of each token that stay", ge=1)

    def is_neutral(self, program: Program) -> bool:
        blocks = [block for stage in program for block in find_experts(stage).blocks]
        return all(block.k <= self.k for block in blocks)

    def skipped_shares(self, program: Program) -> tuple[Pairs, Mapping[int, tuple[float, float]]]:
        if self.special:  # how many tokens keep all of theirs depends on the prompt
            return super().skipped_shares(program)
        blocks = [block for stage in program for block in find_experts(stage).blocks]
        shares = {block.layer: max(0.0, 1 - self.k / block.k) for block in blocks}
        return Pairs.COUNTED, {layer: (share, share) for layer, share in shares.items()}

    def stays(self, weights: Tensor, classes: Tensor) -> Tensor:  # type: ignore[override]
        return rank_of_weights(weights) < self.k


def rank_of_weights(weights: Tensor) -> Tensor:
    """How many experts of a token come before each, by weight and then in the router's order.

    Args:
        weights: ``[tokens, k]``.

    Returns:
        int64 ``[tokens, k]``.
    """
    place = torch.arange(weights.shape[1], device=weights.device)
    own, other = weights[:, :, None], weights[:, None, :]
    earlier = place[None, :] < place[:, None]
    return ((other > own) | ((other == own) & earlier)).sum(-1)
