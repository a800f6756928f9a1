"""The frequency-domain update of PS-SR, against the official code and the card."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vlmopt.denoising.frequency import (
    GRIDS,
    TRANSFORMS,
    butterworth,
    fuse,
    low_pass,
    to_rgb,
    to_yuv,
)

VECTORS = Path(os.environ.get("VLMOPT_VECTORS", Path(__file__).parents[2] / "shared" / "vectors"))


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_golden_vectors_of_the_official_code(transform: str) -> None:
    folder = VECTORS / "40-ps-sr"
    if not folder.is_dir():
        pytest.skip(f"no golden vectors at {folder}")
    stated = json.loads((folder / "case0.json").read_text())["parameters"]
    golden = load_file(folder / "case0.safetensors")
    options = {"cutoff": stated["fc"], "order": stated["order"]}
    gain = butterworth(stated["h"], stated["w"], **options)
    torch.testing.assert_close(gain, golden["filter"][0, 0], atol=1e-6, rtol=0)
    colours = to_yuv(golden["consistent"])
    torch.testing.assert_close(colours, golden["yuv_consistent"], atol=1e-6, rtol=0)
    rest = {name: stated[name] for name in ("alpha", "border", "eps")}
    out = fuse(golden["consistent"], golden["sharp"], transform=transform, **options, **rest)
    torch.testing.assert_close(out, golden["out"], atol=1e-5, rtol=0)


def images(seed: int, height: int = 12, width: int = 15) -> torch.Tensor:
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(9, 9), (8, 10)])
def test_an_image_fused_with_itself_stays(grid: str, size: tuple[int, int]) -> None:
    image = images(0, *size)
    out = fuse(image, image, alpha=1.0, border=0, grid=grid)
    torch.testing.assert_close(out, image, atol=5e-5, rtol=0)


@pytest.mark.parametrize(
    ("size", "grid", "value"),
    [(9, "linspace", 0.4), (8, "linspace", 0.3902), (8, "fftfreq", 0.4), (9, "fftfreq", 0.4)],
)
def test_flat_images_of_the_card(size: int, grid: str, value: float) -> None:
    flat = torch.full((1, 3, size, size), 0.4)
    out = fuse(flat, flat, alpha=0.6, border=0, grid=grid)
    torch.testing.assert_close(out, torch.full_like(flat, value), atol=1e-4, rtol=0)


def test_gain_at_zero_frequency() -> None:
    middle = butterworth(8, 8)[4, 4].item()
    assert middle == pytest.approx(1 / (1 + (2**0.5 / 14 / 0.2) ** 4))
    assert butterworth(8, 8, grid="fftfreq")[4, 4] == 1
    assert butterworth(9, 9)[4, 4] == 1


def test_colours_and_border_are_those_of_the_consistent_image() -> None:
    calm = 0.4 + 0.2 * images(0)  # far from black and white: nothing is clamped
    sharp = 0.4 + 0.2 * images(1)
    out, before = to_yuv(fuse(calm, sharp)), to_yuv(calm)
    torch.testing.assert_close(out[:, 1:], before[:, 1:], atol=5e-5, rtol=0)
    changed = ((out - before)[:, 0].abs() > 1e-3).any(0)
    assert not changed[:2].any()
    assert not changed[-2:].any()
    assert not changed[:, :2].any()
    assert not changed[:, -2:].any()
    assert changed[2:-2, 2:-2].float().mean() > 0.9


def test_a_border_wider_than_the_image_changes_nothing() -> None:
    calm = images(0, 3, 4)
    torch.testing.assert_close(fuse(calm, images(1, 3, 4)), calm, atol=5e-5, rtol=0)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("size", [(7, 9), (8, 8), (32, 20)])
def test_matrices_do_what_the_fast_transform_does(grid: str, size: tuple[int, int]) -> None:
    plane, gain = images(2, *size), butterworth(*size, grid=grid)
    fast, slow = (low_pass(plane, gain, transform=transform) for transform in TRANSFORMS)
    torch.testing.assert_close(fast, slow, atol=2e-6, rtol=0)


def test_colours_come_back() -> None:
    torch.testing.assert_close(to_rgb(to_yuv(images(3))), images(3), atol=5e-5, rtol=0)
