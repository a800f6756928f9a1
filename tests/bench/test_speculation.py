"""The benchmark of speculative decoding, on models too small to say anything about speed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from vlmopt.bench import speculation
from vlmopt.bench.speculation import PLAIN, SETTINGS, Setting
from vlmopt.errors import OptionError
from vlmopt.speculative.capture import DraftTree


def test_all_settings_draw_the_same_images_in_turns() -> None:
    model = replace(speculation.random("1x64", 3), tokens=24, tree=DraftTree(2, 3, 6))
    results, tokens = speculation.measure(model, backend="eager")
    assert [one.name for one in results] == [setting.name for setting in SETTINGS]
    by_name = {one.name: one for one in results}
    plain = by_name[PLAIN].statistics
    # of three images the first is not timed; the first token of each is the prompt's
    assert plain.tokens == 2 * model.tokens and plain.forwards == 2 * (model.tokens - 1)
    for one in results:
        assert len(one.seconds) == 2
        assert tokens[one.name].shape == (3, model.tokens)
        assert (one.statistics.skipped > 0) <= ("uniform" in one.name or "dynamic" in one.name)
    assert by_name[Setting("uniform{interval=2}").name].statistics.skipped
    text = speculation.table(results)
    assert text.count("\n") == 1 + len(results)


def test_digits_are_judged() -> None:
    model = speculation.digits(10)
    settings = (Setting(None), Setting("never"))
    results, tokens = speculation.measure(model, settings, backend="eager")
    for one in results:
        judged, images = speculation.judged(one, tokens[one.name])
        assert images.shape == (10, 1, 16, 16)
        assert judged.accuracy is not None and judged.accuracy >= 0.7
    assert results[1].statistics.tokens_per_forward > 1.3
    assert not tokens[PLAIN].equal(torch.zeros_like(tokens[PLAIN]))


def test_sizes_of_drafts() -> None:
    assert speculation.parse_tree("3x2x6") == DraftTree(depth=3, width=2, nodes=6)
    for wrong in ("3x2", "axbxc", "3x2x60"):
        with pytest.raises(OptionError):
            speculation.parse_tree(wrong)
