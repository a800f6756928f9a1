"""Comparison of denoising loops, on a few steps."""

from __future__ import annotations

import pytest
import torch

from vlmopt.bench import denoising

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def gallery() -> denoising.Gallery:
    found = denoising.Gallery(10, steps=4, size=10, generations=1)
    found.full()
    return found


def test_reuse_halves_the_work(gallery: denoising.Gallery) -> None:
    found = gallery.run("fixed", "fixed-interval{interval=2}")
    assert 0.5 < found.flops < 0.53
    assert found.graphs == 2
    assert found.drift > 0.01


def test_everything_computed_is_the_full_loop(gallery: denoising.Gallery) -> None:
    found = gallery.run("same", "fixed-interval{interval=1}")
    assert found.flops == 1
    assert found.drift == 0


def test_tables_are_measured_once(gallery: denoising.Gallery) -> None:
    path = gallery.artifact()
    found = gallery.run("soda", "soda{anchors=2 interval=4 rows=0 artifact=ARTIFACT}")
    assert 0.5 < found.flops < 0.53
    assert gallery.artifact() == path
    assert len(gallery.plans["soda"][0].anchors) == 2


def test_what_the_first_block_decides_is_counted(gallery: denoising.Gallery) -> None:
    always = gallery.run("always", "first-block-cache{threshold=0}")
    assert always.flops == pytest.approx(1, abs=0.02)
    never = gallery.run("never", "first-block-cache{threshold=1000}")
    assert 0.25 < never.flops < 0.5  # the first step, and first blocks


def test_half_of_the_work() -> None:
    found = denoising.halves(20)
    assert next(iter(found)) == "full"
    assert found["10 steps"] == 10
    assert found["soda, anchors alone"] == "soda{anchors=10 rows=0 artifact=ARTIFACT}"
    assert found["soda"] == "soda{anchors=9 rows=0.09 sensitivity=30 artifact=ARTIFACT}"
    assert (
        found["soda, few anchors"] == "soda{anchors=6 rows=0.29 sensitivity=30 artifact=ARTIFACT}"
    )


def test_a_sheet_of_samples() -> None:
    images = {"one": torch.full((12, 1, 16, 16), -1.0), "two": torch.ones(12, 1, 16, 16)}
    found = denoising.sheet(images)
    assert found.shape == (64, 320)
    assert found[:32].max() == 0
    assert found[32:].min() == 255
