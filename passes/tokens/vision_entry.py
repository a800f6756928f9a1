"""Vision entry: text alone runs the first layers, and vision enters behind them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.errors import PreconditionError
from vlmopt.passes.tokens import select
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Modality, Program
from vlmopt.rewrite.tokens import Choice, CutSite, cut_decode, cut_tokens


@dataclass(frozen=True, kw_only=True)
class VisionEntry(Pass):
    """Run the first layers on text alone, and let vision enter a later one.

    Visual tokens skip the layers before, which have no keys of theirs, and enter as the projector
    made them; all tokens stand at their own positions throughout. For an early exit as well, drop
    all visual tokens at a later layer: ``vision-entry{layer=2} | stride-drop{layers=20 keep=0}``.

    Reference: "What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in
    Multimodal Large Language Models", arXiv 2603.00510.
    """

    name = "vision-entry"
    family = "tokens"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    example = "vision-entry{layer=2}"
    reference = "arXiv 2603.00510"

    layer: int = option(2, "first layer that runs on visual tokens too", ge=1)

    def requires(self, program: Program) -> None:
        stage = token_stage(program)
        layers = find_layers(stage, after=modality_of_tokens(stage).anchor)
        if self.layer >= len(layers):
            raise PreconditionError(
                f"vision cannot enter at layer {self.layer}: stage {stage.name} has layers 0 to "
                f"{len(layers) - 1}",
                hint=f"choose a layer from 1 to {len(layers) - 1}",
            )
        if stage.cuts:
            raise PreconditionError(
                f"vision cannot enter at layer {self.layer}: {stage.cuts[0].made_by} has already "
                f"cut at layer {stage.cuts[0].layer}",
                hint=f"put {self.name} first, and cut at later layers",
            )
        for layer in range(1, self.layer + 1):
            entry = layers.entries[layer]
            if layers.of.get(entry) != layer - 1:
                raise PreconditionError(
                    f"vision cannot enter at layer {self.layer}: this model adds features of the "
                    f"image to the tokens before layer {layer} (DeepStack)",
                    node=entry,
                    hint="drop tokens instead, behind the layers that take such features",
                )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = token_stage(program)
        modality = modality_of_tokens(stage)
        layers = find_layers(stage, after=modality.anchor)
        ragged = len(set(modality.visual)) > 1

        def choose(modality: Tensor, length: Any) -> Choice:
            visual = modality == Modality.VISION
            score = torch.zeros(visual.shape, device=visual.device)
            if not ragged:
                return score, select.keep_best(score, visual, length), None, None
            padding, none = modality == Modality.PADDING, torch.zeros_like(modality[:, :1])
            return score, *select.keep_best_ragged(score, visual, padding, none, length), None

        site = CutSite(
            stage,
            0,
            layers.entries[0],
            modality.source,
            modality.kept,
            modality.visual,
            (0,) * len(modality.visual),
            match=1,
            prefix="vision_entry",
            ctx=ctx,
            until=(layers.entries[self.layer], self.layer),
        )
        cut_tokens(site, choose, lambda emit, modality: [])
        if "decode" in program:
            decode, (cut,) = program["decode"], stage.cuts
            cut_decode(decode, stage, cut, ctx, match=1, prefix="vision_entry")
        return PassResult(True, 1, {"layers_without_vision": self.layer})
