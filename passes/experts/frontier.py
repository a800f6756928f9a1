"""Search for the two thresholds of MoDES: the least harm among those that skip enough."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vlmopt.errors import OptionError

TEXT_END, VISION_END = 0.71, 0.6
"""Where the published grids end, before the sigmoid; for models of 26 layers or more, over which
weights sum to 1."""
STEEPNESS = 10.0


def threshold_grid(count: int, end: float, *, linear: bool = False) -> list[float]:
    """Thresholds to try, ascending: close together where they are small.

    Args:
        count: how many.
        end: of the interval that they are mapped from, which begins at 0.
        linear: evenly spread, between the same ends.
    """
    places = [end * at / (count - 1) for at in range(count)] if count > 1 else [end]
    if linear:
        low, high = _mapped(0.0), _mapped(end)
        return [low + (high - low) * place / end for place in places]
    return [_mapped(place) for place in places]


def _mapped(place: float) -> float:
    return 2 / (1 + math.exp(-STEEPNESS * (place - 1)))


def layer_weights(divergences: Sequence[float]) -> list[float]:
    """Weights of layers that sum to 1, from how far answers drift without each.

    Raises:
        OptionError: they drift for no layer.
    """
    total = math.fsum(divergences)
    if total <= 0:
        raise OptionError(
            "answers are the same without the experts of any layer, so none can be weighed",
            hint="calibrate on more samples, or give weights by hand",
        )
    return [value / total for value in divergences]


@dataclass(frozen=True)
class Frontier:
    """A pair of thresholds by their places in the grids, and what was measured on the way.

    Attributes:
        text, vision: places.
        share, harm: measured there.
        evaluated: ``(text, vision) -> (share, harm)`` of every pair looked at.
    """

    text: int
    vision: int
    share: float
    harm: float
    evaluated: dict[tuple[int, int], tuple[float, float]]


def search_frontier(
    count: int, share: float, measure: Callable[[int, int], tuple[float, float]]
) -> Frontier:
    """Of pairs that skip at least ``share``, one that does least harm.

    Walks along the frontier: the more of the text is skipped, the less of vision has to be. Looks
    at no more than ``2 * count`` pairs. Share and harm should grow with both thresholds, which they
    do but roughly: skipping in one layer changes the routing of later ones. Where they do not, the
    result still skips enough, and is the best of all pairs looked at.

    Args:
        count: thresholds in each grid.
        share: of pairs of token and expert to skip.
        measure: ``(text, vision) -> (share skipped, harm)``; called once for each pair.

    Raises:
        OptionError: even the largest thresholds skip less.
    """
    seen: dict[tuple[int, int], tuple[float, float]] = {}

    def skipped(text: int, vision: int) -> float:
        if (text, vision) not in seen:
            seen[text, vision] = measure(text, vision)
        return seen[text, vision][0]

    last = count - 1
    most = skipped(last, last)
    if most < share:
        raise OptionError(
            f"the largest thresholds skip {most:.3f} of all pairs of token and expert, not {share}",
            hint="ask for a smaller share, or for larger thresholds (options text_end, vision_end)",
        )
    vision = last
    for text in range(count):
        # a row that skips too little here has nothing better than the row before it
        while vision >= 0 and skipped(text, vision) >= share:
            vision -= 1
    best = min(
        (pair for pair, (found, _) in seen.items() if found >= share),
        key=lambda pair: (seen[pair][1], pair),
    )
    return Frontier(*best, *seen[best], seen)
