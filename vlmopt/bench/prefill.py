"""Prefill on fewer tokens against Inductor on the same model, in one run.

Timed is the language model on the embeddings of one prompt: hidden states and the key-value cache.
The vision tower and the output head run the same with and without a token pass, and are left out
of times and FLOPs alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor

from vlmopt.analysis.cost import stage_cost
from vlmopt.bench.methods import one_cut
from vlmopt.bench.models import Shape, build_llava, prompt
from vlmopt.bench.timing import Ratio, finishing, interleave, is_noisy
from vlmopt.errors import VerifyError
from vlmopt.graph.compare import TOLERANCES
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.registry import find_pass
from vlmopt.program import Program, Role, Stage
from vlmopt.runtime.model import compile_stage
from vlmopt.tracing import capture, modality_of

BASELINES = ("hf", "hf_mask", "captured")
"""What a rewritten stage is compared with, all of it compiled by Inductor:

- ``hf``: the untouched Hugging Face decoder, called without an attention mask (nothing is padded),
  which lets it leave the causal mask to the attention kernel;
- ``hf_mask``: the same, called with the processor's mask of ones, which makes it build one;
- ``captured``: vlmopt's graph of it before any pass.
"""


@dataclass(frozen=True)
class Cut:
    """One rewritten stage beside the untouched ones.

    Attributes:
        method: name of the pass.
        keep: visual tokens kept.
        pipeline: what was applied.
        ideal: FLOPs of the untouched language model over those of the rewritten one.
        same_tokens: share of the tokens kept in eager mode that the compiled stage keeps too.
        error: norm of the difference between eager and compiled hidden states of tokens that both
            keep, relative to their norm.
    """

    method: str
    keep: int
    pipeline: str
    ideal: float
    same_tokens: float
    error: float


@dataclass(frozen=True)
class Prefill:
    """Times of one model.

    Attributes:
        seconds: for each baseline and each cut (by its pipeline) one time per round.
        errors: of the baselines, as for cuts.
    """

    shape: Shape
    dtype: str
    backend: str
    cuts: tuple[Cut, ...]
    seconds: Mapping[str, Sequence[float]]
    errors: Mapping[str, float]

    @property
    def baseline(self) -> str:
        """The fastest way to run the user's own module: what a speed-up is measured against."""
        names = [name for name in ("hf", "hf_mask") if name in self.seconds]
        return min(names, key=lambda name: median(self.seconds[name]))

    def speedup(self, cut: Cut, over: str | None = None) -> Ratio:
        """Of a cut over a baseline, by default :attr:`baseline`."""
        return Ratio.of(self.seconds[over or self.baseline], self.seconds[cut.pipeline])

    @property
    def noisy(self) -> bool:
        return any(is_noisy(times) for times in self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        cuts = [
            {
                **asdict(cut),
                "speedup": {
                    name: asdict(self.speedup(cut, name))
                    for name in self.seconds
                    if name in BASELINES
                },
                "of_ideal": self.speedup(cut).value / cut.ideal,
            }
            for cut in self.cuts
        ]
        return {
            "shape": {**asdict(self.shape), "intermediate": self.shape.intermediate},
            "dtype": self.dtype,
            "backend": self.backend,
            "baseline": self.baseline,
            "cuts": cuts,
            "errors": dict(self.errors),
            "noisy": self.noisy,
            "seconds": {name: list(times) for name, times in self.seconds.items()},
        }


def measure(
    shape: Shape,
    keeps: Sequence[int],
    *,
    methods: Sequence[str] = ("v2drop",),
    layer: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 25,
    baselines: Sequence[str] = BASELINES,
    backend: str = "inductor",
    progress: Callable[[str], None] = lambda text: None,
) -> list[Prefill]:
    """Build, capture, rewrite, compile, check, and then time.

    Methods take turns with the baselines, not with each other: of many compiled graphs in turn each
    would find less of itself in the caches than a user's does.

    Args:
        keeps: visual tokens to keep; one rewritten stage for each method and each of these.
        methods: names of passes that drop tokens.
        layer: first layer that runs on fewer tokens.
        rounds: how often each is run.
        baselines: of :data:`BASELINES`, at least one of the first two.
        backend: of :func:`vlmopt.optimize`, for what vlmopt compiles.
        progress: is told what is going on.

    Returns:
        One for each method.

    Raises:
        VerifyError: a compiled stage does not compute what the same stage does in eager mode, or
            in float32 keeps other tokens.
    """
    name = f"{shape.name} {str(dtype).removeprefix('torch.')}"
    progress(f"{name}: capturing")
    model = build_llava(shape, device=device, dtype=dtype)
    inputs = prompt(shape, device=device, dtype=dtype)
    program = capture(model, inputs)
    values = decoder_inputs(model, program, inputs)
    torch.compiler.reset()
    functions: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    with torch.no_grad():
        stage = program["language_model"]
        truth = _hidden(stage, stage.graph_module(*_arguments(stage, values)))
        for baseline in baselines:
            progress(f"{name}: compiling {baseline}")
            if baseline == "captured":
                functions[baseline] = _compiled(stage, values, backend)
                result = _hidden(stage, functions[baseline]())
            else:
                functions[baseline] = _compiled_module(model, values, mask=baseline == "hf_mask")
                result = functions[baseline]().last_hidden_state
            errors[baseline] = difference(result, truth)
            require_parity(baseline, "hidden states", errors[baseline], TOLERANCES[dtype])
        cuts = []
        for method, keep in itertools.product(methods, keeps):
            pipeline = one_cut(method, layer, keep)
            progress(f"{name}: rewriting and compiling {pipeline}")
            rewritten = program.clone()
            run_pipeline(rewritten, pipeline)
            fewer = rewritten["language_model"]
            given = {**values, **_encoded(fewer)}
            functions[pipeline] = _compiled(fewer, given, backend)
            same, error = _checked(fewer, given, functions[pipeline], method, pipeline, dtype)
            ideal = flops_ideal(stage, fewer)
            cuts.append(Cut(method, keep, pipeline, ideal, same, error))
        results = []
        for method in methods:
            own = tuple(cut for cut in cuts if cut.method == method)
            seconds = interleave(
                {one: functions[one] for one in (*baselines, *(cut.pipeline for cut in own))},
                rounds,
                wait=finishing(device),
                progress=partial(_tell_round, progress, f"{name}: {method}", rounds),
            )
            results.append(
                Prefill(shape, str(dtype).removeprefix("torch."), backend, own, seconds, errors)
            )
    return results


def _tell_round(progress: Callable[[str], None], what: str, rounds: int, done: int) -> None:
    progress(f"{what}, round {done} of {rounds}")


def decoder_inputs(model: Any, program: Program, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What reaches the decoder when ``model`` gets a prompt, by the names of its stage's inputs."""
    seen: dict[str, Any] = {}
    decoder = model.get_decoder()
    handle = decoder.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs, logits_to_keep=1)
    finally:
        handle.remove()
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    return {
        "input_ids": ids,
        "inputs_embeds": seen["inputs_embeds"],
        "attention_mask": mask,
        "position_ids": torch.arange(ids.shape[1], device=ids.device)[None],
        "modality": modality_of(ids, mask, program.metadata["visual_token_ids"]),
    }


def _encoded(stage: Stage) -> dict[str, Tensor]:
    """Random values in place of those of the vision encoder, which is not measured."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for port in stage.find_inputs(Role.ENCODED):
        val = stage.placeholder(port).meta["val"]
        found[port.name] = torch.rand(val.shape, generator=generator).to(val.device)
    return found


def _arguments(stage: Stage, values: Mapping[str, Tensor]) -> list[Tensor]:
    return [values[port.name] for port in stage.inputs]


def _compiled(stage: Stage, values: Mapping[str, Tensor], backend: str) -> Callable[[], Any]:
    run = compile_stage(stage, backend)
    arguments = _arguments(stage, values)
    return lambda: run(*arguments)


def _compiled_module(model: Any, values: Mapping[str, Tensor], *, mask: bool) -> Callable[[], Any]:
    run: Any = torch.compile(model.get_decoder(), dynamic=False, fullgraph=True)
    arguments = {"inputs_embeds": values["inputs_embeds"], "use_cache": True}
    if mask:
        arguments["attention_mask"] = values["attention_mask"]
    return lambda: run(**arguments)


def _hidden(stage: Stage, results: Sequence[Tensor]) -> Tensor:
    return next(
        value
        for port, value in zip(stage.outputs, results, strict=True)
        if port.role is Role.HIDDEN_STATES
    )


def _kept(stage: Stage, results: Sequence[Tensor]) -> Tensor:
    """Slots of the tokens present after the last cut, int64 ``[kept]`` (the batch is one)."""
    return [
        value[0]
        for port, value in zip(stage.outputs, results, strict=True)
        if port.role is Role.KEPT
    ][-1]


def _checked(
    stage: Stage,
    values: Mapping[str, Tensor],
    compiled: Callable[[], Any],
    method: str,
    pipeline: str,
    dtype: torch.dtype,
) -> tuple[float, float]:
    """``same_tokens`` and ``error`` of a cut: it must do compiled what it does in eager mode."""
    eager, fast = stage.graph_module(*_arguments(stage, values)), compiled()
    wanted, found = _kept(stage, eager), _kept(stage, fast)
    both = torch.isin(wanted, found)
    same = float(both.float().mean())
    if dtype in (torch.float32, torch.float64) and same < 1:
        raise VerifyError(
            "parity", f"{pipeline}: Inductor keeps other tokens than eager mode ({same:.1%} shared)"
        )
    result, reference = _hidden(stage, fast), _hidden(stage, eager)
    if stage.last_cut is not None:  # else all tokens are back in the end
        result, reference = result[:, torch.isin(found, wanted)], reference[:, both]
    error = difference(result, reference)
    if same == 1 or not getattr(
        find_pass(method), "merges", False
    ):  # else other tokens were merged into these
        require_parity(pipeline, "hidden states", error, TOLERANCES[dtype])
    return same, error


def flops_ideal(before: Stage, after: Stage) -> float:
    """The speed-up of a machine that does every FLOP at the same speed and nothing else."""
    return stage_cost(before).flops / stage_cost(after).flops


def difference(result: Tensor, reference: Tensor) -> float:
    """Norm of the difference, relative to that of ``reference``."""
    return float((result - reference).float().norm() / reference.float().norm())


def require_parity(what: str, values: str, error: float, limit: float) -> None:
    """Raise a ``VerifyError`` where compiled ``values`` are off by more than ``limit``."""
    if not error <= limit:
        raise VerifyError(
            "parity",
            f"{what}: {values} of Inductor and eager mode differ by {error:.1e} of their norm, "
            f"more than {limit:g}",
        )


# -- text ------------------------------------------------------------------------------------


def table(results: Sequence[Prefill]) -> str:
    """The results as a Markdown table, one line per cut; times are medians."""
    head = (
        "model",
        "dtype",
        "backend",
        "method",
        "visual tokens",
        "Inductor",
        "vlmopt",
        "speed-up (90 %)",
        "FLOPs ideal",
        "of ideal",
        "over HF with mask",
        "over captured",
    )
    rows = []
    for result in results:
        for cut in result.cuts:
            ratio = result.speedup(cut)
            rows.append(
                (
                    result.shape.name,
                    result.dtype,
                    result.backend,
                    cut.method,
                    f"{result.shape.visual} -> {cut.keep}",
                    milliseconds(result.seconds[result.baseline]),
                    milliseconds(result.seconds[cut.pipeline]),
                    ratio.text(noisy=result.noisy),
                    f"{cut.ideal:.2f}",
                    f"{ratio.value / cut.ideal:.2f}",
                    _over(result, cut, "hf_mask"),
                    _over(result, cut, "captured"),
                )
            )
    return markdown(head, rows)


SPEED = ("Inductor", "vlmopt", "speed-up (90 %)", "FLOPs ideal", "of ideal", "over captured")
"""Heads of the columns of :func:`speed_cells`."""


def speed_cells(
    baseline: Sequence[float],
    seconds: Sequence[float],
    ratio: Ratio,
    captured: float,
    ideal: float,
    *,
    noisy: bool,
) -> tuple[str, ...]:
    """How fast something is against the untouched model, against its graph, and its ideal.

    Args:
        baseline, seconds: of the untouched model, and of what is compared; one per round.
        ratio: speed-up over the former; ``captured``: over the graph of it.
        ideal: the speed-up that FLOPs allow.
    """
    return (
        milliseconds(baseline),
        milliseconds(seconds),
        ratio.text(noisy=noisy),
        f"{ideal:.2f}",
        f"{ratio.value / ideal:.2f}",
        f"{captured:.2f} ({captured / ideal:.2f})",
    )


def milliseconds(seconds: Sequence[float]) -> str:
    """The median, as text."""
    return f"{1000 * median(seconds):.1f} ms"


def _over(result: Prefill, cut: Cut, baseline: str) -> str:
    if baseline not in result.seconds:
        return "-"
    ratio = result.speedup(cut, baseline).value
    return f"{ratio:.2f} ({ratio / cut.ideal:.2f})"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| "
        + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
        + " |"
        for line in lines
    )
