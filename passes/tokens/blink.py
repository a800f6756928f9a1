"""Blink: middle layers see the region that is attended to once more, at a finer grain."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import Layers, find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.analysis.sublayers import sublayers
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens import select
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Modality, Program
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.tokens import CutSite, cut_decode, remove_unused
from vlmopt.rewrite.values import CutValues
from vlmopt.rewrite.widen import Copies, attention_of_last, widen_layer


@dataclass(frozen=True, kw_only=True)
class Blink(Pass):
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
    family = "tokens"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    example = "blink{layers=12,13,14 expand=0.4}"
    reference = "arXiv 2512.10548"

    layers: tuple[int, ...] = option(
        tuple(range(12, 19)),
        "layers that see copies, one after the other",
        ge=0,
        increasing=True,
        min_items=1,
    )
    expand: float = option(0.35, "share of attention above which a patch is copied", gt=0)
    drop: float = option(0.25, "share below which copies go; at most expand", ge=0)
    patch: int = option(0, "rows and columns of a patch; 0: half the rows of the grid", ge=0)
    up: int = option(2, "copies per token, along each side", ge=1)
    grid: tuple[int, ...] = option((), "rows and columns of an image's tokens; empty: a square")
    swap: bool = option(False, "copy another patch as soon as attention moves there")

    def requires(self, program: Program) -> None:
        stage = token_stage(program)
        modality = modality_of_tokens(stage)
        layers = find_layers(stage, after=modality.anchor)
        if list(self.layers) != list(range(self.layers[0], self.layers[-1] + 1)):
            raise OptionError(
                f"{self.name}: layers {', '.join(map(str, self.layers))} do not follow one another",
                hint="copies live from layer to layer; leave none out",
            )
        if self.layers[-1] >= len(layers):
            raise PreconditionError(
                f"{self.name} cannot copy at layer {self.layers[-1]}: stage {stage.name} has "
                f"layers 0 to {len(layers) - 1}",
                hint=f"choose layers up to {len(layers) - 1}",
            )
        if self.drop > self.expand:
            raise OptionError(
                f"{self.name}: drop={self.drop} is above expand={self.expand}",
                hint="copies would come and go at once",
            )
        if stage.cuts:
            raise PreconditionError(
                f"{self.name} cannot copy at layer {self.layers[0]}: {stage.cuts[0].made_by} has "
                f"already cut at layer {stage.cuts[0].layer}, and patches need the whole grid",
                hint=f"put {self.name} first, and cut at later layers",
            )
        if len(set(modality.visual)) > 1:
            raise PreconditionError(
                f"{self.name}: samples have {', '.join(map(str, modality.visual))} visual tokens",
                hint="batch prompts with equally many images",
            )
        self.places(modality.visual[0])

    def places(self, tokens: int) -> Tensor:
        """Numbers of the visual tokens in each patch, int64 ``[patches, patch * patch]``.

        Images of a prompt lie one below the other; no patch spans two.

        Raises:
            OptionError: the tokens are no grids, or the patches do not tile one.
        """
        rows, columns = self.grid or (math.isqrt(tokens),) * 2
        if rows * columns == 0 or tokens % (rows * columns):
            raise OptionError(
                f"{self.name}: {tokens} visual tokens are no grid of {rows} by {columns}",
                hint="give the rows and columns of an image, such as grid=12,16",
            )
        side = self.patch or max(1, rows // 2)
        if rows % side or columns % side:
            raise OptionError(
                f"{self.name}: patches of {side} by {side} do not tile {rows} by {columns} tokens",
                hint="choose a patch that divides both",
            )
        numbers = torch.arange(tokens).view(tokens // columns // side, side, columns // side, side)
        return numbers.transpose(1, 2).reshape(-1, side * side)

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
        units = torch.eye(side * side).view(1, side * side, side, side)
        finer = torch.nn.functional.interpolate(
            units, scale_factor=self.up, mode="bilinear", align_corners=False
        )
        return finer.flatten(2)[0].T.contiguous()

    def parents(self, side: int) -> Tensor:
        """Number within the patch of the token that each copy stands for, int64 ``[copies]``."""
        line = torch.arange(side * self.up) // self.up
        return (line[:, None] * side + line).flatten()

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = token_stage(program)
        visual = modality_of_tokens(stage).visual
        places = self.places(visual[0])
        side = math.isqrt(places.shape[1])
        count = side * side * self.up**2
        state: tuple[fx.Node, ...] = ()
        for match, layer in enumerate(self.layers, start=1):
            modality = modality_of_tokens(stage)
            layers = find_layers(stage, after=modality.anchor)
            site = CutSite(
                stage,
                layer,
                layers.entries[layer],
                modality.source,
                None,
                visual,
                tuple(present + count for present in visual),
                match=match,
                prefix="blink",
                ctx=ctx,
                until=(sublayers(layers, layer).out, layer + 1),
            )

            def step(
                emit: Emitter,
                kinds: fx.Node,
                site: CutSite = site,
                layers: Layers = layers,
                before: tuple[fx.Node, ...] = state,
            ) -> tuple[Copies, tuple[fx.Node, ...]]:
                if not before:
                    before = emit.trace(self._nothing, site.hidden, kinds, count)
                rows, parents, live, region = before
                values = CutValues(stage, layers, site.layer, kinds, visual, emit)
                attention = attention_of_last(values, Copies(rows, parents, live))
                device = site.hidden.meta["val"].device
                known = (places, self.weights(side), self.parents(side))
                rows, parents, live, region = emit.trace(
                    self._step,
                    *(site.hidden, kinds, attention, rows, live, region),
                    *(emit.constant(value.to(device)) for value in known),
                    names=("rows", "parents", "live", "region"),
                )
                return Copies(rows, parents, live), (region,)

            copies, left = widen_layer(site, layers, count, step, state)
            state = (copies.rows, copies.parents, copies.live, *left)
        remove_unused(stage)
        if "decode" not in program and any(port.kept for port in stage.outputs):
            raise PreconditionError(
                f"{self.name}: the cache would hold copies that decoding could not tell from "
                "tokens",
                hint="use vlmopt.optimize, which rewrites decoding too, or run with "
                "use_cache=False",
            )
        if "decode" in program:
            for match, cut in enumerate(stage.cuts, start=1):
                cut_decode(program["decode"], stage, cut, ctx, match=match, prefix="blink")
        return PassResult(True, len(self.layers), {"copies": count})

    @staticmethod
    def _nothing(hidden: Tensor, modality: Tensor, count: int) -> tuple[Tensor, ...]:
        batch, width = hidden.shape[0], hidden.shape[2]
        number = torch.zeros(batch, 1, dtype=torch.int64, device=hidden.device)
        first = (modality == Modality.VISION).long().argmax(-1, keepdim=True)
        parents = first.expand(-1, count)
        return hidden.new_zeros(batch, count, width), parents, number != 0, number

    def _step(
        self,
        hidden: Tensor,
        modality: Tensor,
        attention: Tensor,
        rows: Tensor,
        live: Tensor,
        region: Tensor,
        places: Tensor,
        weights: Tensor,
        parents: Tensor,
    ) -> tuple[Tensor, ...]:
        slots, _ = select.visual_slots(modality == Modality.VISION, places.numel())
        live, region, now = self.decide(attention.gather(1, slots), live, region, places)
        inside = slots.gather(1, places[region[:, 0]])
        finer = weights @ select.take(hidden, inside).float()
        rows = torch.where(now[..., None], finer.to(hidden.dtype), rows)
        return rows, inside.gather(1, parents.expand(len(inside), -1)), live, region
