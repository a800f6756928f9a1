"""The benchmark of denoising loops, but for the clock."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from vlmopt.bench import caches, loops
from vlmopt.bench.timing import Ratio
from vlmopt.denoising.plan import Action, Choice, Plan, Site
from vlmopt.denoising.session import DenoiseSession
from vlmopt.errors import OptionError, VerifyError
from vlmopt.ops import packed

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


def test_ways_to_run_a_loop() -> None:
    found = loops.measure(SIZE, batch=3, steps=6, rounds=2)
    own = ["captured", "fixed-interval{interval=2}", "2/8 of the rows, interval 3"]
    own = [f"{name}, inductor" for name in (*own, "first-block-cache")]
    theirs = "first-block-cache of diffusers"
    assert list(found.ways) == [*own, theirs]
    assert list(found.seconds) == [loops.BASELINE, *found.ways]
    assert {len(times) for times in found.seconds.values()} == {2}
    assert list(found.missing) == ["cache-dit"]
    # uncompiled is eager; that of diffusers makes the same samples in another way
    assert all(found.errors[at] == 0 for at in (*own, loops.BASELINE))
    assert found.errors[theirs] < 1e-5
    block, gates, around = flops(3)
    full = around + 4 * block
    reused = around + 4 * gates
    captured, fixed, rows, cached = (found.ways[key] for key in own)
    assert (captured.reuse, captured.ideal) == (0, 1)
    assert fixed.reuse == 0.5
    assert fixed.ideal == pytest.approx(2 * full / (full + reused))
    assert rows.reuse == 4 / 6 * 6 / 8
    assert (cached.reuse, cached.ideal) == (found.ways[theirs].reuse, found.ways[theirs].ideal)
    skipped = round(cached.reuse * 6 * 4 / 3)
    assert 0 < skipped < 6
    assert cached.ideal == pytest.approx(6 * full / (6 * full - skipped * 3 * block))
    assert found.over_captured(own[0]) == Ratio(1, 1, 1)
    assert found.over_captured(theirs) is None
    document = json.loads(json.dumps(found.to_json()))
    assert document["of_ideal"][own[1]] == pytest.approx(found.speedup(own[1]).value / fixed.ideal)
    lines = loops.table([found]).splitlines()
    cells = [[cell.strip() for cell in line.split("|")] for line in lines[2:8]]
    assert [row[4] for row in cells] == ["inductor", *(way.name for way in found.ways.values())]
    assert [row[5] for row in cells] == ["", *["inductor"] * 4, ""]
    assert lines[-1].startswith("Left out: cache-dit, since it cannot be imported: ")


@pytest.mark.skipif(not packed.is_available(), reason="this PyTorch has no oneDNN")
def test_several_backends_do_the_same() -> None:
    backends = ("inductor", "onednn")
    found = loops.measure(SIZE, batch=1, steps=6, backends=backends, rounds=1, libraries=())
    names = [way.name for way in found.ways.values()]
    assert names[::2] == names[1::2]
    assert [way.backend for way in found.ways.values()] == [*backends] * 4
    for one, two in zip(*[iter(found.ways.values())] * 2, strict=True):
        assert (one.reuse, one.ideal) == (two.reuse, two.ideal)
    assert found.errors["captured, inductor"] == 0
    assert 0 < found.errors["captured, onednn"] < 1e-5


def test_a_wrong_loop_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(DenoiseSession):
        def __init__(self, *given: Any, backend: str) -> None:
            super().__init__(*given, backend="eager")
            self.scale = 1.0 if backend == "eager" else 1.1

        def run(self, values: Any) -> dict[str, Tensor]:
            return {name: self.scale * one for name, one in super().run(values).items()}

    monkeypatch.setattr(loops, "DenoiseSession", Wrong)
    with pytest.raises(VerifyError, match=r"^parity: captured, inductor: samples of Inductor"):
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
