"""MoDES: skip experts by router score, weighed per layer and modality."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmopt import artifacts
from vlmopt.errors import OptionError
from vlmopt.passes.experts.base import ExpertSkip, layers_with_experts
from vlmopt.pipeline.options import option
from vlmopt.program import Modality, Program


@dataclass(frozen=True, kw_only=True)
class MoDES(ExpertSkip):
    """Skip the experts whose weight matters little for their layer and modality.

    The score of a pair of token and expert is the router's weight times a weight of the layer, one
    for text and one for vision; pairs below the threshold of their modality are skipped. A token
    may lose all of its experts. Layer weights say how far answers drift when a layer's experts are
    left out, thresholds what share of pairs goes.

    Layer weights multiply the router's weights after normalisation, as in the official code; the
    paper multiplies probabilities over all experts.

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
    artifact: str = option("", "JSON file with weights and thresholds, in place of the above")

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
        layers = list(layers_with_experts(program))
        if self.artifact:
            found = artifacts.read(self.artifact, self.name, program)
            if found["layers"] != layers:
                raise OptionError(
                    f"{self.name}: {self.artifact} is for layers {found['layers']}, and there are "
                    f"experts in {layers}"
                )
            return found
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
        return {"layers": layers, "weights": weights, "thresholds": thresholds}

    def constants(self, program: Program) -> dict[int, tuple[float, ...]]:
        found = self.settings(program)
        weights, thresholds = found["weights"], found["thresholds"]
        return {
            layer: (text, vision, thresholds["text"], thresholds["vision"])
            for layer, text, vision in zip(
                found["layers"], weights["text"], weights["vision"], strict=True
            )
        }

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
        seen = classes == Modality.VISION
        # an expert that only just reaches the threshold stays
        return torch.where(seen, weights * vision_weight >= vision, weights * text_weight >= text)
