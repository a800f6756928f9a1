"""A plan as a picture: steps from left to right, branches from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from vlmopt.denoising.plan import Action, Choice, Plan

if TYPE_CHECKING:
    from rich.text import Text

_EIGHTHS = " ▁▂▃▄▅▆▇█"
_SIGNS = {Action.COMPUTE: "█", Action.REUSE: "·", Action.FORECAST: "~"}
_STYLES = {
    Action.COMPUTE: "blue",
    Action.REUSE: "dim",
    Action.PARTIAL: "yellow",
    Action.FORECAST: "magenta",
}
_COLOURS = {
    Action.COMPUTE: "#3b6fb6",
    Action.REUSE: "#e8e8e8",
    Action.PARTIAL: "#e0a030",
    Action.FORECAST: "#b070c0",
}
_WORDS = {
    Action.COMPUTE: "compute",
    Action.REUSE: "reuse",
    Action.PARTIAL: "some rows",
    Action.FORECAST: "forecast",
}


def _taken(plan: Plan) -> list[Action]:
    return sorted({choice.action for row in plan.steps for choice in row})


def _sign(choice: Choice, rows: int) -> str:
    if choice.action is Action.PARTIAL:
        return _EIGHTHS[min(max(round(8 * choice.share(rows)), 1), 7)]
    return _SIGNS[choice.action]


def plan_text(plan: Plan, rows: Sequence[int]) -> str:
    """A line for each branch, a character for each step, and what they mean.

    Args:
        rows: of each branch.
    """
    return "\n".join(line.plain for line in plan_lines(plan, rows))


def plan_lines(plan: Plan, rows: Sequence[int]) -> list[Text]:
    """:func:`plan_text` in colours, as lines of rich."""
    from rich.text import Text

    names = [str(site) for site in plan.sites]
    wide = max(map(len, names))
    anchors = set(plan.anchors)
    marks = "".join("▼" if step in anchors else " " for step in range(len(plan.steps)))
    lines = [Text(f"{'':{wide}}  {marks}", style="dim")]
    for at, name in enumerate(names):
        line = Text(f"{name:{wide}}  ")
        for row in plan.steps:
            line.append(_sign(row[at], rows[at]), style=_STYLES[row[at].action])
        lines.append(line)
    legend = Text(f"{'':{wide}}  ")
    for action in _taken(plan):
        sign = _EIGHTHS[3] if action is Action.PARTIAL else _SIGNS[action]
        legend.append(sign, style=_STYLES[action]).append(f" {_WORDS[action]}  ")
    legend.append(f"▼ everything ({len(anchors)} of {len(plan.steps)} steps)  ")
    legend.append(f"{len(plan.graphs)} kinds of steps")
    return [*lines, legend]


def plan_svg(plan: Plan, rows: Sequence[int], *, cell: int = 12) -> str:
    """The same as an SVG file; of partial steps, the share of rows is filled.

    Args:
        rows: of each branch.
        cell: side of a square in pixels.
    """
    left, top = 120, 24
    width = left + cell * len(plan.steps) + 10
    height = top + cell * len(plan.sites) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="10">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
    ]
    parts += [
        f'<text x="{left + (step + 0.5) * cell:g}" y="{top - 6}" text-anchor="middle">{step}</text>'
        for step in plan.anchors
    ]
    for at, site in enumerate(plan.sites):
        y = top + at * cell
        parts.append(f'<text x="{left - 6}" y="{y + cell - 3}" text-anchor="end">{site}</text>')
        for step, row in enumerate(plan.steps):
            choice, x = row[at], left + step * cell
            filled = choice.action
            if choice.action is Action.PARTIAL:
                filled = Action.REUSE
            parts.append(_square(x, y, cell - 1, cell - 1, _COLOURS[filled]))
            if choice.action is Action.PARTIAL:
                tall = (cell - 1) * choice.share(rows[at])
                shift = cell - 1 - tall
                parts.append(_square(x, y + shift, cell - 1, tall, _COLOURS[choice.action]))
    x = left
    for action in _taken(plan):
        parts.append(_square(x, height - 20, cell - 1, cell - 1, _COLOURS[action]))
        parts.append(f'<text x="{x + cell + 2}" y="{height - 11}">{_WORDS[action]}</text>')
        x += 80
    return "\n".join([*parts, "</svg>", ""])


def _square(x: float, y: float, width: float, height: float, colour: str) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{colour}"/>'
