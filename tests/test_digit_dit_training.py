"""The tool that trains the bundled diffusion transformer."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmopt import digit_diffusion, digits
from vlmopt.digit_diffusion import pixels_of

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


@pytest.fixture(scope="module")
def tool() -> Any:
    path = Path(__file__).resolve().parents[1] / "tools" / "train_digit_dit.py"
    spec = importlib.util.spec_from_file_location("train_digit_dit", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_held_out_digits_are_not_trained_on(tool: Any) -> None:
    images, labels = tool.training_digits()
    assert images.shape == (1438, 8, 8)
    assert labels.bincount().min() > 100
    heldout = {image.numpy().tobytes() for image in digits.heldout_digits()[0]}
    assert not heldout & {image.numpy().tobytes() for image in images}


def test_blocks_add_nothing_at_first_and_learn(tool: Any) -> None:
    images, labels = tool.training_digits()
    torch.manual_seed(0)
    tool.LAYERS, layers = 1, tool.LAYERS
    try:
        model = tool.build_model()
    finally:
        tool.LAYERS = layers
    options = tool.parse_arguments(["--out", "x", "--steps", "6", "--batch", "8"])
    before = model.proj_out_2.weight.clone()
    assert not before.any()
    kept, outcome = tool.train(model, pixels_of(images), labels, options)
    assert outcome.steps == 6
    assert model.proj_out_2.weight.any()
    assert not kept.proj_out_2.weight.equal(model.proj_out_2.weight)


def test_the_bundled_scheduler_is_that_of_training(tool: Any) -> None:
    bundled = digit_diffusion.load_scheduler()
    for name, value in tool.build_scheduler().config.items():
        assert name.startswith("_") or bundled.config[name] == value
    # estimates to both sides of black stay what they are
    bundled.set_timesteps(2)
    noisy, clean = torch.zeros(1), torch.tensor([-1.5])
    time = bundled.timesteps[0]
    speed = bundled.get_velocity(clean, noisy, time[None])
    found = bundled.step(speed, time, bundled.add_noise(clean, noisy, time[None]))
    assert found.pred_original_sample.item() == pytest.approx(-1.5, abs=1e-5)


def test_moved_digits_stay_in_range(tool: Any) -> None:
    images = pixels_of(tool.training_digits()[0][:64])
    moved = tool.moved(images, torch.Generator().manual_seed(0))
    same = (moved == images).flatten(1).all(1).float().mean()
    assert 0.3 < same < 0.7
    assert moved.min() >= -1
    assert moved.max() <= 1


def test_the_judge_learns(tool: Any) -> None:
    images, labels = tool.training_digits()
    options = tool.parse_arguments(["--out", "x", "--judge-steps", "60"])
    judge = tool.train_judge(pixels_of(images), labels, options)
    assert judge.accuracy(pixels_of(images), labels) > 0.8
    assert judge.distance(pixels_of(images)) == pytest.approx(0, abs=1e-2)


def test_a_card_names_its_command(tool: Any) -> None:
    options = tool.parse_arguments(["--out", "x", "--bfloat16"])
    rows = [tool.Row("DDIM, 20 steps, guidance 1.5", 0.985, 1.25)]
    text = tool.model_card(torch.nn.Linear(2, 2), rows, tool.Outcome(10, 3.0, 0.1), options, 1438)
    assert "| DDIM, 20 steps, guidance 1.5 | 98.5% | 1.25 |" in text
    assert "--steps 8000 --minutes 35 --batch 64" in text
    assert "--bfloat16 --out DIR" in text
