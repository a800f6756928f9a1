"""The tool that trains the bundled diffusion transformer."""

from __future__ import annotations

import pytest
import torch
import train_digit_dit as tool
from digit_training import Row, training_digits

from vlmopt import digit_diffusion
from vlmopt.digit_diffusion import pixels_of

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")


def test_blocks_add_nothing_at_first_and_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    images, labels = training_digits()
    torch.manual_seed(0)
    monkeypatch.setattr(tool, "LAYERS", 1)
    model = tool.build_model()
    options = tool.parse_arguments(["--out", "x", "--steps", "6", "--batch", "8"])
    before = model.proj_out_2.weight.clone()
    assert not before.any()
    kept, outcome = tool.train(model, pixels_of(images), labels, options)
    assert outcome.steps == 6
    assert model.proj_out_2.weight.any()
    assert not kept.proj_out_2.weight.equal(model.proj_out_2.weight)


def test_the_bundled_scheduler_is_that_of_training() -> None:
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


def test_the_judge_learns() -> None:
    images, labels = training_digits()
    options = tool.parse_arguments(["--out", "x", "--judge-steps", "60"])
    judge = tool.train_judge(pixels_of(images), labels, options)
    assert judge.accuracy(pixels_of(images), labels) > 0.8
    assert judge.distance(pixels_of(images)) == pytest.approx(0, abs=1e-2)


def test_a_card_names_its_command() -> None:
    options = tool.parse_arguments(["--out", "x", "--bfloat16"])
    rows = [Row("DDIM, 20 steps, guidance 1.5", 0.985, 1.25)]
    text = tool.model_card(torch.nn.Linear(2, 2), rows, tool.Outcome(10, 3.0, 0.1), options, 1438)
    assert "| DDIM, 20 steps, guidance 1.5 | 98.5% | 1.25 |" in text
    assert "--steps 8000 --minutes 35 --batch 64" in text
    assert "--bfloat16 --out DIR" in text
