"""What dropping costs in right answers, on the bundled model: all methods, several cuts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from vlmopt import digits
from vlmopt.bench.methods import needs_artifact, one_cut
from vlmopt.calibration import calibrate
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.registry import find_pass
from vlmopt.program import Program
from vlmopt.runtime.model import Engine
from vlmopt.tracing import capture

BASELINES = ("random-drop", "stride-drop")


@dataclass(frozen=True)
class Score:
    """Right answers of one method at one place.

    Attributes:
        keep: share of the visual tokens that stay from ``layer`` on.
        right, asked: held-out questions.
    """

    method: str
    layer: int
    keep: float
    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def error(self) -> float:
        """Standard error of the share."""
        return math.sqrt(self.share * (1 - self.share) / self.asked)


class Exam:
    """Held-out questions for the bundled model, and programs that have been captured for them.

    Args:
        questions: how many.
        seed: of the draw.
    """

    def __init__(self, questions: int, seed: int = 0) -> None:
        self.model, self.processor = digits.load_model()
        self.samples = digits.heldout_samples(questions, seed)
        self._programs: dict[Any, Program] = {}
        self._folder = TemporaryDirectory(prefix="vlmopt-")

    def full(self) -> tuple[int, int]:
        """Right answers of the untouched model, and questions."""
        return self._count(self.model)

    def score(self, method: str, layer: int, keep: float) -> Score:
        """Right answers with one cut."""
        last = len(self.model.get_decoder().layers) - 1
        text = one_cut(method, layer, keep, last=last, artifact=self._artifact(method))
        engine = Engine(self.model, partial(run_pipeline, pipeline=text), "eager")
        engine.capture = self._capture
        return Score(method, layer, keep, *self._count(engine.twin))

    def _artifact(self, method: str) -> str:
        """Of a method that needs one, calibrated on other questions."""
        if not needs_artifact(method):
            return ""
        path = Path(self._folder.name, f"{method}.json")
        if not path.exists():
            samples = digits.calibration_samples(self.processor)
            calibrate(self.model, samples, find_pass(method)(), path)
        return str(path)

    def _count(self, model: Any) -> tuple[int, int]:
        tallies = digits.evaluate(model, self.processor, self.samples).values()
        return sum(tally.correct for tally in tallies), sum(tally.total for tally in tallies)

    def _capture(self, inputs: dict[str, Any]) -> Program:
        """One capture serves all methods: this model's graphs depend on shapes only."""
        shapes = {name: tuple(value.shape) for name, value in inputs.items()}
        padded = not bool(inputs["attention_mask"].all())
        key = (tuple(sorted(shapes.items())), padded)
        if key not in self._programs:
            self._programs[key] = capture(self.model, inputs)
        return self._programs[key].clone()


def run(
    exam: Exam,
    methods: Iterable[str],
    layers: Sequence[int],
    keeps: Sequence[float],
    progress: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """Every method at every cut."""
    scores = []
    for method in methods:
        for layer in layers:
            if layer < getattr(find_pass(method), "first_layer", 0):
                continue
            for keep in keeps:
                scores.append(exam.score(method, layer, keep))
                progress(scores[-1])
    return scores


def table(scores: Sequence[Score]) -> str:
    """Markdown: a row per method, a column per cut; below random is marked."""
    cuts = sorted({(score.layer, -score.keep) for score in scores})
    methods = list(dict.fromkeys(score.method for score in scores))
    by_cut = {(score.method, score.layer, -score.keep): score for score in scores}
    lines = [
        "| method | " + " | ".join(f"layer {at}, {-keep:.0%}" for at, keep in cuts) + " |",
        "| --- |" + " ---: |" * len(cuts),
    ]
    for method in methods:
        cells = []
        for cut in cuts:
            score = by_cut.get((method, *cut))
            random = by_cut.get(("random-drop", *cut))
            cells.append("-" if score is None else f"{score.share:.1%}{_mark(score, random)}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mark(score: Score, random: Score | None) -> str:
    """A sign for what lies below chance by more than two standard errors of the difference."""
    if random is None or score.method in BASELINES:
        return ""
    error = math.hypot(score.error, random.error)
    return " ↓" if score.share < random.share - 2 * error else ""


_HUES = 18


def figure(scores: Sequence[Score], layer: int, full: float) -> str:
    """SVG: right answers over the share kept, for cuts at one layer, a line per method."""
    width, height, left, top = 720, 420, 60, 20
    right, bottom = 210, 50
    keeps = sorted({score.keep for score in scores})
    lowest = math.floor(min(score.share for score in scores) * 10) / 10

    def x(keep: float) -> float:
        low, high = math.log(keeps[0]), math.log(keeps[-1])
        return left + (math.log(keep) - low) / (high - low) * (width - left - right)

    def y(share: float) -> float:
        return top + (1 - share) / (1 - lowest) * (height - top - bottom)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="14">Right answers over visual tokens kept from layer {layer} on'
        "</text>",
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
        f'<text x="{x(keep):.1f}" y="{height - bottom + 18}" text-anchor="middle">{keep:.0%}</text>'
        for keep in keeps
    ]
    parts.append(
        f'<line x1="{left}" x2="{width - right}" y1="{y(full):.1f}" y2="{y(full):.1f}" '
        'stroke="black" stroke-dasharray="4"/>'
    )
    methods = list(dict.fromkeys(score.method for score in scores if score.layer == layer))
    for number, method in enumerate(methods):
        colour = f"hsl({360 * (number * 7 % _HUES) // _HUES}, 65%, {35 + 15 * (number % 2)}%)"
        dashes = ' stroke-dasharray="6 3"' if method in BASELINES else ""
        points = " ".join(
            f"{x(score.keep):.1f},{y(score.share):.1f}"
            for score in sorted(scores, key=lambda score: score.keep)
            if score.method == method and score.layer == layer
        )
        at = top + 16 * number + 10
        parts += [
            f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{dashes}/>',
            f'<line x1="{width - right + 20}" x2="{width - right + 44}" y1="{at}" y2="{at}" '
            f'stroke="{colour}" stroke-width="2"{dashes}/>'
            f'<text x="{width - right + 50}" y="{at + 4}">{method}</text>',
        ]
    return "\n".join([*parts, "</svg>", ""])


def to_json(scores: Sequence[Score]) -> list[Mapping[str, Any]]:
    """JSON values."""
    return [vars(score) for score in scores]
