"""Sub-layer skip: visual tokens leave out halves of layers, and stay as keys."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.modality import TokenModality, modality_of_tokens, token_stage
from vlmopt.analysis.sublayers import sublayers
from vlmopt.errors import PreconditionError
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Program
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

    def requires(self, program: Program) -> None:
        stage = token_stage(program)
        layers = find_layers(stage, after=modality_of_tokens(stage).anchor)
        for place in self.skip:
            layer = int(place)
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
        computed = 0
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
                    choose = of_vision if vision else without_vision
                    known[key] = by.choose_rows(of, of.visual, choose, others=not vision)
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
            computed += len(skipped) * sum(modality.visual)
        remove_unused(stage)
        return PassResult(True, len(halves), {"rows_skipped": computed})
