"""Scenes, questions and the bundled digit model."""

from __future__ import annotations

import random
import re
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import train_digit_vlm

import vlmopt
from vlmopt import digits
from vlmopt.analysis.experts import find_experts
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.runtime.model import Engine

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor


@cache
def bundled(name: str = "digits") -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    return digits.load_model(name=name)


def recount(scene: digits.Scene, question: digits.Question, images: torch.Tensor) -> str:
    """The answer, from the question's words and from which digit image each cell came.

    Labels are looked up again through the image's bytes, not taken from the scene.
    """
    pool, labels = digits.heldout_digits()
    label_of = {image.numpy().tobytes(): int(d) for image, d in zip(pool, labels, strict=True)}
    rows = [
        [None if s < 0 else label_of[images[s].numpy().tobytes()] for s in row]
        for row in scene.sources.tolist()
    ]
    cells = [digit for row in rows for digit in row]
    numbers = [int(word) for word in re.findall(r"\d+", question.text)]
    if question.text.startswith("which digit"):
        digit = rows[numbers[0] - 1][numbers[1] - 1]
        return "none" if digit is None else str(digit)
    (asked,) = numbers
    found = sum(digit == asked for digit in cells)
    if question.text.startswith("how many"):
        return str(found)
    assert question.text.startswith("is there")
    return "yes" if found else "no"


def test_generator_is_deterministic() -> None:
    first, again = digits.heldout_samples(30, seed=5), digits.heldout_samples(30, seed=5)
    other = digits.heldout_samples(30, seed=6)
    for (scene, question), (scene2, question2) in zip(first, again, strict=True):
        assert torch.equal(scene.image, scene2.image)
        assert torch.equal(scene.labels, scene2.labels)
        assert torch.equal(scene.sources, scene2.sources)
        assert question == question2
    assert [question for _, question in first] != [question for _, question in other]


def test_answers_agree_with_a_recount() -> None:
    images, _ = digits.heldout_digits()
    samples = digits.heldout_samples(300, seed=7)
    for scene, question in samples:
        assert question.answer == recount(scene, question, images)
    for kind in digits.KINDS:
        asked = [question.answer for _, question in samples if question.kind == kind]
        assert len(asked) == 100
        commonest = max(asked.count(reply) for reply in set(asked))
        assert commonest <= 60, f"guessing would do well on {kind}"


def test_scene_image_shows_the_cells() -> None:
    images, labels = digits.heldout_digits()
    scene = digits.make_scene(random.Random(1), images, labels, filled=(5, 5))
    assert scene.image.shape == (64, 64) and scene.image.dtype == torch.uint8
    assert scene.labels.shape == scene.sources.shape == (4, 4)
    assert int((scene.labels != digits.EMPTY).sum()) == 5
    assert sum(scene.count(digit) for digit in range(10)) == 5
    for row in range(4):
        for column in range(4):
            cell = scene.image[row * 16 : row * 16 + 16, column * 16 : column * 16 + 16]
            source = int(scene.sources[row, column])
            if source == digits.EMPTY:
                assert scene.labels[row, column] == digits.EMPTY
                assert not cell.any()
            else:
                assert scene.labels[row, column] == labels[source]
                assert torch.equal(cell, digits.make_tiles(images[source : source + 1])[0])
    picture = scene.to_pil()
    assert picture.size == (64, 64) and picture.mode == "RGB"
    assert picture.getpixel((20, 30)) == (int(scene.image[30, 20]),) * 3


@pytest.mark.parametrize("filled", [(0, 0), (16, 16)])
def test_extreme_scenes(filled: tuple[int, int]) -> None:
    images, labels = digits.heldout_digits()
    for seed in range(20):
        rng = random.Random(seed)
        scene = digits.make_scene(rng, images, labels, filled=filled, palette=(1, 1))
        assert int((scene.labels != digits.EMPTY).sum()) == filled[0]
        assert max(scene.count(digit) for digit in range(10)) <= digits.MAX_COUNT
        for kind in digits.KINDS:
            question = digits.make_question(rng, scene, kind)
            assert question.answer == recount(scene, question, images)


def test_make_scene_rejects_impossible_requests() -> None:
    images, labels = digits.heldout_digits()
    with pytest.raises(ValueError, match="filled"):
        digits.make_scene(random.Random(0), images, labels, filled=(3, 17))
    ones = labels == 1
    with pytest.raises(ValueError, match="different digits"):
        digits.make_scene(random.Random(0), images[ones], labels[ones], filled=(9, 9))


def test_batch_pads_on_the_left() -> None:
    model, processor = bundled()
    samples = digits.heldout_samples(3)
    inputs = digits.batch(processor, [s for s, _ in samples], [q for _, q in samples])
    assert inputs["pixel_values"].shape == (3, 3, 64, 64)
    assert inputs["pixel_values"].dtype == torch.float32
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    assert ids.dtype == mask.dtype == torch.int64
    assert mask[:, -1].all() and not mask.all()
    assert torch.equal(mask, mask.sort(dim=1).values)
    visual = ids == model.config.image_token_id
    assert visual.sum(1).tolist() == [64, 64, 64]
    tokenizer: Any = processor.tokenizer
    assert not (ids == tokenizer.unk_token_id).any()
    with pytest.raises(ValueError, match="questions"):
        digits.batch(processor, [samples[0][0]], [])


