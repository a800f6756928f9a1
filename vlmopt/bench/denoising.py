"""What skipping work in a denoising loop costs in quality, on the bundled diffusion transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from vlmopt import digit_diffusion
from vlmopt.analysis.branches import find_branches
from vlmopt.analysis.cost import stage_cost
from vlmopt.bench.loops import loop_flops
from vlmopt.denoising.pipelines import capture_pipeline
from vlmopt.denoising.plan import Plan
from vlmopt.denoising.session import DenoiseSession
from vlmopt.digit_diffusion import DigitPipeline
from vlmopt.passes.denoise.measuring import calibrate
from vlmopt.passes.denoise.soda import Soda
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What the judge says of samples.

    Attributes:
        name: what was run.
        flops: of a loop, over those of the full one.
        graphs: kinds of steps.
        accuracy: share of samples in which the judge sees the digit asked for.
        distance: squared Frechet distance of features from training images.
        drift: root mean square difference of pixels, -1 to 1, from the samples of the full loop
            with the same noise.
    """

    name: str
    flops: float
    graphs: int
    accuracy: float
    distance: float
    drift: float


class Gallery:
    """Samples of one loop, in full and after passes.

    Args:
        samples: how many, a multiple of ``size``.
        steps, guidance: of the loop.
        size: images at a time.
        generations: of ``size`` images each, to calibrate on.
    """

    def __init__(
        self,
        samples: int = 500,
        *,
        steps: int = 20,
        guidance: float = 1.5,
        size: int = 100,
        generations: int = 3,
    ) -> None:
        self.samples, self.steps, self.guidance, self.size = samples, steps, guidance, size
        self.generations = generations
        self.judge = digit_diffusion.load_judge()
        self.model = digit_diffusion.load_model()
        self.labels = digit_diffusion.labels_in_turn(samples)
        self.plans: dict[str, tuple[Plan, tuple[int, ...]]] = {}
        self.images: dict[str, Tensor] = {}
        self._programs: dict[int, Program] = {}
        self._folder = TemporaryDirectory(prefix="vlmopt-")

    def pipe(self) -> DigitPipeline:
        """A new pipeline around the one model."""
        return DigitPipeline(self.model)

    def calls(self, number: int, steps: int) -> list[dict[str, Any]]:
        """Calls to calibrate on."""
        return digit_diffusion.calibration_calls(
            number, steps=steps, guidance=self.guidance, size=self.size
        )

    def program(self) -> Program:
        """The captured step."""
        if self.steps not in self._programs:
            (call,) = self.calls(1, self.steps)
            self._programs[self.steps] = capture_pipeline(self.pipe(), **call)
        return self._programs[self.steps].clone()

    def artifact(self) -> str:
        """Tables of soda for this loop, measured once."""
        path = Path(self._folder.name, "soda.safetensors")
        if not path.exists():
            # the anchors of its own plan do not matter
            one = Soda(anchors=self.steps, interval=min(6, self.steps))
            calibrate(self.pipe(), self.calls(self.generations, self.steps), one, path)
        return str(path)

    def full(self, steps: int | None = None) -> Drawn:
        """The untouched loop, perhaps of fewer steps."""
        steps = self.steps if steps is None else steps
        name = "full" if steps == self.steps else f"{steps} steps"
        return self._judge(name, self._draw(self.pipe(), steps), steps / self.steps, 1)

    def run(self, name: str, pipeline: str) -> Drawn:
        """The loop after a pipeline; ``ARTIFACT`` in its text stands for tables of soda."""
        if "ARTIFACT" in pipeline:
            pipeline = pipeline.replace("ARTIFACT", self.artifact())
        program = self.program()
        whole = self.steps * stage_cost(program["denoiser"]).flops
        run_pipeline(program, pipeline)
        session = DenoiseSession(program, backend="eager")
        rows = [one.tokens for one in find_branches(self.program()["denoiser"])]
        self.plans[name] = session.plan, tuple(rows)
        pipe = self.pipe()
        session.install(pipe)
        images = self._draw(pipe, self.steps)
        # mean over loops, where what is computed depends on the samples
        flops = loop_flops(session, session.computed * self.size / self.samples)
        return self._judge(name, images, flops / whole, len(session.graphs))

    def _draw(self, pipe: DigitPipeline, steps: int) -> Tensor:
        return digit_diffusion.drawings(
            pipe, self.samples, steps=steps, guidance=self.guidance, size=self.size
        )

    def _judge(self, name: str, images: Tensor, flops: float, graphs: int) -> Drawn:
        self.images[name] = images
        return Drawn(
            name=name,
            flops=flops,
            graphs=graphs,
            accuracy=self.judge.accuracy(images, self.labels),
            distance=self.judge.distance(images),
            drift=float((images - self.images["full"]).square().mean().sqrt()),
        )


def halves(steps: int) -> dict[str, str | int]:
    """Loops that cost about half: names, and pipelines or numbers of steps of untouched loops.

    The full one comes first.
    """
    half, few = (steps + 1) // 2, max(round(0.3 * steps), -(-steps // 6))

    def soda(anchors: int) -> str:
        """Rows make up for the anchors that are fewer than half of the steps."""
        rows = round((half - anchors) / (steps - anchors), 2)
        chosen = f"rows={rows} sensitivity=30" if rows else "rows=0"
        return f"soda{{anchors={anchors} {chosen} artifact=ARTIFACT}}"

    found: dict[str, str | int] = {
        "full": steps,
        f"{half} steps": half,
        "fixed-interval": "fixed-interval{interval=2}",
        "taylorseer": "taylorseer{interval=2 order=1}",
        "first-block-cache": "first-block-cache{threshold=0.15}",
        "soda, anchors alone": soda(half),
        "soda": soda(max(half - 1, few)),
        "soda, few anchors": soda(few),
    }
    return found


def table(drawn: Sequence[Drawn]) -> str:
    """Markdown: a row for each."""
    lines = [
        "| loop | FLOPs | kinds of steps | class accuracy | Frechet distance | drift of pixels |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {one.name} | {one.flops:.1%} | {one.graphs} | {one.accuracy:.1%} | "
        f"{one.distance:.2f} | {one.drift:.3f} |"
        for one in drawn
    ]
    return "\n".join(lines)


def to_json(drawn: Sequence[Drawn]) -> list[Mapping[str, Any]]:
    """JSON values."""
    return [vars(one) for one in drawn]


def sheet(images: Mapping[str, Tensor], columns: int = 10) -> Tensor:
    """The first samples of each loop below each other, twice as large.

    Returns:
        uint8 ``[height, width]``, a row of ``columns`` digits for each loop.
    """
    first = torch.cat([one[:columns] for one in images.values()])
    grid = digit_diffusion.grid_of(first, columns)
    return grid.repeat_interleave(2, 0).repeat_interleave(2, 1)
