"""ALVTS: each layer sees the visual tokens that it would attend to; the others skip it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from vlmopt.graph.attention import is_causal
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.low_rank import selector_mass, selectors
from vlmopt.pipeline.options import option, override
from vlmopt.rewrite.values import CutValues, compute_rows, query_and_key


@dataclass(frozen=True, kw_only=True)
class Alvts(TokenDrop):
    """Let only some visual tokens through each layer, chosen anew by each.

    A copy of the layer's query and key projections, of low rank and without rotary positions and
    heads, gives an attention map; a token's score is what it gets from visual tokens times what it
    gets from text. Tokens that skip a layer keep their state and have no key in it: nothing is ever
    deleted. The copies come from a singular value decomposition of the weights; the calibration
    that the paper adds is not done here.

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

    def read(self, values: CutValues, name: str) -> fx.Node:
        if name != "selector_mass":
            return super().read(values, name)
        projected = query_and_key(values, self.name)
        left, right = selectors(projected.query, projected.key, projected.heads, self.rank)
        (rows,) = compute_rows(values, [projected.rows])
        result: fx.Node = values.emit.trace(
            selector_mass,
            rows,
            values.modality,
            values.mask_of(projected.attention),
            is_causal(projected.attention),
            values.emit.constant(left),
            values.emit.constant(right),
            1 / (projected.heads * projected.size**0.5),
            names=("mass",),
        )
        return result

    @staticmethod
    def score(mass: Tensor) -> Tensor:  # type: ignore[override]
        """What a token gets from visual tokens times what it gets from text.

        Args:
            mass: float32 ``[batch, tokens, 2]``.
        """
        return mass[..., 0] * mass[..., 1]
