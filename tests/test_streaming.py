"""Sessions of an encoder: which frames are computed in full, and that streams never mix."""

from __future__ import annotations

import functools
import itertools
import re
from pathlib import Path

import encoders
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

import vlmopt
from vlmopt.errors import ArtifactError, OptionError, PreconditionError
from vlmopt.passes.frames.stc_cacher import StcCacher
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program
from vlmopt.streaming import EncodedFrames, FrameEncoder, FrameSession


@functools.cache
def program(text: str, frames: int = 1) -> Program:
    found = captured(frames).clone()
    run_pipeline(found, text)
    return found


@functools.cache
def captured(frames: int) -> Program:
    return vlmopt.capture(encoders.build("siglip"), (encoders.images(frames),))


def encoder(interval: int = 2, frames: int = 1) -> FrameEncoder:
    return FrameEncoder(program(f"stc-cacher{{interval={interval}}}", frames), backend="eager")


def clip(seed: int, chunks: int, frames: int = 1) -> list[Tensor]:
    """A picture of which a part changes from frame to frame."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randn(frames, 3, 40, 40, generator=generator)
    found = [first]
    for at in range(1, chunks):
        chunk = found[-1].clone()
        top = 8 * (at % 5)
        chunk[..., top : top + 8, :] = torch.randn(frames, 3, 8, 40, generator=generator)
        found.append(chunk)
    return found


def play(session: FrameSession, chunks: list[Tensor]) -> list[EncodedFrames]:
    return [session.encode(pixel_values=chunk) for chunk in chunks]


def same(one: EncodedFrames, other: EncodedFrames) -> bool:
    assert one.outputs.keys() == other.outputs.keys() and one.outputs
    equal = all(value.equal(other.outputs[name]) for name, value in one.outputs.items())
    return equal and one.reference == other.reference


@pytest.mark.parametrize(
    ("interval", "wanted"), [(1, "RRRRR"), (2, "R-R-R"), (4, "R---R"), (9, "R----")]
)
def test_which_chunks_are_computed_in_full(interval: int, wanted: str) -> None:
    results = play(encoder(interval).session(), clip(0, 5))
    assert "".join("R" if one.reference else "-" for one in results) == wanted
    assert [one.similarity is None for one in results] == [kind == "R" for kind in wanted]


def test_frames_between_are_compared_with_the_last_reference() -> None:
    """With an interval of 4, frames 1, 2 and 3 each with frame 0: their order does not matter."""
    chunks = clip(1, 4)
    results = play(encoder(4).session(), chunks)
    for order in itertools.permutations((1, 2, 3)):
        again = play(encoder(4).session(), [chunks[0], *(chunks[at] for at in order)])
        assert all(same(results[at], one) for at, one in zip(order, again[1:], strict=True))


def test_full_chunks_are_what_the_encoder_computes() -> None:
    chunks = clip(2, 5, frames=2)
    stage = captured(2)["model"]
    names = [port.name for port in stage.outputs]
    for chunk, found in zip(chunks, play(encoder(2, 2).session(), chunks), strict=True):
        with torch.no_grad():
            plain = dict(zip(names, stage.graph_module(chunk), strict=True))
        assert found.outputs.keys() == plain.keys()
        equal = all(value.equal(plain[name]) for name, value in found.outputs.items())
        assert equal == found.reference


def test_two_streams_never_mix() -> None:
    """Interleaved, in step or not, each gives what it gives alone."""
    shared = encoder(3)
    clips = [clip(3, 12), clip(4, 12)]
    alone = [play(encoder(3).session(), chunks) for chunks in clips]
    for order in ([0, 1] * 12, [0, 0, 1] * 6 + [1] * 6, [1] * 5 + [0] * 12 + [1] * 7):
        sessions = [shared.session(), shared.session()]
        todo = [iter(chunks) for chunks in clips]
        results: list[list[EncodedFrames]] = [[], []]
        for which in order:
            results[which].append(sessions[which].encode(pixel_values=next(todo[which])))
        for found, wanted in zip(results, alone, strict=True):
            assert len(found) == 12
            assert all(same(one, other) for one, other in zip(found, wanted, strict=True))


def test_saved_in_the_middle() -> None:
    """Through bytes of safetensors, into another session of the same encoder."""
    chunks, shared = clip(5, 9), encoder(4)
    wanted = play(shared.session(), chunks)
    for at in range(9):
        first = shared.session()
        play(first, chunks[:at])
        saved = load(save(first.state_dict()))
        play(first, clip(6, 2))  # what it does later is nothing to what was saved
        second = shared.session()
        second.load_state_dict(saved)
        results = play(second, chunks[at:])
        assert all(same(one, other) for one, other in zip(results, wanted[at:], strict=True))


def test_state_of_another_encoder() -> None:
    state = encoder().session().state_dict()
    del state["reference_ffn_1"]
    with pytest.raises(ArtifactError, match="holds reference_ffn_1 None, and this encoder needs"):
        encoder().session().load_state_dict(state)


def test_the_state_stays_where_it_is() -> None:
    """As Inductor and CUDA graphs want it; and it never grows."""
    session = encoder().session()
    places = [tensor.data_ptr() for tensor in session._state]
    size = session.nbytes
    assert size == 3 * 4 * 25 * 32 * 4
    play(session, clip(7, 6))
    assert [tensor.data_ptr() for tensor in session._state] == places
    assert session.nbytes == size


def test_what_was_returned_does_not_change_later() -> None:
    session, chunks = encoder().session(), clip(8, 4)
    first = session.encode(pixel_values=chunks[0])
    before = {name: value.clone() for name, value in first.outputs.items()}
    play(session, chunks[1:])
    assert all(value.equal(before[name]) for name, value in first.outputs.items())


def test_a_scene_cut_is_computed_in_full() -> None:
    chunks = clip(9, 6)
    other = clip(10, 6)
    chunks[3:] = other[3:]
    plain = play(encoder(8).session(), chunks)
    seen = [float(one.similarity.min()) for one in plain[1:] if one.similarity is not None]
    level = (min(seen[:2]) + max(seen[2:])) / 2
    assert min(seen[:2]) > max(seen[2:])
    results = play(encoder(8).session(cut=level), chunks)
    assert [one.reference for one in results][:4] == [True, False, False, True]
    assert results[3].similarity is not None
    assert same(results[3], encoder(8).session().encode(pixel_values=chunks[3]))
    # the new scene is the reference from there on
    later = encoder(8).session()
    wanted = play(later, chunks[3:])
    assert all(same(one, two) for one, two in zip(results[3:], wanted, strict=True))


@pytest.mark.parametrize("rows", [0, 1, 6, 7])
def test_lossless(rows: int) -> None:
    """No row that changed is left out; where more changed than fit, the chunk runs in full."""
    text = "stc-cacher{interval=9 ratio=0.25 lossless=true}"  # 6 of 25 rows
    shared = FrameEncoder(program(text), backend="eager")
    first = encoders.images(1)
    later = first.clone()
    places = [(3 * row) % 25 for row in range(rows)]
    for place in places:  # too little for a cosine to tell from rounding, and not nothing
        later[..., 8 * (place // 5), 8 * (place % 5)] += 1e-2
    before, found = play(shared.session(), [first, later])
    assert before.changed is None and found.changed is not None
    assert found.reference == (rows == 7)
    full = shared.session().encode(pixel_values=later)
    if found.reference:
        assert found.outputs.keys() == full.outputs.keys() and int(found.changed) == 7
        assert all(value.equal(found.outputs[name]) for name, value in full.outputs.items())
        return
    one, other = (each.outputs["last_hidden_state"][0] for each in (before, found))
    differing = torch.nonzero((one != other).any(-1))[:, 0].tolist()
    assert set(places) <= set(differing) and len(differing) <= 6


def test_lossless_by_other_rows_than_the_least_similar() -> None:
    """Rows that point elsewhere come first among those that changed, longer ones count too."""
    key, reference = torch.ones(1, 8, 4), torch.ones(8, 4)
    key[0, 5] *= 3  # the cosine is 1
    key[0, 7, 0] = -1
    method = StcCacher(ratio=0.25, lossless=True)
    slots, _, changed = method._choose(key, reference)
    assert changed is not None
    assert (slots.tolist(), changed.tolist()) == ([[5, 7]], [2])
    slots, _, nothing = StcCacher(ratio=0.25)._choose(key, reference)
    assert (slots.tolist(), nothing) == ([[0, 7]], None)


class OneBlock(nn.Module):
    """As little as there is to compile."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(encoders.Block(16, 2))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


