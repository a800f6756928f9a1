"""The errors of vlmopt: each says what went wrong, where, why, and what to try.

Every exception that a user's mistake or an unsupported model can cause derives from
:class:`VlmoptError`. An ``AssertionError`` out of vlmopt is a bug of vlmopt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.fx import Node


def describe_node(node: Node) -> str:
    """``%name (module path, file:line)`` of an fx node, with whatever of it is known."""
    from vlmopt.graph.text import module_path, source_location  # imports torch

    places = [place for place in (module_path(node), source_location(node)) if place]
    return f"%{node.name}" + (f" ({', '.join(places)})" if places else "")


class VlmoptError(Exception):
    """Root of all errors of vlmopt.

    Args:
        what: one sentence, without a full stop: what went wrong, and why.
        node: the fx node where it happened, if any; its module path and source line are printed.
        hint: what the user may try.
    """

    def __init__(self, what: str, *, node: Node | None = None, hint: str | None = None) -> None:
        self.what = what
        self.node = node
        self.hint = hint
        text = what
        if node is not None:
            text += f"\n  at:  {describe_node(node)}"
        if hint is not None:
            text += f"\n  try: {hint}"
        super().__init__(text)


class PipelineSyntaxError(VlmoptError):
    """The pipeline text cannot be parsed."""


class UnknownPassError(VlmoptError):
    """A pipeline names a pass that nobody registered."""


class OptionError(VlmoptError):
    """An option of a pass is unknown, missing, repeated, of the wrong type or out of range."""


class CaptureError(VlmoptError):
    """A model cannot be captured as graphs."""


class ArtifactError(VlmoptError):
    """A saved program or calibration artifact is missing, damaged, or made for something else."""


class PreconditionError(VlmoptError):
    """A pass needs something that the program does not have."""


class NoVisualTokensError(PreconditionError):
    """A token pass was asked to work on a program in which no token comes from vision."""


class ExpertMismatchError(PreconditionError):
    """Tokens are routed to experts, but the block is built in a way that no pass can rewrite."""


class BlockMismatchError(PreconditionError):
    """The blocks of an encoder or a denoiser are built in a way that no pass can rewrite."""


class PlanMismatchError(PreconditionError):
    """A denoising loop runs otherwise than the plan says that it follows."""


class StreamFullError(VlmoptError):
    """A stream cannot remember more, and nothing may be forgotten."""


class NoMatchError(VlmoptError):
    """A pass found nothing to rewrite although the pipeline asked for it."""


class UnsupportedOperatorError(VlmoptError):
    """A token axis reaches an operator without a rule, or one that dropping tokens would change."""


class PassFailed(VlmoptError):  # noqa: N818 - the field's term for it
    """A pass raised, or broke its own declaration. The program is as it was before the pass."""


class VerifyError(VlmoptError):
    """An invariant of the graphs does not hold.

    Attributes:
        invariant: its short name, such as ``"metadata"`` or ``"signature"``.
    """

    def __init__(
        self, invariant: str, what: str, *, node: Node | None = None, hint: str | None = None
    ) -> None:
        self.invariant = invariant
        super().__init__(f"{invariant}: {what}", node=node, hint=hint)


class LoweringError(VlmoptError):
    """A program cannot be compiled for, or exported to, the target asked for."""
