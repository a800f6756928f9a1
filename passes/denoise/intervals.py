"""Plans without calibration: everything is computed at fixed intervals."""

from __future__ import annotations

from collections.abc import Sequence

from vlmopt.analysis.branches import BranchSite
from vlmopt.denoising.plan import Action, Choice, Plan


def plan_at_intervals(
    sites: Sequence[BranchSite], steps: int, interval: int, choice: Choice
) -> Plan:
    """Everything at each ``interval``-th step, the first included, and ``choice`` at the others."""
    everything = tuple(Choice(Action.COMPUTE) for _ in sites)
    between = tuple(choice for _ in sites)
    rows = (between if step % interval else everything for step in range(steps))
    return Plan(tuple(one.site for one in sites), tuple(rows))
