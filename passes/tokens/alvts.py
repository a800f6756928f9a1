"""ALVTS: each layer sees the visual tokens that it would attend to; the others skip it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx
from torch._subclasses import FakeTensor

from vlmopt import artifacts
from vlmopt.analysis.sublayers import attention_of
from vlmopt.calibration import Learning, Sample
from vlmopt.errors import ArtifactError
from vlmopt.graph.attention import is_causal
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.selectors import Projections, Selector, SelectorLearner, selector_mass
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program
from vlmopt.rewrite.values import CutValues, compute_rows

_SIDES = ("left", "right")


@dataclass(frozen=True, kw_only=True)
class Alvts(TokenDrop, Learning):
    """Let only some visual tokens through each layer, chosen anew by each.

    A copy of the layer's query and key projections, of low rank and without rotary positions and
    heads (unless ``per_head``), gives an attention map; a token's score is what it gets from visual
    tokens times what it gets from text. Tokens that skip a layer keep their state and have no key
    in it: nothing is ever deleted. The copies come from a singular value decomposition of the
    weights; from there ``vlmopt calibrate`` brings their scores closer to those of the layer's own
    attention.

    Reference: "One Layer's Trash is Another Layer's Treasure: Adaptive Layer-wise Visual Token
    Selection in LVLMs", arXiv 2606.14277.
    """

    name = "alvts"
    example = "alvts{layers=2,3,4 keep=0.33}"
    reference = "arXiv 2606.14277"
    reads = ("selector_mass",)
    restores = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (2,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.33,))
    rank: int = option(256, "rank of the copies, at most the width", ge=1)

    per_head: bool = option(False, "a map for each head and their mean, not one map of all")
    artifact: str = option("", "safetensors file of a calibration; empty for none")
    rate: float = option(1e-4, "learning rate of the calibration", gt=0)

    def requires(self, program: Program) -> None:
        super().requires(program)
        if self.artifact:
            artifacts.read(self.artifact, self.name, program)

    def measure(self, model: Any, program: Program, sample: Sample) -> SelectorLearner:
        return SelectorLearner(
            model, program, sample, self.layers, self.rank, self.per_head, self.rate
        )

    def summarise(self, program: Program, rows: list[Any]) -> dict[str, Any]:
        """Mean squared error of the scores, of which even attention gives each token 1.

        Args:
            rows: of each sample, the loss of each layer.
        """
        losses = [sum(layer) / len(layer) for layer in zip(*rows, strict=True)]
        return {"layers": list(self.layers), "rank": self.rank, "losses": losses}

    def read(self, values: CutValues, name: str) -> fx.Node:
        if name != "selector_mass":
            return super().read(values, name)
        found = Projections.of(values.stage, attention_of(values.layers, values.layer))
        maps, scale = found.maps(self.per_head)
        left, right = map(values.emit.constant, self._sides(values.layer, found, maps))
        (rows,) = compute_rows(values, [found.rows])
        result: fx.Node = values.emit.trace(
            selector_mass,
            rows,
            values.modality,
            values.mask_of(found.attention),
            is_causal(found.attention),
            left,
            right,
            scale,
            names=("mass",),
        )
        return result

    def _sides(self, layer: int, found: Projections, maps: int) -> tuple[Tensor, Tensor]:
        if self.artifact:
            left, right = (artifacts.tensor(self.artifact, f"{layer}.{side}") for side in _SIDES)
            if len(left) != maps:
                raise ArtifactError(
                    f"{self.artifact} has {len(left)} maps for layer {layer}, and this asks for "
                    f"{maps}",
                    hint=f"calibrate with per_head={str(self.per_head).lower()}",
                )
            return left, right
        if any(w.is_meta or isinstance(w, FakeTensor) for w in (found.query, found.key)):
            raise ArtifactError(
                f"{self.name} decomposes weights, and this program has none",
                node=found.attention,
                hint="capture the model with its weights, or give an artifact",
            )
        return Selector.of(found.query, found.key, found.heads, self.rank).sides(maps)

    @staticmethod
    def score(mass: Tensor) -> Tensor:  # type: ignore[override]
        """What a token gets from visual tokens times what it gets from text.

        Args:
            mass: float32 ``[batch, tokens, 2]``.
        """
        return mass[..., 0] * mass[..., 1]
