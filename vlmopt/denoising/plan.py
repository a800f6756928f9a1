"""What each step of a denoising loop computes, for every residual branch of the transformer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from vlmopt.errors import ArtifactError, OptionError


class Action(IntEnum):
    """What a step does about one branch; the values are those in artifacts."""

    COMPUTE = 0
    """The whole branch, whose output is kept for later steps."""
    REUSE = 1
    """The output kept last, and nothing is computed."""
    PARTIAL = 2
    """Some rows anew; the others from the output kept last, which they are written into."""
    FORECAST = 3
    """A Taylor series through the outputs kept last."""


@dataclass(frozen=True, order=True)
class Site:
    """A residual branch: a module of a transformer block, counted in the order of execution."""

    layer: int
    module: str  # "attention", "cross_attention" or "mlp"

    def __str__(self) -> str:
        return f"{self.layer}.{self.module}"


@dataclass(frozen=True)
class Choice:
    """What one step does about one branch.

    Attributes:
        action: see :class:`Action`.
        rows: how many rows are computed, of :attr:`Action.PARTIAL` only.
        order: of the series, of :attr:`Action.FORECAST` only; 0 is reuse.
    """

    action: Action
    rows: int = 0
    order: int = 0

    def share(self, rows: int) -> float:
        """Of the ``rows`` of the branch, how many are computed."""
        if self.action is Action.PARTIAL:
            return self.rows / rows
        return 1.0 if self.action is Action.COMPUTE else 0.0


StepPlan = tuple[Choice, ...]
"""One choice for each site, in the order of :attr:`Plan.sites`."""


@dataclass(frozen=True)
class Plan:
    """What is done at each step, in the order of execution.

    Steps whose rows are equal share a graph.

    Attributes:
        sites: the branches, in the order of execution.
        steps: one row of choices for each step.

    Raises:
        OptionError: rows of another length than ``sites``; a first step that computes too little.
    """

    sites: tuple[Site, ...]
    steps: tuple[StepPlan, ...]

    def __post_init__(self) -> None:
        for step, row in enumerate(self.steps):
            if len(row) != len(self.sites):
                raise OptionError(
                    f"step {step} of the plan chooses for {len(row)} branches, and there are "
                    f"{len(self.sites)}"
                )
        if not self.steps or any(choice.action != Action.COMPUTE for choice in self.steps[0]):
            raise OptionError("the first step of a plan computes everything: nothing is kept yet")

    @property
    def anchors(self) -> tuple[int, ...]:
        """Steps that compute everything."""
        return tuple(
            step
            for step, row in enumerate(self.steps)
            if all(choice.action == Action.COMPUTE for choice in row)
        )

    @property
    def graphs(self) -> tuple[StepPlan, ...]:
        """The rows that differ, in the order of their first step."""
        return tuple(dict.fromkeys(self.steps))

    def to_json(self) -> dict[str, Any]:
        """JSON values: rows that differ once, and their number for each step."""
        which = {row: at for at, row in enumerate(self.graphs)}
        return {
            "sites": [[site.layer, site.module] for site in self.sites],
            "rows": [[[int(c.action), c.rows, c.order] for c in row] for row in self.graphs],
            "steps": [which[row] for row in self.steps],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Plan:
        """Back from :meth:`to_json`.

        Raises:
            ArtifactError: the values are none of a plan.
        """
        try:
            rows = [tuple(Choice(Action(a), *rest) for a, *rest in row) for row in values["rows"]]
            sites = tuple(Site(layer, module) for layer, module in values["sites"])
            return cls(sites, tuple(rows[at] for at in values["steps"]))
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise ArtifactError(f"what should be a plan is none: {error!r}") from error
