"""The bundled diffusion transformer and its judge."""

from __future__ import annotations

import pytest
import torch

from vlmopt import digit_diffusion, digits
from vlmopt.digit_diffusion import DigitPipeline, Moments
from vlmopt.errors import OptionError

pytest.importorskip("diffusers")


def test_the_judge_knows_held_out_digits() -> None:
    images, labels = digits.heldout_digits()
    judge = digit_diffusion.load_judge()
    real = digit_diffusion.pixels_of(images)
    assert judge.accuracy(real, labels) > 0.97
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert 20 * judge.distance(real) < judge.distance(noise)


def test_samples_show_the_digits_asked_for() -> None:
    labels = digit_diffusion.labels_in_turn(20)
    drawn = DigitPipeline()(labels, num_inference_steps=10, guidance_scale=1.5)
    assert drawn.shape == (20, 1, 16, 16)
    assert digit_diffusion.load_judge().accuracy(drawn, labels) >= 0.8
    assert drawn.min() >= -1
    assert drawn.max() <= 1


def test_seeds_and_guidance_matter() -> None:
    pipe, labels = DigitPipeline(), torch.tensor([3])
    first = pipe(labels, num_inference_steps=2)
    assert pipe.guidance_scale == 1.5
    assert pipe(labels, num_inference_steps=2).equal(first)
    assert not pipe(labels, num_inference_steps=2, seed=1).equal(first)
    assert not pipe(labels, num_inference_steps=2, guidance_scale=1.0).equal(first)


def test_other_schedulers_take_the_same_noise_schedule() -> None:
    scheduler = digit_diffusion.load_scheduler("DPMSolverMultistepScheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    ours = digit_diffusion.load_scheduler().alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod, ours)
    with pytest.raises(OptionError, match="no scheduler 'ddim'"):
        digit_diffusion.load_scheduler("ddim")


def test_frechet_distance_of_known_distributions() -> None:
    one = Moments(torch.tensor([0.0, 0.0]).double(), torch.diag(torch.tensor([1.0, 4.0])).double())
    two = Moments(torch.tensor([3.0, 4.0]).double(), torch.diag(torch.tensor([9.0, 4.0])).double())
    assert one.distance(one) == pytest.approx(0, abs=1e-9)
    assert one.distance(two) == pytest.approx(25 + (3 - 1) ** 2)
    features = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    assert Moments.of(features).covariance.shape == (3, 3)


def test_a_grid_of_samples() -> None:
    samples = torch.full((6, 1, 16, 16), -1.0)
    samples[4] = 1.0
    grid = digit_diffusion.grid_of(samples, columns=3)
    assert grid.shape == (32, 48)
    assert grid[16:, 16:32].float().mean() == 255
    assert grid.float().mean() == pytest.approx(255 / 6)
