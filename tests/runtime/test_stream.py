"""Streams through a whole model, against the untouched model over everything that they showed."""

from __future__ import annotations

import functools
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles.watched import Watched
from torch import Tensor

import vlmopt
from vlmopt.errors import (
    ArtifactError,
    NoVisualTokensError,
    OptionError,
    PreconditionError,
    StreamFullError,
)
from vlmopt.passes.frames import novelty
from vlmopt.runtime.stream import StreamingModel, StreamSession

FAMILIES = ("llava", "qwen2_5_vl", "qwen3_vl", "internvl")


@functools.cache
def model(name: str = "llava") -> Any:
    return zoo.build(name, layers=2)


def chunk(name: str = "llava", seed: int = 0) -> dict[str, Tensor]:
    """A picture with a little text before and behind it."""
    return zoo.inputs(name, text=(2,), seed=seed)


@functools.cache
def streaming(
    name: str = "llava", passes: str = "", backend: str = "eager", **sizes: Any
) -> StreamingModel:
    sizes = {"chunks": 2, "text": 24, "block": 4} | sizes
    return StreamingModel(model(name), chunk(name), passes, backend=backend, **sizes)


def words(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(8, zoo.VOCAB, (1, count), generator=generator)


def ask(session: StreamSession, ids: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """The answer of three tokens, and the logits of each, ``[3, vocabulary]``."""
    found = session.generate(
        input_ids=ids,
        max_new_tokens=3,
        min_new_tokens=3,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **how,
    )
    return found.sequences[:, ids.shape[1] :], torch.cat(found.logits)


def expect(oracle: Watched, ids: Tensor, answer: Tensor, start: int) -> Tensor:
    """What the oracle says of each token of the answer; it remembers question and answer."""
    whole = torch.cat([ids, answer[:, :-1]], 1)
    return oracle.feed({"input_ids": whole}, start)[0, ids.shape[1] - 1 :]


def length(inputs: dict[str, Tensor]) -> int:
    return inputs["input_ids"].shape[1]


@pytest.mark.parametrize("name", FAMILIES)
def test_a_stream_is_what_the_untouched_model_sees(name: str) -> None:
    """Text, chunks, a question that is forgotten, one that is not, and chunks that drop out."""
    session, oracle = streaming(name).session(), Watched(model(name))
    session.append(input_ids=words(3, 1))
    oracle.feed({"input_ids": words(3, 1)}, 0)
    places, fed = [3], [3]  # where each chunk begins, by position and by number of token
    for seed in range(4):
        given = chunk(name, seed)
        session.append(**given)
        if seed >= 2:
            oracle.forget(fed[seed - 2], fed[seed - 2] + length(given))
        oracle.feed(given, places[-1])
        places.append(session.usage.position)
        ids = words(6, seed + 2)
        answer, logits = ask(session, ids, remember=seed == 1)
        torch.testing.assert_close(
            logits, expect(oracle, ids, answer, places[-1]), atol=1e-4, rtol=1e-4
        )
        total = len(oracle.visible)
        if seed == 1:  # what is remembered holds the last word too
            oracle.feed({"input_ids": answer[:, -1:]}, places[-1] + 8)
            places[-1] += 9
            total += 1
        else:
            oracle.forget(total - 8, total)
        assert session.usage.position == places[-1]
        fed.append(total)
    usage = session.usage
    assert (usage.seen, usage.chunks, usage.text) == (4, 2, 12)
    assert usage.tokens == (int(oracle.visible.sum()),) * 2


def test_inductor_computes_the_same() -> None:
    compiled, eager = (streaming(backend=backend).session() for backend in ("inductor", "eager"))
    for seed in range(3):
        compiled.append(**chunk(seed=seed))
        eager.append(**chunk(seed=seed))
    _, logits = ask(compiled, words(5, 0))
    torch.testing.assert_close(logits, ask(eager, words(5, 0))[1], atol=1e-5, rtol=1e-4)


@functools.cache
def pruned() -> StreamingModel:
    return streaming(passes="stc-pruner{keep=0.5 carry=true}")


def test_the_pruner_remembers_the_stream() -> None:
    """What a frame is compared with are all frames before, also those that are forgotten."""
    shown = zoo.visual(chunk())[0]
    memory = novelty.Memory.empty(model().config.text_config.hidden_size)

    def prune(embeds: Tensor) -> Tensor:
        nonlocal memory
        frame = embeds[:, shown]
        memory = novelty.remember(novelty.started(memory, frame), frame)
        kept = novelty.newest(frame, memory, frame.shape[1] // 2, strategy="gaussian")[0]
        stays = ~shown
        stays[shown.nonzero()[kept, 0]] = True
        return stays.nonzero()[:, 0]

    session, oracle = pruned().session(), Watched(model(), prune)
    start, each = 0, len(shown) - int(shown.sum()) // 2
    for seed in range(4):
        session.append(**chunk(seed=seed))
        if seed >= 2:
            oracle.forget((seed - 2) * each, (seed - 1) * each)
        oracle.feed(chunk(seed=seed), start, chunk=True)
        start += each
        assert session.usage.position == start
    answer, logits = ask(session, words(5, 9))
    torch.testing.assert_close(
        logits, expect(oracle, words(5, 9), answer, start), atol=1e-4, rtol=1e-4
    )


def pair(seed: int, again: bool = False) -> dict[str, Tensor]:
    """Two pictures with a little text before and behind them; the second may be the first again."""
    found = zoo.inputs("llava", text=(2,), images=(2,), seed=seed)
    if again:
        found["pixel_values"][1] = found["pixel_values"][0]
    return found


@functools.cache
def sampled() -> StreamingModel:
    passes = "evs{frames=2 keep=0.5 carry=true}"
    return StreamingModel(model(), pair(0), passes, backend="eager", chunks=2, text=24, block=4)


def test_what_changes_is_told_from_chunk_to_chunk() -> None:
    """Each frame is compared with the one before, whose chunk may be gone; positions are kept."""
    shown = zoo.visual(pair(0))[0]
    last: list[Tensor] = []

    def prune(embeds: Tensor) -> Tensor:
        frames = embeds[0, shown].unflatten(0, (2, -1)).double()
        change = []
        for frame in frames:
            alike = torch.cosine_similarity(frame, last[-1], dim=-1) if last else None
            change.append(torch.full((16,), 9.0) if alike is None else 1 - alike)
            last.append(frame)
        order = torch.cat(change).sort(descending=True, stable=True).indices[:16]
        stays = ~shown
        stays[shown.nonzero()[order, 0]] = True
        return stays.nonzero()[:, 0]

    session, oracle = sampled().session(), Watched(model(), prune, renumber=False)
    each, left = len(shown), len(shown) - 16
    for seed in range(4):
        session.append(**pair(seed))
        if seed >= 2:
            oracle.forget((seed - 2) * left, (seed - 1) * left)
        oracle.feed(pair(seed), seed * each, chunk=True)
    assert session.usage.position == 4 * each
    answer, logits = ask(session, words(5, 9))
    wanted = expect(oracle, words(5, 9), answer, 4 * each)
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


def test_a_clip_in_chunks_is_the_whole_clip() -> None:
    """Where each chunk has room for what changed in it: here one frame of two, every time."""
    chunks, ids = [pair(0, again=True), pair(3)], words(5, 9)
    session = sampled().session()
    for given in chunks:
        session.append(**given)
    answer, logits = ask(session, ids)
    whole = {
        "input_ids": torch.cat([*(given["input_ids"] for given in chunks), ids], 1),
        "pixel_values": torch.cat([given["pixel_values"] for given in chunks]),
    }
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    optimized = vlmopt.optimize(model(), whole, "evs{frames=4 keep=0.5}", backend="eager")
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    found = optimized.generate(**whole, **how, return_dict_in_generate=True, output_logits=True)
    assert found.sequences[0, -3:].equal(answer[0])
    torch.testing.assert_close(logits, torch.cat(found.logits), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "passes", ["v2drop{layers=1 keep=0.5}", "random-drop{layers=0,1 keep=0.5}", "visionzip{keep=4}"]
)
def test_token_passes_work_on_chunks(passes: str) -> None:
    """One chunk and a question are a prompt, which :func:`vlmopt.optimize` knows how to shorten."""
    ids = words(5, 3)
    given = chunk()
    whole = dict(given)
    whole["input_ids"] = torch.cat([given["input_ids"], ids], 1)
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    optimized = vlmopt.optimize(model(), whole, passes, backend="eager")
    how = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "output_logits": True}
    wanted = optimized.generate(**whole, **how, return_dict_in_generate=True)
    session = streaming(passes=passes).session()
    session.append(**given)
    answer, logits = ask(session, ids)
    torch.testing.assert_close(logits, torch.cat(wanted.logits), atol=1e-4, rtol=1e-4)
    assert answer.equal(wanted.sequences[:, -3:])


def test_what_did_not_change_is_reused() -> None:
    """Of a still picture, a stream that computes a fifth of the rows sees what one in full does."""
    still = chunk()
    full = streaming().session()
    lean = streaming(passes="stc-cacher{interval=9 ratio=0.2}").session()
    for _ in range(3):
        full.append(**still)
        lean.append(**still)
    assert lean.frames is not None and lean.frames.since == 2
    _, logits = ask(lean, words(5, 0))
    torch.testing.assert_close(logits, ask(full, words(5, 0))[1], atol=1e-4, rtol=1e-4)


def test_two_long_streams_never_mix(tmp_path: Path) -> None:
    """Each of 500 frames, in turn, saved and restored in the middle, with questions between."""
    pictures = [[chunk(seed=40 * which + seed) for seed in range(20)] for which in range(2)]
    model = streaming(passes="stc-cacher{interval=3} | stc-pruner{keep=0.5 carry=true}")
    alone = [model.session(), model.session()]
    for session, shown in zip(alone, pictures, strict=True):
        for frame in range(500):
            session.append(**shown[frame * frame % 20])
    mixed = [model.session(), model.session()]
    for frame in range(500):
        for session, shown in zip(mixed, pictures, strict=True):
            session.append(**shown[frame * frame % 20])
        if frame == 100:
            tensors, size = live_tensors(), mixed[0].usage.nbytes
        if frame % 50 == 20:
            ask(mixed[0], words(4, frame))  # which leaves no trace
        if frame == 250:
            for which, session in enumerate(mixed):
                session.save(tmp_path / f"{which}.safetensors")
                mixed[which] = model.session()
                mixed[which].restore(tmp_path / f"{which}.safetensors")
            del session
    assert (live_tensors(), mixed[0].usage.nbytes) == (tensors, size)
    for one, other in zip(alone, mixed, strict=True):
        assert one.usage == other.usage
        assert ask(one, words(5, 0))[1].equal(ask(other, words(5, 0))[1])


def live_tensors() -> int:
    gc.collect()
    return sum(isinstance(found, Tensor) for found in gc.get_objects())


def test_saved_in_the_middle(tmp_path: Path) -> None:
    model = streaming(passes="stc-cacher{interval=3} | stc-pruner{keep=0.5 carry=true}")
    first, second = model.session(), model.session()
    first.append(input_ids=words(2, 0))
    for seed in range(4):
        first.append(**chunk(seed=seed))
    first.save(tmp_path / "stream.safetensors")
    for seed in range(4, 7):
        first.append(**chunk(seed=seed))
    second.append(**chunk(seed=90))
    second.restore(tmp_path / "stream.safetensors")
    for seed in range(4, 7):
        second.append(**chunk(seed=seed))
    assert first.usage == second.usage
    assert ask(first, words(5, 0))[1].equal(ask(second, words(5, 0))[1])
    with pytest.raises(ArtifactError, match="exists already"):
        first.save(tmp_path / "stream.safetensors")
    with pytest.raises(ArtifactError, match="passes"):
        pruned().session().restore(tmp_path / "stream.safetensors")


def test_the_last_frame_is_saved(tmp_path: Path) -> None:
    first, second = sampled().session(), sampled().session()
    first.append(**pair(0))
    first.save(tmp_path / "stream.safetensors")
    second.append(**pair(90))
    second.restore(tmp_path / "stream.safetensors")
    for session in (first, second):
        session.append(**pair(1))
    assert ask(first, words(5, 0))[1].equal(ask(second, words(5, 0))[1])


def test_state_of_another_memory() -> None:
    session = streaming().session()
    session.append(**chunk())
    before = ask(session, words(5, 0))[1]
    with pytest.raises(ArtifactError, match="needs"):
        session.load_state_dict(streaming(chunks=3).session().state_dict())
    assert ask(session, words(5, 0))[1].equal(before)


def test_memory_stays_as_it_is() -> None:
    session = pruned().session()
    session.append(**chunk())
    where = {name: buffer.data_ptr() for name, buffer in session.memory.buffers.items()}
    size = session.usage.nbytes
    for seed in range(6):
        session.append(**chunk(seed=seed))
        ask(session, words(5, seed))
    assert {name: buffer.data_ptr() for name, buffer in session.memory.buffers.items()} == where
    assert session.usage.nbytes == size


def test_positions_run_out_and_keys_move() -> None:
    """Rotary positions are relative: a stream goes on when its last position is reached."""
    roomy, tight = StreamingModel.session(streaming()), StreamSession(near_the_end())
    for session in (roomy, tight):
        session.append(input_ids=words(3, 1))
        for seed in range(6):
            session.append(**chunk(seed=seed))
    assert tight.usage.position < roomy.usage.position
    _, logits = ask(tight, words(5, 0))
    # pinned text is nearer than it was, nothing else has moved against the rest
    for session in (roomy, tight):
        session.memory.forget_turn(0)
    torch.testing.assert_close(
        ask(tight, words(5, 0))[1], ask(roomy, words(5, 0))[1], atol=1e-4, rtol=1e-4
    )
    assert logits.isfinite().all()


def near_the_end() -> StreamingModel:
    """The same model, which knows positions for four chunks only."""
    made = StreamingModel(model(), chunk(), "", chunks=2, text=24, block=4, backend="eager")
    made.room = replace(made.room, positions=4 * length(chunk()))
    return made


def test_nothing_left_to_forget() -> None:
    session = streaming(evict="refuse").session()
    session.append(**chunk())
    session.append(**chunk())
    with pytest.raises(StreamFullError, match="2 chunks are remembered"):
        session.append(**chunk())
    with pytest.raises(StreamFullError, match="25 tokens of text do not fit"):
        session.append(input_ids=words(25, 0))
    ask(session, words(5, 0))  # it can still be asked


def test_old_text_is_forgotten_turn_by_turn() -> None:
    session = streaming().session()
    session.append(input_ids=words(10, 0))  # for ever
    session.append(**chunk())
    for seed in range(4):
        session.append(input_ids=words(7, seed))
    assert session.usage.text == 24
    session.append(input_ids=words(1, 8))
    assert session.usage.text == 18


def test_what_cannot_be_streamed() -> None:
    with pytest.raises(PreconditionError, match="sliding_attention"):
        StreamingModel(zoo.build("gemma3", layers=2), zoo.inputs("gemma3"), "", backend="eager")
    with pytest.raises(NoVisualTokensError, match="comes from vision"):
        StreamingModel(model(), {"input_ids": words(5, 0)}, "", backend="eager")
    with pytest.raises(PreconditionError, match="positions=keep"):
        StreamingModel(
            model(), chunk(), "v2drop{layers=1 keep=0.5 positions=renumber}", backend="eager"
        )
    with pytest.raises(OptionError, match="evict"):
        StreamingModel(model(), chunk(), "", evict="newest")
    session = streaming().session()
    with pytest.raises(PreconditionError, match="one sequence"):
        session.append(input_ids=words(5, 0).expand(2, -1))
    with pytest.raises(PreconditionError, match="a question is text"):
        session.generate(input_ids=chunk()["input_ids"])
    with pytest.raises(PreconditionError, match="chunks of"):
        session.append(**zoo.inputs("llava", text=(3,)))
    with pytest.raises(PreconditionError, match="within a session"):
        session.model.twin.generate(input_ids=words(5, 0))
    with pytest.raises(PreconditionError, match="without beams"):
        ask(session, words(5, 0), num_beams=2)
    assert session.usage.text == 0


def test_prompts_have_no_memory() -> None:
    """A pass that remembers from prompt to prompt is refused where nobody carries the state."""
    with pytest.raises(PreconditionError, match="StreamingModel"):
        vlmopt.optimize(model(), chunk(), "stc-pruner{carry=true}")
