"""What skipping experts costs in right answers, on the bundled model with experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vlmopt import digits
from vlmopt.bench.chart import chart
from vlmopt.bench.quality import Answers, Exam
from vlmopt.calibration import Run, calibrate
from vlmopt.passes.experts.base import PAIRS, ExpertSkip
from vlmopt.passes.experts.expert_topk import ExpertTopK
from vlmopt.passes.experts.modes import MoDES
from vlmopt.passes.experts.naee import Naee
from vlmopt.pipeline.options import option
from vlmopt.program import Program

MODEL = "digits-moe"
REFERENCE = "random"


@dataclass(frozen=True, kw_only=True)
class RandomSkip(ExpertSkip):
    """Skips pairs at random: what a method has to be better than."""

    name = REFERENCE

    share: float = option(0.5, "of the pairs", ge=0, le=1)

    def stays(self, weights: Tensor, classes: Tensor) -> Tensor:  # type: ignore[override]
        # late digits of a weight are as good as random, and the same in every run
        return torch.frac(weights * 9973.0) >= self.share


@dataclass(frozen=True, kw_only=True)
class ManyShares(MoDES):
    """Calibrates ``modes`` for several shares at once: what is tried for one serves all."""

    shares: tuple[float, ...] = option((), "of the pairs, to skip")

    def search(self, program: Program, rows: Tensor, run: Run) -> dict[str, Any]:
        return {
            str(share): MoDES.search(replace(self, rho=share), program, rows, run)
            for share in self.shares
        }


@dataclass(frozen=True, kw_only=True)
class Score(Answers):
    """Right answers of one method with one setting.

    Attributes:
        setting: the option that was found for it.
        wanted: share of the pairs of token and expert to skip; ``None`` where the method cannot be
            asked for a share.
        skipped: measured on the questions.
    """

    method: str
    setting: str
    wanted: float | None
    skipped: float


class Counting:
    """A model that generates, and counts the pairs of token and expert of its prompts.

    Args:
        model: rewritten by a pass with ``count``.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.device, self.dtype = model.device, model.dtype
        self.pairs = torch.zeros(2, dtype=torch.int64)

    def generate(self, **options: Any) -> Tensor:
        """As the model's own; only the tokens are returned."""
        result = self.model.generate(**options, return_dict_in_generate=True)
        self._add(result)
        return result.sequences  # type: ignore[no-any-return]

    def read(self, samples: Sequence[Mapping[str, Any]]) -> Counting:
        """Run prompts, and generate nothing."""
        for sample in samples:
            with torch.no_grad():
                self._add(self.model(**sample))
        return self

    def _add(self, result: Any) -> None:
        self.pairs += result.past_key_values.reported[PAIRS].sum((0, 1))

    @property
    def skipped(self) -> float:
        """Share of the pairs that were not computed."""
        every, computed = self.pairs.tolist()
        return 1 - computed / every


