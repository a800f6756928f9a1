"""Hi-Lo Prune: keep what differs in pixels and meaning, after a look at what will be lost."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.errors import OptionError
from vlmopt.ops.selection import farthest_point
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Modality, Program
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.encoded import NEEDS_ROUTES
from vlmopt.rewrite.fusion import raise_attention


@dataclass(frozen=True, kw_only=True)
class HiLoPrune(TokenDrop):
    """Keep visual tokens that differ in pixels, then in meaning; attend to the runners-up before.

    A coarse set is picked by farthest-point sampling of the pixels of each token, and out of it
    those that stay, by farthest-point sampling of embeddings. In the layers before the cut all
    other tokens raise their logits towards the runners-up of the coarse set, where attention is
    above average and among the largest: ``gain`` times the logit is added. Then the runners-up go
    with the rest. The paper does not publish ``gain``, ``threshold`` and ``top``.

    Reference: "Hi-Lo Prune: Look at What You'll Lose before Pruning with Hierarchical Token
    Selection", CVPR 2026.
    """

    name = "hilo-prune"
    example = "hilo-prune{layers=2 keep=0.1}"
    reference = "CVPR 2026"
    reads = ("selection",)
    needs_capture = NEEDS_ROUTES
    first_layer = 1
    rounding = "round"

    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.1,))
    alpha: float = option(
        0.0, "size of the coarse set, times those that stay; 0: 30 % of all above these", ge=0
    )
    gain: float = option(0.5, "what is added to a raised logit, times the logit", ge=0)
    positive: bool = option(False, "add the magnitude: a negative logit is raised too")
    threshold: float = option(0.0, "attention above which logits are raised; 0: average", ge=0)
    top: int = option(16, "runners-up that a token may raise", ge=1)

    def requires(self, program: Program) -> None:
        super().requires(program)
        if len(self.layers) > 1:
            raise OptionError(
                f"{self.name} cuts at one layer, not at {len(self.layers)}",
                hint="let another pass cut later: hilo-prune{layers=2} | fastv{layers=8}",
            )

    def begin(self, program: Program, ctx: PassContext) -> dict[str, fx.Node]:
        """Select at the entry of the language model; raise attention up to the cut."""
        stage = token_stage(program)
        with self.at_entry(program, ctx) as values:
            sizes = [self._sizes(count) for count in values.visual]
            most = [max(counts) for counts in zip(*sizes, strict=True)]
            given = (values.modality, values["encoded_pixels"], values.hidden, *most)
            selection = values.emit.trace(self.select, *given, names=("selection",))
            leaving = values.emit.call(torch.ops.aten.lt.Scalar, selection, 0, name="leaving")
            room = max(coarse - quota for quota, coarse in sizes)
            slots, valid = values.emit.trace(
                select.visual_slots, leaving, room, names=("slots", "valid")
            )
        layers = find_layers(stage, after=modality_of_tokens(stage).anchor)
        emitter = partial(Emitter.of_pass, ctx, stage, prefix=self.name)
        for layer in range(self.layers[0]) if self.gain and room else ():
            raise_attention(stage, layers, layer, leaving, slots, valid, self.added, emitter)
        return {"selection": selection}

    def _sizes(self, present: int) -> tuple[int, int]:
        """How many tokens of so many stay, and how many the coarse set has."""
        quota = self.quota(present, self.keep[0])
        return quota, max(quota, min(math.ceil(self._wide(quota, present) - 1e-6), present))

    def _wide(self, quota: Any, present: Any) -> Any:
        """Size of the coarse set before rounding, of numbers or tensors."""
        return self.alpha * quota if self.alpha else quota + 0.3 * present

    def select(
        self, modality: Tensor, pixels: Tensor, hidden: Tensor, most: int, widest: int
    ) -> Tensor:
        """Above 0 for what stays, earlier picks first; below 0 for runners-up; else 0.

        Args:
            modality: int64 ``[batch, tokens]``.
            pixels, hidden: ``[batch, tokens, ...]``.
            most: how many stay of the sample that keeps most; ``widest``: size of the largest
                coarse set.

        Returns:
            float32 ``[batch, tokens]``.
        """
        visual = modality == Modality.VISION
        slots, valid = select.visual_slots(visual, visual.shape[1])
        present = visual.sum(1, keepdim=True)
        quota = self._quotas(present, self.keep[0])
        wide = torch.ceil(self._wide(quota, present) - 1e-6).long()
        coarse_size = torch.minimum(wide, present)
        coarse = self.first(select.take(pixels, slots), valid, coarse_size, widest)
        inside, there = select.visual_slots(coarse > 0, widest)
        rows = select.take(select.take(hidden, slots), inside)
        fine = self.first(rows, there, quota, most)
        fine = torch.zeros_like(coarse).scatter(1, inside, fine)
        found = torch.where(fine > 0, fine, torch.where(coarse > 0, -1.0, 0.0))
        return torch.zeros_like(found).scatter(1, slots, torch.where(valid, found, 0.0))

    @staticmethod
    def first(rows: Tensor, among: Tensor, count: Tensor, most: int) -> Tensor:
        """Farthest-point sampling, ``count`` picks per sample: float32, falling, 0 for the rest."""
        order = select.by_order(
            farthest_point(rows, among, None, None, most, "cosine"), rows.shape[1]
        )
        return torch.where(among & (order > most - count), order, 0.0)

    def added(self, logits: Tensor, chance: Tensor, seen: Tensor, among: Tensor) -> Tensor:
        """What is added to logits towards runners-up; see :data:`vlmopt.rewrite.fusion.Raise`."""
        limit = self.threshold or 1 / seen.clamp(min=1)
        ranked = torch.where(among, chance, -1.0)
        least = torch.ops.vlmopt.kth_largest(ranked, min(self.top, ranked.shape[-1]))
        raised = among & (chance > limit) & (chance >= least)
        size = logits.abs() if self.positive else logits
        return torch.where(raised, self.gain * size, 0.0)

    @staticmethod
    def score(selection: Tensor) -> Tensor:  # type: ignore[override]
        """The order of picking."""
        return selection
