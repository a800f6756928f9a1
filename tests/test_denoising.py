"""Denoising loops that follow plans, in diffusers' own pipelines, against hooks that do it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import denoisers
import pytest
import torch
from oracles.denoising import ByHand
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch.nn import functional

import vlmopt
from vlmopt.analysis.branches import find_branches
from vlmopt.denoising.following import follow_plan
from vlmopt.denoising.pipelines import capture_pipeline
from vlmopt.denoising.plan import Action, Choice, Plan, Site
from vlmopt.denoising.session import DenoiseSession, in_onnx_runtime
from vlmopt.encoding import named_tensors
from vlmopt.errors import BlockMismatchError, OptionError, PlanMismatchError, PreconditionError
from vlmopt.graph.text import module_path
from vlmopt.graph.verify import verify_program, verify_stage
from vlmopt.lowering.onnx import export_program
from vlmopt.ops.packed import is_available
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Program, Role, Stage
from vlmopt.rewrite.branches import NEW, PARTIAL, observe_step, write_rows, write_step

CONTEXT = PassContext("plan")
COMPUTE, REUSE = Choice(Action.COMPUTE), Choice(Action.REUSE)
STEPS = 6
NAMES = list(denoisers.DENOISERS)


@functools.cache
def captured(name: str, guided: bool) -> Program:
    pipe = denoisers.pipeline(name, denoisers.build(name))
    return capture_pipeline(pipe, **denoisers.call(name, guided=guided, steps=STEPS))


def sites_of(program: Program) -> tuple[Site, ...]:
    return tuple(one.site for one in find_branches(program["denoiser"]))


def plan_of(program: Program, *rows: Choice | Sequence[Choice]) -> Plan:
    """One row, or one choice for all sites, for each step."""
    sites = sites_of(program)
    return Plan(
        sites, tuple(tuple(r) if not isinstance(r, Choice) else (r,) * len(sites) for r in rows)
    )


def mixed(program: Program, rows: int = 0) -> Plan:
    """Some modules reuse here, others there; with ``rows``, those compute some instead."""
    sites = sites_of(program)
    other = Choice(Action.PARTIAL, rows) if rows else REUSE
    one = [REUSE if site.module == "attention" else other for site in sites]
    two = [COMPUTE if at % 2 else other for at in range(len(sites))]
    three = [other if at % 3 else REUSE for at in range(len(sites))]
    return plan_of(program, COMPUTE, one, two, three, COMPUTE, REUSE)


def by_hand(name: str, plan: Plan, *, guided: bool, seed: int = 0) -> Tensor:
    model = denoisers.build(name)
    rows = [
        {
            (site.layer, site.module): (int(choice.action), choice.rows or choice.order)
            for site, choice in zip(plan.sites, row, strict=True)
        }
        for row in plan.steps
    ]
    pipe = denoisers.pipeline(name, model)
    hand = ByHand(name, model, rows, calls=2 if guided and name in ("flux", "wan") else 1)
    with hand.following():
        return denoisers.sample(pipe, name, guided=guided, steps=STEPS, seed=seed)


def followed(name: str, session: DenoiseSession, *, guided: bool, seed: int = 0) -> Tensor:
    pipe = denoisers.pipeline(name, denoisers.build(name))
    session.install(pipe)
    return denoisers.sample(pipe, name, guided=guided, steps=STEPS, seed=seed)


def agree(found: Tensor, wanted: Tensor) -> None:
    assert wanted.isfinite().all()
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


guidance = pytest.mark.parametrize("guided", [False, True], ids=["plain", "guided"])


@guidance
@pytest.mark.parametrize("name", NAMES)
def test_all_steps_in_full(name: str, guided: bool) -> None:
    """K = T: bit-equal samples."""
    program = captured(name, guided)
    session = DenoiseSession(program, plan_of(program, *[COMPUTE] * STEPS), backend="eager")
    pipe = denoisers.pipeline(name, denoisers.build(name))
    wanted = denoisers.sample(pipe, name, guided=guided, steps=STEPS)
    assert wanted.std() > 0.1
    assert followed(name, session, guided=guided).equal(wanted)
    assert session.graphs == ("denoiser",)
    assert session.nbytes == 0


@guidance
@pytest.mark.parametrize("name", NAMES)
def test_reuse(name: str, guided: bool) -> None:
    """Two generations, of which the second must not see the first."""
    program = captured(name, guided)
    plan = mixed(program)
    session = DenoiseSession(program, plan, backend="eager")
    for seed in (0, 1):
        found = followed(name, session, guided=guided, seed=seed)
        wanted = by_hand(name, plan, guided=guided, seed=seed)
        agree(found, wanted)
    full = by_hand(name, plan_of(program, *[COMPUTE] * STEPS), guided=guided, seed=1)
    assert (found - full).abs().max() > 1e-2 * full.abs().max()


@guidance
@pytest.mark.parametrize("name", NAMES)
def test_some_rows(name: str, guided: bool) -> None:
    program = captured(name, guided)
    sites = sites_of(program)
    some = [Choice(Action.PARTIAL, 3 + at % 2) for at, _ in enumerate(sites)]
    last = [Choice(Action.PARTIAL, 5) if at % 2 else REUSE for at, _ in enumerate(sites)]
    plan = plan_of(program, COMPUTE, some, last, mixed(program, 2).steps[2], some, last)
    session = DenoiseSession(program, plan, backend="eager")
    found = followed(name, session, guided=guided)
    agree(found, by_hand(name, plan, guided=guided))


@guidance
@pytest.mark.parametrize("name", NAMES)
def test_forecast(name: str, guided: bool) -> None:
    """Series of order 1 and 2 beside reuse; those of a second generation begin anew."""
    program = captured(name, guided)
    sites = sites_of(program)
    series = [Choice(Action.FORECAST, order=at % 3) for at, _ in enumerate(sites)]
    plan = plan_of(program, COMPUTE, COMPUTE, series, COMPUTE, series, series)
    session = DenoiseSession(program, plan, backend="eager")
    assert len(session.graphs) == 2
    for seed in (0, 1):
        found = followed(name, session, guided=guided, seed=seed)
        agree(found, by_hand(name, plan, guided=guided, seed=seed))


@pytest.mark.parametrize("name", NAMES)
def test_what_is_measured(name: str) -> None:
    """Full and partial results of each module beside each other; the step itself is as it was."""
    program = captured(name, False)
    stage = program["denoiser"]
    sites = sites_of(program)
    seen = {}
    for rows in (None, [5] * len(sites)):
        seen[rows is None] = stage.clone()
        observe_step(seen[rows is None], rows, CONTEXT)
        verify_stage(seen[rows is None])
    given = inputs_of_stage(stage, name)
    generator = torch.Generator().manual_seed(7)
    state = [
        torch.randn(seen[False].placeholder(port).meta["val"].shape, generator=generator)
        for port in seen[False].inputs[len(given) :]
    ]
    plain, full = (run(one, given) for one in (stage, seen[True]))
    both = run(seen[False], [*given, *state])
    assert len(full) == 1 + sum(len(one.branches) for one in find_branches(stage))
    assert all(both[key].equal(value) for key, value in full.items())
    assert all(full[key].equal(value) for key, value in plain.items())
    # each module alone: what comes before it is in full
    for at, site in enumerate(sites):
        row = [COMPUTE] * len(sites)
        row[at] = Choice(Action.PARTIAL, 5)
        alone = stage.clone()
        write_step(alone, tuple(row), {(site, Role.BRANCH)}, CONTEXT)
        named = dict(zip((port.name for port in seen[False].inputs), [*given, *state], strict=True))
        found = run(alone, [named[port.name] for port in alone.inputs])
        for key, value in found.items():
            if key.endswith(NEW):
                agree(both[key.removesuffix(NEW) + PARTIAL], value)


def inputs_of_stage(stage: Stage, name: str) -> list[Tensor]:
    """Random inputs of a captured step."""
    values = dict(named_tensors(denoisers.inputs(name, batch=1)))
    return [values[port.name] for port in stage.inputs]


def run(stage: Stage, given: Sequence[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        values = stage.graph_module(*given)
    return dict(zip((port.name for port in stage.outputs), values, strict=True))


@guidance
@pytest.mark.parametrize("name", ["flux", "wan"])
def test_first_block_cache(name: str, guided: bool) -> None:
    """Against diffusers' own."""
    from diffusers import FirstBlockCacheConfig

    program = captured(name, guided).clone()
    threshold = 1.0 if name == "flux" else 0.4
    run_pipeline(program, f"first-block-cache{{threshold={threshold}}}", verify="full")
    session = DenoiseSession(program, backend="eager")
    pipe = denoisers.pipeline(name, denoisers.build(name))
    plain = denoisers.sample(pipe, name, guided=guided, steps=STEPS)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
    try:
        wanted = [
            denoisers.sample(pipe, name, guided=guided, steps=STEPS, seed=at) for at in (0, 1)
        ]
    finally:
        pipe.transformer.disable_cache()
    for seed in (0, 1):
        agree(followed(name, session, guided=guided, seed=seed), wanted[seed])
    runs = 2 * STEPS * (2 if guided else 1)
    assert 0 < session.computed < runs
    assert not wanted[0].allclose(plain)