def test_compiled() -> None:
    """Of rows that stand still, which are computed is no matter of rounding."""
    chunks = [torch.randn(2, 24, 16, generator=torch.Generator().manual_seed(11))]
    chunks.append(chunks[0].clone())
    chunks[1][:, 20:22] *= -1
    small = vlmopt.capture(OneBlock().eval(), (chunks[0],))
    run_pipeline(small, "stc-cacher")
    found, wanted = (
        [session.encode(x=chunk) for chunk in chunks]
        for session in (FrameEncoder(small, backend=b).session() for b in ("inductor", "eager"))
    )
    for one, other in zip(found, wanted, strict=True):
        for name, value in one.outputs.items():
            torch.testing.assert_close(value, other.outputs[name], atol=1e-5, rtol=1e-5)


def test_the_example_of_the_page() -> None:
    page = Path(__file__).parents[1] / "docs" / "streaming.md"
    (block,) = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    block = block.replace("FrameEncoder(program)", 'FrameEncoder(program, backend="eager")')
    chunks = clip(12, 6)
    scope = {"encoder": encoders.build("siglip"), "first_frame": chunks[0], "video": chunks}
    exec(block, scope)  # noqa: S102 - what the page tells users to run
    wanted = play(encoder(4).session(cut=0.5), chunks)[-1]
    assert same(scope["encoded"], wanted)  # type: ignore[arg-type]


def test_errors() -> None:
    with pytest.raises(PreconditionError, match="no encoder that reuses frames"):
        FrameEncoder(captured(1))
    with pytest.raises(OptionError, match="no backend 'fast'"):
        FrameEncoder(program("stc-cacher"), backend="fast")
    session = encoder().session()
    with pytest.raises(PreconditionError, match=r"pixel_values \[1, 3, 40, 40\].*\[2, 3, 40, 40\]"):
        session.encode(pixel_values=encoders.images(2))
    with pytest.raises(PreconditionError, match="is called with None"):
        session.encode()
    assert session.since is None
