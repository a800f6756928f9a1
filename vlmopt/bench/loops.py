"""Denoising loops that reuse branches, against Inductor on the untouched loop.

Timed is a whole generation of a class-conditional diffusion transformer: DDIM from noise to sample,
scheduler included, without encoders and decoders. Caches of other libraries run in turns with those
of vlmopt, with the threshold of vlmopt's first-block cache, by which they must make the same
decisions and the same samples.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmopt.analysis.branches import BranchSite, find_branches
from vlmopt.analysis.cost import stage_cost
from vlmopt.bench.caches import CACHES, Cached, why_missing
from vlmopt.bench.models import layers_and_width
from vlmopt.bench.prefill import difference, markdown, milliseconds, require_parity
from vlmopt.bench.timing import Ratio, finishing, interleave, is_noisy
from vlmopt.denoising.following import LOOP
from vlmopt.denoising.plan import Action, Choice, Plan
from vlmopt.denoising.session import DenoiseSession
from vlmopt.errors import OptionError
from vlmopt.graph.compare import TOLERANCES
from vlmopt.passes.denoise.sensitivity import SHARES
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program
from vlmopt.tracing import capture

BASELINE = "inductor"
"""Every step in full: the untouched transformer of diffusers, compiled by Inductor."""

CAPTURED = "captured"
"""Every step in full: vlmopt's graph of it, with a plan that computes everything."""

FIRST_BLOCK = "first-block-cache"
"""Name of vlmopt's, and first part of the names of those of other libraries."""

Denoiser = Callable[[Tensor, Tensor, Tensor], Tensor]
"""``(sample, timesteps, labels) -> predicted noise``."""


@dataclass(frozen=True)
class Size:
    """Size of a diffusion transformer; heads are 64 wide.

    Attributes:
        tokens: of a sample, a square number.
    """

    layers: int
    width: int
    tokens: int = 256

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}"

    @property
    def side(self) -> int:
        """Side of a sample; patches are 2 wide."""
        return 2 * round(self.tokens**0.5)


