"""Scenes of digits that change over time, with questions about what is seen now."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.digits import (
    CELL_PIXELS,
    EMPTY,
    GRID,
    KINDS,
    MAX_COUNT,
    Question,
    Scene,
    compose,
    heldout_digits,
    make_question,
    make_scene,
    make_tiles,
)
from vlmopt.errors import OptionError

FILLED = (4, 12)
"""Fewest and most cells of a scene that hold a digit."""

_PALETTE = 5
_EMPTIED = 0.25


@dataclass(frozen=True, eq=False)
class Moment:
    """One frame of a stream.

    Attributes:
        scene: what is seen.
        question: about it, with its answer.
        changed: bool ``[GRID, GRID]``, cells that hold another digit than in the frame before, or
            hold one and did not, or did and do not; in the first frame none.
    """

    scene: Scene
    question: Question
    changed: Tensor


def draw_stream(
    frames: int,
    *,
    static: float = 0.75,
    every: int = 1,
    same_cells: bool = False,
    seed: int = 0,
) -> list[Moment]:
    """A stream of scenes of held-out digits, in which some cells change now and then.

    Args:
        frames: how many.
        static: share of cells that stay as they are when a scene changes; the nearest number of
            cells is taken. All other cells change.
        every: frames from one change to the next; those between are the same again.
        same_cells: it is always the same cells that change.
        seed: of all that is drawn; the same seed gives the same stream.

    Raises:
        OptionError: a share or a number that cannot be.
    """
    if not 0 <= static <= 1 or every < 1 or frames < 1:
        raise OptionError(
            f"no stream has {frames} frames, {static} of their cells static, a change every "
            f"{every} frames",
            hint="static is 0 to 1, the others are 1 or more",
        )
    rng = random.Random(seed)
    images, labels = heldout_digits()
    scene = make_scene(rng, images, labels, filled=FILLED)
    present = set(scene.labels[scene.labels != EMPTY].tolist())
    absent = [digit for digit in range(10) if digit not in present]
    palette = sorted(present | set(rng.sample(absent, max(0, _PALETTE - len(present)))))
    count = GRID**2 - round(static * GRID**2)
    fixed = _cells_that_can_change(rng, scene, count) if same_cells else None
    found = []
    for at in range(frames):
        before = scene
        if at and at % every == 0:
            scene = _changed(rng, scene, fixed or range(GRID**2), count, palette, images, labels)
        question = make_question(rng, scene, KINDS[at % len(KINDS)])
        found.append(Moment(scene, question, scene.labels != before.labels))
    return found


def same_cells(one: Scene, other: Scene) -> Tensor:
    """Which cells hold the same pixels, bool ``[GRID, GRID]``."""
    differ = one.image != other.image
    cells = differ.unfold(0, CELL_PIXELS, CELL_PIXELS).unfold(1, CELL_PIXELS, CELL_PIXELS)
    return ~cells.flatten(2).any(-1)


def _changed(
    rng: random.Random,
    scene: Scene,
    within: Sequence[int],
    count: int,
    palette: list[int],
    images: Tensor,
    labels: Tensor,
) -> Scene:
    """The scene with other digits, or none, in ``count`` of the cells ``within``."""
    cells: list[int] = scene.labels.flatten().tolist()
    sources: list[int] = scene.sources.flatten().tolist()
    chosen, emptied = _choose_cells(rng, cells, within, count)
    for cell in emptied:
        cells[cell] = sources[cell] = EMPTY
    for cell in chosen:
        if cell not in emptied:
            others = [d for d in palette if d != cells[cell] and cells.count(d) < MAX_COUNT]
            cells[cell] = rng.choice(others)
            sources[cell] = rng.choice(torch.nonzero(labels == cells[cell])[:, 0].tolist())
    filled = torch.tensor(sources)
    tiles = torch.zeros(1, GRID**2, CELL_PIXELS, CELL_PIXELS, dtype=torch.uint8)
    tiles[0, filled != EMPTY] = make_tiles(images[filled[filled != EMPTY]])
    shape = GRID, GRID
    return Scene(compose(tiles)[0], torch.tensor(cells).view(shape), filled.view(shape))


def _cells_that_can_change(rng: random.Random, scene: Scene, count: int) -> list[int]:
    """Some cells that can all change, again and again: not too many others hold a digit."""
    while True:
        chosen = rng.sample(range(GRID**2), count)
        others = scene.labels.flatten()[[at for at in range(GRID**2) if at not in chosen]]
        if int((others != EMPTY).sum()) <= max(FILLED[1] - count, 0):
            return chosen


def _choose_cells(
    rng: random.Random, cells: list[int], within: Sequence[int], count: int
) -> tuple[list[int], list[int]]:
    """Cells to change, and those of them that are to hold nothing; empty ones get a digit."""
    while True:
        chosen = rng.sample(within, count)
        full = [cell for cell in chosen if cells[cell] != EMPTY]
        filled = sum(label != EMPTY for label in cells) + count - len(full)
        least, most = max(0, filled - FILLED[1]), min(len(full), filled - FILLED[0])
        if least <= most:
            wanted = sum(rng.random() < _EMPTIED for _ in full)
            return chosen, rng.sample(full, max(least, min(most, wanted)))