@pytest.mark.parametrize("name", digits.MODELS)
def test_bundled_model_is_the_documented_one(name: str) -> None:
    from transformers import AutoProcessor

    model, processor = bundled(name)
    assert not model.training
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    card = (digits.asset_dir(name) / "README.md").read_text(encoding="utf-8")
    assert f"of {sum(parameter.numel() for parameter in model.parameters()):,} parameters" in card
    decoder: Any = model.config.text_config
    assert decoder.num_hidden_layers >= 6
    assert decoder._attn_implementation == "sdpa"
    assert (digits.asset_dir(name) / "model.safetensors").stat().st_size < 10_000_000
    auto: Any = AutoProcessor
    automatic = auto.from_pretrained(digits.asset_dir(name), local_files_only=True)
    assert type(automatic) is type(processor)


def test_chat_template_gives_the_prompt() -> None:
    _, processor = bundled()
    text = "is there a 7?"
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    template: Any = processor.apply_chat_template
    assert template(messages, add_generation_prompt=True) == digits.prompt(text)


@pytest.mark.parametrize("name", digits.MODELS)
def test_heldout_accuracy(name: str) -> None:
    model, processor = bundled(name)
    tallies = digits.evaluate(model, processor, digits.heldout_samples(150, seed=11))
    assert sum(tally.total for tally in tallies.values()) == 150
    assert sum(tally.correct for tally in tallies.values()) >= 0.93 * 150, tallies


def test_experts_are_found_and_skipped() -> None:
    model, processor = bundled("digits-moe")
    samples = digits.heldout_samples(12, seed=13)
    inputs = digits.batch(processor, [scene for scene, _ in samples], [ask for _, ask in samples])
    program = vlmopt.capture(model, dict(inputs))
    for stage in ("language_model", "decode"):
        found = find_experts(program[stage])
        assert [block.layer for block in found.blocks] == list(range(8))
        assert {(block.experts, block.k) for block in found.blocks} == {(16, 4)}
        assert not found.misses
    engine = Engine(model, partial(run_pipeline, pipeline="modes{text=0.05 vision=0.1}"), "eager")
    engine.capture = lambda inputs: program  # once is enough
    replies = digits.answer(model, processor, samples)
    assert digits.answer(engine.twin, processor, samples) == replies


def test_a_mixture_that_computes_the_dense_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """All slices, weighed alike: nothing is lost between the dense model and its experts."""
    monkeypatch.setattr(train_digit_vlm, "UPCYCLING_NOISE", 0.0)
    monkeypatch.setattr(train_digit_vlm, "ROUTER_STD", 0.0)
    dense, processor = bundled()
    size = train_digit_vlm.Mixture(experts=5, top=5, width=64)
    mixed = train_digit_vlm.build_model(processor.tokenizer, size).eval()
    train_digit_vlm.upcycle(mixed, dense, size)
    ((scene, question),) = digits.heldout_samples(1)
    inputs = digits.batch(processor, [scene], [question])
    with torch.no_grad():
        torch.testing.assert_close(
            mixed(**inputs).logits, dense(**inputs).logits, atol=1e-4, rtol=1e-4
        )


def test_blank_image_is_seen_as_blank() -> None:
    """The answers come from the image: with the digits gone, none is found."""
    model, processor = bundled()
    blank = torch.zeros(64, 64, dtype=torch.uint8)
    nothing = torch.full((4, 4), digits.EMPTY)
    samples = [
        (digits.Scene(blank, nothing, nothing), question)
        for _, question in digits.heldout_samples(30, seed=12)
    ]
    expected = {"position": "none", "count": "0", "presence": "no"}
    replies = digits.answer(model, processor, samples)
    right = [r == expected[q.kind] for r, (_, q) in zip(replies, samples, strict=True)]
    assert sum(right) >= 24


def test_training_saw_no_heldout_digit() -> None:
    pytest.importorskip("sklearn", reason="the split is recomputed from scikit-learn's digits")
    split = train_digit_vlm.split_digits()
    images, labels = digits.heldout_digits()
    assert torch.equal(split.heldout_images, images)
    assert torch.equal(split.heldout_labels, labels)
    trained = {image.numpy().tobytes() for image in split.train_images}
    assert not trained & {image.numpy().tobytes() for image in images}
    assert len(trained) > 1000 and len(images) > 300
    assert sorted(set(labels.tolist())) == list(range(10))


def test_training_tool_keeps_existing_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert train_digit_vlm.main(["--out", str(tmp_path)]) == 2
    assert "--force" in capsys.readouterr().err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_training_pixels_equal_processor_pixels() -> None:
    _, processor = bundled()
    ((scene, question),) = digits.heldout_samples(1)
    expected = digits.batch(processor, [scene], [question])["pixel_values"]
    torch.testing.assert_close(train_digit_vlm.normalise(scene.image[None]), expected)
