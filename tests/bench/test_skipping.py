"""Quality of skipping experts, on two layers of the bundled model that has them."""

from __future__ import annotations

import pytest

from vlmopt import digits
from vlmopt.bench import skipping
from vlmopt.bench.quality import Exam


@pytest.fixture(scope="module")
def methods() -> skipping.Skipping:
    exam = Exam(6, model=skipping.MODEL)
    decoder = exam.model.get_decoder()
    decoder.layers = decoder.layers[:2]
    decoder.config.num_hidden_layers = 2
    return skipping.Skipping(exam, 6, grid=2, text_end=2.0, vision_end=2.0)


@pytest.fixture(scope="module")
def scores(methods: skipping.Skipping) -> list[skipping.Score]:
    told: list[skipping.Score] = []
    found = skipping.run(methods, [0.5], [2], told.append)
    assert told == found
    return found


def test_methods_are_brought_to_one_share(scores: list[skipping.Score]) -> None:
    assert [score.method for score in scores] == ["modes", "naee", "random", "expert-topk"]
    assert [score.wanted for score in scores] == [0.5, 0.5, 0.5, None]
    modes, naee, random, fewer = (score.skipped for score in scores)
    assert modes >= 0.49  # at least one half on the prompts that it was calibrated on
    assert abs(random - modes) < 0.03
    # the best expert always stays, and there are four
    assert abs(naee - min(modes, 0.75)) < 0.03
    # the first token is special, and keeps its experts
    assert fewer == pytest.approx(0.5 * _not_special(), abs=1e-9)
    assert all(score.asked == 6 for score in scores)


def _not_special() -> float:
    """Share of the tokens of the six prompts that are not special: all but the first of each."""
    processor = digits.load_model(name=skipping.MODEL)[1]
    drawn = digits.heldout_samples(6)
    inputs = digits.batch(processor, [one for one, _ in drawn], [asked for _, asked in drawn])
    tokens = int(inputs["attention_mask"].sum())
    return (tokens - 6) / tokens


def test_results_as_text(scores: list[skipping.Score]) -> None:
    lines = skipping.table(scores).splitlines()
    assert len(lines) == 2 + len(scores)
    assert f"| - | expert-topk | k=2 | {scores[-1].skipped:.1%} |" in "\n".join(lines)
    drawn = skipping.figure(scores, 1.0)
    assert drawn.count("<circle") == len(scores) and drawn.count("<polyline") == 4


def test_the_nearest_setting() -> None:
    assert skipping.nearest(lambda x: x, 0.3) == pytest.approx(0.3, abs=3e-3)
    assert skipping.nearest(lambda x: x, 0.3, within=0) == pytest.approx(0.3, abs=1e-3)
    assert skipping.nearest(lambda x: x / 2, 0.9) == 1.0
    # a step: of equally near ones, the smaller
    assert skipping.nearest(lambda x: float(x >= 0.5), 1.0) == 0.5
