"""Mixtures of experts on fewer pairs of token and expert against Inductor on all, in one run.

Timed is a stack of sparse blocks as Hugging Face builds them, each with its norm and residual, and
nothing between them: what skipping experts leaves alone is left out of times and FLOPs alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmopt.analysis.experts import find_experts
from vlmopt.bench.models import layers_and_width
from vlmopt.bench.prefill import SPEED, difference, markdown, require_parity, speed_cells
from vlmopt.bench.timing import Ratio, finishing, interleave, is_noisy
from vlmopt.graph.compare import TOLERANCES
from vlmopt.passes.experts.base import PAIRS
from vlmopt.passes.experts.modes import MoDES
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Modality, Program, Role
from vlmopt.runtime.model import compile_stage
from vlmopt.tracing import capture

BASELINES = ("hf", "captured")
"""What is compared with: the untouched Hugging Face blocks by Inductor's default settings, and
vlmopt's graph of them before any pass by the backend that is measured."""

_TOLERANCES = {**TOLERANCES, torch.bfloat16: 0.1}
"""Rounding lets experts change places whose scores are next to each other: a token then takes
another expert, in each of the layers."""


@dataclass(frozen=True)
class Size:
    """Size of a stack of mixtures.

    Attributes:
        inner: width of an expert.
        k: experts of each token.
    """

    layers: int
    width: int
    inner: int
    experts: int = 64
    k: int = 8
    tokens: int = 640

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}, {self.k} of {self.experts}"

    @property
    def pairs(self) -> int:
        return self.layers * self.tokens * self.k

    def flops(self, pairs: int) -> int:
        """Of the routers and of the products of so many pairs of token and expert."""
        routers = 2 * self.layers * self.tokens * self.width * self.experts
        return routers + pairs * 2 * 3 * self.width * self.inner


