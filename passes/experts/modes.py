"""MoDES: skip experts by router score, weighed per layer and modality."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from vlmopt.analysis.cost import Pairs
from vlmopt.calibration import Run, Searched, Variant
from vlmopt.errors import OptionError
from vlmopt.passes.experts import frontier
from vlmopt.passes.experts.base import (
    PAIRS,
    ExpertSkip,
    blocks_of,
    layers_with_experts,
    read_calibrated,
    rounded_up,
    visual_tokens,
)
from vlmopt.passes.experts.bypass import KINDS, Bypass
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.options import option
from vlmopt.program import Modality, Program


@dataclass(frozen=True, kw_only=True)
class MoDES(ExpertSkip, Searched):
    """Skip the experts whose weight matters little for their layer and modality.

    The score of a pair of token and expert is the router's weight times a weight of the layer, one
    for text and one for vision; pairs below the threshold of their modality are skipped. A token
    may lose all of its experts. Layer weights say how far answers drift when a layer's experts are
    left out, thresholds what share of pairs goes.

    By default the router's weights after normalisation are scored, and layers weigh by modality,
    as in the official code; ``of=scores`` takes scores over all experts, ``shared`` weighs each
    layer once, as in the paper. An artifact says which it was made for.

    Reference: "MoDES: Accelerating Mixture-of-Experts Multimodal Large Language Models via Dynamic
    Expert Skipping", arXiv 2511.15690.
    """

    name = "modes"
    example = "modes{text=0.02 vision=0.01 text_weights=0.3,0.2 vision_weights=0.1,0.4}"
    reference = "arXiv 2511.15690"

    text: float = option(0.0, "threshold of text, 0 to skip nothing", ge=0)
    vision: float = option(0.0, "threshold of vision, 0 to skip nothing", ge=0)
    text_weights: tuple[float, ...] = option((), "of each layer with experts; none: 1", ge=0)
    vision_weights: tuple[float, ...] = option((), "of each layer with experts; none: 1", ge=0)
    of: str = option(
        "weights",
        "what is scored: the router's weights, or its scores over all experts, not renormalised",
        choices=("weights", "scores"),
    )
    artifact: str = option("", "JSON file with weights and thresholds, in place of the above")

    margin: float = option(
        0.0,
        "with an artifact, for a graph of fixed sizes: capacity of each layer, as a multiple of "
        "the pairs that stayed on average; 0: see capacity",
        ge=0,
    )

    rho: float = option(
        0.8, "for calibration: share of pairs of token and expert to skip", gt=0, lt=1
    )
    grid: int = option(100, "for calibration: thresholds to try of each modality", ge=2)
    linear: bool = option(False, "for calibration: thresholds spread evenly")
    text_end: float = option(
        frontier.TEXT_END,
        "for calibration: end of the thresholds of text, 2 / (1 + exp(10 - 10 * end)); models of "
        "few layers, whose weights are larger, need larger ones",
        gt=0,
    )
    vision_end: float = option(frontier.VISION_END, "for calibration: of those of vision", gt=0)
    shared: bool = option(
        False, "for calibration: weigh each layer once, its experts left out for all tokens"
    )
    bypass: str = option(
        "normed_input",
        "for calibration: what takes the place of a layer's experts, as in published weights, or "
        "zero",
        choices=("normed_input", "zero"),
    )

    def is_neutral(self, program: Program) -> bool:
        return not any(self.settings(program)["thresholds"].values())

    def requires(self, program: Program) -> None:
        super().requires(program)
        self.settings(program)

    def settings(self, program: Program) -> dict[str, Any]:
        """Layers, weights and thresholds, as in an artifact.

        Raises:
            ArtifactError: the artifact is missing, or of another model.
            OptionError: there are not as many weights as layers with experts.
        """
        if self.artifact:
            return read_calibrated(self.artifact, self.name, program)
        layers = list(layers_with_experts(program))
        weights = {}
        for kind in ("text", "vision"):
            given = getattr(self, f"{kind}_weights") or (1.0,) * len(layers)
            if len(given) != len(layers):
                raise OptionError(
                    f"{self.name}: option {kind}_weights has {len(given)} values, and "
                    f"{len(layers)} layers have experts"
                )
            weights[kind] = list(given)
        thresholds = {"text": self.text, "vision": self.vision}
        return {"layers": layers, "weights": weights, "thresholds": thresholds, "of": self.of}

    def is_scored(self, program: Program) -> bool:
        return bool(self.settings(program).get("of") == "scores")

    def pair_limits(self, program: Program) -> Mapping[tuple[str, int], int]:
        if not self.margin:
            return super().pair_limits(program)
        if not self.artifact or self.capacity:
            raise OptionError(
                f"{self.name}: option margin is a multiple of what an artifact counted, in place "
                "of capacity",
                hint="give artifact and margin, or capacity alone",
            )
        found = self.settings(program)
        limits = {}
        for stage, block in blocks_of(program):
            at = found["layers"].index(block.layer)
            pairs, seen = block.ids.meta["val"].numel(), visual_tokens(stage, block.layer) * block.k
            kept = sum(
                count * (1 - found["skipped_by_layer"][kind][at])
                for kind, count in (("text", pairs - seen), ("vision", seen))
            )
            limits[stage.name, block.layer] = min(rounded_up(self.margin * kept), pairs)
        return limits

    def constants(self, program: Program) -> dict[int, tuple[float, ...]]:
        found = self.settings(program)
        weights, thresholds = found["weights"], found["thresholds"]
        return {
            layer: (text, vision, thresholds["text"], thresholds["vision"])
            for layer, text, vision in zip(
                found["layers"], weights["text"], weights["vision"], strict=True
            )
        }

    def skipped_shares(self, program: Program) -> tuple[Pairs, Mapping[int, tuple[float, float]]]:
        if not self.artifact:
            return super().skipped_shares(program)
        found = self.settings(program)
        shares = found["skipped_by_layer"]
        by_layer = zip(shares["text"], shares["vision"], strict=True)
        return Pairs.MEASURED, dict(zip(found["layers"], by_layer, strict=True))

    @staticmethod
    def stays(  # type: ignore[override]
        weights: Tensor,
        classes: Tensor,
        text_weight: float,
        vision_weight: float,
        text: float,
        vision: float,
    ) -> Tensor:
        """What reaches the threshold of its modality; vision is one, all else the other.

        Args:
            weights: of the chosen experts, float32 ``[tokens, k]``.
            classes: int64 ``[tokens, 1]``, values of :class:`~vlmopt.program.Modality`.
            text_weight, vision_weight: of the layer.
            text, vision: thresholds.

        Returns:
            bool ``[tokens, k]``.
        """
        score = MoDES.score(weights, classes, text_weight, vision_weight, text, vision)
        # an expert that only just reaches the threshold stays
        return score >= torch.where(classes == Modality.VISION, vision, text)

    @staticmethod
    def score(  # type: ignore[override]
        weights: Tensor,
        classes: Tensor,
        text_weight: float,
        vision_weight: float,
        text: float,
        vision: float,
    ) -> Tensor:
        return torch.where(
            classes == Modality.VISION, weights * vision_weight, weights * text_weight
        )

    def variants(self, program: Program) -> list[Variant]:
        """The routed experts of one layer left out for text, then for vision; layer by layer."""
        together = [tuple(KINDS)] if self.shared else [(kind,) for kind in KINDS]
        return [
            partial(
                run_pipeline,
                pipeline=[
                    Bypass(layer=layer, kind=kind, special=self.special, result=self.bypass)
                    for kind in kinds
                ],
            )
            for layer in layers_with_experts(program)
            for kinds in together
        ]

    def search(self, program: Program, rows: Tensor, run: Run) -> dict[str, Any]:
        count = rows[:, :1]
        drift = (rows[:, 1:].clamp(min=0) * count).sum(0) / count.sum()
        drift = drift.view(len(layers_with_experts(program)), -1).expand(-1, len(KINDS))
        weights = {
            kind: frontier.layer_weights(drift[:, at].tolist()) for at, kind in enumerate(KINDS)
        }
        ends = {"text": self.text_end, "vision": self.vision_end}
        grids = {
            kind: frontier.threshold_grid(self.grid, end, linear=self.linear)
            for kind, end in ends.items()
        }

        def setting(text: int, vision: int) -> MoDES:
            return MoDES(
                text=grids["text"][text],
                vision=grids["vision"][vision],
                text_weights=tuple(weights["text"]),
                vision_weights=tuple(weights["vision"]),
                of=self.of,
                special=self.special,
                count=True,
            )

        def measure(text: int, vision: int) -> tuple[float, float]:
            harm, *pairs = run((text, vision), setting(text, vision))
            return _skipped(torch.tensor(pairs).view(-1, 3, 2).sum((0, 1))), harm

        found = frontier.search_frontier(self.grid, self.rho, measure)
        _, *pairs = run((found.text, found.vision), setting(found.text, found.vision))
        by_layer = torch.tensor(pairs).view(-1, 3, 2)
        return {
            "layers": list(layers_with_experts(program)),
            "weights": weights,
            "thresholds": {
                "text": grids["text"][found.text],
                "vision": grids["vision"][found.vision],
            },
            "of": self.of,
            "rho": self.rho,
            "shared": self.shared,
            "bypass": self.bypass,
            "skipped": found.share,
            "divergence": found.harm,
            "skipped_by_layer": {
                kind: [round(_skipped(layer[at]), 6) for layer in by_layer]
                for at, kind in enumerate(KINDS)
            },
            "trials": len(found.evaluated),
        }

    def trial(self, reported: Mapping[str, Tensor]) -> list[float]:
        return [float(value) for value in reported[PAIRS].flatten()]


def _skipped(pairs: Tensor) -> float:
    """The share of pairs that are not computed, from their numbers in all and computed."""
    every, computed = pairs.tolist()
    return 1 - computed / every if every else 0.0
