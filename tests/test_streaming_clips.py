"""Streams of real motion: clips of photographs, one of them out of a video file."""

from __future__ import annotations

import functools
from fractions import Fraction
from pathlib import Path

import encoders
import pytest
import torch

import vlmopt
from vlmopt.bench.clips import SHARES, make_clip, normalised
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.streaming import EncodedFrames, FrameEncoder

pytest.importorskip("sklearn")


@functools.cache
def encoder(text: str) -> FrameEncoder:
    program = vlmopt.capture(encoders.build("siglip"), (encoders.images(1),))
    run_pipeline(program, text)
    return FrameEncoder(program, backend="eager")


def played(text: str, pixels: torch.Tensor) -> list[EncodedFrames]:
    session = encoder(text).session()
    return [session.encode(pixel_values=frame[None]) for frame in pixels]


def test_the_more_stands_still_the_more_frames_are_alike() -> None:
    """Nothing else than what moved differs in the first block; frames alike are found to be so."""
    seen = []
    for share in (*SHARES, 1.0):
        clip = make_clip(5, size=40, patch=8, static=share, motion="move", seed=2)
        results = played("stc-cacher{interval=5 ratio=0.25}", clip.pixels())
        assert [one.reference for one in results] == [True, False, False, False, False]
        likeness = [float(one.similarity) for one in results if one.similarity is not None]
        seen.append(sum(likeness) / 4)
    assert seen == sorted(seen) and seen[-1] == 1.0 > seen[-2]


def test_reuse_is_nearer_to_full_compute_where_more_stands_still() -> None:
    """And exact where everything does."""
    off = []
    for share in (0.0, 0.5, 0.9, 1.0):
        clip = make_clip(4, size=40, patch=8, static=share, motion="occlude", seed=3)
        both = [
            played(f"stc-cacher{{interval={interval} ratio=0.25}}", clip.pixels())
            for interval in (4, 1)
        ]
        some, full = (
            torch.stack([one.outputs["last_hidden_state"] for one in results]) for results in both
        )
        off.append(float((some - full).norm() / full.norm()))
    assert off[0] > off[1] > off[2] > off[3] and off[3] < 1e-6


def test_from_a_video_file(tmp_path: Path) -> None:
    """An mp4: what stood still is no longer the same to the last bit, and reused all the same."""
    av = pytest.importorskip("av")
    from vlmopt.video import Video

    clip = make_clip(8, size=40, patch=8, static=0.75, motion="move", seed=4)
    with av.open(str(tmp_path / "clip.mp4"), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.height = stream.width = 40
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 4_000_000
        for number, rows in enumerate(clip.frames.permute(0, 2, 3, 1).numpy()):
            frame = av.VideoFrame.from_ndarray(rows, format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1, 8)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    text = "stc-cacher{interval=4 ratio=0.25}"
    pixels = torch.stack([normalised(frame) for frame in Video(tmp_path / "clip.mp4", fps=4)])
    assert len(pixels) == 4
    found = played(text, pixels)
    wanted = played(text, clip.pixels()[::2])
    assert [one.reference for one in found] == [True, False, False, False]
    for one, other in zip(found, wanted, strict=True):
        value, right = (each.outputs["last_hidden_state"] for each in (one, other))
        assert (value - right).norm() < 0.3 * right.norm()
