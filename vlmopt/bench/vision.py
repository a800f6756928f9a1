"""Image encoding on fewer tokens against Inductor on the same model, in one run.

Timed is a vision transformer with its classifier, from pixels to logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from vlmopt.bench.models import layers_and_width
from vlmopt.bench.prefill import (
    SPEED,
    difference,
    flops_ideal,
    markdown,
    require_parity,
    speed_cells,
)
from vlmopt.bench.timing import Ratio, finishing, interleave, is_noisy
from vlmopt.graph.compare import TOLERANCES
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.tracing import capture

BASELINES = ("hf", "captured")
"""What a rewritten model is compared with, compiled by Inductor: the untouched Hugging Face model,
and vlmopt's graph of it before any pass."""


@dataclass(frozen=True)
class Size:
    """Size of a vision transformer; heads are 64 wide.

    Attributes:
        image, patch: side in pixels.
    """

    layers: int
    width: int
    image: int = 224
    patch: int = 16

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}"


def parse_size(text: str) -> Size:
    """``12x384``: layers and width (ViT-S; ViT-B is ``12x768``).

    Raises:
        OptionError: the text is none of these.
    """
    return Size(*layers_and_width(text, "a vision transformer"))


def build_vit(size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A ``ViTForImageClassification`` with random weights, in eval mode."""
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(  # type: ignore[call-arg]
        hidden_size=size.width,
        intermediate_size=4 * size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.width // 64,
        image_size=size.image,
        patch_size=size.patch,
        num_labels=1000,
    )
    torch.manual_seed(0)
    return ViTForImageClassification(config).eval().to(device, dtype)


@dataclass(frozen=True)
class Encoding:
    """Times of one model, one batch and one pass.

    Attributes:
        ideal: FLOPs of the untouched model over those of the rewritten one.
        seconds: for each baseline, and for the pipeline, one time per round.
        errors: norm of the difference between the logits of Inductor and eager mode, relative to
            their norm.
    """

    size: Size
    dtype: str
    batch: int
    pipeline: str
    ideal: float
    seconds: Mapping[str, Sequence[float]]
    errors: Mapping[str, float]

    def speedup(self, over: str = "hf") -> Ratio:
        """Of the rewritten model over a baseline."""
        return Ratio.of(self.seconds[over], self.seconds[self.pipeline])

    @property
    def noisy(self) -> bool:
        return any(is_noisy(times) for times in self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "speedup": {name: asdict(self.speedup(name)) for name in BASELINES},
            "of_ideal": self.speedup().value / self.ideal,
            "noisy": self.noisy,
        }


def measure(
    size: Size,
    batch: int,
    pipeline: str,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 25,
    progress: Callable[[str], None] = lambda text: None,
) -> Encoding:
    """Build, capture, rewrite, compile, check, and then time.

    Args:
        batch: images.
        rounds: how often each is run.
        progress: is told what is going on.

    Raises:
        VerifyError: what is compiled does not compute what it does in eager mode.
    """
    name = f"{size.name} batch {batch}"
    progress(f"{name}: capturing")
    model = build_vit(size, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(batch, 3, size.image, size.image, generator=generator).to(device, dtype)
    program = capture(model, {"pixel_values": images})
    rewritten = program.clone()
    run_pipeline(rewritten, pipeline)
    eager: dict[str, Callable[..., Any]] = {
        "hf": lambda images: model(images).logits,
        "captured": program["model"].graph_module,
        pipeline: rewritten["model"].graph_module,
    }
    torch.compiler.reset()
    functions: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    with torch.no_grad():
        for variant, function in eager.items():
            progress(f"{name}: compiling {variant}")
            run: Any = torch.compile(function, dynamic=False)
            functions[variant] = lambda run=run: run(images)  # type: ignore[misc]
            wanted, found = _logits(function(images)), _logits(functions[variant]())
            errors[variant] = difference(found, wanted)
            require_parity(variant, "logits", errors[variant], TOLERANCES[dtype])
        seconds = interleave(
            functions,
            rounds,
            wait=finishing(device),
            progress=lambda done: progress(f"{name}: round {done} of {rounds}"),
        )
    ideal = flops_ideal(program["model"], rewritten["model"])
    kind = str(dtype).removeprefix("torch.")
    return Encoding(size, kind, batch, pipeline, ideal, seconds, errors)


def _logits(result: Any) -> torch.Tensor:
    logits: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return logits


def table(results: Sequence[Encoding]) -> str:
    """The results as a Markdown table, one line each; times are medians."""
    head = (
        "model",
        "dtype",
        "batch",
        "pass",
        *SPEED,
    )
    rows = []
    for result in results:
        ratio, captured = result.speedup(), result.speedup("captured").value
        rows.append(
            (
                result.size.name,
                result.dtype,
                str(result.batch),
                result.pipeline,
                *speed_cells(
                    result.seconds["hf"],
                    result.seconds[result.pipeline],
                    ratio,
                    captured,
                    result.ideal,
                    noisy=result.noisy,
                ),
            )
        )
    return markdown(head, rows)
