"""Line charts of right answers, as SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence

_HUES = 18


def chart(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    full: float,
    *,
    ticks: Sequence[float],
    scale: Callable[[float], float] = float,
    dashed: Collection[str] = (),
    dots: bool = False,
) -> str:
    """An SVG file with a line for each name.

    Args:
        lines: points ``(share, share of right answers)``, ascending.
        full: right answers of the untouched model, a dashed line across.
        ticks: shares that are named below, ascending; the first and the last are the ends.
        scale: of the shares from left to right.
        dashed: names whose lines are dashed.
        dots: whether points are marked.
    """
    width, height, left, top = 720, 420, 60, 20
    right, bottom = 210, 50
    lowest = math.floor(min(y for points in lines.values() for _, y in points) * 10) / 10

    def x(share: float) -> float:
        low, high = scale(ticks[0]), scale(ticks[-1])
        return left + (scale(share) - low) / (high - low) * (width - left - right)

    def y(share: float) -> float:
        return top + (1 - share) / (1 - lowest) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="14">{title}</text>',
    ]
    steps = round((1 - lowest) * 10)
    for step in range(steps + 1):
        share = lowest + step / 10
        parts.append(
            f'<line x1="{left}" x2="{width - right}" y1="{y(share):.1f}" y2="{y(share):.1f}" '
            f'stroke="#ddd"/><text x="{left - 8}" y="{y(share) + 4:.1f}" text-anchor="end">'
            f"{share:.0%}</text>"
        )
    parts += [
        f'<text x="{x(tick):.1f}" y="{height - bottom + 18}" text-anchor="middle">{tick:.0%}</text>'
        for tick in ticks
    ]
    parts.append(
        f'<line x1="{left}" x2="{width - right}" y1="{y(full):.1f}" y2="{y(full):.1f}" '
        'stroke="black" stroke-dasharray="4"/>'
    )
    for number, (name, values) in enumerate(lines.items()):
        colour = f"hsl({360 * (number * 7 % _HUES) // _HUES}, 65%, {35 + 15 * (number % 2)}%)"
        dashes = ' stroke-dasharray="6 3"' if name in dashed else ""
        places = [(f"{x(share):.1f}", f"{y(right_):.1f}") for share, right_ in values]
        points = " ".join(",".join(place) for place in places)
        at = top + 16 * number + 10
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>',
            f'<line x1="{width - right + 20}" x2="{width - right + 44}" y1="{at}" y2="{at}" '
            f'stroke="{colour}" stroke-width="2"{dashes}/>'
            f'<text x="{width - right + 50}" y="{at + 4}">{name}</text>',
        ]
        if dots:
            parts += [f'<circle cx="{cx}" cy="{cy}" r="3" fill="{colour}"/>' for cx, cy in places]
    return "\n".join([*parts, "</svg>", ""])
