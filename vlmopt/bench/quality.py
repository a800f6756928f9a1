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
from vlmopt.bench.chart import chart
from vlmopt.bench.methods import needs_artifact, one_cut
from vlmopt.calibration import calibrate
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.passes import Pass
from vlmopt.pipeline.registry import find_pass
from vlmopt.program import Program
from vlmopt.runtime.model import Engine
from vlmopt.tracing import capture

BASELINES = ("random-drop", "stride-drop")


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What was asked, and what was right.

    Attributes:
        right, asked: held-out questions.
    """

    right: int
    asked: int

    @property
    def share(self) -> float:
        return self.right / self.asked

    @property
    def error(self) -> float:
        """Standard error of the share."""
        return math.sqrt(self.share * (1 - self.share) / self.asked)


@dataclass(frozen=True, kw_only=True)
class Score(Answers):
    """Right answers of one method at one place.

    Attributes:
        keep: share of the visual tokens that stay from ``layer`` on.
    """

    method: str
    layer: int
    keep: float


class Exam:
    """Held-out questions for a bundled model, and programs that have been captured for them.

    Args:
        questions: how many.
        seed: of the draw.
        model: name of the model.
    """

    def __init__(self, questions: int, seed: int = 0, model: str = "digits") -> None:
        self.model, self.processor = digits.load_model(name=model)
        self.samples = digits.heldout_samples(questions, seed)
        self._programs: dict[Any, Program] = {}
        self._folder = TemporaryDirectory(prefix="vlmopt-")

    def full(self) -> tuple[int, int]:
        """Right answers of the untouched model, and questions."""
        return self.count(self.model)

    def rewritten(self, pipeline: str | Sequence[Pass]) -> Any:
        """The model after a pipeline."""
        engine = Engine(self.model, partial(run_pipeline, pipeline=pipeline), "eager")
        engine.capture = self._capture
        return engine.twin

    def score(self, method: str, layer: int, keep: float) -> Score:
        """Right answers with one cut."""
        last = len(self.model.get_decoder().layers) - 1
        text = one_cut(method, layer, keep, last=last, artifact=self._artifact(method))
        right, asked = self.count(self.rewritten(text))
        return Score(method=method, layer=layer, keep=keep, right=right, asked=asked)

    def _artifact(self, method: str) -> str:
        """Of a method that needs one, calibrated on other questions."""
        if not needs_artifact(method):
            return ""
        path = Path(self._folder.name, f"{method}.json")
        if not path.exists():
            samples = digits.calibration_samples(self.processor)
            calibrate(self.model, samples, find_pass(method)(), path)
        return str(path)

    def count(self, model: Any) -> tuple[int, int]:
        """Right answers of a model, and questions."""
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


def figure(scores: Sequence[Score], layer: int, full: float) -> str:
    """SVG: right answers over the share kept, for cuts at one layer, a line per method."""
    here = sorted((score for score in scores if score.layer == layer), key=lambda one: one.keep)
    return chart(
        f"Right answers over visual tokens kept from layer {layer} on",
        {
            method: [(score.keep, score.share) for score in here if score.method == method]
            for method in dict.fromkeys(score.method for score in scores if score.layer == layer)
        },
        full,
        ticks=sorted({score.keep for score in scores}),
        scale=math.log,
        dashed=BASELINES,
    )


def to_json(scores: Sequence[Answers]) -> list[Mapping[str, Any]]:
    """JSON values."""
    return [vars(score) for score in scores]