class Skipping:
    """Methods that skip experts.

    Settings are found on the calibration samples, right answers and shares are measured on the
    questions.

    Args:
        exam: questions for the model.
        prompts: to calibrate on.
        calibration: options of ``modes`` for its calibration.

    Attributes:
        found: what that calibration found, by share.
    """

    def __init__(self, exam: Exam, prompts: int, **calibration: Any) -> None:
        self.exam = exam
        # in one batch: a rewriting for each length of prompt is what takes time
        self.samples = digits.calibration_samples(exam.processor, prompts, size=prompts)
        self.special = tuple(exam.processor.tokenizer.all_special_ids)
        self.calibration = calibration
        self.found: dict[str, Any] = {}

    def fewer(self, k: int) -> Score:
        """The best ``k`` experts of each token."""
        return self._score(ExpertTopK(k=(k,), special=self.special, count=True), f"k={k}", None)

    def modes(self, shares: Sequence[float]) -> Iterator[Score]:
        """With the weights and thresholds of calibrations for these shares."""
        one = ManyShares(shares=tuple(shares), special=self.special, **self.calibration)
        with TemporaryDirectory(prefix="vlmopt-") as folder:
            self.found = calibrate(self.exam.model, self.samples, one, Path(folder, "modes.json"))
        for share in shares:
            found = self.found[str(share)]
            thresholds, weights = found["thresholds"], found["weights"]
            calibrated = MoDES(
                **thresholds,
                text_weights=tuple(weights["text"]),
                vision_weights=tuple(weights["vision"]),
                special=self.special,
                count=True,
            )
            setting = " ".join(f"{kind}={value:.3g}" for kind, value in thresholds.items())
            yield self._score(calibrated, setting, share)

    def naee(self, share: float, wanted: float) -> Score:
        """With a threshold for ``share``, where ``wanted`` was asked for."""

        def made(beta: float) -> Naee:
            return Naee(beta=beta, special=self.special, count=True)

        def skipped(beta: float) -> float:
            return self._counting(made(beta)).read(self.samples).skipped

        beta = nearest(skipped, share)
        return self._score(made(beta), f"beta={beta:.3g}", wanted)

    def random(self, share: float, wanted: float) -> Score:
        """Whatever comes, for ``share`` where ``wanted`` was asked for."""
        return self._score(RandomSkip(share=share, count=True), "", wanted)

    def _counting(self, one: ExpertSkip) -> Counting:
        return Counting(self.exam.rewritten([one]))

    def _score(self, one: ExpertSkip, setting: str, wanted: float | None) -> Score:
        model = self._counting(one)
        right, asked = self.exam.count(model)
        return Score(
            right=right,
            asked=asked,
            method=one.name,
            setting=setting,
            wanted=wanted,
            skipped=model.skipped,
        )


def nearest(
    measure: Callable[[float], float], wanted: float, *, within: float = 0.003, steps: int = 10
) -> float:
    """Where between 0 and 1 a function that grows comes nearest to a value, by halving.

    Args:
        measure: does not fall.
        within: near enough to stop.
        steps: times that the interval is halved at most.
    """
    low, high = 0.0, 1.0
    seen = {high: measure(high)}
    while seen[high] >= wanted and len(seen) <= steps:
        middle = (low + high) / 2
        seen[middle] = measure(middle)
        if abs(seen[middle] - wanted) <= within:
            return middle
        if seen[middle] < wanted:
            low = middle
        else:
            high = middle
    return min(seen, key=lambda place: (abs(seen[place] - wanted), place))


def run(
    skipping: Skipping,
    shares: Sequence[float],
    ks: Sequence[int],
    progress: Callable[[Score], None] = lambda score: None,
) -> list[Score]:
    """All methods, brought to the shares that ``modes`` arrives at.

    Args:
        shares: of the pairs, that ``modes`` is to skip at least.
        ks: experts of each token, for the method that can be asked for nothing else.
    """

    def made() -> Iterator[Score]:
        for share, first in zip(shares, skipping.modes(shares), strict=True):
            yield first
            yield skipping.naee(first.skipped, share)
            yield skipping.random(first.skipped, share)
        for k in ks:
            yield skipping.fewer(k)

    scores = []
    for score in made():
        scores.append(score)
        progress(score)
    return scores


def table(scores: Sequence[Score]) -> str:
    """Markdown: a row per method and setting, in the order of the shares."""
    lines = [
        "| asked for | method | setting | pairs skipped | right answers |",
        "| ---: | --- | --- | ---: | ---: |",
    ]
    for score in sorted(scores, key=lambda one: (one.wanted or one.skipped, one.method)):
        wanted = "-" if score.wanted is None else f"{score.wanted:.0%}"
        lines.append(
            f"| {wanted} | {score.method} | {score.setting} | {score.skipped:.1%} | "
            f"{score.share:.1%} ± {score.error:.1%} |"
        )
    return "\n".join(lines)


def figure(scores: Sequence[Score], full: float) -> str:
    """SVG: right answers over the share skipped, a line per method."""
    ordered = sorted(scores, key=lambda one: one.skipped)
    return chart(
        "Right answers over pairs of token and expert skipped",
        {
            method: [(one.skipped, one.share) for one in ordered if one.method == method]
            for method in dict.fromkeys(one.method for one in scores)
        },
        full,
        ticks=[at / 10 for at in range(2, 10)],
        dashed=(REFERENCE,),
        dots=True,
    )
