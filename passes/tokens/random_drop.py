"""Random drop: the baseline that every method must beat."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override


@dataclass(frozen=True, kw_only=True)
class RandomDrop(TokenDrop):
    """Drop visual tokens at random, the same ones in every run: the mandatory baseline.

    The order is a hash of the seed and the number of the token, in integers: no state, and the
    same in eager mode, Inductor and ONNX Runtime.
    """

    name = "random-drop"
    example = "random-drop{layers=2 keep=0.33 seed=0}"
    reads = ("ordinal",)

    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.33,))
    seed: int = option(0, "seed of the random order", ge=0)
    fixed: bool = option(
        False, "choose when the graph is rewritten, for prompts of one layout: slices, no gathers"
    )

    def is_fixed(self) -> bool:
        return self.fixed

    def score(self, ordinal: Tensor) -> Tensor:  # type: ignore[override]
        """A fixed random value for the first, second, ... visual token of each sample.

        Args:
            ordinal: int64 ``[batch, tokens]``, number of each visual token among its sample's.

        Returns:
            float32 ``[batch, tokens]``; higher stays.
        """
        return select.hashed(ordinal, self.seed)
