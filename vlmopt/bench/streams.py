"""Streams of frames through an encoder that reuses rows, against Inductor on the untouched one.

Timed is one interval: a frame computed in full, and those until the next. The baseline computes as
many frames, each in full. Both are called frame by frame, as a camera gives them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlmopt.analysis.cost import stage_cost
from vlmopt.bench.models import layers_and_width
from vlmopt.bench.prefill import SPEED, difference, markdown, require_parity, speed_cells
from vlmopt.bench.timing import Ratio, finishing, interleave, is_noisy
from vlmopt.errors import OptionError, VerifyError
from vlmopt.graph.compare import TOLERANCES
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program
from vlmopt.runtime.model import compile_stage
from vlmopt.streaming import FrameEncoder, FrameSession
from vlmopt.tracing import capture

BASELINES = ("hf", "captured")
"""What a stream is compared with, every frame computed in full by Inductor: the untouched Hugging
Face encoder, and vlmopt's graph of it before any pass."""

PATCH = 14
"""Side of a patch in pixels."""


@dataclass(frozen=True)
class Size:
    """Size of an encoder; heads are 64 wide.

    Attributes:
        tokens: of a frame, a square number.
    """

    layers: int
    width: int
    tokens: int = 576

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}"

    @property
    def image(self) -> int:
        """Side of a frame in pixels."""
        return PATCH * round(self.tokens**0.5)


