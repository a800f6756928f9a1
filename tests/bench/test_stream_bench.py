"""The benchmark of streams, but for the clock."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from vlmopt.bench import streams
from vlmopt.errors import OptionError, VerifyError
from vlmopt.streaming import FrameEncoder

SIZE = streams.Size(2, 64, tokens=16)


def uncompiled(function: Any, **options: Any) -> Any:
    return function


def test_intervals_are_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)
    found = streams.measure(SIZE, (2, 4), backends=("inductor", "onednn"), rounds=2)
    assert [one.interval for one in found] == [2, 4]
    assert found[0].rows == 4

    def block(rows: int) -> int:
        """By hand: keys of all rows; the rest, and attention to all rows, of some."""
        return 2 * 64**2 * (16 + 11 * rows) + 4 * rows * 16 * 64

    patches = 2 * 16 * 3 * 14**2 * 64
    full, fewer = (patches + 2 * block(rows) for rows in (16, 4))
    for one in found:
        assert one.ideal == pytest.approx(one.interval * full / (full + (one.interval - 1) * fewer))
        assert list(one.seconds) == [*streams.BASELINES, "inductor", "onednn"]
        assert {len(times) for times in one.seconds.values()} == {2}
        assert one.same_rows == {"inductor": 1.0, "onednn": 1.0}
        assert one.errors["hf"] == one.errors["captured"] == one.errors["inductor"] == 0.0
        assert one.errors["onednn"] < 1e-5
    document = json.loads(json.dumps(found[1].to_json()))
    ratio = found[1].speedup("onednn").value
    assert document["of_ideal"]["onednn"] == pytest.approx(ratio / found[1].ideal)
    assert document["speedup"]["onednn"]["hf"]["value"] == ratio
    lines = streams.table(found).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:6]] for line in lines]
    assert [(interval, backend) for *_, interval, backend in cells] == [
        ("2", "inductor"),
        ("2", "onednn"),
        ("4", "inductor"),
        ("4", "onednn"),
    ]
    assert cells[0][:3] == ["2x64", "16, 4 anew", "float32"]


def test_an_interval_is_one_frame_in_full_and_the_others_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In each round anew, whatever interval the pass was told."""
    monkeypatch.setattr(torch, "compile", uncompiled)
    ran: list[str] = []

    def interleave(functions: Any, rounds: int, **options: Any) -> Any:
        for _ in range(2):
            results = functions["inductor"]()
            ran.append("".join("R" if one.reference else "-" for one in results))
        assert len(functions["hf"]()) == len(functions["captured"]()) == len(results)
        return {name: [1.0, 1.0] for name in functions}

    monkeypatch.setattr(streams, "interleave", interleave)
    streams.measure(SIZE, (4, 2))
    assert ran == ["R---", "R---", "R-", "R-"]


@pytest.mark.parametrize(
    ("which", "why"),
    [("full", "a frame in full: hidden states"), ("selective", "a selective frame: ")],
)
def test_a_wrong_stream_is_not_timed(which: str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", uncompiled)

    def wrong(program: Any, *, backend: str) -> Any:
        encoder = FrameEncoder(program, backend="eager")
        if backend == "eager":
            return encoder
        name = "_run" if which == "full" else "_run_selective"
        right = getattr(encoder, name)
        setattr(encoder, name, lambda frame, *state: right(1.5 * frame, *state))
        return encoder

    monkeypatch.setattr(streams, "FrameEncoder", wrong)
    with pytest.raises(VerifyError, match=f"^parity: {why}"):
        streams.measure(SIZE, (2,), rounds=1)


def test_sizes() -> None:
    assert streams.parse_size("12x384").image == 24 * 14
    assert streams.parse_size("12x384", 1024).image == 32 * 14
    with pytest.raises(OptionError, match="'12x100' is no size of an encoder"):
        streams.parse_size("12x100")
    with pytest.raises(OptionError, match="577 patches are no square picture"):
        streams.parse_size("12x384", 577)


def test_frames_that_leave_nothing_to_rounding() -> None:
    """Every patch changes, and no two by about as much."""
    first, second = streams.moving_frames(SIZE, 2)
    change = (second - first).unfold(2, 14, 14).unfold(3, 14, 14).square().sum((0, 1, 4, 5))
    amounts = change.flatten().sort().values
    assert amounts[0] == 0 and (amounts[2:] > 1.1 * amounts[1:-1]).all()
