"""Clips and streams of digits: what they say of themselves is what their pixels show."""

from __future__ import annotations

import itertools
import sys
from fractions import Fraction

import pytest
import torch

from vlmopt.bench.clips import (
    MOTIONS,
    PHOTOGRAPHS,
    SCIKIT_LEARN,
    SHARES,
    Motion,
    make_clip,
    normalised,
    photograph,
    same_patches,
)
from vlmopt.bench.digit_stream import FILLED, draw_stream, same_cells
from vlmopt.digits import EMPTY, GRID, KINDS, MAX_COUNT
from vlmopt.errors import OptionError, PreconditionError

PACKAGES = {name: "sklearn" if name in SCIKIT_LEARN else "skimage" for name in PHOTOGRAPHS}


@pytest.mark.parametrize("motion", MOTIONS)
@pytest.mark.parametrize("share", SHARES)
def test_the_share_of_patches_that_stand_still(share: float, motion: Motion) -> None:
    """Counted in the pixels, between any two frames next to each other."""
    pytest.importorskip("sklearn")
    clip = make_clip(9, size=112, patch=14, static=share, motion=motion, seed=1)
    assert clip.frames.shape == (9, 3, 112, 112) and clip.frames.dtype == torch.uint8
    assert abs(float(clip.static) - share) <= 0.5 / 64
    for one, other in zip(clip.frames, clip.frames[1:], strict=False):
        pixels = (one != other).any(0)
        still = [
            not pixels[14 * row : 14 * row + 14, 14 * column : 14 * column + 14].any()
            for row in range(8)
            for column in range(8)
        ]
        assert Fraction(sum(still), 64) == clip.static
        assert same_patches(one, other, 14).flatten().tolist() == still
        assert clip.moving.flatten().tolist() == [not same for same in still]


def test_a_seed_is_a_clip() -> None:
    pytest.importorskip("sklearn")
    one, again, other = (make_clip(3, size=56, motion="occlude", seed=s) for s in (4, 4, 5))
    assert one.frames.equal(again.frames)
    assert not one.frames.equal(other.frames)
    assert not make_clip(3, size=56, motion="move", seed=4).frames.equal(one.frames)


def test_motion_never_stops_or_leaves_the_picture() -> None:
    pytest.importorskip("sklearn")
    for motion in MOTIONS:
        frames = make_clip(80, size=56, motion=motion, static=0, photographs=["flower"]).frames
        assert len(frames) == 80  # each differs from the one before: else there were an error


def test_normalised_pixels() -> None:
    grey = torch.tensor([[0, 255]], dtype=torch.uint8).expand(3, 1, 2)
    low, high = normalised(grey).unbind(-1)
    torch.testing.assert_close(low[0], torch.tensor([-0.48145466 / 0.26862954]))
    torch.testing.assert_close(high[2], torch.tensor([(1 - 0.40821073) / 0.27577711]))
    assert normalised(grey, torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("name", PHOTOGRAPHS)
def test_photographs(name: str) -> None:
    pytest.importorskip(PACKAGES[name])
    picture = photograph(name)
    assert picture.dtype == torch.uint8 and picture.ndim == 3
    assert picture.shape[0] == 3 and min(picture.shape[1:]) >= 300
    assert picture.float().std() > 20


def test_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="no photograph 'moon'"):
        photograph("moon")
    with pytest.raises(OptionError, match="3 frames of 50 pixels in patches of 14"):
        make_clip(3, size=50)
    with pytest.raises(OptionError, match=r"1.5 of them static"):
        make_clip(3, static=1.5)
    with pytest.raises(OptionError, match=r"no stream has 3 frames, 0.5 .* every 0"):
        draw_stream(3, static=0.5, every=0)
    for module, package in (("sklearn", "scikit-learn"), ("skimage", "scikit-image")):
        name = next(name for name, where in PACKAGES.items() if where == module)
        monkeypatch.setitem(sys.modules, module, None)
        monkeypatch.setitem(sys.modules, f"{module}.datasets", None)
        with pytest.raises(PreconditionError, match=f"comes with {package}") as caught:
            photograph(name)
        assert caught.value.hint is not None
        assert caught.value.hint.startswith(f"pip install {package}, ")


def test_an_even_picture_does_not_move(monkeypatch: pytest.MonkeyPatch) -> None:
    grey = torch.full((3, 60, 60), 7, dtype=torch.uint8)
    monkeypatch.setattr("vlmopt.bench.clips.photograph", lambda name: grey)
    with pytest.raises(PreconditionError, match="'flower' is too even"):
        make_clip(2, size=28, photographs=["flower"])
    assert make_clip(2, size=28, static=1, photographs=["flower"]).static == 1


# -- digits ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", SHARES)
def test_cells_that_change(share: float) -> None:
    """Exactly as many as were asked for, in labels and in pixels."""
    stream = draw_stream(40, static=share, seed=2)
    changes = GRID**2 - round(share * GRID**2)
    assert not stream[0].changed.any()
    for before, now in itertools.pairwise(stream):
        assert int(now.changed.sum()) == changes
        assert now.changed.equal(before.scene.labels != now.scene.labels)
        assert same_cells(before.scene, now.scene).equal(~now.changed)


def test_scenes_are_as_those_the_model_was_trained_on() -> None:
    for moment in draw_stream(200, static=0.25, seed=3):
        labels = moment.scene.labels
        assert FILLED[0] <= int((labels != EMPTY).sum()) <= FILLED[1]
        assert max(moment.scene.count(digit) for digit in range(10)) <= MAX_COUNT


def test_a_scene_changes_now_and_then() -> None:
    stream = draw_stream(10, static=0.75, every=3, seed=4)
    assert [bool(moment.changed.any()) for moment in stream] == [
        at in (3, 6, 9) for at in range(10)
    ]


def test_answers_are_about_the_scene_that_is_seen() -> None:
    stream = draw_stream(30, static=0.5, seed=5)
    assert [moment.question.kind for moment in stream[:6]] == [*KINDS, *KINDS]
    stale = 0
    for before, now in itertools.pairwise(stream):
        words = now.question.text.rstrip("?").split()
        for scene in (now.scene, before.scene):
            if now.question.kind == "position":
                row, column = int(words[5]) - 1, int(words[7]) - 1
                label = int(scene.labels[row, column])
                right = "none" if label == EMPTY else str(label)
            else:
                digit = next(int(word) for word in words if word.isdigit())
                count = scene.count(digit)
                presence = "yes" if count else "no"
                right = str(count) if now.question.kind == "count" else presence
            if scene is now.scene:
                assert now.question.answer == right
            else:
                stale += now.question.answer != right
    assert stale > 5  # whoever looks at the frame before is wrong often


def test_a_seed_is_a_stream() -> None:
    one, again, other = (draw_stream(5, seed=seed) for seed in (6, 6, 7))
    assert all(a.scene.image.equal(b.scene.image) for a, b in zip(one, again, strict=True))
    assert [a.question for a in one] == [b.question for b in again]
    assert [a.question for a in one] != [b.question for b in other]


@pytest.mark.parametrize("share", SHARES)
def test_the_same_cells_change_all_along(share: float) -> None:
    stream = draw_stream(20, static=share, same_cells=True, seed=8)
    changes = GRID**2 - round(share * GRID**2)
    assert int(stream[1].changed.sum()) == changes
    assert all(moment.changed.equal(stream[1].changed) for moment in stream[1:])
    for before, now in itertools.pairwise(stream):
        assert same_cells(before.scene, now.scene).equal(~now.changed)
        assert FILLED[0] <= int((now.scene.labels != EMPTY).sum()) <= FILLED[1]