def parse_size(text: str, tokens: int = 256) -> Size:
    """``12x384``: layers and width.

    Raises:
        OptionError: the text is none of these, or ``tokens`` is no square number.
    """
    size = Size(*layers_and_width(text, "a diffusion transformer"), tokens)
    if tokens < 1 or (size.side // 2) ** 2 != tokens:
        raise OptionError(
            f"{tokens} patches are no square picture", hint="a square number, such as 64 or 256"
        )
    return size


def build_denoiser(size: Size, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A ``DiTTransformer2DModel`` with random weights, in eval mode; its gates are not zero."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model: Any = DiTTransformer2DModel(
        num_attention_heads=size.width // 64,
        attention_head_dim=64,
        in_channels=4,
        num_layers=size.layers,
        sample_size=size.side,
        patch_size=2,
        num_embeds_ada_norm=1000,
        norm_num_groups=1,
    )
    for block in model.transformer_blocks:
        nn.init.normal_(block.norm1.linear.weight, std=0.05)
    return nn.Module.to(model.eval(), device, dtype)  # that of diffusers warns of casts


@dataclass(frozen=True)
class Generation:
    """What a generation begins with.

    Attributes:
        noise: ``[batch, 4, side, side]``.
        labels: int64 ``[batch]``.
        steps: of DDIM.
    """

    noise: Tensor
    labels: Tensor
    steps: int

    def run(self, denoiser: Denoiser, after: Callable[[], None] = lambda: None) -> Tensor:
        """The sample.

        Args:
            after: called behind each step.
        """
        from diffusers import DDIMScheduler

        scheduler: Any = DDIMScheduler()
        scheduler.set_timesteps(self.steps, device=self.noise.device)
        sample = self.noise
        with torch.no_grad():
            for time in scheduler.timesteps:
                found = denoiser(sample, time.expand(len(sample)), self.labels)
                sample = scheduler.step(found, time, sample).prev_sample
                after()
        return sample


@dataclass(frozen=True)
class Way:
    """One way to run the loop.

    Attributes:
        name: of the loop.
        backend: of :class:`~vlmopt.denoising.session.DenoiseSession`; empty for other libraries,
            whose blocks Inductor compiles.
        reuse: share of the branches of all steps that are not computed; of one that is computed for
            some rows only, the share of the others.
        ideal: FLOPs of the loop in full over those of this one.
    """

    name: str
    backend: str
    reuse: float
    ideal: float

    @property
    def key(self) -> str:
        """What tells it from the others."""
        return f"{self.name}, {self.backend}" if self.backend else self.name


@dataclass(frozen=True)
class Loop:
    """Times of one transformer.

    Attributes:
        batch: samples at a time.
        threshold: of first-block caches.
        ways: by their keys.
        seconds: of a generation, one per round, of the baseline and each way.
        errors: norm of the difference of compiled and eager samples, relative to their norm. Those
            of other libraries are compared with vlmopt's first-block cache in eager mode.
        missing: libraries that are left out, and why.
    """

    size: Size
    dtype: str
    batch: int
    steps: int
    threshold: float
    ways: Mapping[str, Way]
    seconds: Mapping[str, Sequence[float]]
    errors: Mapping[str, float]
    missing: Mapping[str, str]

    def speedup(self, way: str, over: str = BASELINE) -> Ratio:
        """Of a way over the baseline, or over another way."""
        return Ratio.of(self.seconds[over], self.seconds[way])

    def over_captured(self, way: str) -> Ratio | None:
        """Speed-up over all steps in full on the same backend; ``None`` for other libraries."""
        captured = replace(self.ways[way], name=CAPTURED).key
        return self.speedup(way, captured) if captured in self.ways else None

    @property
    def noisy(self) -> bool:
        return any(is_noisy(times) for times in self.seconds.values())

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return {
            **asdict(self),
            "speedup": {way: asdict(self.speedup(way)) for way in self.ways},
            "over_captured": {
                way: asdict(ratio) for way in self.ways if (ratio := self.over_captured(way))
            },
            "of_ideal": {
                name: self.speedup(name).value / way.ideal for name, way in self.ways.items()
            },
            "noisy": self.noisy,
        }


def measure(
    size: Size,
    *,
    batch: int = 2,
    steps: int = 20,
    interval: int = 2,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    backends: Sequence[str] = ("inductor",),
    libraries: Sequence[str] = tuple(CACHES),
    rounds: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> Loop:
    """Build, capture, plan, compile, check, and then time.

    All ways that reuse anything reuse about as much as ``fixed-interval`` does.

    Args:
        interval: steps from one computed in full to the next.
        backends: of :class:`~vlmopt.denoising.session.DenoiseSession`, for vlmopt's loops.
        libraries: of :data:`~vlmopt.bench.caches.CACHES`; one that is not installed is left out.
        rounds: how often each is run.
        progress: is told what is going on.

    Raises:
        VerifyError: what is compiled does not compute what it does in eager mode.
    """
    kind = str(dtype).removeprefix("torch.")
    name = f"{size.name} {size.tokens} tokens {kind} batch {batch}"
    progress(f"{name}: capturing")
    model = build_denoiser(size, device=device, dtype=dtype)
    generation = _generation(size, batch, steps, device, dtype)
    program = _captured(model, generation)
    torch.compiler.reset()
    missing = {library: why for library in libraries if (why := why_missing(library))}
    wanted: dict[str, Tensor] = {}
    denoisers: dict[str, Denoiser] = {}
    ways: dict[str, Way] = {}

    def add(way: Way, denoiser: Denoiser, reference: Tensor) -> None:
        ways[way.key], denoisers[way.key], wanted[way.key] = way, denoiser, reference

    progress(f"{name}: compiling the baseline")
    wanted[BASELINE] = generation.run(partial(_call, model))
    denoisers[BASELINE] = torch.compile(partial(_call, model), dynamic=False)
    whole = steps * stage_cost(program["denoiser"]).flops
    rows = [one.tokens for one in find_branches(program["denoiser"])]
    for at, plan in _plans(program, interval).items():
        eager = DenoiseSession(program, plan, backend="eager")
        reference = generation.run(_following(eager))
        share, ideal = reuse_share(plan, rows), whole / loop_flops(eager)
        for backend in backends:
            progress(f"{name}: compiling {at} for {backend}")
            session = DenoiseSession(program, plan, backend=backend)
            add(Way(at, backend, share, ideal), _following(session), reference)

    progress(f"{name}: looking for a threshold")
    cached = program.clone()
    run_pipeline(cached, FIRST_BLOCK)
    sessions = {one: DenoiseSession(cached, backend=one) for one in backends}
    share = next(way.reuse for way in ways.values() if way.reuse)
    share *= size.layers / (size.layers - 1)  # of the blocks that may be skipped
    session = sessions[backends[0]]
    threshold = _threshold(session, generation, min(round(share * steps), steps - 1))
    eager = DenoiseSession(cached, backend="eager")
    eager.followed = session.followed
    reference = generation.run(_following(eager))
    share, ideal = _skipping(session, eager.computed, program)
    for backend, each in sessions.items():
        each.followed = session.followed
        add(Way(FIRST_BLOCK, backend, share, ideal), _following(each), reference)
    for library in libraries:
        if library in missing:
            continue
        progress(f"{name}: compiling that of {library}")
        cache = CACHES[library](model, threshold, steps)
        share, ideal = _skipping(session, _in_full(cache, generation), program)
        way = Way(f"{FIRST_BLOCK} of {library}", "", share, ideal)
        add(way, _beginning(cache, steps), reference)

    errors = {at: difference(generation.run(run), wanted[at]) for at, run in denoisers.items()}
    for at, error in errors.items():
        require_parity(at, "samples", error, TOLERANCES[dtype])

    def tell(done: int) -> None:
        progress(f"{name}: round {done} of {rounds}")

    def generating(run: Denoiser) -> Callable[[], Tensor]:
        return lambda: generation.run(run)

    functions = {at: generating(run) for at, run in denoisers.items()}
    seconds = interleave(functions, rounds, wait=finishing(device), progress=tell)
    return Loop(size, kind, batch, steps, threshold, ways, seconds, errors, missing)


# -- loops -------------------------------------------------------------------------------------


def _call(model: Any, sample: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    found: Tensor = model(sample, timestep=timesteps, class_labels=labels, return_dict=False)[0]
    return found


def _generation(size: Size, batch: int, steps: int, device: str, dtype: torch.dtype) -> Generation:
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(batch, 4, size.side, size.side, generator=generator)
    return Generation(noise.to(device, dtype), torch.arange(batch, device=device), steps)


def _captured(model: Any, generation: Generation) -> Program:
    times = torch.zeros_like(generation.labels)
    inputs = {
        "hidden_states": generation.noise,
        "timestep": times,
        "class_labels": generation.labels,
        "return_dict": False,
    }
    program = capture(model, inputs)
    program.metadata[LOOP] = {"scheduler": "DDIMScheduler", "steps": generation.steps}
    return program


def _following(session: DenoiseSession) -> Denoiser:
    def denoiser(sample: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        given = {"hidden_states": sample, "timestep": timesteps, "class_labels": labels}
        return next(iter(session.run(given).values()))

    return denoiser


def _beginning(cache: Cached, steps: int) -> Denoiser:
    """Generations of ``steps`` calls each."""
    calls = 0

    def denoiser(*given: Tensor) -> Tensor:
        nonlocal calls
        if calls % steps == 0:
            cache.begin()
        calls += 1
        return cache(*given)

    return denoiser


def _in_full(cache: Cached, generation: Generation) -> int:
    """Steps in full of a generation."""
    skipped: list[bool] = []
    generation.run(_beginning(cache, generation.steps), lambda: skipped.append(cache.skipped()))
    return skipped.count(False)


# -- plans -------------------------------------------------------------------------------------


def _plans(program: Program, interval: int) -> dict[str, Plan]:
    """Nothing reused; everything, at fixed intervals; most rows, at intervals that are longer."""
    steps = program.metadata[LOOP]["steps"]
    sites = find_branches(program["denoiser"])
    rows = [one.tokens for one in sites]
    compute, reuse = ([Choice(action) for _ in sites] for action in (Action.COMPUTE, Action.REUSE))
    fixed = _between(sites, steps, interval, reuse)
    between = steps - len(range(0, steps, interval + 1))
    computed = 1 - reuse_share(fixed, rows) * steps / between
    eighths = min(max(round(SHARES * computed), 1), SHARES - 1)
    some = [Choice(Action.PARTIAL, count * eighths // SHARES) for count in rows]
    return {
        CAPTURED: _between(sites, steps, 1, compute),
        f"fixed-interval{{interval={interval}}}": fixed,
        f"{eighths}/{SHARES} of the rows, interval {interval + 1}": _between(
            sites, steps, interval + 1, some
        ),
    }


def _between(sites: Sequence[BranchSite], steps: int, interval: int, row: Sequence[Choice]) -> Plan:
    """Everything at each ``interval``-th step, and ``row`` at the others."""
    everything = tuple(Choice(Action.COMPUTE) for _ in sites)
    rows = (tuple(row) if step % interval else everything for step in range(steps))
    return Plan(tuple(one.site for one in sites), tuple(rows))


def reuse_share(plan: Plan, rows: Sequence[int]) -> float:
    """:attr:`Way.reuse` of a plan.

    Args:
        rows: of each branch.
    """
    shares = {Action.COMPUTE: 0.0, Action.REUSE: 1.0, Action.FORECAST: 1.0}
    found = [
        shares[choice.action] if choice.action in shares else 1 - choice.rows / count
        for row in plan.steps
        for choice, count in zip(row, rows, strict=True)
    ]
    return sum(found) / len(found)


def _threshold(session: DenoiseSession, generation: Generation, skipped: int) -> float:
    """The threshold by which about so many steps are skipped; the session keeps it."""
    low, high = 0.0, 1.0
    best: tuple[int, float] | None = None
    for _ in range(12):
        middle = (low + high) / 2
        session.followed = replace(session.followed, threshold=middle)
        before = session.computed
        generation.run(_following(session))
        found = generation.steps - (session.computed - before)
        if best is None or abs(found - skipped) < best[0]:
            best = abs(found - skipped), middle
        if found == skipped:
            break
        low, high = (middle, high) if found < skipped else (low, middle)
    assert best is not None
    session.followed = replace(session.followed, threshold=best[1])
    return best[1]


def _skipping(session: DenoiseSession, computed: int, program: Program) -> tuple[float, float]:
    """:attr:`Way.reuse` and :attr:`Way.ideal` of a loop in which so many steps are in full.

    Of the others the first block is.
    """
    steps = len(session.plan.steps)
    sites = session.plan.sites
    others = sum(site.layer > 0 for site in sites) / len(sites)
    whole = steps * stage_cost(program["denoiser"]).flops
    return others * (1 - computed / steps), whole / loop_flops(session, computed)


def loop_flops(session: DenoiseSession, computed: float = 0) -> float:
    """FLOPs of a loop.

    Args:
        computed: steps in full, where that is decided while the loop runs.
    """
    cost = {name: stage_cost(stage).flops for name, stage in session.stages.items()}
    if session.followed.threshold is None:
        return sum(cost[stage] for stage in session.followed.stages)
    steps = len(session.plan.steps)
    # the first block always, then the others or what stands for them
    first, others, reused = cost.values()
    return steps * first + computed * others + (steps - computed) * reused


# -- text ------------------------------------------------------------------------------------


def table(results: Sequence[Loop]) -> str:
    """The results as Markdown tables; times are medians of whole generations."""
    head = (
        "transformer",
        "dtype",
        "batch",
        "loop",
        "backend",
        "reused",
        "time",
        "speed-up (90 %)",
        "FLOPs ideal",
        "of ideal",
        "over captured",
    )
    rows: list[tuple[str, ...]] = []
    for result in results:
        size = f"{result.size.name}, {result.size.tokens} tokens"
        about = (size, result.dtype, str(result.batch))
        time = milliseconds(result.seconds[BASELINE])
        rows.append((*about, BASELINE, "", "0 %", time, "", "", "", ""))
        for key, way in result.ways.items():
            ratio, captured = result.speedup(key), result.over_captured(key)
            share = f"{captured.value:.2f} ({captured.value / way.ideal:.2f})" if captured else ""
            rows.append(
                (
                    *about,
                    way.name,
                    way.backend,
                    f"{100 * way.reuse:.0f} %",
                    milliseconds(result.seconds[key]),
                    ratio.text(noisy=result.noisy),
                    f"{way.ideal:.2f}",
                    f"{ratio.value / way.ideal:.2f}",
                    share,
                )
            )
    lines = [markdown(head, rows)]
    missing = {library: why for result in results for library, why in result.missing.items()}
    lines += [f"Left out: {library}, since {why}." for library, why in missing.items()]
    return "\n\n".join(lines)
