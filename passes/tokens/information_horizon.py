"""Information horizon: deep in the model choose blindly, and past the horizon drop all."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from vlmopt import artifacts
from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.calibration import Compared, Variant
from vlmopt.errors import OptionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class InformationHorizon(TokenDrop, Compared):
    """Drop visual tokens where they no longer matter, without asking which.

    From some layer on methods that score tokens do no better than chance, and past the horizon
    visual tokens carry nothing that the text has not taken up. So the choice is blind (evenly
    spread, or random) at all layers but the last one, where all visual tokens go. Where these
    layers lie is found by ``vlmopt calibrate``, on the task at hand; or named by hand.

    Reference: "When Token Pruning is Worse than Random: Understanding Visual Token Information in
    VLLMs", arXiv 2512.07580.
    """

    name = "information-horizon"
    example = "information-horizon{layers=16,24 keep=0.5,0}"
    reference = "arXiv 2512.07580"
    reads = ("ordinal", "quota", "present")
    least = 0

    layers: tuple[int, ...] = override(TokenDrop, "layers", (16, 24))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.5, 0.0))
    mode: str = option("stride", "how to choose", choices=("stride", "random"))
    seed: int = option(0, "seed of the random choice", ge=0)
    fixed: bool = option(
        False, "choose when the graph is rewritten, for prompts of one layout: slices, no gathers"
    )
    tolerance: float = option(0.005, "how far from 1 the curve may stay past the horizon", gt=0)
    artifact: str = option("", "JSON file of a calibration; the horizon it found is the last layer")

    def cuts(self) -> list[tuple[int, float | int]]:
        if not self.artifact:
            return super().cuts()
        horizon = int(artifacts.read(self.artifact, self.name)["horizon"])
        before = [cut for cut in super().cuts() if cut[1] > 0 and cut[0] < horizon]
        return [*before, (horizon, 0)]

    def requires(self, program: Program) -> None:
        if self.artifact:
            found = artifacts.read(self.artifact, self.name, program)
            if found["horizon"] is None:
                raise OptionError(
                    f"{self.name}: {self.artifact} found no layer past which visual tokens do not "
                    "matter",
                    hint="this task needs them to the end; name layers by hand to drop some",
                )
        super().requires(program)

    def variants(self, program: Program) -> list[Variant]:
        """All visual tokens gone from layer 0 on, from layer 1 on, and so on."""
        stage = token_stage(program)
        layers = find_layers(stage, after=modality_of_tokens(stage).anchor)
        ends = [InformationHorizon(layers=(layer,), keep=(0.0,)) for layer in range(len(layers))]
        return [partial(run_pipeline, pipeline=[end]) for end in ends]

    def conclude(self, rows: Tensor) -> dict[str, Any]:
        """The withdrawal curve, and from where on it stays at the top.

        The curve is the mean over samples of ``exp(-divergence)``, 1 where dropping all visual
        tokens at a layer's entry changes nothing.
        """
        curve = (-rows).exp().mean(0)
        below = [layer for layer, value in enumerate(curve.tolist()) if value < 1 - self.tolerance]
        horizon = below[-1] + 1 if below else 0
        return {
            "curve": [round(value, 6) for value in curve.tolist()],
            "tolerance": self.tolerance,
            "horizon": horizon if horizon < len(curve) else None,
        }

    def is_fixed(self) -> bool:
        return self.fixed

    def score(  # type: ignore[override]
        self, ordinal: Tensor, quota: Tensor, present: Tensor
    ) -> Tensor:
        """A blind order.

        Args:
            ordinal: int64 ``[batch, tokens]``, number of each visual token among its sample's.
            quota, present: int64 ``[batch, 1]``, visual tokens that stay, and that there are.
        """
        if self.mode == "random":
            return select.hashed(ordinal, self.seed)
        return select.strided(ordinal, quota, present)
