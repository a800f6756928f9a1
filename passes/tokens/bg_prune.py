"""Background-aware pruning: drop the blank patches of a page before the vision encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from vlmopt.passes.tokens import page
from vlmopt.passes.tokens.patch_prune import PatchPrune
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Program
from vlmopt.rewrite.patches import Patches, find_patches


@dataclass(frozen=True, kw_only=True)
class BackgroundPrune(PatchPrune):
    """Drop patches of which more than ``tau_bg`` has the commonest gray value of the page.

    Neither encoder nor language model computes them. A token stays where one of its patches does,
    up to ``keep`` of each image, those with least background; one stays of a blank page. Tiles of
    an image count as pages. For scans, coloured or textured pages the commonest value means
    nothing.

    Reference: "DocPrune: Efficient Document Question Answering via Background, Question, and
    Comprehension-aware Token Pruning", arXiv 2604.22281.
    """

    name = "bg-prune"
    example = "bg-prune{tau_bg=0.9 keep=0.5}"
    reference = "arXiv 2604.22281"

    tau_e: float = option(1.0, "gray values that are less than this apart are the same", gt=0)
    tau_bg: float = option(0.9, "share of background above which a patch goes", ge=0, le=1)
    mean: tuple[float, ...] = option(page.CLIP_MEAN, "of red, green, blue: the processor's")
    std: tuple[float, ...] = option(page.CLIP_STD, "of red, green, blue: the processor's", gt=0)

    def requires(self, program: Program) -> None:
        super().requires(program)
        find_patches(program).images_input()

    def is_identity(self) -> bool:
        return self.tau_bg == 1 and self.keep[0] == 1

    def given(self, patches: Patches, ctx: PassContext) -> list[fx.Node]:
        return [patches.images_input()]

    def judge(self, patches: Patches, images: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gray = page.to_gray(patches.values(images), self.mean, self.std)
        return page.foreground(gray, self.tau_e, self.tau_bg)
