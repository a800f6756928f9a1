"""The benchmark of denoising loops, but for the clock."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmopt.bench import caches, loops
from vlmopt.denoising.plan import Action, Choice, Plan, Site
from vlmopt.denoising.session import DenoiseSession
from vlmopt.errors import OptionError, VerifyError

pytest.importorskip("diffusers")

SIZE = loops.Size(4, 64, tokens=16)


def uncompiled(function: Any, **options: Any) -> Any:
    return function


@pytest.fixture(autouse=True)
def no_compiler_and_no_cache_dit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    monkeypatch.setitem(sys.modules, "cache_dit", None)


def flops(batch: int) -> tuple[int, int, int]:
    """By hand: of a block, of its gates alone, and of what is around the blocks."""
    tokens, width = 16, 64
    time = 256 * width + width**2
    modulation = 2 * batch * (time + 6 * width**2)
    block = 2 * batch * tokens * 12 * width**2 + 4 * batch * tokens**2 * width + modulation
    patches = 2 * batch * tokens * 16 * width
    gates = 2 * batch * (time + 2 * width**2)
    return block, gates, 2 * patches + 2 * batch * (time + 2 * width**2)


def test_ways_to_run_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    found = loops.measure(SIZE, batch=3, steps=6, rounds=2)
    plans = ["fixed-interval{interval=2}", "2/8 of the rows, interval 3"]
    cached = ["first-block-cache", "first-block-cache of diffusers"]
    assert list(found.ways) == [*plans, *cached]
    assert list(found.seconds) == [*loops.BASELINES, *found.ways]
    assert {len(times) for times in found.seconds.values()} == {2}
    assert list(found.missing) == ["cache-dit"]
    # uncompiled is eager; that of diffusers makes the same samples in another way
    assert all(found.errors[at] == 0 for at in (*plans, "first-block-cache", *loops.BASELINES))
    assert found.errors["first-block-cache of diffusers"] < 1e-5
    block, gates, around = flops(3)
    full = around + 4 * block
    reused = around + 4 * gates
    assert found.ways[plans[0]].reuse == 0.5
    assert found.ways[plans[0]].ideal == pytest.approx(2 * full / (full + reused))
    assert found.ways[plans[1]].reuse == 4 / 6 * 6 / 8
    assert found.ways["first-block-cache"] == found.ways["first-block-cache of diffusers"]
    skipped = round(found.ways["first-block-cache"].reuse * 6 * 4 / 3)
    assert 0 < skipped < 6
    ideal = 6 * full / (6 * full - skipped * 3 * block)
    assert found.ways["first-block-cache"].ideal == pytest.approx(ideal)
    document = json.loads(json.dumps(found.to_json()))
    assert document["of_ideal"][plans[0]] == pytest.approx(
        found.speedup(plans[0]).value / found.ways[plans[0]].ideal
    )
    lines = loops.table([found]).splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:8]] == list(found.seconds)
    assert lines[-1].startswith("Left out: cache-dit, since it cannot be imported: ")


def test_a_wrong_loop_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(DenoiseSession):
        def __init__(self, *given: Any, backend: str) -> None:
            super().__init__(*given, backend="eager")
            self.scale = 1.0 if backend == "eager" else 1.1

        def run(self, values: Any) -> dict[str, Tensor]:
            return {name: self.scale * one for name, one in super().run(values).items()}

    monkeypatch.setattr(loops, "DenoiseSession", Wrong)
    with pytest.raises(VerifyError, match=r"^parity: captured: samples of Inductor"):
        loops.measure(SIZE, batch=1, steps=4, rounds=1, libraries=())


def test_a_share_of_what_is_reused() -> None:
    sites = (Site(0, "attention"), Site(0, "mlp"))
    compute, reuse = Choice(Action.COMPUTE), Choice(Action.REUSE)
    plan = Plan(sites, ((compute,) * 2, (reuse, Choice(Action.PARTIAL, 4)), (compute, reuse)))
    assert loops.reuse_share(plan, (16, 16)) == (1 + 0.75 + 1) / 6


def test_sizes() -> None:
    assert loops.parse_size("12x384").side == 32
    with pytest.raises(OptionError, match="'12x100' is no size of a diffusion transformer"):
        loops.parse_size("12x100")
    with pytest.raises(OptionError, match="255 patches are no square picture"):
        loops.parse_size("12x384", 255)


def test_other_libraries() -> None:
    assert caches.why_missing("diffusers") is None
    why = caches.why_missing("cache-dit")
    assert why is not None and "cache_dit" in why
    with pytest.raises(OptionError, match="no cache of deepcache"):
        caches.why_missing("deepcache")
