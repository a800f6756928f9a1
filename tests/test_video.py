"""Frames of video files, written here and read back."""

from __future__ import annotations

import sys
import wave
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmopt.bench.clips import make_clip
from vlmopt.errors import ArtifactError, OptionError, PreconditionError
from vlmopt.video import Video

av = pytest.importorskip("av")


def write(path: Path, frames: Tensor, *, rate: int = 10, times: list[int] | None = None) -> Path:
    """An mp4 of uint8 frames ``[frames, 3, height, width]``.

    Args:
        times: when each is shown, in units of 1/``rate`` seconds; one after the other by default.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.height, stream.width = frames.shape[2:]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 8_000_000
        for number, frame in enumerate(frames):
            shown = av.VideoFrame.from_ndarray(frame.permute(1, 2, 0).numpy(), format="rgb24")
            shown.pts = number if times is None else times[number]
            shown.time_base = Fraction(1, rate)
            container.mux(stream.encode(shown))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip() -> Tensor:
    """Of real pictures, as a codec is made for."""
    pytest.importorskip("sklearn")
    return make_clip(13, size=112, motion="move", static=0.5).frames


@pytest.fixture(scope="module")
def path(clip: Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("video") / "clip.mp4", clip)


def off(found: Tensor, wanted: Tensor) -> float:
    """Mean difference in grey levels."""
    assert found.shape == wanted.shape and found.dtype == torch.uint8
    return float((found.float() - wanted.float()).abs().mean())


def test_all_frames_come_back(clip: Tensor, path: Path) -> None:
    """As many as were written, in order, each nearer to its own than to those beside it."""
    video = Video(path)
    assert video.frame_rate == 10
    for _ in range(2):  # from the start again
        frames = list(video)
        assert len(frames) == 13 and frames[0].is_contiguous()
        for number, frame in enumerate(frames):
            distance = [off(frame, other) for other in clip]
            assert distance[number] == min(distance) < 8


def test_red_is_first(tmp_path: Path) -> None:
    red = torch.zeros(2, 3, 32, 48, dtype=torch.uint8)
    red[:, 0] = 230
    (frame, _) = Video(write(tmp_path / "red.mp4", red))
    assert frame.shape == (3, 32, 48)
    assert frame[0].float().mean() > 200 and frame[1:].float().mean() < 30


@pytest.mark.parametrize(
    ("options", "wanted"),
    [
        ({"stride": 5}, [0, 5, 10]),
        ({"fps": 5}, [0, 2, 4, 6, 8, 10, 12]),
        ({"fps": 4}, [0, 3, 5, 8, 10]),  # at 0, .25, .5, .75 and 1 second
        ({"fps": 0.4}, [0]),
        ({"fps": 50}, list(range(13))),
    ],
)
def test_some_frames(path: Path, options: dict[str, Any], wanted: list[int]) -> None:
    every = list(Video(path))
    found = list(Video(path, **options))
    assert [min(range(13), key=lambda at: off(frame, every[at])) for frame in found] == wanted
    assert all(frame.equal(every[at]) for frame, at in zip(found, wanted, strict=True))


def test_frames_that_are_shown_at_odd_times(clip: Tensor, tmp_path: Path) -> None:
    """What counts is when they are shown, not how many there were."""
    path = write(tmp_path / "odd.mp4", clip[:6], times=[0, 1, 2, 20, 21, 40])
    every = list(Video(path))
    assert len(every) == 6
    found = list(Video(path, fps=1))
    assert [next(at for at in range(6) if frame.equal(every[at])) for frame in found] == [0, 3, 5]


def test_scaled(clip: Tensor, path: Path) -> None:
    small = next(iter(Video(path, size=56)))
    wanted = torch.nn.functional.interpolate(clip[:1].float(), size=(56, 56), mode="area")[0]
    assert off(small, wanted.round().to(torch.uint8)) < 8
    assert next(iter(Video(path, size=(28, 84)))).shape == (3, 28, 84)


def test_chunks(path: Path) -> None:
    frames = torch.stack(list(Video(path)))
    found = list(Video(path).chunks(5))
    assert [len(chunk) for chunk in found] == [5, 5, 3]
    assert torch.cat(found).equal(frames)
    assert [len(chunk) for chunk in Video(path, stride=3).chunks(5)] == [5]


def test_one_frame_at_a_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is converted before it is asked for."""
    seen: list[int] = []
    video = Video(path)
    convert = video._tensor

    def counted(frame: Any) -> Tensor:
        seen.append(frame.pts)
        return convert(frame)

    monkeypatch.setattr(video, "_tensor", counted)
    frames = iter(video)
    for count in (1, 2, 3):
        next(frames)
        assert len(seen) == count


class Turned:
    """A frame of a camera held sideways: ``rotation`` degrees counterclockwise make it upright."""

    def __init__(self, upright: Tensor, rotation: int) -> None:
        self.rotation = rotation
        self.rows = upright.rot90(-rotation // 90, (1, 2)).permute(1, 2, 0)

    def reformat(self, *, height: int = 4, width: int = 4, **options: Any) -> Any:
        self.asked = height, width
        frame = self.rows.contiguous().numpy()
        return av.VideoFrame.from_ndarray(frame, format="rgb24")


@pytest.mark.parametrize("rotation", [0, 90, -90, 180])
def test_frames_are_upright(path: Path, rotation: int) -> None:
    picture = torch.randint(0, 256, (3, 4, 8), dtype=torch.uint8)
    frame = Turned(picture, rotation)
    assert Video(path, size=(4, 8))._tensor(frame).equal(picture)
    assert frame.asked == ((8, 4) if rotation in (90, -90) else (4, 8))


def test_files_that_are_no_videos(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nothing\.mp4 is no file"):
        Video(tmp_path / "nothing.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("no video " * 100)
    with pytest.raises(ArtifactError, match=r"text\.mp4 cannot be read as a video: Invalid data"):
        Video(text)
    with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    with pytest.raises(ArtifactError, match=r"sound\.wav has no video stream, only audio"):
        Video(tmp_path / "sound.wav")


def test_a_broken_file(path: Path) -> None:
    """Frames before the error are given."""

    class Broken:
        def decode(self, stream: Any) -> Any:
            yield from ("one", "two")
            raise av.error.InvalidDataError(1094995529, "Invalid data found", "clip.mp4")

    frames = Video(path)._decoded(Broken(), None)
    assert [next(frames), next(frames)] == ["one", "two"]
    with pytest.raises(ArtifactError, match="broken behind frame 2: Invalid data found"):
        next(frames)


@pytest.mark.parametrize(
    "options", [{"stride": 0}, {"fps": 0}, {"fps": 2, "stride": 2}, {"size": (0, 8)}]
)
def test_options_that_cannot_be(path: Path, options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="no frames can be taken"):
        Video(path, **options)
    with pytest.raises(OptionError, match="0 frames"):
        next(Video(path).chunks(0))


def test_without_pyav(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(PreconditionError, match="read with PyAV") as caught:
        Video(path)
    assert caught.value.hint is not None and "vlmopt[video]" in caught.value.hint
