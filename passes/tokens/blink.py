"""Blink: middle layers see the region that is attended to once more, at a finer grain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmopt import artifacts
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.calibration import Learning, Sample
from vlmopt.errors import ArtifactError, OptionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.copies import TokenCopies
from vlmopt.passes.tokens.grids import bilinear, parents, patches, rows_and_columns
from vlmopt.passes.tokens.token_sr import NAMES, TokenSRLearner, super_resolved
from vlmopt.pipeline.options import option
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Blink(TokenCopies, Learning):
    """Add finer copies of the region that the last token looks at, while it looks there.

    Before each of some layers the attention of the prompt's last token is summed over the patches
    of the image. Where one patch has more than ``expand`` of the whole, its tokens are copied at
    ``up`` times the resolution, by interpolation; where the largest share is below ``drop``, the
    copies go; between the two all stays as it is. The copies are gone behind the last of these
    layers. They cost time, for quality: drop tokens behind them to pay for it.

    With ``mode=tokensr`` a module of three convolutions, one for each layer, adds to the copies
    what interpolation cannot tell; ``vlmopt calibrate`` learns it. Thresholds, patch and factor are
    not public, nor what these modules look like exactly; these are our own.

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

    mode: str = option(
        "interp", "copies by interpolation, or by learned modules", choices=("interp", "tokensr")
    )
    artifact: str = option("", "safetensors file of a calibration, which mode=tokensr needs")
    rate: float = option(1e-3, "learning rate of the calibration", gt=0)

    def requires(self, program: Program) -> None:
        super().requires(program)
        if self.drop > self.expand:
            raise OptionError(
                f"{self.name}: drop={self.drop} is above expand={self.expand}",
                hint="copies would come and go at once",
            )
        if bool(self.artifact) != (self.mode == "tokensr"):
            raise OptionError(
                f"{self.name}: mode={self.mode} {'takes no' if self.artifact else 'needs an'} "
                "artifact",
                hint=f'vlmopt calibrate MODEL -p "{self.name}{{...}}" makes one for mode=tokensr',
            )
        if self.artifact:
            found = artifacts.read(self.artifact, self.name, program)
            side = self._side(modality_of_tokens(token_stage(program)).visual[0])
            if (found["side"], found["up"]) != (side, self.up):
                raise ArtifactError(
                    f"{self.artifact} learnt patches of {found['side']} by {found['side']} tokens "
                    f"at up={found['up']}, and these are {side} by {side} at up={self.up}",
                    hint="calibrate with the options that the pass has now",
                )

    def measure(self, model: Any, program: Program, sample: Sample) -> TokenSRLearner:
        super().requires(program)
        given = (self.layers, self._grid, self.places, self.up, self.rate)
        return TokenSRLearner(model, program, sample, *given)

    def summarise(self, program: Program, rows: list[Any]) -> dict[str, Any]:
        """Mean divergence of the copies from what they should be, in nats, as learnt and before.

        Args:
            rows: of each sample, the loss of each layer, then that of interpolation.
        """
        losses = torch.tensor(rows, dtype=torch.float64).mean(0).unflatten(0, (2, -1)).tolist()
        side = self._side(modality_of_tokens(token_stage(program)).visual[0])
        values = {"layers": list(self.layers), "side": side, "up": self.up}
        return {**values, "losses": losses[0], "interpolation": losses[1]}

    def learnt(self, layer: int) -> tuple[Tensor, ...]:
        if not self.artifact:
            return ()
        return tuple(artifacts.tensor(self.artifact, f"{layer}.{name}") for name in NAMES)

    def _grid(self, tokens: int) -> tuple[int, int]:
        return rows_and_columns(self.name, self.grid, tokens, images=True)

    def _side(self, tokens: int) -> int:
        return math.isqrt(self.places(tokens).shape[1])

    def places(self, tokens: int) -> Tensor:
        """Numbers of the visual tokens in each patch, int64 ``[patches, patch * patch]``.

        Images of a prompt lie one below the other; no patch spans two.

        Raises:
            OptionError: the tokens are no grids, or the patches do not tile one.
        """
        rows, columns = self._grid(tokens)
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
        side = self._side(tokens)
        return self.places(tokens), self.weights(side), self.parents(side)

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
        *module: Tensor,
    ) -> tuple[Tensor, ...]:
        live, region, now = self.decide(attention, live, region, places)
        inside = slots.gather(1, places[region[:, 0]])
        finer = weights @ select.take(hidden, inside).float()
        if module:
            finer = super_resolved(finer, *module)
        rows = torch.where(now[..., None], finer.to(hidden.dtype), rows)
        return rows, inside.gather(1, parents.expand(len(inside), -1)), live, region
