"""Frames of a video file, one after the other.

Files are decoded by PyAV (FFmpeg), which ``pip install 'vlmopt[video]'`` brings along; without it
streams take tensors all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmopt.errors import ArtifactError, OptionError, PreconditionError


class Video:
    """The frames of a video file, from the first on each time they are iterated over.

    No more frames are in memory than the decoder needs, however long the video is. Frames come in
    the order in which they are shown, upright, as uint8 tensors ``[3, height, width]``, red first.

    Args:
        path: any file with a video stream that FFmpeg knows; of several the one it thinks best.
        stride: take each so-manieth frame, the first one included.
        fps: instead, take so many frames a second: the first frame, and after each further
            1/``fps`` seconds the next that is shown. Where the video has fewer, each comes once.
        size: height and width to which frames are scaled, as they are shown; one number for a
            square. By default that of the video.

    Attributes:
        frame_rate: average frames per second of the file, ``None`` where it does not say.

    Raises:
        OptionError: an option that cannot be.
        PreconditionError: PyAV is not installed.
        ArtifactError: there is no such file, or no video in it; while iterating: it is broken.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        stride: int = 1,
        fps: float | None = None,
        size: int | tuple[int, int] | None = None,
    ) -> None:
        sizes = (size, size) if isinstance(size, int) else size
        if stride < 1 or (fps is not None and (fps <= 0 or stride != 1)) or min(sizes or (1,)) < 1:
            raise OptionError(
                f"no frames can be taken with stride {stride}, fps {fps} and size {size}",
                hint="either a stride of 1 or more, or frames per second above 0; sizes are pixels",
            )
        self.path = Path(path)
        self.stride = stride
        self.fps = fps
        self.size = sizes
        self._av = _import_av()
        with self._open() as container:
            rate = _video_stream(container, self.path).average_rate
        self.frame_rate = None if rate is None else float(rate)

    def __iter__(self) -> Iterator[Tensor]:
        due = start = None
        with self._open() as container:
            stream = _video_stream(container, self.path)
            for number, frame in enumerate(self._decoded(container, stream)):
                if self.fps is None:
                    if number % self.stride == 0:
                        yield self._tensor(frame)
                    continue
                time = _shown_at(frame, self.path)
                if due is None or start is None:
                    due = start = time
                if time >= due:
                    passed = (time - start) * Fraction(self.fps)
                    due = start + (passed.__floor__() + 1) / Fraction(self.fps)
                    yield self._tensor(frame)

    def chunks(self, frames: int) -> Iterator[Tensor]:
        """The frames in groups, uint8 ``[frames, 3, height, width]``; the last may have fewer."""
        if frames < 1:
            raise OptionError(f"a chunk cannot have {frames} frames", hint="give 1 or more")
        group: list[Tensor] = []
        for frame in self:
            group.append(frame)
            if len(group) == frames:
                yield torch.stack(group)
                group = []
        if group:
            yield torch.stack(group)

    def _open(self) -> Any:
        if not self.path.is_file():
            raise ArtifactError(f"{self.path} is no file", hint="give the path of a video file")
        try:
            return self._av.open(str(self.path))
        except self._av.FFmpegError as error:
            raise ArtifactError(
                f"{self.path} cannot be read as a video: {error.strerror}",
                hint="give a file that FFmpeg can read, such as mp4, mkv or webm",
            ) from error

    def _decoded(self, container: Any, stream: Any) -> Iterator[Any]:
        number = 0
        try:
            for frame in container.decode(stream):
                yield frame
                number += 1
        except self._av.FFmpegError as error:
            raise ArtifactError(
                f"{self.path} is broken behind frame {number}: {error.strerror}",
                hint="repair the file, or take the frames that came before the error",
            ) from error

    def _tensor(self, frame: Any) -> Tensor:
        turns = round(frame.rotation / 90) % 4
        given: dict[str, Any] = {}
        if self.size is not None:
            height, width = reversed(self.size) if turns % 2 else self.size
            given = {"height": height, "width": width, "interpolation": "BILINEAR"}
        rows: np.ndarray[Any, Any] = frame.reformat(format="rgb24", **given).to_ndarray()
        upright = np.rot90(rows, turns)  # counterclockwise, as the rotation of a frame is counted
        return torch.from_numpy(np.ascontiguousarray(upright.transpose(2, 0, 1)))


def _video_stream(container: Any, path: Path) -> Any:
    stream = container.streams.best("video")
    if stream is None:
        kinds = sorted({stream.type for stream in container.streams})
        raise ArtifactError(
            f"{path} has no video stream, only {', '.join(kinds) or 'nothing'}",
            hint="give a file with pictures in it",
        )
    return stream


def _shown_at(frame: Any, path: Path) -> Fraction:
    """Seconds."""
    if frame.pts is None:
        raise ArtifactError(
            f"{path} does not say when its frames are shown", hint="give a stride instead of fps"
        )
    return frame.pts * Fraction(frame.time_base)


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise PreconditionError(
            f"video files are read with PyAV, which cannot be imported: {error}",
            hint="pip install 'vlmopt[video]', or give frames as tensors",
        ) from error
    return av
