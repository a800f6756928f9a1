"""A whole model that watches a clip: encoder, pruning and prefill of each frame, and its answers.

Timed is one interval of frames, appended to a session frame by frame, against the same session
without any pass. What the same pipeline does to answers is asked of the bundled digit model, about
scenes of which the same share of cells stands still.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from vlmopt import digits
from vlmopt.analysis.cost import stage_cost
from vlmopt.bench.clips import make_clip
from vlmopt.bench.digit_stream import draw_stream
from vlmopt.bench.models import Shape, build_llava
from vlmopt.bench.prefill import markdown, milliseconds
from vlmopt.bench.timing import Ratio, interleave, is_noisy
from vlmopt.program import Program
from vlmopt.rewrite.reuse import REUSE
from vlmopt.runtime.stream import StreamingModel, StreamSession

SHAPE = Shape(12, 512, heads=8, vision_layers=12, vision_width=384)

PIPELINES = (
    "stc-cacher{interval=4 ratio=0.5}",
    "stc-cacher{interval=4 ratio=0.5} | v2drop{layers=4 keep=0.11}",
    "stc-cacher{interval=4 ratio=0.5} | stc-pruner{keep=0.5 carry=true}",
)

FRAMES = 4
"""Of an interval that is timed."""


@dataclass(frozen=True)
class Watching:
    """Times and answers of one pipeline.

    Attributes:
        static: share of the clip that stands still, and of the cells of scenes.
        seconds: of ``FRAMES`` frames without a pass, and with the pipeline; one per round.
        ideal: FLOPs without a pass over those with the pipeline, what was seen before aside.
        right, full: right answers of the digit model, with the pipeline and without.
        asked: questions.
    """

    pipeline: str
    static: float
    seconds: Mapping[str, Sequence[float]]
    ideal: float
    right: int
    full: int
    asked: int

    @property
    def speedup(self) -> Ratio:
        """Over no reuse and no pruning."""
        return Ratio.of(self.seconds["none"], self.seconds["pipeline"])

    @property
    def noisy(self) -> bool:
        return any(is_noisy(times) for times in self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {**asdict(self), "speedup": asdict(self.speedup), "noisy": self.noisy}


def measure(
    pipelines: Sequence[str],
    *,
    shape: Shape = SHAPE,
    static: float = 0.5,
    dtype: torch.dtype = torch.float32,
    backend: str = "inductor",
    rounds: int = 9,
    streams: int = 25,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Watching]:
    """Time all pipelines in one run, and ask the digit model ``12 * streams`` questions of each."""
    progress("building")
    model = build_llava(shape, dtype=dtype)
    clip = make_clip(FRAMES, size=shape.image_size, static=static).pixels(dtype)
    chunks = [_chunk(model, shape, frame[None]) for frame in clip]
    sessions: dict[str, StreamSession] = {}
    for pipeline in ("", *pipelines):
        progress(f"compiling {pipeline or 'no pass'}")
        made = StreamingModel(model, chunks[0], pipeline, chunks=2, text=32, backend=backend)
        sessions[pipeline] = made.session()

    def watch(session: StreamSession) -> Callable[[], None]:
        def interval() -> None:
            if session.frames is not None:
                session.frames.since = None  # an interval begins with a frame in full
            for chunk in chunks:
                session.append(**chunk)

        return interval

    functions = {name: watch(session) for name, session in sessions.items()}
    seconds = interleave(functions, rounds, progress=lambda n: progress(f"round {n} of {rounds}"))
    plain = sessions[""].model.program
    full, asked = answers("", static=static, streams=streams)
    found = []
    for pipeline in pipelines:
        progress(f"asking {pipeline}")
        right, _ = answers(pipeline, static=static, streams=streams)
        times = {"none": seconds[""], "pipeline": seconds[pipeline]}
        ideal = _flops(plain) / _flops(sessions[pipeline].model.program)
        found.append(Watching(pipeline, static, times, ideal, right, full, asked))
    return found


def answers(pipeline: str, *, static: float, streams: int, frames: int = 12) -> tuple[int, int]:
    """Right answers of the bundled digit model about what it sees now, and how many were asked.

    It remembers one frame, since it was trained on one. In each frame other digits stand in some
    cells, always the same, as in a clip.
    """
    model, processor = digits.load_model()
    reads: Any = processor.tokenizer  # type: ignore[attr-defined]

    def ids(text: str, *, first: bool = False) -> Tensor:
        tokens: Tensor = reads(text, return_tensors="pt", add_special_tokens=first).input_ids
        return tokens

    def chunk(scene: digits.Scene) -> dict[str, Tensor]:
        given = processor(
            images=[scene.to_pil()], text=["<image>"], return_tensors="pt", add_special_tokens=False
        )
        return dict(given)

    before, after = digits.prompt("|").split("<image>")
    blank = digits.make_scene(random.Random(0), *digits.heldout_digits())
    watching = StreamingModel(model, chunk(blank), pipeline, chunks=1, text=40, backend="eager")
    right = 0
    for seed in range(streams):
        session = watching.session()
        session.append(input_ids=ids(before, first=True))
        for moment in draw_stream(frames, static=static, seed=seed, same_cells=True):
            session.append(**chunk(moment.scene))
            question = ids(after.replace("|", moment.question.text))
            reply = session.generate(input_ids=question, max_new_tokens=4, do_sample=False)
            new = reply[0, question.shape[1] :]
            right += reads.decode(new, skip_special_tokens=True).strip() == moment.question.answer
    return right, streams * frames


def _chunk(model: Any, shape: Shape, pixels: Tensor) -> dict[str, Tensor]:
    ids = torch.full((1, shape.visual), model.config.image_token_id)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _flops(program: Program) -> float:
    """Of one frame, the mean over an interval."""
    reused = next((stage.facts[REUSE] for stage in program if REUSE in stage.facts), None)
    names = reused["stages"] if reused else ["vision_encoder"]
    full, *changed = (float(stage_cost(program[name]).flops) for name in names)
    encoder = (full + (FRAMES - 1) * changed[0]) / FRAMES if changed else full
    rest = (stage_cost(program[name]).flops for name in ("projector", "language_model"))
    return encoder + sum(rest)


def table(results: Sequence[Watching]) -> str:
    """The results as a Markdown table; times are medians of whole intervals."""
    head = (
        "pipeline",
        "static",
        "no pass",
        "vlmopt",
        "speed-up (90 %)",
        "FLOPs ideal",
        "right (no pass)",
    )
    rows = [
        (
            f"`{result.pipeline.replace('|', chr(92) + '|')}`",
            f"{result.static:.0%}",
            milliseconds(result.seconds["none"]),
            milliseconds(result.seconds["pipeline"]),
            result.speedup.text(noisy=result.noisy),
            f"{result.ideal:.2f}",
            f"{result.right / result.asked:.1%} ({result.full / result.asked:.1%})",
        )
        for result in results
    ]
    return markdown(head, rows)