@pytest.mark.parametrize("name", NAMES)
def test_first_block_cache_of_threshold_zero(name: str) -> None:
    program = captured(name, True).clone()
    run_pipeline(program, "first-block-cache{threshold=0}", verify="full")
    pipe = denoisers.pipeline(name, denoisers.build(name))
    wanted = denoisers.sample(pipe, name, guided=True, steps=STEPS)
    assert followed(name, DenoiseSession(program, backend="eager"), guided=True).equal(wanted)


# -- graphs and state --------------------------------------------------------------------------


def test_few_graphs_share_their_weights(tmp_path: Path) -> None:
    program = captured("pixart", False)
    plan = plan_of(program, COMPUTE, REUSE, COMPUTE, REUSE, mixed(program).steps[2], COMPUTE)
    before = program.named_weights()
    rewritten = program.clone()
    follow_plan(rewritten, plan, CONTEXT)
    assert list(rewritten.stages) == ["denoiser", "denoiser_1", "denoiser_2"]
    after = rewritten.named_weights()
    assert {id(weight) for weight in after.values()} == {id(weight) for weight in before.values()}
    verify_program(rewritten)
    # what is reused is not computed
    attends = torch.ops.aten.scaled_dot_product_attention.default
    counts = [len(s.graph.find_nodes(op="call_function", target=attends)) for s in rewritten]
    assert counts == [4, 0, 2]
    # six branches of 16 rows of 32 numbers; nothing is kept that is not read
    assert DenoiseSession(rewritten, backend="eager").nbytes == 6 * 16 * 32 * 4
    rewritten.save(tmp_path / "program")
    loaded = DenoiseSession(vlmopt.load(tmp_path / "program"), backend="eager")
    assert loaded.plan == plan
    wanted = followed("pixart", DenoiseSession(rewritten, backend="eager"), guided=False)
    assert followed("pixart", loaded, guided=False).equal(wanted)


