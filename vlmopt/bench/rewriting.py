"""How long capturing and rewriting take, by number of layers, on models without weights."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from vlmopt.bench.models import Shape, build_llava, llava_7b, prompt
from vlmopt.bench.prefill import markdown
from vlmopt.graph.diff import diff
from vlmopt.graph.diff_text import render
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.tracing import capture

REPEATS = 3


@dataclass(frozen=True)
class Rewriting:
    """What one model took, in a process of its own; times in seconds.

    Attributes:
        rewrite: of the pass itself; ``verify`` and ``snapshot`` of what the pass manager does
            around it: checking the graphs, and keeping and comparing the old ones. Medians of
            :data:`REPEATS` runs.
        diff: of the whole graph diff, text included.
        nodes: of the prefill and decode stages, before and after.
        peak_bytes: largest memory of the process.
    """

    layers: int
    width: int
    pipeline: str
    build: float
    capture: float
    rewrite: float
    verify: float
    snapshot: float
    diff: float
    nodes: tuple[int, int]
    peak_bytes: int

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def measure(layers: int) -> Rewriting:
    """Of a LLaVA-1.5-7B with that many decoder layers: two cuts, in prefill and decode."""
    return measure_shape(llava_7b(layers))


def measure_shape(shape: Shape) -> Rewriting:
    """As :func:`measure`, of any shape with four layers or more."""
    pipeline = f"v2drop{{layers=2,{shape.layers * 3 // 4} keep=0.5,0.5}}"
    times = [time.perf_counter()]
    model, inputs = build_llava(shape, device="meta"), prompt(shape)
    times.append(time.perf_counter())
    before = capture(model, inputs)
    times.append(time.perf_counter())
    runs = []
    for _ in range(REPEATS):
        after = before.clone()
        started = time.perf_counter()
        (record,) = run_pipeline(after, pipeline).records
        whole = time.perf_counter() - started
        around = whole - record.seconds - record.verify_seconds
        runs.append((record.seconds, record.verify_seconds, around))
    rewrite, verify, snapshot = map(median, zip(*runs, strict=True))
    started = time.perf_counter()
    render(diff(before, after))
    told = time.perf_counter() - started
    return Rewriting(
        layers=shape.layers,
        width=shape.width,
        pipeline=pipeline,
        build=times[1] - times[0],
        capture=times[2] - times[1],
        rewrite=rewrite,
        verify=verify,
        snapshot=snapshot,
        diff=told,
        nodes=(_nodes(before), _nodes(after)),
        peak_bytes=peak_bytes(),
    )


def _nodes(program: Any) -> int:
    stages = ("language_model", "decode")
    return sum(len(program[name].graph.nodes) for name in stages)


def peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage starts from the parent's peak
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text(encoding="ascii"))
        if found:
            return 1024 * int(found[1])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def table(results: Sequence[Rewriting]) -> str:
    """The results as a Markdown table."""
    head = (
        "layers",
        "nodes",
        "capture",
        "rewrite",
        "per layer",
        "verify",
        "snapshot",
        "diff",
        "peak memory",
    )
    rows = [
        (
            str(result.layers),
            f"{result.nodes[0]} -> {result.nodes[1]}",
            f"{result.capture:.1f} s",
            f"{result.rewrite:.2f} s",
            f"{1000 * result.rewrite / result.layers:.0f} ms",
            f"{result.verify:.2f} s",
            f"{result.snapshot:.2f} s",
            f"{result.diff:.2f} s",
            f"{result.peak_bytes / 2**30:.1f} GiB",
        )
        for result in results
    ]
    return markdown(head, rows)
