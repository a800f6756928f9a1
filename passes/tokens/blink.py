"""Blink: middle layers see the region that is attended to once more, at a finer grain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import OptionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.copies import TokenCopies
from vlmopt.passes.tokens.grids import bilinear, parents, patches, rows_and_columns
from vlmopt.pipeline.options import option
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Blink(TokenCopies):
    """Add finer copies of the region that the last token looks at, while it looks there.

    Before each of some layers the attention of the prompt's last token is summed over the patches
    of the image. Where one patch has more than ``expand`` of the whole, its tokens are copied at
    ``up`` times the resolution, by interpolation; where the largest share is below ``drop``, the
    copies go; between the two all stays as it is. The copies are gone behind the last of these
    layers. They cost time, for quality: drop tokens behind them to pay for it.

    Nothing here is trained: the paper's learned modules for the copies, which it calls TokenSR,
    are left out. Thresholds, patch and factor are not public; these are our own.

    Reference: "Blink: Dynamic Visual Token Resolution for Enhanced Multimodal Understanding",
    arXiv 2512.10548.
    """

    name = "blink"
    example = "blink{layers=12,13,14 expand=0.4}"
    reference = "arXiv 2512.10548"

    expand: float = option(0.35, "share of attention above which a patch is copied", gt=0)
    drop: float = option(0.25, "share below which copies go; at most expand", ge=0)
    patch: int = option(0, "rows and columns of a patch; 0: half the rows of the grid", ge=0)
    up: int = option(2, "copies per token, along each side", ge=1)
    grid: tuple[int, ...] = option((), "rows and columns of an image's tokens; empty: a square")
    swap: bool = option(False, "copy another patch as soon as attention moves there")

    def requires(self, program: Program) -> None:
        super().requires(program)
        if self.drop > self.expand:
            raise OptionError(
                f"{self.name}: drop={self.drop} is above expand={self.expand}",
                hint="copies would come and go at once",
            )

    def places(self, tokens: int) -> Tensor:
        """Numbers of the visual tokens in each patch, int64 ``[patches, patch * patch]``.

        Images of a prompt lie one below the other; no patch spans two.

        Raises:
            OptionError: the tokens are no grids, or the patches do not tile one.
        """
        rows, columns = rows_and_columns(self.name, self.grid, tokens, images=True)
        side = self.patch or max(1, rows // 2)
        if rows % side or columns % side:
            raise OptionError(
                f"{self.name}: patches of {side} by {side} do not tile {rows} by {columns} tokens",
                hint="choose a patch that divides both",
            )
        return patches(tokens, columns, side)

    def decide(
        self, attention: Tensor, live: Tensor, region: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Which patch is copied from here on.

        Args:
            attention: of the last token to visual tokens, float32 ``[batch, visual tokens]``.
            live: bool ``[batch, 1]``, whether there are copies.
            region: int64 ``[batch, 1]``, of which patch.

        Returns:
            ``live`` and ``region`` anew, and bool ``[batch, 1]``: the patch is to be copied now.
        """
        shares = attention[:, places].sum(-1)
        best = shares.argmax(-1, keepdim=True)
        ratio = shares.gather(1, best) / shares.sum(-1, keepdim=True)
        moved = live & (best != region) if self.swap else torch.zeros_like(live)
        now = (~live | moved) & (ratio > self.expand)
        stays = live & (ratio >= self.drop)
        return stays | now, torch.where(now, best, region), now

    def weights(self, side: int) -> Tensor:
        """Bilinear interpolation of a patch, float32 ``[copies, side * side]``; rows sum to 1."""
        return bilinear(side, self.up)

    def parents(self, side: int) -> Tensor:
        """Number within the patch of the token that each copy stands for, int64 ``[copies]``."""
        return parents(side, self.up)

    def copies(self, tokens: int) -> int:
        return self.places(tokens).shape[1] * self.up**2

    def known(self, tokens: int) -> tuple[Tensor, ...]:
        places = self.places(tokens)
        side = math.isqrt(places.shape[1])
        return places, self.weights(side), self.parents(side)

    def update(  # type: ignore[override]
        self,
        hidden: Tensor,
        slots: Tensor,
        attention: Tensor,
        rows: Tensor,
        live: Tensor,
        region: Tensor,
        places: Tensor,
        weights: Tensor,
        parents: Tensor,
    ) -> tuple[Tensor, ...]:
        live, region, now = self.decide(attention, live, region, places)
        inside = slots.gather(1, places[region[:, 0]])
        finer = weights @ select.take(hidden, inside).float()
        rows = torch.where(now[..., None], finer.to(hidden.dtype), rows)
        return rows, inside.gather(1, parents.expand(len(inside), -1)), live, region
