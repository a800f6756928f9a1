"""What methods share that choose patches of an image before the vision encoder runs."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from vlmopt.analysis.modality import token_stage
from vlmopt.errors import OptionError
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.passes.tokens import page, select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.pipeline.passes import PassContext, PassResult
from vlmopt.program import Port, Program, Role
from vlmopt.rewrite.encoded import NEEDS_ROUTES, encoding_of
from vlmopt.rewrite.exits import require_untouched
from vlmopt.rewrite.patches import Patches, find_patches
from vlmopt.rewrite.pruning import prune_patches


@dataclass(frozen=True, kw_only=True)
class PatchPrune(TokenDrop):
    """Base of the methods that run both encoder and language model on some patches.

    Patches that become one token stay or go together: they stay where one of them passes, up to
    ``keep`` tokens of each image, and one at least. What fills up an image is masked in the
    encoder, and does not enter the language model. Positions are those of the whole image.
    """

    reads = ("encoded_kept",)
    bounded = True
    needs_capture = NEEDS_ROUTES

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,), le=0)

    @abstractmethod
    def given(self, patches: Patches, ctx: PassContext) -> list[fx.Node]:
        """Values of the encoder that :meth:`judge` takes: its inputs."""

    @abstractmethod
    def judge(self, patches: Patches, *values: Tensor) -> tuple[Tensor, Tensor]:
        """How good patches are, and which may stay.

        Returns:
            float32 and bool, ``[images, tokens of an image, patches of a token]``.
        """

    def is_identity(self) -> bool:
        """Whether no patch can go."""
        return False

    def requires(self, program: Program) -> None:
        encoding_of(program)
        stage = program["vision_encoder"]
        require_untouched(
            stage,
            f"{self.name} cannot prune",
            hint="docprune drops by background and question at once",
        )
        find_patches(program)
        super().requires(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        if self.is_identity():
            ctx.remark("no patch can go", stage="vision_encoder")
            return PassResult(False, 1, {"tokens_dropped": 0})
        return super().run(program, ctx)

    def begin(self, program: Program, ctx: PassContext) -> dict[str, fx.Node]:
        """Prune the encoder."""
        drop_constant_masks(program["vision_encoder"].graph)
        patches = find_patches(program)
        count = self.quota(len(patches.tokens[0]), self.keep[0])
        choose = partial(self.choose, patches, count)
        before = patches.rows, patches.special + count * patches.members
        prune_patches(patches, count, choose, self.given(patches, ctx), ctx, prefix=self.name)
        room = list(token_stage(program).facts["visual_tokens"])
        for sample, tokens in zip(patches.samples, patches.tokens, strict=True):
            room[sample] -= len(tokens) - count  # those of no patch, such as line ends, stay
        done = {"block": 0, "tokens": list(before), "by": ctx.spec, "room": room}
        program["vision_encoder"].facts["merges"] = [done]
        return {}

    def choose(self, patches: Patches, count: int, *values: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens of each image that stay, see :func:`~vlmopt.rewrite.pruning.prune_patches`."""
        score, passing = self.judge(patches, *values)
        return select.best_passing(score.amax(-1), passing.any(-1), count)

    def quotas(self, program: Program, counts: Sequence[int], keep: float | int) -> list[int]:
        room: list[int] = program["vision_encoder"].facts["merges"][0]["room"]
        return room

    def _quotas(self, count: Tensor, keep: float | int) -> Tensor:
        return count  # the encoder has chosen

    @staticmethod
    def score(encoded_kept: Tensor) -> Tensor:  # type: ignore[override]
        """Below 0 for what was dropped, float32 ``[batch, tokens]``."""
        return encoded_kept

    def passing(self, score: Tensor) -> Tensor:
        return score >= 0


@dataclass(frozen=True, kw_only=True)
class Question(PatchPrune):
    """Base of the methods that ask a retriever which patches have to do with the question."""

    sigma: float = option(1.0, "of the Gaussian that smooths similarities, in patches", ge=0)
    retriever: tuple[int, ...] = option(
        (32, 32, 128), "rows and columns of the retriever's patches, width of its embeddings", ge=1
    )
    question: int = option(32, "tokens of a question, at most", ge=1)
    size: tuple[int, ...] = option(
        (), "rows and columns of an image's tokens, where that is neither a square nor known", ge=1
    )

    def requires(self, program: Program) -> None:
        for name, length in (("retriever", (3,)), ("size", (0, 2))):
            if len(getattr(self, name)) not in length:
                raise OptionError(
                    f"{self.name}: option {name} has {len(getattr(self, name))} values",
                    hint=f"give {length[-1]}, such as {name}={'32,32,128'[: 3 * length[-1] - 1]}",
                )
        super().requires(program)
        find_patches(program).grid(self.size)

    def retrieved(self, patches: Patches, ctx: PassContext) -> list[fx.Node]:
        """What the retriever says of questions and pages: new inputs of the encoder."""
        rows, columns, width = self.retriever
        samples = max(patches.samples) + 1
        nodes = [
            patches.stage.add_input(
                Port("retrieved_question", Role.RETRIEVED_QUESTION), samples, self.question, width
            ),
            patches.stage.add_input(
                Port("retrieved_page", Role.RETRIEVED_PAGE), patches.images, rows * columns, width
            ),
        ]
        for node in nodes:
            ctx.stamp(node, 1)
        return nodes

    def similarity(self, patches: Patches, question: Tensor, pages: Tensor) -> Tensor:
        """Of each patch with the question: float32 ``[images, tokens, patches of a token]``."""
        rows, columns, _ = self.retriever
        asked = question[torch.tensor(patches.samples, device=question.device)]
        found = page.similarity(pages, asked).view(patches.images, rows, columns)
        whole = page.resized(found, *patches.grid(self.size), self.sigma)
        return page.by_token(whole, patches.side)