def test_all_rows_and_none() -> None:
    """k = N is the whole module, bit for bit; k = 0 is reuse."""
    program = captured("dit", False)
    found = []
    for all_rows, none in ((COMPUTE, REUSE), (Choice(Action.PARTIAL, 16), Choice(Action.PARTIAL))):
        plan = plan_of(
            program, COMPUTE, [none, all_rows] * 2, none, [all_rows, none] * 2, none, none
        )
        session = DenoiseSession(program, plan, backend="eager")
        found.append(followed("dit", session, guided=False))
    assert found[0].equal(found[1])


def test_rows_are_few() -> None:
    """Queries, attention and networks run on the rows chosen; keys of all are kept."""
    program = captured("dit", True).clone()
    some = Choice(Action.PARTIAL, 5)
    follow_plan(program, plan_of(program, COMPUTE, *[some] * 5), CONTEXT)
    stage = program["denoiser_1"]
    linear = stage.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    inside = [n for n in linear if "attn1" in str(n.args[1]) or "_ff_" in str(n.args[1])]
    assert len(inside) == 2 * 6
    assert {tuple(n.meta["val"].shape[:2]) for n in inside} == {(2, 5)}
    verify_program(program)


def test_of_modulations_gates_alone_are_computed() -> None:
    """By layers with rows of the captured weights, which stay shared."""
    program = captured("dit", True).clone()
    shared = {id(weight) for weight in program.named_weights().values()}
    follow_plan(program, plan_of(program, COMPUTE, *[REUSE] * 5), CONTEXT)
    found = {}
    for stage in program:
        linear = stage.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
        inside = [node for node in linear if module_path(node).endswith("norm1.linear")]
        found[stage.name] = [tuple(node.meta["val"].shape) for node in inside]
    assert found == {"denoiser": [(2, 192)] * 2, "denoiser_1": [(2, 32)] * 4}
    assert {id(weight) for weight in program.named_weights().values()} == shared
    verify_program(program)


packed = pytest.param("onednn", marks=pytest.mark.skipif(not is_available(), reason="no oneDNN"))


