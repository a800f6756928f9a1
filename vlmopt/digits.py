"""Scenes of handwritten digits, questions about them, and the bundled models that answer.

A scene is a 4 x 4 grid of 16 x 16 pixel cells, each empty or holding one handwritten digit. Three
kinds of question are asked about it: which digit stands at a row and column, how many times a digit
occurs, and whether it occurs at all. The bundled models, one dense and one with experts, are small
``LlavaForConditionalGeneration`` trained on such scenes by ``tools/train_digit_vlm.py``; the digit
images shipped next to the dense one were kept out of the training of both.

Importing this module costs no more than importing torch: transformers and Pillow are imported only
by the functions that need them.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BatchFeature, LlavaForConditionalGeneration, LlavaProcessor

__all__ = [
    "CELL_PIXELS",
    "EMPTY",
    "GRID",
    "IMAGE_PIXELS",
    "KINDS",
    "MAX_COUNT",
    "MODELS",
    "NO_DIGIT",
    "Question",
    "QuestionKind",
    "Scene",
    "Tally",
    "answer",
    "asset_dir",
    "batch",
    "compose",
    "draw_samples",
    "evaluate",
    "heldout_digits",
    "heldout_samples",
    "load_model",
    "make_question",
    "make_scene",
    "make_tiles",
    "prompt",
]

GRID = 4
"""Rows, and columns, of cells in a scene."""
CELL_PIXELS = 16
"""Side of a cell in pixels."""
IMAGE_PIXELS = GRID * CELL_PIXELS
"""Side of a scene image in pixels."""
DIGIT_PIXELS = 14
"""Side to which an 8 x 8 digit is enlarged; the rest of the cell is a black margin."""
MAX_COUNT = 5
"""Largest number of times one digit occurs in a scene, so also the largest count answer."""
EMPTY = -1
"""Label and source index of a cell that holds no digit."""
NO_DIGIT = "none"
"""Answer to a position question about an empty cell."""

QuestionKind = Literal["position", "count", "presence"]
KINDS: tuple[QuestionKind, ...] = get_args(QuestionKind)
"""All question kinds, in the order in which results are reported."""

MODELS = {"digits": "digit_vlm", "digits-moe": "digit_moe"}
"""Bundled models, and their folders: one with a Llama decoder, one with mixtures of experts."""
HELDOUT_FILE = "heldout_digits.safetensors"
"""In the folder of the dense model: the digit images that no bundled model was trained on."""
_DIGIT_RANGE = 16  # scikit-learn's digits have integer intensities 0..16


@dataclass(frozen=True, eq=False)
class Scene:
    """One scene.

    Attributes:
        image: uint8 ``[IMAGE_PIXELS, IMAGE_PIXELS]``, grey level 0 (black) to 255.
        labels: int64 ``[GRID, GRID]``, the digit in each cell, ``EMPTY`` where there is none.
        sources: int64 ``[GRID, GRID]``, index of the digit image each cell was drawn from,
            ``EMPTY`` where there is none.
    """

    image: Tensor
    labels: Tensor
    sources: Tensor

    def count(self, digit: int) -> int:
        """Number of cells that hold ``digit``."""
        return int((self.labels == digit).sum())

    def to_pil(self) -> Image.Image:
        """The image as an RGB Pillow image of ``IMAGE_PIXELS`` x ``IMAGE_PIXELS`` pixels."""
        from PIL import Image

        return Image.fromarray(self.image.numpy()).convert("RGB")


@dataclass(frozen=True)
class Question:
    """A question about a scene with its right answer.

    Attributes:
        kind: one of ``KINDS``.
        text: the question in words; rows and columns are numbered from 1.
        answer: one word: a digit or ``NO_DIGIT`` (position), 0..``MAX_COUNT`` (count), ``yes`` or
            ``no`` (presence).
    """

    kind: QuestionKind
    text: str
    answer: str


@dataclass(frozen=True)
class Tally:
    """Number of right answers out of the number asked."""

    correct: int
    total: int

    @property
    def accuracy(self) -> float:
        """Share of right answers, 0..1."""
        return self.correct / self.total if self.total else 0.0


def asset_dir(name: str = "digits") -> Path:
    """Folder of a bundled model: weights, configuration, processor files; held-out digits.

    Args:
        name: one of ``MODELS``; held-out digits are with the first of them alone.
    """
    return Path(str(resources.files("vlmopt") / "assets" / MODELS[name]))


def heldout_digits() -> tuple[Tensor, Tensor]:
    """The digit images that no bundled model was trained on.

    Returns:
        images: uint8 ``[N, 8, 8]``, intensity 0..16.
        labels: int64 ``[N]``, digit 0..9.
    """
    from safetensors.torch import load_file

    tensors = load_file(asset_dir() / HELDOUT_FILE)
    return tensors["images"], tensors["labels"].long()


def make_tiles(images: Tensor) -> Tensor:
    """Enlarges digit images to cells.

    Args:
        images: uint8 ``[N, 8, 8]``, intensity 0..16.

    Returns:
        uint8 ``[N, CELL_PIXELS, CELL_PIXELS]``, grey level 0..255, black margin included.
    """
    grey = images.float() * (255.0 / _DIGIT_RANGE)
    size = (DIGIT_PIXELS, DIGIT_PIXELS)
    digit = torch.nn.functional.interpolate(
        grey[:, None], size=size, mode="bilinear", align_corners=False
    )[:, 0]
    before = (CELL_PIXELS - DIGIT_PIXELS) // 2
    after = CELL_PIXELS - DIGIT_PIXELS - before
    padded = torch.nn.functional.pad(digit, (before, after, before, after))
    return padded.round().clamp(0, 255).to(torch.uint8)


def compose(tiles: Tensor) -> Tensor:
    """Lays cells out as scene images.

    Args:
        tiles: any dtype, ``[B, GRID * GRID, CELL_PIXELS, CELL_PIXELS]``, cells in row-major order.

    Returns:
        ``[B, IMAGE_PIXELS, IMAGE_PIXELS]`` of the same dtype.
    """
    shape = (tiles.shape[0], GRID, GRID, CELL_PIXELS, CELL_PIXELS)
    rows = tiles.reshape(shape).transpose(2, 3)
    return rows.reshape(tiles.shape[0], IMAGE_PIXELS, IMAGE_PIXELS)


def make_scene(
    rng: random.Random,
    images: Tensor,
    labels: Tensor,
    *,
    filled: tuple[int, int] = (4, 12),
    palette: tuple[int, int] = (3, 10),
) -> Scene:
    """Draws a scene from a pool of digit images.

    Args:
        rng: source of all randomness; the same state and pool give the same scene.
        images: uint8 ``[N, 8, 8]``, intensity 0..16.
        labels: int64 ``[N]``, digit 0..9.
        filled: least and greatest number of cells that hold a digit.
        palette: least and greatest number of different digits to choose from; more where fewer
            could not fill the cells within ``MAX_COUNT`` of each. Small palettes make repeated
            digits, and so large counts, common.

    Returns:
        The scene. One image may occur in it more than once.
    """
    low, high = filled
    if not 0 <= low <= high <= GRID * GRID:
        raise ValueError(f"filled must lie within 0..{GRID * GRID}, got {filled}")
    pool: dict[int, list[int]] = {}
    for index, label in enumerate(labels.tolist()):
        pool.setdefault(label, []).append(index)
    digits = sorted(pool)
    number = rng.randint(*filled)
    least = max(palette[0], -(-number // MAX_COUNT))
    size = min(rng.randint(least, max(least, palette[1])), len(digits))
    chosen = rng.sample(digits, size)
    if number > len(chosen) * MAX_COUNT:
        raise ValueError(f"{number} cells need more than {len(chosen)} different digits")
    labels = torch.full((GRID * GRID,), EMPTY, dtype=torch.int64)
    sources = torch.full((GRID * GRID,), EMPTY, dtype=torch.int64)
    seen = dict.fromkeys(chosen, 0)
    for cell in rng.sample(range(GRID * GRID), number):
        digit = rng.choice([d for d in chosen if seen[d] < MAX_COUNT])
        seen[digit] += 1
        labels[cell] = digit
        sources[cell] = rng.choice(pool[digit])
    present = sources != EMPTY
    tiles = torch.zeros(1, GRID * GRID, CELL_PIXELS, CELL_PIXELS, dtype=torch.uint8)
    if number:
        tiles[0, present] = make_tiles(images[sources[present]])
    return Scene(compose(tiles)[0], labels.view(GRID, GRID), sources.view(GRID, GRID))


def make_question(rng: random.Random, scene: Scene, kind: QuestionKind) -> Question:
    """Draws a question of one kind about a scene.

    Answers are drawn to be varied: presence is as often ``yes`` as ``no``, every count that occurs
    in the scene is equally likely, and one position question in ten is about an empty cell (more
    only where no cell is filled, none where all are).

    Args:
        rng: source of all randomness.
        scene: the scene to ask about.
        kind: one of ``KINDS``.
    """
    labels: list[int] = scene.labels.flatten().tolist()
    counts = [labels.count(digit) for digit in range(10)]
    if kind == "position":
        full = [cell for cell, label in enumerate(labels) if label != EMPTY]
        blank = [cell for cell, label in enumerate(labels) if label == EMPTY]
        use_blank = not full or (bool(blank) and rng.random() < 0.1)
        cell = rng.choice(blank if use_blank else full)
        row, column = divmod(cell, GRID)
        text = f"which digit is at row {row + 1} column {column + 1}?"
        return Question(kind, text, NO_DIGIT if labels[cell] == EMPTY else str(labels[cell]))
    if kind == "count":
        count = rng.choice(sorted(set(counts)))
        digit = rng.choice([d for d in range(10) if counts[d] == count])
        return Question(kind, f"how many {digit} are there?", str(count))
    if kind == "presence":
        absent = [digit for digit in range(10) if not counts[digit]]
        present = [digit for digit in range(10) if counts[digit]]
        want = bool(present) and (not absent or rng.random() < 0.5)
        digit = rng.choice(present if want else absent)
        return Question(kind, f"is there a {digit}?", "yes" if want else "no")
    raise ValueError(f"unknown question kind {kind!r}")


def heldout_samples(number: int, seed: int = 0) -> list[tuple[Scene, Question]]:
    """Held-out scenes, each with one question; the kinds take turns.

    Args:
        number: how many scenes to draw.
        seed: seed of the draw; the same seed gives the same samples.
    """
    return draw_samples(random.Random(seed), *heldout_digits(), number)


def draw_samples(
    rng: random.Random, images: Tensor, labels: Tensor, number: int
) -> list[tuple[Scene, Question]]:
    """Scenes from a pool of digit images, each with one question; the kinds take turns.

    Args:
        rng: source of all randomness.
        images: uint8 ``[N, 8, 8]``, intensity 0..16.
        labels: int64 ``[N]``, digit 0..9.
        number: how many scenes to draw.
    """
    samples = []
    for index in range(number):
        scene = make_scene(rng, images, labels)
        samples.append((scene, make_question(rng, scene, KINDS[index % len(KINDS)])))
    return samples


def load_model(
    dtype: torch.dtype = torch.float32, folder: Path | None = None, *, name: str = "digits"
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Loads a bundled model and its processor, without network access.

    Args:
        dtype: dtype of the weights.
        folder: folder to load from; that of the bundled model by default.
        name: one of ``MODELS``.

    Returns:
        The model in evaluation mode on the CPU with ``sdpa`` attention, and the processor, whose
        tokenizer pads on the left.
    """
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    folder = asset_dir(name) if folder is None else folder
    model = LlavaForConditionalGeneration.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", local_files_only=True
    )
    processor = LlavaProcessor.from_pretrained(folder, local_files_only=True)
    model.train(False)
    return model, processor


