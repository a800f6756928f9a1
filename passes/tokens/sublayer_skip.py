"""Sub-layer skip: visual tokens leave out halves of layers, and stay as keys."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from vlmopt import artifacts
from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.modality import (
    TokenModality,
    embedding_table,
    modality_of_tokens,
    token_stage,
)
from vlmopt.analysis.sublayers import sublayers
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens import classes, select
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Modality, Program
from vlmopt.rewrite.rows import (
    RowRewrite,
    Rows,
    first_values,
    of_vision,
    without_values,
    without_vision,
)
from vlmopt.rewrite.tokens import remove_unused


@dataclass(frozen=True, kw_only=True)
class SublayerSkip(Pass):
    """Compute some halves of layers without visual tokens, in prompts.

    The number of a layer stands for its attention, half more for its feed-forward network. What a
    visual token would add there to the residual stream is zero: queries, the output projection and
    the feed-forward network run on the other tokens only, while keys and values of all are there.

    In place of leaving attention out, or besides it, visual tokens do not read one another
    (``attention=vv``), or text does not read them (``vt``): these probabilities become zero, and
    the others stay as they are. In layer 0 the first visual token gets what text would have paid
    to all. The official code does ``vt`` as ``zero,vt``.

    With a ``share`` below 1 only so many visual tokens skip: those nearest to the anchors that
    ``vlmopt calibrate -p embedlens`` found, as the embeddings enter the first layer.

    Reference: "What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in
    Multimodal Large Language Models", arXiv 2603.00510.
    """

    name = "sublayer-skip"
    family = "tokens"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    example = "sublayer-skip{skip=0.5,1,1.5}"
    reference = "arXiv 2603.00510"

    skip: tuple[float | int, ...] = option(
        (1.5,),
        "layers whose attention is left out; x.5 for the feed-forward network",
        ge=0,
        increasing=True,
        min_items=1,
    )
    attention: tuple[str, ...] = option(
        ("zero",),
        "zero: visual tokens do not attend; vv, vt: visual tokens, text do not attend to them",
        choices=("zero", "vv", "vt"),
        min_items=1,
    )
    share: float = option(1.0, "share of the visual tokens that skip", gt=0, le=1)
    artifact: str = option("", "JSON file of a calibration of embedlens, where share is below 1")

    def requires(self, program: Program) -> None:
        stage = token_stage(program)
        layers = find_layers(stage, after=modality_of_tokens(stage).anchor)
        if (self.share < 1) != bool(self.artifact):
            raise OptionError(
                f"{self.name} needs an artifact where share is below 1, and only there",
                hint="vlmopt calibrate MODEL -p embedlens --data ... -o embedlens.json",
            )
        if self.artifact:
            if self.attention != ("zero",):
                raise OptionError(
                    f"{self.name}: attention={','.join(self.attention)} is about all visual tokens",
                    hint="leave out share and artifact",
                )
            found = artifacts.read(self.artifact, "embedlens", program)
            classes.check(found, self.artifact, embedding_table(program))
            if stage.cuts and stage.cuts[0].layer == 0:
                raise PreconditionError(
                    f"{self.name} looks at tokens as they enter layer 0, where "
                    f"{stage.cuts[0].made_by} has cut",
                    hint=f"cut at later layers, or let {self.name} skip all visual tokens",
                )
        for place in self.skip:
            layer = int(place)
            if modality_of_tokens(stage, layer).fillers:
                raise PreconditionError(
                    f"{self.name} cannot skip {place}: how many tokens {stage.cuts[-1].made_by} "
                    "leaves there depends on the prompt",
                    hint="skip halves of layers before that cut",
                )
            if place % 0.5 or layer >= len(layers):
                raise PreconditionError(
                    f"{self.name} cannot skip {place}: stage {stage.name} has layers 0 to "
                    f"{len(layers) - 1}",
                    hint="name a layer n for its attention, n.5 for its feed-forward network",
                )
            for cut in stage.cuts:
                if cut.until is not None and cut.covers(layer):
                    raise PreconditionError(
                        f"{self.name} cannot skip {place}: {cut.made_by} has already taken tokens "
                        "out of that layer",
                        hint="skip halves of other layers",
                    )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = token_stage(program)
        halves: dict[int, list[bool]] = defaultdict(list)
        for place in self.skip:
            halves[int(place)].append(bool(place % 1))
        known: dict[object, Rows] = {}
        left_out = 0
        for match, (layer, skipped) in enumerate(halves.items(), start=1):
            layers = find_layers(stage, after=modality_of_tokens(stage).anchor)
            modality = modality_of_tokens(stage, layer)
            rewrite = RowRewrite(stage, layers, layer, ctx, match, "sublayer_skip")

            def rows(
                *, vision: bool, by: RowRewrite = rewrite, of: TokenModality = modality
            ) -> Rows:
                """Chosen once for all layers with the same tokens."""
                key = of.kept, vision
                if key not in known:
                    known[key] = self._rows(by, of, vision)
                return known[key]

            parts = sublayers(layers, layer)
            if True in skipped:  # before attention, behind which it stands
                rewrite.skip_feed_forward(parts, rows(vision=False))
            if False in skipped:
                lost = first_values if layer == 0 else without_values
                if "vv" in self.attention and "zero" not in self.attention:
                    rewrite.divert_attention(rows(vision=True), without_values)
                if "vt" in self.attention and "zero" not in self.attention:
                    rewrite.divert_attention(rows(vision=False), lost)
                if "zero" in self.attention:
                    values = lost if "vt" in self.attention else None
                    rewrite.skip_attention(parts, rows(vision=False), values=values)
            left_out += len(skipped) * sum(self._counts(modality))
        remove_unused(stage)
        return PassResult(True, len(halves), {"rows_skipped": left_out})

    def _counts(self, modality: TokenModality) -> list[int]:
        """Visual tokens of each sample that skip."""
        return [math.floor(count * Fraction(str(self.share))) for count in modality.visual]

    def _rows(self, rewrite: RowRewrite, modality: TokenModality, vision: bool) -> Rows:
        """The visual tokens, or the tokens that do not skip."""
        if vision:
            return rewrite.choose_rows(modality, modality.visual, of_vision)
        if not self.artifact:
            return rewrite.choose_rows(modality, modality.visual, without_vision, others=True)
        counts = self._counts(modality)
        found = artifacts.read(self.artifact, "embedlens")
        quotas = [[there - skipped] for there, skipped in zip(modality.visual, counts, strict=True)]

        def choose(kinds: Tensor, count: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
            vectors, thresholds, quota = (
                torch.tensor(value, device=hidden.device)
                for value in (found["vectors"], found["thresholds"], quotas)
            )
            score = -classes.threshold_margin(hidden, vectors, thresholds)
            visual, padding = kinds == Modality.VISION, kinds == Modality.PADDING
            return select.keep_best_ragged(score, visual, padding, quota, count)

        entry = rewrite.layers.entries[0]
        return rewrite.choose_rows(modality, counts, choose, entry, others=True)