@pytest.mark.parametrize("backend", ["inductor", packed])
@pytest.mark.parametrize("name", ["dit", "sd3"])
def test_compiled(name: str, backend: str) -> None:
    program = captured(name, True)
    some = Choice(Action.PARTIAL, 5)
    plan = plan_of(program, COMPUTE, REUSE, some, some, COMPUTE, REUSE)
    session = DenoiseSession(program, plan, backend=backend)
    wanted = DenoiseSession(program, plan, backend="eager")
    for seed in (0, 1):
        with torch._dynamo.config.patch(recompile_limit=1):  # plans may have many kinds of steps
            found = followed(name, session, guided=True, seed=seed)
        eager = followed(name, wanted, guided=True, seed=seed)
        # other kernels round otherwise, and guidance enlarges that
        limit = 1e-4 if backend == "inductor" else 1e-3
        assert (found - eager).abs().max() <= limit * eager.abs().max()


def test_rows_are_written_where_the_state_is() -> None:
    """Inductor makes no other tensor as large as the state."""

    def step(state: Tensor, slots: Tensor, rows: Tensor) -> None:
        state.copy_(write_rows(state, slots, 2 * rows))

    generator = torch.Generator().manual_seed(0)
    state, rows = (torch.randn(2, size, 32, generator=generator) for size in (24, 3))
    slots = torch.tensor([[5, 0, 23], [1, 7, 2]])
    wanted = state.clone()
    for sample, places in enumerate(slots):
        wanted[sample, places] = 2 * rows[sample]
    _, (source,) = run_and_get_code(torch.compile(step), state, slots, rows)
    assert state.equal(wanted)
    assert "empty_strided" not in source.split("def call(", 1)[1]


def test_onnx(tmp_path: Path) -> None:
    """The states are outputs of one model and inputs of others."""
    program = captured("pixart", True).clone()
    some = Choice(Action.PARTIAL, 5)
    follow_plan(program, plan_of(program, COMPUTE, some, REUSE, some, COMPUTE, some), CONTEXT)
    export_program(program, tmp_path, overwrite=True)
    session = DenoiseSession(program, backend=in_onnx_runtime(tmp_path))
    wanted = followed("pixart", DenoiseSession(program, backend="eager"), guided=True)
    found = followed("pixart", session, guided=True)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()


# -- loops that a plan is not for --------------------------------------------------------------


def session_of(name: str, guided: bool = False) -> tuple[DenoiseSession, Any]:
    program = captured(name, guided)
    session = DenoiseSession(program, plan_of(program, COMPUTE, *[REUSE] * 5), backend="eager")
    pipe = denoisers.pipeline(name, denoisers.build(name))
    session.install(pipe)
    return session, pipe


@pytest.mark.parametrize(
    ("name", "change", "why"),
    [
        ("sd3", {"num_inference_steps": 8}, "plan is for 6 steps, and the pipeline takes 8"),
        ("sd3", {"num_inference_steps": 4}, "plan is for 6 steps, and the pipeline takes 4"),
        ("sd3", {"height": 32}, r"plan is for hidden_states \[1, 4, 8, 8\].* has \[1, 4, 4, 8\]"),
        ("sd3", {"num_images_per_prompt": 2}, r"has \[2, 4, 8, 8\]"),
        ("flux", {"guidance_scale": 2.0}, "plan is for guidance 3.5, and the pipeline has 2.0"),
        ("dit", {"guidance_scale": 4.0}, r"plan is for hidden_states \[1, 4, 8, 8\]"),
    ],
)
def test_other_calls(name: str, change: dict[str, Any], why: str) -> None:
    _, pipe = session_of(name)
    given = denoisers.call(name, guided=False, steps=STEPS) | change
    with pytest.raises(PlanMismatchError, match=why) as caught:
        pipe(**given)
    assert caught.value.hint is not None


def test_guidance_that_no_pipeline_tells() -> None:
    """It acts outside of the transformer: only that there is any shows there, by the batch."""
    program = captured("dit", True)
    pipe = denoisers.pipeline("dit", denoisers.build("dit"))
    assert not hasattr(pipe, "guidance_scale")
    session = DenoiseSession(program, plan_of(program, COMPUTE, *[REUSE] * 5), backend="eager")
    assert session.conditions["guidance"] is None
    session.install(pipe)
    pipe(**denoisers.call("dit", guided=True, steps=STEPS) | {"guidance_scale": 2.0})
    with pytest.raises(PlanMismatchError, match=r"plan is for hidden_states \[2, 4, 8, 8\]"):
        pipe(**denoisers.call("dit", guided=False, steps=STEPS))