def prompt(text: str) -> str:
    """The prompt for a question text, as the processor takes it: one ``<image>`` placeholder."""
    return f"USER: <image> {text} ASSISTANT:"


def batch(
    processor: LlavaProcessor, scenes: Sequence[Scene], questions: Sequence[Question]
) -> BatchFeature:
    """Processor inputs for one question about each scene.

    Args:
        processor: the model's processor.
        scenes: ``B`` scenes.
        questions: ``B`` questions, the i-th about the i-th scene.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``[B, T]``, padded on the left, each row with as
        many image tokens as the model has visual tokens; ``pixel_values``, float32
        ``[B, 3, IMAGE_PIXELS, IMAGE_PIXELS]``.
    """
    if len(scenes) != len(questions):
        raise ValueError(f"{len(scenes)} scenes but {len(questions)} questions")
    inputs = processor(
        images=[scene.to_pil() for scene in scenes],
        text=[prompt(question.text) for question in questions],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    return cast("BatchFeature", inputs)


def calibration_samples(processor: Any, number: int = 64, *, size: int = 1) -> list[dict[str, Any]]:
    """Held-out prompts for calibrations: drawn otherwise than those of evaluations.

    Args:
        processor: the model's processor.
        number: of prompts.
        size: prompts to a sample, padded on the left to one length.
    """
    drawn = heldout_samples(number, seed=1)
    samples = []
    for start in range(0, number, size):
        scenes, questions = zip(*drawn[start : start + size], strict=True)
        samples.append(dict(batch(processor, scenes, questions)))
    return samples


@torch.no_grad()
def answer(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[tuple[Scene, Question]],
    *,
    batch_size: int = 64,
    max_new_tokens: int = 4,
) -> list[str]:
    """Answers questions by greedy generation.

    Args:
        model: the model, or one with the same ``generate``.
        processor: its processor.
        samples: scenes, each with its question.
        batch_size: prompts per call of ``generate``.
        max_new_tokens: greatest length of an answer in tokens, the end-of-sequence token included.

    Returns:
        One answer per sample: the generated text without special tokens.
    """
    replies: list[str] = []
    for start in range(0, len(samples), batch_size):
        part = samples[start : start + batch_size]
        inputs = batch(processor, [scene for scene, _ in part], [asked for _, asked in part])
        inputs = inputs.to(model.device, dtype=model.dtype)
        generate = cast(Any, model).generate
        tokens: Tensor = generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        new = tokens[:, inputs["input_ids"].shape[1] :]
        replies.extend(cast(Any, processor).batch_decode(new, skip_special_tokens=True))
    return [reply.strip() for reply in replies]


def evaluate(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    samples: Sequence[tuple[Scene, Question]],
    *,
    batch_size: int = 64,
) -> dict[QuestionKind, Tally]:
    """Right answers per question kind, by greedy generation.

    Args:
        model: the model, or one with the same ``generate``.
        processor: its processor.
        samples: scenes, each with its question.
        batch_size: prompts per call of ``generate``.

    Returns:
        A tally for each kind that occurs in ``samples``, in the order of ``KINDS``.
    """
    replies = answer(model, processor, samples, batch_size=batch_size)
    tallies: dict[QuestionKind, Tally] = {}
    for kind in KINDS:
        right = [
            reply == asked.answer
            for reply, (_, asked) in zip(replies, samples, strict=True)
            if asked.kind == kind
        ]
        if right:
            tallies[kind] = Tally(sum(right), len(right))
    return tallies