def parse_size(text: str, **options: int) -> Size:
    """``8x512``: layers and width, with experts half as wide.

    Raises:
        OptionError: the text is none of these.
    """
    layers, width = layers_and_width(text, "a stack of mixtures")
    return Size(layers, width, width // 2, **options)


class Block(nn.Module):
    """A sparse block with its norm and residual."""

    def __init__(self, norm: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.norm, self.mlp = norm, mlp

    def forward(self, rows: Tensor) -> Tensor:
        found: Tensor = self.mlp(self.norm(rows))
        return rows + found


class Stack(nn.Module):
    """Sparse blocks, one after the other; ``modality`` is not read, but says what tokens are."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, rows: Tensor, modality: Tensor) -> Tensor:
        for block in self.layers:
            rows = block(rows)
        return rows


def build(size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Stack:
    """Blocks of Qwen3-MoE (softmax router, weights that sum to 1) with random weights.

    Weights of routers are large enough to tell experts apart.
    """
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import (
        Qwen3MoeRMSNorm,
        Qwen3MoeSparseMoeBlock,
    )

    config = Qwen3MoeConfig(
        hidden_size=size.width,
        moe_intermediate_size=size.inner,
        num_experts=size.experts,
        num_experts_per_tok=size.k,
        norm_topk_prob=True,
    )
    config._experts_implementation = "grouped_mm"  # what from_pretrained chooses
    generator = torch.Generator().manual_seed(0)
    blocks = []
    for _ in range(size.layers):
        block = Block(Qwen3MoeRMSNorm(size.width), Qwen3MoeSparseMoeBlock(config))
        for name, weight in block.named_parameters():
            if "norm" not in name:
                scale = size.width**-0.5
                weight.data = torch.randn(weight.shape, generator=generator) * scale
        blocks.append(block)
    return Stack(blocks).eval().to(device, dtype)


@dataclass(frozen=True)
class Skipping:
    """One rewritten stack beside the untouched ones.

    Attributes:
        wanted, skipped: share of the pairs of token and expert that should be and is skipped.
        ideal: FLOPs of the untouched stack over those of the rewritten one.
        error: norm of the difference between eager and compiled results, relative to theirs.
    """

    wanted: float
    skipped: float
    pipeline: str
    ideal: float
    error: float


@dataclass(frozen=True)
class Mixture:
    """Times of one stack, in seconds, one per round, for each baseline and each pipeline."""

    size: Size
    dtype: str
    backend: str
    cuts: tuple[Skipping, ...]
    seconds: Mapping[str, Sequence[float]]

    def speedup(self, cut: Skipping, over: str = "hf") -> Ratio:
        """Of a rewritten stack over a baseline."""
        return Ratio.of(self.seconds[over], self.seconds[cut.pipeline])

    @property
    def noisy(self) -> bool:
        return any(is_noisy(times) for times in self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        cuts = [
            {
                **asdict(cut),
                "speedup": {name: asdict(self.speedup(cut, name)) for name in BASELINES},
                "of_ideal": self.speedup(cut).value / cut.ideal,
            }
            for cut in self.cuts
        ]
        return {**asdict(self), "cuts": cuts, "noisy": self.noisy}


def measure(
    size: Size,
    shares: Sequence[float] = (0.0, 0.5, 0.75, 0.88),
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    rounds: int = 25,
    backend: str = "inductor",
    progress: Callable[[str], None] = lambda text: None,
) -> Mixture:
    """Build, capture, rewrite, compile, check, and then time.

    Args:
        shares: of pairs to skip, each by a threshold of ``modes``; with 0 the threshold is one
            that nothing is below, so that all of the rewritten graph runs.
        rounds: how often each is run.
        backend: of :func:`vlmopt.optimize`, for what vlmopt compiles.
        progress: is told what is going on.

    Raises:
        VerifyError: what is compiled does not compute what it does in eager mode.
    """
    kind = str(dtype).removeprefix("torch.")
    name = f"{size.name} {kind} {backend}"
    progress(f"{name}: capturing")
    model = build(size, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(1, size.tokens, size.width, generator=generator).to(device, dtype)
    given = rows, torch.full((1, size.tokens), Modality.TEXT, device=device)
    program = capture(model, given, roles={"modality": Role.MODALITY})
    torch.compiler.reset()
    with torch.no_grad():
        weights = _router_weights(program, given)
        run: Any = torch.compile(model, dynamic=False, fullgraph=True)
        functions: dict[str, Callable[[], Any]] = {"hf": lambda: run(*given)}
        functions["captured"] = _compiled(program, given, backend)
        truth = program["model"].graph_module(*given)[0]
        for baseline in BASELINES:
            progress(f"{name}: compiling {baseline}")
            result = functions[baseline]()
            _checked(baseline, result if baseline == "hf" else result[0], truth, dtype)
        cuts = []
        for share in shares:
            threshold = float(weights.quantile(share)) if share else 1e-30
            one = MoDES(text=threshold)
            progress(f"{name}: rewriting and compiling {one}")
            rewritten = program.clone()
            run_pipeline(rewritten, [one])
            functions[str(one)] = _compiled(rewritten, given, backend)
            wanted = rewritten["model"].graph_module(*given)[0]
            error = _checked(str(one), functions[str(one)]()[0], wanted, dtype)
            computed = _computed(program, one, given)
            ideal = size.flops(size.pairs) / size.flops(computed)
            cuts.append(Skipping(share, 1 - computed / size.pairs, str(one), ideal, error))
        seconds = interleave(
            functions,
            rounds,
            wait=finishing(device),
            progress=lambda done: progress(f"{name}: round {done} of {rounds}"),
        )
    return Mixture(size, kind, backend, tuple(cuts), seconds)


def _compiled(program: Program, given: tuple[Tensor, ...], backend: str) -> Callable[[], Any]:
    run = compile_stage(program["model"], backend)
    return lambda: run(*given)


def _router_weights(program: Program, given: tuple[Tensor, ...]) -> Tensor:
    """Weights of all chosen experts of all layers of the untouched stack, float32."""
    seen: list[Tensor] = []
    wanted = {block.weights for block in find_experts(program["model"]).blocks}

    class Reader(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            result = super().run_node(n)
            if n in wanted:
                seen.append(result.float().flatten())
            return result

    Reader(program["model"].graph_module).run(*given)
    return torch.cat(seen)


def _computed(program: Program, one: MoDES, given: tuple[Tensor, ...]) -> int:
    """Pairs that are computed when ``one`` has been applied."""
    counting = program.clone()
    run_pipeline(counting, [MoDES(text=one.text, count=True)])
    stage = counting["model"]
    results = stage.graph_module(*given)
    names = [port.name for port in stage.outputs]
    return int(results[names.index(PAIRS)][..., 1].sum())


def _checked(what: str, result: Tensor, reference: Tensor, dtype: torch.dtype) -> float:
    error = difference(result, reference)
    require_parity(what, "results", error, _TOLERANCES[dtype])
    return error


def table(results: Sequence[Mixture]) -> str:
    """The results as a Markdown table, one line per share; times are medians."""
    head = (
        "blocks",
        "dtype",
        "backend",
        "skipped",
        *SPEED,
    )
    rows = []
    for result in results:
        for cut in result.cuts:
            ratio, captured = result.speedup(cut), result.speedup(cut, "captured").value
            rows.append(
                (
                    result.size.name,
                    result.dtype,
                    result.backend,
                    f"{cut.skipped:.1%}",
                    *speed_cells(
                        result.seconds["hf"],
                        result.seconds[cut.pipeline],
                        ratio,
                        captured,
                        cut.ideal,
                        noisy=result.noisy,
                    ),
                )
            )
    return markdown(head, rows)
