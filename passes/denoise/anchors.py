"""Which steps of a denoising loop compute everything: a schedule by dynamic programming.

Algorithm 2 of "SODA: Sensitivity-Oriented Dynamic Acceleration for Diffusion Transformer", arXiv
2603.07057. The paper does not say how errors add up over an interval; here they are summed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmopt.errors import OptionError


@dataclass(frozen=True)
class Schedule:
    """Anchors and what they cost.

    Attributes:
        anchors: ascending; the first is step 0.
        cost: sum over all other steps of the error of reusing the anchor before it.
    """

    anchors: tuple[int, ...]
    cost: float


def interval_cost(reuse: Sequence[Sequence[float]], anchor: int, length: int) -> float:
    """Error of an anchor that serves the steps up to the next one, ``length`` steps on.

    Args:
        reuse: see :func:`find_anchors`.
    """
    return math.fsum(reuse[anchor + age][age - 1] for age in range(1, length))


def find_anchors(reuse: Sequence[Sequence[float]], count: int, longest: int) -> Schedule:
    """The ``count`` anchors of least cost; of equal ones, those whose first intervals are shorter.

    Takes time in the order of ``steps * count * longest``.

    Args:
        reuse: of each step, the errors of using what was stored 1, 2, ... steps before it, mean
            over branches; at least ``longest - 1`` of them, those that reach behind step 0 are not
            looked at.
        count: steps that compute everything.
        longest: greatest distance from an anchor to the next one, or to the end.

    Raises:
        OptionError: there are fewer steps than anchors, or more than they reach.
    """
    steps = len(reuse)
    if not 1 <= count <= steps:
        raise OptionError(f"{count} anchors cannot be chosen from {steps} steps")
    if count * longest < steps:
        raise OptionError(
            f"{count} anchors serve at most {count * longest} steps, {longest} each, and there are "
            f"{steps}",
            hint=f"ask for at least {-(-steps // longest)} anchors, or for longer intervals",
        )
    costs = {
        (anchor, length): interval_cost(reuse, anchor, length)
        for anchor in range(steps)
        for length in range(1, min(longest, steps - anchor) + 1)
    }
    # best[anchor][i]: cost and length of the first interval, with i anchors from this one on
    nothing = (math.inf, 0)
    best = [[nothing] * (count + 1) for _ in range(steps + 1)]
    best[steps][0] = (0.0, 0)
    for anchor in reversed(range(steps)):
        for left in range(1, count + 1):
            best[anchor][left] = min(
                (
                    (costs[anchor, length] + best[anchor + length][left - 1][0], length)
                    for length in range(1, min(longest, steps - anchor) + 1)
                ),
                default=nothing,
            )
    anchors, at = [], 0
    for left in range(count, 0, -1):
        anchors.append(at)
        at += best[at][left][1]
    return Schedule(tuple(anchors), best[0][count][0])
