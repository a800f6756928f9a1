"""What steps between anchors do: reuse, or recompute the rows that a budget allows.

Algorithm 3 of "SODA: Sensitivity-Oriented Dynamic Acceleration for Diffusion Transformer", arXiv
2603.07057. Its text calls alpha a pruning rate and has sensitive places pruned less, while alpha
grows with sensitivity: read as the share of rows that is recomputed, both hold.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.denoising.plan import Action, Choice, Plan, Site
from vlmopt.errors import OptionError
from vlmopt.passes.denoise.sensitivity import SHARES, Errors, rows_of

MEANINGS = ("recompute", "prune")


@dataclass(frozen=True)
class Between:
    """The steps between anchors, and the errors that decide what they do.

    Attributes:
        steps: ascending.
        reuse: float64 ``[steps, branches]``, of reusing the anchor before.
        partial: float64 ``[steps, branches, SHARES - 1]``, of recomputing 1, 2, ... eighths.
    """

    steps: tuple[int, ...]
    reuse: Tensor
    partial: Tensor


def between(errors: Errors, anchors: Sequence[int], stretches: int = 0) -> Between:
    """Errors of the steps that are no anchors.

    Args:
        anchors: ascending, the first is step 0.
        stretches: parts of the loop of about as many steps each; within one, steps equally far
            from their anchors get their mean errors, so that they decide alike. 0 for none.

    Raises:
        OptionError: a step is further from its anchor than errors have been measured.
    """
    taken = set(anchors)
    steps = tuple(step for step in range(len(errors.reuse)) if step not in taken)
    latest = [max(anchor for anchor in anchors if anchor < step) for step in steps]
    ages = [step - anchor - 1 for step, anchor in zip(steps, latest, strict=True)]
    if max(ages, default=0) >= (known := errors.reuse.shape[-1]):
        raise OptionError(
            f"a step is {max(ages) + 1} steps after its anchor, and errors of reuse are known for "
            f"{known}",
            hint="calibrate with longer intervals, or take more anchors",
        )
    reuse = errors.reuse[list(steps), :, ages].double()
    partial = errors.partial[list(steps)].double()
    if stretches:
        part = torch.arange(len(steps)) * stretches // max(len(steps), 1)
        kind = torch.stack([part, torch.tensor(ages, dtype=torch.int64)], 1)
        for one in kind.unique(dim=0):
            alike = (kind == one).all(1)
            reuse[alike] = reuse[alike].mean(0)
            partial[alike] = partial[alike].mean(0)
    return Between(steps, reuse, partial)


def rates(reuse: Tensor, scale: float, base: float, alpha_means: str = "recompute") -> Tensor:
    """Share of rows that would be recomputed, 0 to 1, before rounding.

    Args:
        reuse: errors of reuse, any shape.
        scale, base: ``alpha = scale * reuse + base``, within 0 and 1.
        alpha_means: one of :data:`MEANINGS`: alpha is that share, or the share that is not.
    """
    alpha = (scale * reuse + base).clamp(0, 1)
    return alpha if alpha_means == "recompute" else 1 - alpha


def eighths_of(rate: Tensor) -> Tensor:
    """Shares rounded up to eighths: int64, 0 to 8."""
    return (rate * SHARES).ceil().long()


def decide(found: Between, rate: Tensor) -> Tensor:
    """Eighths of the rows that are recomputed; none where reuse does no more harm.

    Args:
        rate: ``[steps, branches]``; see :func:`rates`.

    Returns:
        int64 ``[steps, branches]``, 0 for reuse, 8 for all rows.
    """
    eighths = eighths_of(rate)
    return torch.where(_worth(found).gather(-1, eighths[..., None])[..., 0], eighths, 0)


def _worth(found: Between) -> Tensor:
    """Whether recomputing 0, 1, ... 8 eighths does less harm than reuse: ``[..., SHARES + 1]``."""
    edge = torch.zeros_like(found.partial[..., :1])
    # nothing recomputed is reuse itself, everything is no error at all
    harm = torch.cat([edge + torch.inf, found.partial, edge], -1)
    return harm < found.reuse[..., None]


def base_for(
    found: Between,
    budget: float,
    scale: float = 1.0,
    alpha_means: str = "recompute",
    weights: Sequence[float] = (),
) -> float:
    """The base rate at which the rows recomputed come closest to a budget from below.

    The share grows with the rate in jumps, one wherever a branch gets another eighth: all are
    looked at.

    Args:
        budget: mean share of the rows between anchors that is recomputed, over steps and branches.
        scale, alpha_means: see :func:`rates`.
        weights: of the branches, such as their floating-point operations; none for equal ones.

    Raises:
        OptionError: the budget is not within 0 and 1.
    """
    if not 0 <= budget <= 1:
        raise OptionError(f"a budget of {budget} is no share of the rows: it is from 0 to 1")
    sign = 1.0 if alpha_means == "recompute" else -1.0
    lift = sign * scale * found.reuse
    # a branch goes from j to j + 1 eighths just above this base, or its like for pruning
    jumps = torch.arange(SHARES) / SHARES - lift[..., None]
    eighths = torch.arange(SHARES + 1, dtype=torch.float64)
    shares = torch.where(_worth(found), eighths, 0) / SHARES
    weight = torch.tensor(list(weights) or [1.0] * lift.shape[1], dtype=torch.float64)
    weight = weight / (weight.sum() * max(len(found.steps), 1))
    gains = shares.diff(dim=-1) * weight[:, None]
    places, order = jumps.flatten().sort(stable=True)
    reached = gains.flatten()[order].cumsum(0)
    # only where the base can lie: behind the last of equal jumps
    stops = [*(places[1:] > places[:-1]).nonzero().flatten().tolist(), len(places) - 1]
    best, share = -1, 0.0
    for stop in stops if len(places) else ():
        if share < (now := float(reached[stop])) <= budget + 1e-9:
            best, share = stop, now
    if best < 0:
        base = float(places[0]) - 1 if len(places) else 0.0
    elif best + 1 < len(places):
        base = float(places[best] + places[best + 1]) / 2
    else:
        base = float(places[best]) + 1
    return base if alpha_means == "recompute" else 1 - base


def plan_of(
    sites: Sequence[Site],
    rows: Sequence[int],
    steps: int,
    found: Between,
    eighths: Tensor,
) -> Plan:
    """The plan: anchors compute everything, the others what :func:`decide` says.

    Args:
        sites: the branches.
        rows: of each branch.
        eighths: int64 ``[steps between, branches]``.
    """
    everything = tuple(Choice(Action.COMPUTE) for _ in sites)
    plan = [everything] * steps
    for step, row in zip(found.steps, eighths.tolist(), strict=True):
        plan[step] = tuple(_choice(share, count) for share, count in zip(row, rows, strict=True))
    return Plan(tuple(sites), tuple(plan))


def _choice(eighths: int, rows: int) -> Choice:
    count = rows_of(rows, eighths)
    if not count:
        return Choice(Action.REUSE)
    return Choice(Action.PARTIAL, count) if count < rows else Choice(Action.COMPUTE)


def recomputed_share(plan: Plan, rows: Sequence[int]) -> float:
    """Share of all rows of all branches and steps that a plan computes, anchors included.

    Args:
        rows: of each branch.
    """
    shares = [
        choice.share(count) for row in plan.steps for choice, count in zip(row, rows, strict=True)
    ]
    return sum(shares) / len(shares)
