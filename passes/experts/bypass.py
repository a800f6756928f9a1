"""Routed experts of one layer left out for one modality: what calibration compares."""

from __future__ import annotations

from dataclasses import dataclass

from vlmopt.analysis.experts import find_experts
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Modality, Program, Role
from vlmopt.rewrite.classes import TokenClasses
from vlmopt.rewrite.experts import bypass_experts

KINDS = {"text": Modality.TEXT, "vision": Modality.VISION}


@dataclass(frozen=True, kw_only=True)
class Bypass(Pass):
    """Leave out the routed experts of one layer for text or for vision, in prompts."""

    name = "expert-bypass"
    family = "experts"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY

    layer: int = option(0, "layer with experts", ge=0)
    kind: str = option("text", "tokens that bypass them", choices=tuple(KINDS))
    special: tuple[int, ...] = option((), "ids of tokens that are neither", ge=0)
    result: str = option(
        "normed_input",
        "what takes the place of the experts' result: what they read, or zero",
        choices=("normed_input", "zero"),
    )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        matches = 0
        for stage in program:
            if stage.name != "model" and not stage.find_outputs(Role.KEY):
                continue
            for block in find_experts(stage).blocks:
                if block.layer != self.layer:
                    continue
                made = TokenClasses(stage, self.special, ctx, self.name)
                classes = made.of(block.layer, block.stream)
                if classes is None:  # decoding
                    continue
                matches += 1
                bypass_experts(
                    stage,
                    block,
                    classes,
                    KINDS[self.kind],
                    ctx,
                    prefix=self.name,
                    normed_input=self.result == "normed_input",
                )
            stage.graph_module.recompile()
        return PassResult(changed=matches > 0, matches=matches)
