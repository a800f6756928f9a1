"""When a draft is taken over without asking the target.

"VVS: Accelerating Speculative Decoding for Visual Autoregressive Generation via Partial
Verification Skipping", arXiv 2511.13587. No policy skips twice running.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmopt.pipeline.options import Configurable, option
from vlmopt.pipeline.spec import parse_choice
from vlmopt.speculative.similarity import path_similarity

WARM_UP = 5
"""So many new tokens are verified before any draft is not: their features are needed."""


@dataclass(frozen=True)
class Draft:
    """What a policy may look at.

    Attributes:
        iteration: of the loop, from 0.
        new_tokens: committed so far.
        after_skip: the last iteration was not verified.
        candidates: int64 ``[paths, length]``, tokens, root first; -1 behind the end of a path.
        codebook: ``[vocabulary, width]``, what tokens look like.
    """

    iteration: int
    new_tokens: int
    after_skip: bool
    candidates: Tensor
    codebook: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SkipPolicy(Configurable):
    """Decides draft by draft."""

    compares: ClassVar[bool] = False
    """Whether it looks at a codebook."""

    def skips(self, draft: Draft) -> bool:
        """Whether this draft is not verified."""
        return draft.new_tokens > WARM_UP and not draft.after_skip and self.wants(draft)

    @abstractmethod
    def wants(self, draft: Draft) -> bool:
        """Likewise, where it may be skipped at all."""


@dataclass(frozen=True, kw_only=True)
class Never(SkipPolicy):
    """Every draft is verified."""

    name = "never"

    def wants(self, draft: Draft) -> bool:
        return False


@dataclass(frozen=True, kw_only=True)
class Uniform(SkipPolicy):
    """One draft in ``interval`` is not verified."""

    name = "uniform"

    interval: int = option(5, "drafts of which one is not verified", ge=2)

    def wants(self, draft: Draft) -> bool:
        return draft.iteration % self.interval == 1


@dataclass(frozen=True, kw_only=True)
class Dynamic(SkipPolicy):
    """Drafts whose paths look alike are not verified: whichever is right, little is lost."""

    name = "dynamic"
    compares = True

    threshold: float = option(0.7, "least similarity of paths", ge=-1, le=1)
    decay: float = option(0.9, "weight of a depth against the one above it", gt=0, le=1)
    stride: int = option(2, "every so many paths are compared", ge=1)

    def wants(self, draft: Draft) -> bool:
        assert draft.codebook is not None, "paths are compared by the codes of their tokens"
        rows = draft.candidates[:: self.stride]
        alike = path_similarity(rows, draft.codebook, decay=self.decay)
        return float(alike) >= self.threshold


POLICIES = (Never, Uniform, Dynamic)


def parse_policy(text: str) -> SkipPolicy:
    """The policy that a text such as ``uniform{interval=4}`` describes.

    Raises:
        PipelineSyntaxError, OptionError: see :func:`vlmopt.pipeline.spec.parse_choice`.
    """
    classes: tuple[type[SkipPolicy], ...] = POLICIES
    return parse_choice(text, classes, what="a policy", example="uniform{interval=4}")
