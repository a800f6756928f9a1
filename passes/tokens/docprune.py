"""DocPrune: drop blank patches, then those foreign to the question, then what is not looked at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from vlmopt.errors import OptionError
from vlmopt.passes.tokens import page
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.patch_prune import Question
from vlmopt.pipeline.options import option, override
from vlmopt.pipeline.passes import PassContext, PassResult
from vlmopt.pipeline.registry import find_pass
from vlmopt.program import Program
from vlmopt.rewrite.patches import Patches, find_patches


@dataclass(frozen=True, kw_only=True)
class DocPrune(Question):
    """Drop patches by background and question before the encoder, and tokens by attention behind.

    A patch stays if it passes both tests, see ``bg-prune`` and ``query-prune``; where more pass
    than there is room for, the ones most similar to the question stay. At a second layer the tokens
    go that the end of the prompt does not look at, see ``comprehension-prune``. ``keep`` says how
    many tokens of an image enter the language model, and what share of these stays behind that
    layer, both at most.

    Reference: "DocPrune: Efficient Document Question Answering via Background, Question, and
    Comprehension-aware Token Pruning", arXiv 2604.22281.
    """

    name = "docprune"
    example = "docprune{tau_bg=0.9 tau_qst=0.3 layers=0,16 keep=0.5,0.5}"
    reference = "arXiv 2604.22281"

    layers: tuple[int, ...] = option(
        (0, 16),
        "0, and the layer whose input is cut, if any, counted from 0",
        ge=0,
        increasing=True,
        min_items=1,
    )
    keep: tuple[float | int, ...] = override(Question, "keep", (0.5, 0.5))
    ask: bool = option(True, "drop by the question: prompts need the retriever's embeddings")
    tau_e: float = option(1.0, "gray values that are less than this apart are the same", gt=0)
    tau_bg: float = option(0.9, "share of background above which a patch goes", ge=0, le=1)
    tau_qst: float = option(0.3, "similarity to the question that a patch needs to stay")
    tau_att: float = option(0.5, "attention that a token needs to stay; 1 is an even share", ge=0)
    attention: str = option(
        "logit_mean",
        "attention of comprehension-prune: by logits or by probabilities",
        choices=("logit_mean", "prob_mean"),
    )
    artifact: str = option("", "JSON file of a calibration of comprehension-prune, for its layer")
    mean: tuple[float, ...] = option(page.CLIP_MEAN, "of red, green, blue: the processor's")
    std: tuple[float, ...] = option(page.CLIP_STD, "of red, green, blue: the processor's", gt=0)

    @property
    def comprehension(self) -> TokenDrop | None:
        """The pass that cuts at the second layer, if there is to be one."""
        if len(self.layers) == 1 and not self.artifact:
            return None
        made: Any = find_pass("comprehension-prune")
        places = {} if self.artifact else {"layers": self.layers[1:], "keep": self.keep[-1:]}
        last: TokenDrop = made(
            tau_att=self.tau_att,
            attention=self.attention,
            artifact=self.artifact,
            positions=self.positions,
            of=self.of,
            **places,
        )
        return last

    def cuts(self) -> list[tuple[int, float | int]]:
        return [(0, self.keep[0])]

    def requires(self, program: Program) -> None:
        if self.layers[0] != 0 or len(self.layers) > 2 or len(self.keep) > 2:
            raise OptionError(
                f"{self.name} prunes before the encoder, and once behind it: not at layers "
                f"{','.join(map(str, self.layers))}",
                hint="docprune{layers=0,16 keep=0.5,0.5}, or docprune{layers=0 keep=0.5}",
            )
        super().requires(program)
        find_patches(program).images_input()
        if self.comprehension is not None:
            self.comprehension.requires(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        first = super().run(program, ctx)
        if self.comprehension is None:
            return first
        second = self.comprehension.run(program, ctx)
        counted = {name: first.statistics[name] + second.statistics[name] for name in _COUNTED}
        return PassResult(True, first.matches + second.matches, counted)

    def given(self, patches: Patches, ctx: PassContext) -> list[fx.Node]:
        retrieved = self.retrieved(patches, ctx) if self.ask else []
        return [patches.images_input(), *retrieved]

    def judge(self, patches: Patches, images: Tensor, *retrieved: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        gray = page.to_gray(patches.values(images), self.mean, self.std)
        score, passing = page.foreground(gray, self.tau_e, self.tau_bg)
        if not retrieved:
            return score, passing
        score = self.similarity(patches, *retrieved)
        return score, passing & (score >= self.tau_qst)


_COUNTED = ("tokens_dropped", "cuts")