def parse_size(text: str, tokens: int = 576) -> Size:
    """``12x384``: layers and width.

    Raises:
        OptionError: the text is none of these, or ``tokens`` is no square number.
    """
    size = Size(*layers_and_width(text, "an encoder"), tokens)
    if tokens < 1 or (size.image // PATCH) ** 2 != tokens:
        raise OptionError(
            f"{tokens} patches are no square picture", hint="a square number, such as 576 or 1024"
        )
    return size


def build_encoder(size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A ``SiglipVisionModel`` without pooling, random weights, in eval mode."""
    from transformers import SiglipVisionConfig, SiglipVisionModel

    config = SiglipVisionConfig(
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        image_size=size.image,
        patch_size=PATCH,
        vision_use_head=False,
    )
    torch.manual_seed(0)
    return SiglipVisionModel(config).eval().to(device, dtype)


def moving_frames(size: Size, count: int) -> list[Tensor]:
    """Frames in which each patch changes, none as much as another: nothing is left to rounding.

    Returns:
        ``count`` tensors, float32 ``[1, 3, image, image]``.
    """
    generator = torch.Generator().manual_seed(1)
    side = size.image // PATCH
    frames = [torch.randn(1, 3, size.image, size.image, generator=generator)]
    for _ in range(count - 1):
        amount = torch.randperm(size.tokens, generator=generator).view(1, 1, side, side)
        amount = (amount / size.tokens).square()
        amount = amount.repeat_interleave(PATCH, -1).repeat_interleave(PATCH, -2)
        frames.append(frames[0] + amount * torch.randn(frames[0].shape, generator=generator))
    return frames


@dataclass(frozen=True)
class Stream:
    """Times of one encoder and one interval.

    Attributes:
        rows: of a frame, computed in frames that are not references.
        ideal: FLOPs of all frames computed in full over those of an interval.
        seconds: for each baseline, and for each backend of the stream, the time of an interval,
            one per round.
        errors: norm of the difference between compiled and eager results, relative to their norm.
        same_rows: for each backend, share of the first selective frame's rows that are within
            that difference of eager mode: others were computed in one and reused in the other.
    """

    size: Size
    dtype: str
    interval: int
    rows: int
    pipeline: str
    ideal: float
    seconds: Mapping[str, Sequence[float]]
    errors: Mapping[str, float]
    same_rows: Mapping[str, float]

    @property
    def backends(self) -> tuple[str, ...]:
        return tuple(name for name in self.seconds if name not in BASELINES)

    def speedup(self, backend: str, over: str = "hf") -> Ratio:
        """Of a stream over a baseline."""
        return Ratio.of(self.seconds[over], self.seconds[backend])

    @property
    def noisy(self) -> bool:
        return any(is_noisy(times) for times in self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "speedup": {
                backend: {name: asdict(self.speedup(backend, name)) for name in BASELINES}
                for backend in self.backends
            },
            "of_ideal": {one: self.speedup(one).value / self.ideal for one in self.backends},
            "noisy": self.noisy,
        }


def measure(
    size: Size,
    intervals: Sequence[int],
    *,
    ratio: float = 0.25,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backends: Sequence[str] = ("inductor",),
    rounds: int = 25,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Stream]:
    """Build, capture, rewrite, compile, check, and then time.

    Args:
        intervals: frames from one computed in full to the next; one result for each.
        ratio: share of rows that are computed in the others.
        backends: of :func:`vlmopt.optimize`, for the stream.
        rounds: how often each is run.
        progress: is told what is going on.

    Raises:
        VerifyError: what is compiled does not compute what it does in eager mode.
    """
    kind = str(dtype).removeprefix("torch.")
    name = f"{size.name} {size.tokens} tokens {kind}"
    progress(f"{name}: capturing")
    model = build_encoder(size, device=device, dtype=dtype)
    frames = [frame.to(device, dtype) for frame in moving_frames(size, max(intervals))]
    program = capture(model, {"pixel_values": frames[0]})
    plain = program["model"]
    torch.compiler.reset()
    progress(f"{name}: compiling baselines")
    full: dict[str, Callable[[Tensor], Any]] = {
        "hf": torch.compile(lambda frame: model(frame).last_hidden_state, dynamic=False),
    }
    run_plain = compile_stage(plain, "inductor")
    full["captured"] = lambda frame: run_plain(frame)[0]
    pipeline = f"stc-cacher{{interval={max(intervals)} ratio={ratio}}}"
    rewritten = program.clone()
    run_pipeline(rewritten, pipeline)
    eager = FrameEncoder(rewritten, backend="eager")
    encoders = {}
    errors: dict[str, float] = {}
    same: dict[str, float] = {}
    with torch.no_grad():
        wanted = plain.graph_module(frames[0])[0]
        for baseline, run in full.items():
            errors[baseline] = difference(run(frames[0]), wanted)
            require_parity(baseline, "hidden states", errors[baseline], TOLERANCES[dtype])
    for backend in backends:
        progress(f"{name}: rewriting and compiling for {backend}")
        encoders[backend] = FrameEncoder(rewritten, backend=backend)
        errors[backend], same[backend] = _checked(encoders[backend], eager, frames, dtype)
    results = []
    for interval in intervals:
        functions = {one: _all_in_full(run, frames[:interval]) for one, run in full.items()}
        for backend, encoder in encoders.items():
            functions[backend] = _one_interval(encoder, interval, frames[:interval])

        def tell(done: int, interval: int = interval) -> None:
            progress(f"{name}: interval {interval}, round {done} of {rounds}")

        seconds = interleave(functions, rounds, wait=finishing(device), progress=tell)
        results.append(
            Stream(
                size,
                kind,
                interval,
                eager.rows,
                f"stc-cacher{{interval={interval} ratio={ratio}}}",
                flops_ideal(program, rewritten, interval),
                seconds,
                errors,
                same,
            )
        )
    return results


def flops_ideal(before: Program, after: Program, interval: int) -> float:
    """The speed-up of a machine that does every FLOP at the same speed and nothing else."""
    full, selective = (stage_cost(stage).flops for stage in after)
    return interval * stage_cost(before["model"]).flops / (full + (interval - 1) * selective)


def _all_in_full(run: Callable[[Tensor], Any], frames: Sequence[Tensor]) -> Callable[[], Any]:
    def interval() -> Any:
        with torch.no_grad():
            return [run(frame) for frame in frames]

    return interval


def _one_interval(
    encoder: FrameEncoder, interval: int, frames: Sequence[Tensor]
) -> Callable[[], Any]:
    session = FrameSession(encoder, None)

    def run() -> Any:
        session.since = None  # the next frame is a reference, whatever interval was captured
        return [session.encode(pixel_values=frame) for frame in frames]

    return run


def _checked(
    compiled: FrameEncoder, eager: FrameEncoder, frames: Sequence[Tensor], dtype: torch.dtype
) -> tuple[float, float]:
    """``error`` and ``same_rows`` of a stream: compiled it must do what it does in eager mode.

    Which rows are chosen is up to comparisons that rounding can turn, in bfloat16 above all; rows
    that are chosen in one of both only are left out of the error, and there must be few of them.
    """
    limit = TOLERANCES[dtype]
    found, wanted = (
        [session.encode(pixel_values=frame) for frame in frames[:2]]
        for session in (compiled.session(), eager.session())
    )
    worst, share = 0.0, 1.0
    for one, other in zip(found, wanted, strict=True):
        result, reference = (each.outputs["last_hidden_state"].float()[0] for each in (one, other))
        off = (result - reference).norm(dim=-1) / reference.norm(dim=-1)
        same = off <= 10 * limit
        if one.reference:
            require_parity("a frame in full", "hidden states", difference(result, reference), limit)
        share = min(share, float(same.float().mean()))
        worst = max(worst, difference(result[same], reference[same]))
    if share < (0.98 if dtype == torch.float32 else 0.5):
        raise VerifyError("parity", f"a selective frame: {1 - share:.1%} of rows are others")
    require_parity("a selective frame", "hidden states", worst, limit)
    return worst, share


# -- text ------------------------------------------------------------------------------------


def table(results: Sequence[Stream]) -> str:
    """The results as a Markdown table, one line each; times are medians of whole intervals."""
    head = (
        "encoder",
        "tokens",
        "dtype",
        "interval",
        "backend",
        *SPEED,
    )
    rows = []
    for result in results:
        for backend in result.backends:
            ratio, captured = result.speedup(backend), result.speedup(backend, "captured").value
            rows.append(
                (
                    result.size.name,
                    f"{result.size.tokens}, {result.rows} anew",
                    result.dtype,
                    str(result.interval),
                    backend,
                    *speed_cells(
                        result.seconds["hf"],
                        result.seconds[backend],
                        ratio,
                        captured,
                        result.ideal,
                        noisy=result.noisy,
                    ),
                )
            )
    return markdown(head, rows)