def test_other_scheduler() -> None:
    import diffusers

    _, pipe = session_of("dit")
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler()
    with pytest.raises(PlanMismatchError, match=r"scheduler DDIMScheduler.* DPMSolver"):
        denoisers.sample(pipe, "dit", guided=False, steps=STEPS)


def step(session: DenoiseSession, time: int, **change: Tensor) -> None:
    values = dict(named_tensors(denoisers.inputs("dit", batch=1)))
    session.run(values | {"timestep": torch.tensor([time])} | change)


def test_loops_without_a_pipeline() -> None:
    """By their timesteps alone."""
    session, _ = session_of("dit")
    session._pipe = None
    for time in (900, 800):
        step(session, time)
    with pytest.raises(PlanMismatchError, match="two calls in a row are at timestep 800"):
        step(session, 800)
    with pytest.raises(PlanMismatchError, match="new generation begins at timestep 900 after 2"):
        step(session, 900)
    session.reset()
    times = (900, 800, 700, 600, 500, 400)
    for time in times * 2:
        step(session, time)
    step(session, 900)  # given up
    for time in times:
        step(session, time)
    with pytest.raises(PlanMismatchError, match="step 0 is at timestep 900, and the loop is at 30"):
        step(session, 300)
    with pytest.raises(PlanMismatchError, match="was captured without guidance"):
        step(session, 900, guidance=torch.ones(1))


def test_calls_within_contexts() -> None:
    """Each has its own state, and its own count of steps."""
    session, _ = session_of("dit")
    session._pipe = None
    for time in (900, 800):
        for name in ("cond", "uncond"):
            with session.cache_context(name):
                step(session, time)


def test_plans_of_other_models() -> None:
    program = captured("dit", False)
    many = Choice(Action.PARTIAL, 17)
    for plan, why in (
        (plan_of(captured("pixart", False), *[COMPUTE] * 6), "for 6 branches .* this model has 4"),
        (plan_of(program, COMPUTE), "captured in a loop of 6"),
        (plan_of(program, COMPUTE, *[many] * 5), r"computes 17 rows of 0\.attention, which has 16"),
        (None, "follows no plan"),
    ):
        with pytest.raises(PreconditionError, match=why):
            DenoiseSession(program, plan)
    with pytest.raises(OptionError, match="no backend"):
        DenoiseSession(program, backend="tpu")


# -- blocks that are built otherwise -----------------------------------------------------------


class Odd(nn.Module):
    """A block that is built in some unusual way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.q, self.k, self.v, self.out, self.fc1, self.fc2 = (nn.Linear(8, 8) for _ in range(6))
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        u = self.norm(x) * (1 + time)
        query, key, value = (
            p(u).unflatten(-1, (2, 4)).transpose(1, 2) for p in (self.q, self.k, self.v)
        )
        if self.kind == "keys of other rows":
            key = self.k(x).unflatten(-1, (2, 4)).transpose(1, 2)
        mixed = functional.scaled_dot_product_attention(query, key, value)
        added = self.out(mixed.transpose(1, 2).flatten(2))
        if self.kind == "pooled":
            added = added + added.mean(1, keepdim=True)
        if self.kind == "post-norm":
            return self.norm(self.fc2(x)) + time * added
        y = x + time * added
        return y + time * self.fc2(functional.gelu(self.fc1(self.norm(y))))


class Blocks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Odd(kind), Odd(kind)])

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        for block in self.blocks:
            sample = block(sample, timestep[:, None, None].float())
        return sample


def odd(kind: str) -> Program:
    return vlmopt.capture(Blocks(kind).eval(), (torch.randn(2, 9, 8), torch.ones(2)))


def test_a_sum_of_something_else_is_no_residual_stream() -> None:
    with pytest.raises(BlockMismatchError, match="no blocks that add to a residual stream"):
        find_branches(odd("post-norm")["denoiser"])


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("keys of other rows", "keys or values of 0.attention are not projections of the rows"),
        ("pooled", "combines rows of a sample outside of attention"),
    ],
)
def test_rows_that_cannot_be_computed_alone(kind: str, why: str) -> None:
    program = odd(kind)
    assert [str(site) for site in sites_of(program)] == [
        "0.attention",
        "0.mlp",
        "1.attention",
        "1.mlp",
    ]
    DenoiseSession(program, plan_of(program, COMPUTE, REUSE), backend="eager")
    plan = plan_of(program, COMPUTE, Choice(Action.PARTIAL, 2))
    with pytest.raises(BlockMismatchError, match=why) as caught:
        DenoiseSession(program, plan)
    assert caught.value.node is not None
    assert caught.value.hint is not None
