"""Streams in ONNX Runtime: what the same session gives in PyTorch, frame by frame."""

from __future__ import annotations

import json
from pathlib import Path

import encoders
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor

import vlmopt
from vlmopt.errors import ArtifactError, PreconditionError
from vlmopt.lowering.onnx import MANIFEST, export_program
from vlmopt.lowering.onnx_frames import OnnxFrameEncoder
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program
from vlmopt.streaming import EncodedFrames, FrameEncoder, FrameSession


@pytest.fixture(scope="module")
def program() -> Program:
    found = vlmopt.capture(encoders.build("siglip"), (encoders.images(1),))
    run_pipeline(found, "stc-cacher{interval=3 lossless=true}")
    return found


@pytest.fixture(scope="module")
def folder(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("stream") / "onnx"
    export_program(program, out)
    return out


@pytest.fixture(scope="module")
def runner(folder: Path) -> OnnxFrameEncoder:
    return OnnxFrameEncoder(folder)


def clip(frames: int) -> list[Tensor]:
    """Five of 25 patches change, each by as much as no other does; from frame 4 on all of them."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1, 3, 40, 40, generator=generator)
    found = [first]
    for at in range(1, frames):
        later = first.clone()
        for patch in range(25 if at == 4 else 5):
            row, column = divmod((7 * patch + 2 * at) % 25, 5)
            place = (..., slice(8 * row, 8 * row + 8), slice(8 * column, 8 * column + 8))
            later[place] += (patch + 1) * torch.randn(1, 3, 8, 8, generator=generator)
        if at == 4:
            first = later
        found.append(later)
    return found


def play(session: FrameSession, frames: list[Tensor]) -> list[EncodedFrames]:
    return [session.encode(pixel_values=frame) for frame in frames]


def agree(found: list[EncodedFrames], wanted: list[EncodedFrames]) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.reference == other.reference
        assert one.outputs.keys() == other.outputs.keys() and one.outputs
        for name, value in one.outputs.items():
            torch.testing.assert_close(value, other.outputs[name], atol=1e-4, rtol=1e-4)
        for name in ("similarity", "changed"):
            value, right = getattr(one, name), getattr(other, name)
            assert (value is None) == (right is None)
            if value is not None:
                torch.testing.assert_close(value, right, atol=1e-5, rtol=1e-5)


def test_six_frames(program: Program, runner: OnnxFrameEncoder) -> None:
    """Also one that runs in full since more rows change than fit."""
    frames = clip(6)
    wanted = play(FrameEncoder(program, backend="eager").session(), frames)
    session = runner.session()
    found = play(session, frames)
    agree(found, wanted)
    assert [one.reference for one in found] == [True, False, False, True, True, False]
    assert session.nbytes == 3 * 4 * 25 * 32 * 4
    assert (found[1].outputs["last_hidden_state"] - found[0].outputs["last_hidden_state"]).any()


def test_scene_cuts(program: Program, runner: OnnxFrameEncoder) -> None:
    frames = [*clip(2), *(10 + frame for frame in clip(2))]
    wanted = play(FrameEncoder(program, backend="eager").session(cut=0.8), frames)
    agree(play(runner.session(cut=0.8), frames), wanted)


@pytest.mark.parametrize("at", [1, 2, 5])
def test_saved_and_gone_on_with_elsewhere(
    at: int, program: Program, runner: OnnxFrameEncoder
) -> None:
    """Through bytes, into another session: of ONNX Runtime, from there to PyTorch, and back."""
    frames, pytorch = clip(6), FrameEncoder(program, backend="eager")
    wanted = play(runner.session(), frames)
    for first, then in ((runner, runner), (runner, pytorch), (pytorch, runner)):
        one = first.session()
        play(one, frames[:at])
        saved = load(save(one.state_dict()))
        other = then.session()
        other.load_state_dict(saved)
        found = play(other, frames[at:])
        agree(found, wanted[at:])
        if first is then:
            assert all(
                value.equal(right.outputs[name])
                for mine, right in zip(found, wanted[at:], strict=True)
                for name, value in mine.outputs.items()
            )


def test_two_streams_never_mix(runner: OnnxFrameEncoder) -> None:
    clips = [clip(5), [frame.flip(-1) for frame in clip(5)]]
    alone = [play(runner.session(), frames) for frames in clips]
    sessions = [runner.session(), runner.session()]
    for at in range(5):
        for session, frames, wanted in zip(sessions, clips, alone, strict=True):
            found = session.encode(pixel_values=frames[at])
            assert found.outputs["last_hidden_state"].equal(wanted[at].outputs["last_hidden_state"])


def test_what_was_returned_does_not_change_later(runner: OnnxFrameEncoder) -> None:
    session, frames = runner.session(), clip(4)
    first = session.encode(pixel_values=frames[0]).outputs["last_hidden_state"]
    before = first.clone()
    play(session, frames[1:])
    assert first.equal(before)


def test_errors(program: Program, folder: Path, runner: OnnxFrameEncoder, tmp_path: Path) -> None:
    with pytest.raises(
        PreconditionError, match=r"pixel_values \[1, 3, 40, 40\] of float32, and .*2"
    ):
        runner.session().encode(pixel_values=encoders.images(2))
    with pytest.raises(
        PreconditionError, match=r"is called with \[1, 3, 40, 40\] of torch.float64"
    ):
        runner.session().encode(pixel_values=encoders.images(1).double())
    with pytest.raises(PreconditionError, match="is called with None"):
        runner.session().encode()
    with pytest.raises(ArtifactError, match=f"has no {MANIFEST}"):
        OnnxFrameEncoder(tmp_path)
    manifest = json.loads((folder / MANIFEST).read_text())
    for change, why in (
        ({"schema": 7}, "has schema 7"),
        ({"stages": {"model": {}}}, "holds no encoder that reuses frames, only model"),
        ({"stages": {"model": manifest["stages"]["model"]}}, "a stream needs model_selective too"),
    ):
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **change}))
        with pytest.raises(ArtifactError, match=why):
            OnnxFrameEncoder(tmp_path)
    (tmp_path / MANIFEST).write_text("nothing")
    with pytest.raises(ArtifactError, match="is not what an export writes"):
        OnnxFrameEncoder(tmp_path)
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="is no file"):
        OnnxFrameEncoder(tmp_path)
