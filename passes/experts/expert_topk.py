"""expert-topk: fewer experts for every token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.analysis.cost import Pairs
from vlmopt.errors import OptionError
from vlmopt.passes.experts.base import (
    ExpertSkip,
    blocks_of,
    layers_with_experts,
    read_calibrated,
    rounded_up,
    visual_tokens,
)
from vlmopt.passes.experts.bypass import KINDS
from vlmopt.pipeline.options import option
from vlmopt.program import Modality, Program
from vlmopt.rewrite.capacity import best_of_each


@dataclass(frozen=True, kw_only=True)
class ExpertTopK(ExpertSkip):
    """Compute only the few experts of each token that weigh most.

    The simplest way to skip experts, for others to be compared with. Of experts of equal weight
    the one that the router ranks first stays.

    With ``static`` the others are not in the graph at all: rows of all sizes are a number, which
    compilers for edge devices ask for. A class that keeps fewer experts in a layer than the other
    computes as many, some of which weigh nothing.
    """

    name = "expert-topk"
    example = "expert-topk{k=2}"

    k: tuple[int, ...] = option(
        (1,), "experts of each token that stay: for all layers with experts, or for each", ge=1
    )
    artifact: str = option(
        "",
        "JSON file of modes, in place of k: of text and of vision, in each layer, as many as "
        "stayed on average, rounded up",
    )
    static: bool = option(False, "a graph of fixed sizes, with rows for these experts only")

    def requires(self, program: Program) -> None:
        super().requires(program)
        self.constants(program)
        if self.static and (self.special or self.capacity):
            raise OptionError(
                f"{self.name}: with static every token computes as many experts",
                hint="leave out special and capacity, or static",
            )

    def constants(self, program: Program) -> Mapping[int, tuple[float, ...]]:
        layers = layers_with_experts(program)
        if self.artifact:
            found = read_calibrated(self.artifact, "modes", program)
            k = {block.layer: block.k for _, block in blocks_of(program)}
            skipped = zip(*(found["skipped_by_layer"][kind] for kind in KINDS), strict=True)
            return {
                layer: tuple(float(rounded_up(k[layer] * (1 - share))) for share in shares)
                for layer, shares in zip(layers, skipped, strict=True)
            }
        if len(self.k) not in (1, len(layers)):
            raise OptionError(
                f"{self.name}: option k has {len(self.k)} values, and {len(layers)} layers have "
                "experts"
            )
        given = self.k if len(self.k) > 1 else self.k * len(layers)
        return {layer: (k, k) for layer, k in zip(layers, given, strict=True)}

    def is_neutral(self, program: Program) -> bool:
        kept = self.constants(program)
        return all(block.k <= min(kept[block.layer]) for _, block in blocks_of(program))

    def skipped_shares(self, program: Program) -> tuple[Pairs, Mapping[int, tuple[float, float]]]:
        if self.special:  # how many tokens keep all of theirs depends on the prompt
            return super().skipped_shares(program)
        kept = self.constants(program)
        k = {block.layer: block.k for _, block in blocks_of(program)}
        shares = {
            layer: (max(0.0, 1 - text / k[layer]), max(0.0, 1 - vision / k[layer]))
            for layer, (text, vision) in kept.items()
        }
        return Pairs.COUNTED, shares

    def pair_limits(self, program: Program) -> Mapping[tuple[str, int], int]:
        if not self.static or self.is_neutral(program):
            return super().pair_limits(program)
        kept, limits = self.constants(program), {}
        for stage, block in blocks_of(program):
            text, vision = kept[block.layer]
            tokens = block.ids.meta["val"].shape[0]
            most = max(text, vision) if visual_tokens(stage, block.layer) else text
            limits[stage.name, block.layer] = tokens * min(int(most), block.k)
        return limits

    def stays(  # type: ignore[override]
        self, weights: Tensor, classes: Tensor, text: float, vision: float
    ) -> Tensor:
        k = torch.where(classes == Modality.VISION, int(vision), int(text))
        return rank_of_weights(weights) < k

    def select(
        self, weights: Tensor, ids: Tensor, *given: Tensor, constants: tuple[float, ...], count: int
    ) -> tuple[Tensor, Tensor]:
        if not self.static:
            return super().select(weights, ids, *given, constants=constants, count=count)
        stays = self._stays(weights, ids, *given, constants=constants)
        return best_of_each(weights, stays, count // weights.shape[0])


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
