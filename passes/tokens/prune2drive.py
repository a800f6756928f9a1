"""Prune2Drive: farthest-point sampling of visual tokens, with a budget for each camera view."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.ops.selection import farthest_point
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Prune2Drive(TokenDrop):
    """Keep, in each of several views, the visual tokens that differ most from each other.

    A prompt's visual tokens are its views one after the other, equally many in each. Within a view
    tokens are picked by farthest-point sampling (cosine), from the most isolated one on; views do
    not compete. ``budgets`` gives each view a share of its own, found by a search outside;
    without it ``keep`` serves all.

    Reference: "Prune2Drive: A Plug-and-Play Framework for Accelerating Vision-Language Models in
    Autonomous Driving", arXiv 2508.13305. Cuts before the language model, as in the paper; the
    official code cuts at layer 1.
    """

    name = "prune2drive"
    example = "prune2drive{views=6 keep=0.1}"
    reference = "arXiv 2508.13305"
    reads = ("hidden", "valid")
    compact = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.1,))
    views: int = option(1, "views of a prompt, with equally many visual tokens", ge=1)
    budgets: tuple[float, ...] = option((), "share kept of each view, in order", ge=0, le=1)

    def requires(self, program: Program) -> None:
        super().requires(program)
        if self.budgets and len(self.budgets) != self.views:
            raise PreconditionError(
                f"{self.name} has {len(self.budgets)} budgets for {self.views} views",
                hint="give one share per view",
            )

    def quota(self, count: int, keep: float | int) -> int:
        return sum(self._budgets(count, keep))

    def _budgets(self, count: int, keep: float | int) -> list[int]:
        """Tokens kept of each view."""
        if count % self.views:
            raise PreconditionError(
                f"{self.name}: {count} visual tokens are not {self.views} views of the same size",
                hint="set views to the images of a prompt; they must all have the same size",
            )
        size = count // self.views
        shares = self.budgets or (keep if keep <= 1 else int(keep) // self.views,) * self.views
        return [super(Prune2Drive, self).quota(size, share) for share in shares]

    def score(self, hidden: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """Earlier picks of each view score higher, and picks within budget above all others.

        Args:
            hidden: ``[batch, visual tokens, width]``.
            valid: bool ``[batch, visual tokens]``.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        batch, tokens, width = hidden.shape
        keep = self.keep[0]
        budgets = self._budgets(tokens, keep)
        size = tokens // self.views
        most = max(budgets)
        picks = farthest_point(
            hidden.reshape(batch * self.views, size, width),
            valid.reshape(batch * self.views, size),
            None,
            None,
            most,
            "cosine",
        )
        order = select.by_order(picks, size).reshape(batch, self.views, size)
        spare = torch.tensor([most - budget for budget in budgets], device=order.device)
        return (order - spare[:, None]).reshape(batch, tokens)
