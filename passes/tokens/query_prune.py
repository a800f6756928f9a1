"""Question-aware pruning: drop the patches that have little to do with the question."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from vlmopt.passes.tokens.patch_prune import Question
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import PassContext
from vlmopt.rewrite.patches import Patches


@dataclass(frozen=True, kw_only=True)
class QueryPrune(Question):
    """Drop patches that a retriever finds less similar to the question than ``tau``.

    Similarity is the sum, over the tokens of the question, of the cosine between embeddings of the
    retriever (ColPali in the paper): inputs ``retrieved_question``, ``[batch, tokens, width]``, and
    ``retrieved_page``, ``[images, patches of the retriever, width]``. Its map of the page is
    resized to the encoder's patches and smoothed. A token stays where one of its patches does, up
    to ``keep`` of each image, the most similar ones, and one at least.

    Reference: "DocPrune: Efficient Document Question Answering via Background, Question, and
    Comprehension-aware Token Pruning", arXiv 2604.22281.
    """

    name = "query-prune"
    example = "query-prune{tau=0.3 keep=0.5}"
    reference = "arXiv 2604.22281"

    tau: float = option(0.3, "similarity that a patch needs to stay; it grows with the question")

    def given(self, patches: Patches, ctx: PassContext) -> list[fx.Node]:
        return self.retrieved(patches, ctx)

    def judge(self, patches: Patches, question: Tensor, pages: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        score = self.similarity(patches, question, pages)
        return score, score >= self.tau
