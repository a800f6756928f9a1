"""What the tools that train the bundled models share."""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import digit_training
import pytest
import torch
from digit_training import Meter, Pace, Row

from vlmopt import digits
from vlmopt.digit_diffusion import load_judge, pixels_of


def test_held_out_digits_are_not_trained_on() -> None:
    pytest.importorskip("sklearn")
    images, labels = digit_training.training_digits()
    assert images.shape == (1438, 8, 8)
    assert labels.bincount().min() > 100
    heldout = {image.numpy().tobytes() for image in digits.heldout_digits()[0]}
    assert not heldout & {image.numpy().tobytes() for image in images}


def test_moved_digits_stay_in_range() -> None:
    images = pixels_of(digits.heldout_digits()[0][:64])
    moved = digit_training.moved(images, torch.Generator().manual_seed(0))
    same = (moved == images).flatten(1).all(1).float().mean()
    assert 0.3 < same < 0.7
    assert moved.min() >= -1
    assert moved.max() <= 1


def test_the_first_limit_sets_the_pace(monkeypatch: pytest.MonkeyPatch) -> None:
    pace = Pace(4, 60.0)
    assert [round(progress, 3) for progress in pace] == [0, 0.25, 0.5, 0.75]
    assert pace.steps == 4

    clock = iter(range(0, 1000, 15))  # seconds
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    pace = Pace(100, 1.0)
    assert [*pace] == [0.25, 0.5, 0.75]
    assert (pace.steps, pace.minutes) == (3, 1.0)
    assert not [*Pace(0, 1.0)] and not [*Pace(1, 0.0)]


def test_the_learning_rate_rises_and_falls_to_nothing() -> None:
    rates = [digit_training.learning_rate(at / 100, 2.0, warmup=0.1) for at in range(101)]
    assert rates[:11] == sorted(rates[:11])
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[0] < 0.01 and rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)


def test_vectors_do_not_decay() -> None:
    frozen = torch.nn.Linear(3, 3).requires_grad_(False)
    module = torch.nn.ModuleList([torch.nn.Linear(2, 5), torch.nn.LayerNorm(5), frozen])
    decayed, kept = digit_training.parameter_groups(module, 0.3)
    assert [tuple(weight.shape) for weight in decayed["params"]] == [(5, 2)]
    assert [tuple(weight.shape) for weight in kept["params"]] == [(5,)] * 3
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)


def test_a_step_is_held_to_a_norm() -> None:
    model = torch.nn.Linear(1, 1, bias=False)
    before = model.weight.item()
    optimizer = torch.optim.SGD(model.parameters(), lr=5.0)
    digit_training.descend(1000 * model.weight.sum(), optimizer, model, rate=0.5)
    assert model.weight.item() == pytest.approx(before - 0.5, abs=1e-4)


def test_means_start_afresh() -> None:
    meter = Meter()
    meter.add(loss=1.0, right=0.5)
    meter.add(loss=2.0)
    assert meter.report() == "loss 1.500  right 0.500"
    assert meter.report() == ""


def test_a_command_repeats_its_run() -> None:
    options = argparse.Namespace(threads=2, lr=1e-3, draft_steps=80, bfloat16=True, other=False)
    assert digit_training.command_line(
        "tool.py", options, ("lr", "draft_steps", "other", "bfloat16")
    ) == ("OMP_NUM_THREADS=2 python tools/tool.py --lr 0.001 --draft-steps 80 --bfloat16 --out DIR")


def test_arguments_must_be_positive(capsys: pytest.CaptureFixture[str]) -> None:
    def read(*more: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser()
        digit_training.add_arguments(parser, steps=7, minutes=1.5, batch=3, samples="scenes")
        return digit_training.read_arguments(parser, ["--out", "x", *more])

    assert (read().steps, read("--lr", "0.5").lr) == (7, 0.5)
    with pytest.raises(SystemExit):
        read("--batch", "0")
    assert "must be positive" in capsys.readouterr().err


def test_files_arrive_together(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / digit_training.CHECKPOINT).write_bytes(b"")
    with digit_training.written_to(out) as folder:
        digit_training.save_tensors({"a": torch.arange(6).view(2, 3).T}, folder / "a.safetensors")
        assert [path.name for path in out.iterdir()] == [digit_training.CHECKPOINT]
    assert [path.name for path in out.iterdir()] == ["a.safetensors"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    from safetensors.torch import load_file

    assert load_file(out / "a.safetensors")["a"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_rows_of_a_card(capsys: pytest.CaptureFixture[str]) -> None:
    images, labels = digits.heldout_digits()
    row = Row.of("real", load_judge(), pixels_of(images), labels)
    assert capsys.readouterr().out.startswith("real ")
    assert row.accuracy > 0.97
    table = Row.table("images", [row, Row("drawn", 0.985, 1.254)])
    assert table.splitlines()[0] == "| images | class accuracy | Frechet distance |"
    assert table.splitlines()[-1] == "| drawn | 98.5% | 1.25 |"
