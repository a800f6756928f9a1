"""Rules of acceptance by name: what the target must say for a drafted token to stay."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.pipeline.options import Configurable, option
from vlmopt.pipeline.spec import parse_choice
from vlmopt.speculative.lantern import Neighbourhood, nearest_codes


@dataclass(frozen=True, kw_only=True)
class AcceptanceRule(Configurable):
    """Says which tokens help one another."""

    @abstractmethod
    def neighbours(
        self, codebook: Tensor | None, ids: Tensor | None = None
    ) -> Neighbourhood | None:
        """Those of a codebook; ``None`` where no token helps another.

        Args:
            codebook: ``[codes, width]``.
            ids: int64 ``[codes]``, the token that each code is; ``None`` for the same numbers.

        Raises:
            PreconditionError: there is no codebook, and the rule needs one.
            OptionError: it has too few codes.
        """


@dataclass(frozen=True, kw_only=True)
class Exact(AcceptanceRule):
    """Lossless: the output is that of the target alone."""

    name = "exact"

    def neighbours(
        self, codebook: Tensor | None, ids: Tensor | None = None
    ) -> Neighbourhood | None:
        return None


@dataclass(frozen=True, kw_only=True)
class Lantern(AcceptanceRule):
    """Codes that look alike share their probability; see :mod:`vlmopt.speculative.lantern`."""

    name = "lantern"

    delta: float = option(
        0.1, "most probability that neighbours add; beyond 1, delta - 1 times the own", ge=0
    )
    k: int = option(1000, "nearest codes that may help", ge=1)

    def neighbours(
        self, codebook: Tensor | None, ids: Tensor | None = None
    ) -> Neighbourhood | None:
        if codebook is None:
            raise PreconditionError(
                "lantern compares image tokens by their codes, and there is no codebook",
                hint="pass the codebook, or use acceptance='exact'",
            )
        return Neighbourhood(nearest_codes(codebook, self.k), self.delta, ids)


RULES = (Exact, Lantern)


def parse_rule(text: str) -> AcceptanceRule:
    """The rule that a text such as ``lantern{delta=0.1 k=1000}`` describes.

    Raises:
        PipelineSyntaxError, OptionError: see :func:`vlmopt.pipeline.spec.parse_choice`.
    """
    classes: tuple[type[AcceptanceRule], ...] = RULES
    example = "lantern{delta=0.1 k=1000}"
    return parse_choice(text, classes, what="a rule of acceptance", example=example)
