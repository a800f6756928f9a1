"""What a pass is: a frozen set of options, a declaration, and ``run``.

Authors subclass :class:`Pass`, declare options with :func:`vlmopt.pipeline.options.option`, and
write :meth:`Pass.run`; bookkeeping, verification and restoring after a failure are the manager's.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, ClassVar

from torch import fx

from vlmopt.pipeline.options import Configurable

if TYPE_CHECKING:
    from vlmopt.program import Program


class Semantics(StrEnum):
    """What a pass promises about the values that a program computes."""

    EXACT = "exact"
    """bit-equal outputs"""
    NUMERIC = "numeric"
    """equal up to rounding"""
    LOSSY = "lossy"
    """different by design; equal to the method's eager reference, and to the original program
    when the options are neutral (such as ``keep=1``)"""


class Phase(StrEnum):
    """Where in a pipeline a pass belongs; a pipeline must not go back to an earlier phase."""

    ANNOTATE = "annotate"
    REDUCE = "reduce"
    CLEANUP = "cleanup"
    LOWER = "lower"


@dataclass(frozen=True)
class Remark:
    """A note of a pass about one place: a near miss, a choice it made, a limit it met."""

    text: str
    node: str | None = None
    stage: str | None = None


@dataclass(frozen=True)
class PassResult:
    """What a pass did.

    Attributes:
        changed: whether any graph differs; checked by the manager against the graphs.
        matches: number of places rewritten.
        statistics: named counts and figures, plural nouns such as ``tokens_dropped``.
        remarks: notes, for ``vlmopt explain`` and the report.
    """

    changed: bool
    matches: int
    statistics: Mapping[str, float] = field(default_factory=dict)
    remarks: tuple[Remark, ...] = ()


class PassContext:
    """What the manager hands to a running pass: the stamp for provenance and a place for remarks.

    Args:
        spec: text of the pass with its options, as in the pipeline.
        index: position of the pass in the pipeline, from 0.
    """

    def __init__(self, spec: str, index: int = 0) -> None:
        self.spec = spec
        self.index = index
        self.remarks: list[Remark] = []

    def remark(self, text: str, *, node: fx.Node | None = None, stage: str | None = None) -> None:
        self.remarks.append(Remark(text, node.name if node is not None else None, stage))

    def stamp(self, node: fx.Node, match: int) -> None:
        """Record on ``node`` that this pass made it, at its ``match``-th place (from 1).

        Kept under ``meta["custom"]["vlmopt"]``, which survives saving and re-export.
        """
        custom = dict(node.meta.get("custom") or {})
        custom["vlmopt"] = {
            "pass": self.spec.split("{", 1)[0],
            "index": self.index,
            "match": match,
        }
        node.meta["custom"] = custom


@dataclass(frozen=True, kw_only=True)
class Pass(Configurable):
    """Base of every pass. The docstring's first line is its summary in ``vlmopt passes``.

    Subclasses are frozen, keyword-only dataclasses whose fields are the options, and set the class
    variables below. An instance keeps no state between runs.
    """

    family: ClassVar[str]
    phase: ClassVar[Phase]
    semantics: ClassVar[Semantics]
    reference: ClassVar[str] = ""
    """paper and arXiv id"""
    example: ClassVar[str] = ""
    """a pipeline text that shows typical options"""
    needs_capture: ClassVar[str] = ""
    """why it works on what ``vlmopt.capture`` makes alone, and under ``torch.compile`` not"""
    in_encoder: ClassVar[bool] = False
    """works on a vision encoder alone, whatever reads it"""
    needs_vision: ClassVar[bool] = True
    """has nothing to do where all tokens are text"""
    zero_matches_ok: ClassVar[bool] = False
    """a clean-up may find nothing; any other pass that finds nothing is an error"""

    def __str__(self) -> str:
        """The text of this pass in a pipeline; options that equal their default are left out."""
        from vlmopt.pipeline.spec import format_pass  # spec needs the registry, which needs Pass

        return format_pass(self)

    def requires(self, program: Program) -> None:
        """Raise :class:`~vlmopt.errors.PreconditionError` if the program lacks what this needs."""

    @abstractmethod
    def run(self, program: Program, ctx: PassContext) -> PassResult:
        """Rewrite ``program`` in place."""
