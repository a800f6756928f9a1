"""Models that watch video as it comes, and answer questions at any time.

A chunk of frames goes through the encoder, which may reuse what did not change, and through the
language model, whose keys and values join those of earlier chunks in buffers of fixed size. Text
goes the same way. Everything compiled is shared by all streams of a model; what a stream has seen
belongs to its session.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from vlmopt import artifacts, families
from vlmopt.encoding import named_tensors
from vlmopt.errors import (
    ArtifactError,
    NoVisualTokensError,
    OptionError,
    PreconditionError,
)
from vlmopt.pipeline.manager import Report, run_pipeline
from vlmopt.program import Modality, Program, Role, Stage
from vlmopt.rewrite.buffers import keep_in_buffers
from vlmopt.rewrite.reuse import REUSE
from vlmopt.rewrite.rotation import rotation_of
from vlmopt.runtime.buffered import BufferedStage
from vlmopt.runtime.encoder import Encoded, EncoderModules, EncoderStage
from vlmopt.runtime.model import (
    compile_stage,
    positions_for,
    require_backend,
    twin_of,
)
from vlmopt.runtime.stream_memory import EVICTIONS, Room, StreamMemory
from vlmopt.streaming import FrameEncoder
from vlmopt.tracing import capture, modality_of, submodules

PASSES = "stc-cacher | stc-pruner{carry=true}"


class StreamingModel:
    """A vision-language model, compiled to be fed chunks of frames; see :meth:`session`.

    What a stream remembers is bounded: the keys and values of the last ``chunks`` chunks, and of
    ``text`` tokens of text. When a chunk arrives and there is no room, the oldest one is forgotten;
    text is forgotten turn by turn, oldest first, but not what was written before the first chunk.

    Args:
        model: a Hugging Face vision-language model. It is not changed, and shares its weights.
        chunk: inputs of one chunk as its processor returns them: ``input_ids`` with the
            placeholders of the frames and whatever text stands around them in every chunk, and the
            pixels. Batch of one. All chunks have these shapes.
        passes: pipeline for chunks. Text runs on the model's own graph.
        chunks: how many chunks are remembered.
        text: how many tokens of text are remembered.
        block: tokens of text that run at once.
        evict: ``"oldest"``, or ``"refuse"`` to raise where something would be forgotten.
        cut: see :meth:`vlmopt.streaming.FrameEncoder.session`.
        backend: see :func:`vlmopt.optimize`.

    Attributes:
        program, report: of a chunk.

    Raises:
        OptionError: unknown backend or eviction, or a size below 1.
        PreconditionError: the model attends within windows, or a pass does what a stream cannot.
        VlmoptError: see :func:`vlmopt.capture` and :func:`vlmopt.run_pipeline`.
    """

    def __init__(
        self,
        model: nn.Module,
        chunk: Mapping[str, Any],
        passes: str = PASSES,
        *,
        chunks: int = 32,
        text: int = 256,
        block: int = 16,
        evict: str = "oldest",
        cut: float | None = None,
        backend: str = "inductor",
    ) -> None:
        require_backend(backend)
        if evict not in EVICTIONS:
            raise OptionError(f"evict is {evict!r}", hint=f"choose one of {', '.join(EVICTIONS)}")
        if min(chunks, text, block) < 1:
            raise OptionError("chunks, text and block are at least 1")
        self.model = cast("Any", model)
        self.passes = passes
        self.cut = cut
        self.visual = families.visual_token_ids(self.model.config)
        self._running = threading.local()
        self.program = capture(self.model, chunk)
        self.report: Report | None = run_pipeline(self.program, passes) if passes else None
        _require_streamable(self.model, self.program)
        stage = self.program["language_model"].clone()
        keys = stage.find_outputs(Role.KEY)
        self.kept = tuple(dict.fromkeys(port.kept for port in keys))
        """By group of layers that hold the same tokens of a chunk: the port that lists them."""
        groups = tuple(self.kept.index(port.kept) for port in keys)
        sizes = {port.kept: stage.output_node(port).meta["val"].shape[2] for port in keys}
        one, several = (self._capture_text(tokens) for tokens in (1, block))
        self.room = Room(
            chunks,
            text,
            block,
            groups,
            tuple(int(sizes[kept]) for kept in self.kept),
            getattr(self.model.config.get_text_config(), "max_position_embeddings", None),
            rotation_of(one),
            evict,
        )
        self.chunk, self.word, self.words = (
            _Watched(each, self.room, backend) for each in (stage, one, several)
        )
        reuses = any(REUSE in found.facts for found in self.program)
        self.frames = FrameEncoder(self.program, backend=backend) if reuses else None
        parts = submodules(self.model)
        self._modules = EncoderModules(parts["vision_encoder"], parts.get("projector"))
        self._encoder = EncoderStage(
            self.program,
            partial(compile_stage, backend=backend),
            self._encode_frames if reuses else None,
        )
        replaced = {
            self.model.get_decoder(): self._decoder_forward,
            self._modules.encoder: self._encoder_forward,
            self._modules.projector: self._projector_forward,
        }
        self.twin: Any = twin_of(model, self._forward, replaced)

    def session(self) -> StreamSession:
        """A new stream, which shares nothing with others but what is compiled, and the weights."""
        return StreamSession(self)

    def _capture_text(self, tokens: int) -> Stage:
        config = self.model.config.get_text_config()
        ends = (config.eos_token_id, config.pad_token_id, config.bos_token_id)
        special = {*self.visual, *(i for n in ends for i in (n if isinstance(n, list) else [n]))}
        word = next(number for number in itertools.count() if number not in special)
        ids = torch.full((1, tokens), word, device=self.model.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        return capture(self.model, inputs)["language_model"]

    # what the twin runs in place of the model's own

    def read(self, session: StreamSession, inputs: Mapping[str, Any]) -> None:
        """Let a session take a chunk, or text."""
        modality = modality_of(inputs["input_ids"], inputs.get("attention_mask"), self.visual)
        if not bool((modality == Modality.VISION).any()):
            self._run(session, None, dict(inputs))
            return
        tokens = self.chunk.stage.facts["tokens"]
        if modality.shape[1] != tokens:
            raise PreconditionError(
                f"the model was compiled for chunks of {tokens} tokens, and this has "
                f"{modality.shape[1]}",
                hint="give chunks with as many frames, of the same size, and the same text",
            )
        session.memory.require_room()
        self._run(session, modality, dict(inputs))

    def _run(self, session: StreamSession, modality: Tensor | None, inputs: dict[str, Any]) -> Any:
        self._running.turn = _Turn(session, modality)
        try:
            with torch.no_grad():
                return type(self.model).forward(self.twin, **inputs, logits_to_keep=1)
        finally:
            self._running.turn = None

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """What ``generate()`` calls: a question, then each token of the answer."""
        cache = kwargs.pop("past_key_values", None)
        ids = args[0] if args else kwargs.pop("input_ids")
        if not isinstance(cache, _Answer):
            raise PreconditionError(
                "a streaming model generates within a session", hint="session.generate(...)"
            )
        if ids.shape[0] != 1:
            raise PreconditionError(
                f"a stream is one sequence, and {ids.shape[0]} were asked for",
                hint="generate without beams, and one sequence at a time",
            )
        cache.seen += ids.shape[1]
        result = self._run(cache.session, None, {"input_ids": ids, "return_dict": True})
        result.past_key_values = cache
        return result

    def _encoder_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        turn: _Turn = self._running.turn
        return self._modules.encode(self._encoder, turn, original, args, kwargs, {})

    def _projector_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        turn: _Turn = self._running.turn
        return self._modules.project(self._encoder, turn, original, args, kwargs)

    def _encode_frames(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        turn: _Turn = self._running.turn
        assert turn.session.frames is not None
        return dict(turn.session.frames.encode(**values).outputs)

    def _decoder_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        turn: _Turn = self._running.turn
        values: dict[str, Any] = dict(named_tensors(kwargs))
        if turn.modality is None:
            hidden = turn.session.take_text(values)
        else:
            values["modality"] = turn.modality
            values |= turn.tokens(self._encoder, turn.modality)
            hidden = turn.session.take_chunk(values)
        return MoeModelOutputWithPast(last_hidden_state=hidden)


@dataclass
class _Turn(Encoded):
    """What runs through the model at present: a chunk, or text, which has no modality."""

    session: StreamSession
    modality: Tensor | None


class _Answer(DynamicCache):
    """Stands for a session while ``generate()`` runs: it counts the tokens of that call alone."""

    def __init__(self, session: StreamSession) -> None:
        super().__init__()
        self.session = session
        self.seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen


class _Watched(BufferedStage):
    """A prefill stage on buffers, compiled.

    Attributes:
        result: the output that the decoder hands on.
    """

    def __init__(self, stage: Stage, room: Room, backend: str) -> None:
        keep_in_buffers(stage, room.groups, room.capacities)
        super().__init__(stage, backend)
        handed_on = (Role.HIDDEN_STATES, Role.LOGITS)
        self.result = next(port.name for port in stage.outputs if port.role in handed_on)


@dataclass(frozen=True)
class StreamUsage:
    """What a stream has seen and what of it is remembered.

    Attributes:
        nbytes: of all that it remembers; it never grows.
        seen: chunks.
        chunks: of those, how many are remembered.
        text: tokens of text that are remembered.
        tokens: by layer, how many tokens it attends to.
        position: of the next token.
    """

    nbytes: int
    seen: int
    chunks: int
    text: int
    tokens: tuple[int, ...]
    position: int


class StreamSession:
    """One stream: what a model remembers of it, in buffers that stay where they are.

    Args:
        model: the compiled model; or what :class:`StreamingModel` takes, with ``args`` and
            ``kwargs``, to compile one for this session.
    """

    def __init__(self, model: StreamingModel | nn.Module, *args: Any, **kwargs: Any) -> None:
        self.model = (
            model if isinstance(model, StreamingModel) else StreamingModel(model, *args, **kwargs)
        )
        self.frames = None
        if self.model.frames is not None:
            self.frames = self.model.frames.session(cut=self.model.cut)
        self.memory = StreamMemory(self.model.chunk.stage, self.model.room)

    @property
    def usage(self) -> StreamUsage:
        """What it has seen, and what of it is remembered."""
        memory = self.memory
        return StreamUsage(
            memory.nbytes + (self.frames.nbytes if self.frames else 0),
            memory.seen,
            memory.chunks,
            memory.text,
            memory.tokens,
            memory.position,
        )

    def append(self, **inputs: Tensor) -> None:
        """Watch the next chunk of frames, or read text.

        Args:
            inputs: as the processor returns them.

        Raises:
            PreconditionError: other shapes than those captured, or a batch.
            StreamFullError: there is no room, and nothing that may be forgotten.
        """
        self._begin(inputs, lasting=not self.memory.seen)
        self.model.read(self, inputs)

    def generate(self, *, remember: bool = False, **inputs: Any) -> Any:
        """Answer a question about what was seen; as ``generate()`` of the model.

        Args:
            remember: question and answer stay in memory, as text does; else they are forgotten.
            inputs: ``input_ids`` of the question, and arguments of ``generate``.

        Returns:
            What ``generate`` returns: ids of the question and the answer.

        Raises:
            PreconditionError: a batch, or frames in the question.
            StreamFullError: question and answer are longer than what may be remembered of text.
        """
        ids = inputs["input_ids"]
        if any(bool((ids == token).any()) for token in self.model.visual):
            raise PreconditionError("a question is text", hint="append the frames first")
        self._begin(inputs)
        inputs.pop("attention_mask", None)
        cache = _Answer(self)
        try:
            result = self.model.twin.generate(**inputs, past_key_values=cache, use_cache=True)
            sequence = result if isinstance(result, Tensor) else result.sequences
            if remember:  # what was generated last has been through no layer yet
                self.model.read(self, {"input_ids": sequence[:, cache.seen :]})
        except BaseException:
            self.memory.forget_turn(self.memory.turn)
            raise
        if not remember:
            self.memory.forget_turn(self.memory.turn)
        return result

    def state_dict(self) -> dict[str, Tensor]:
        """All that the stream remembers, as tensors that do not change any more."""
        state = self.memory.state_dict()
        if self.frames is not None:
            frames = self.frames.state_dict()
            state |= {f"{_FRAMES}{name}": value for name, value in frames.items()}
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a session stood when it gave this; see :meth:`state_dict`.

        Raises:
            ArtifactError: it is of another model, pipeline or memory; nothing is changed then.
        """
        self.memory.require_fits(state)
        if self.frames is not None:
            own = {name: value for name, value in state.items() if name.startswith(_FRAMES)}
            self.frames.load_state_dict({n.removeprefix(_FRAMES): v for n, v in own.items()})
        self.memory.load_state_dict(state)

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write :meth:`state_dict` as a safetensors file.

        Raises:
            ArtifactError: the file exists, or its name does not end in ``.safetensors``.
        """
        values = {"passes": self.model.passes}
        program = self.model.program
        artifacts.write(path, _STREAM, program, values, self.state_dict(), overwrite=overwrite)

    def restore(self, path: str | Path) -> None:
        """Go on where a session stood when it was saved.

        Raises:
            ArtifactError: no such file, or one of another model, pipeline or memory.
        """
        again = "save a session of this model: session.save(...)"
        found = artifacts.read(path, _STREAM, self.model.program, again=again)
        if found.get("passes") != self.model.passes:
            raise ArtifactError(
                f"{path} is of a stream through {found.get('passes')}, and this model runs "
                f"{self.model.passes}",
                hint="make the StreamingModel with the same passes",
            )
        self.load_state_dict({name: artifacts.tensor(path, name) for name in self.state_dict()})

    # what the language model does with a chunk, and with text

    def take_chunk(self, values: dict[str, Any]) -> Tensor:
        """Hidden states of a chunk, whose keys and values join the buffers."""
        run, modality = self.model.chunk, values["modality"]
        positions = positions_for(run.stage, values.get("position_ids"), modality)
        taken = _positions_taken(run.stage, positions)
        place = self.memory.place_chunk(taken)
        values.setdefault("attention_mask", torch.ones_like(modality))
        given = {**values, "position_ids": positions + place.start, **place.slots}
        results = run(given | self.memory.buffers)
        there = {
            group: results[kept][0] >= 0
            for group, kept in enumerate(self.model.kept)
            if kept is not None
        }
        self.memory.keep_chunk(place, taken, there)
        return results[run.result]

    def take_text(self, values: dict[str, Any]) -> Tensor:
        """Hidden states of text, whose keys and values join the buffers."""
        length = values["inputs_embeds"].shape[1]
        self.memory.make_room_for_text(length)
        hidden = []
        start = 0
        while start < length:
            one = length - start == 1
            run, size = (self.model.word, 1) if one else (self.model.words, self.model.room.block)
            hidden.append(self._take_block(run, values, start, min(size, length - start), size))
            start += size
        return torch.cat(hidden, 1)

    def _take_block(
        self, run: _Watched, values: dict[str, Any], start: int, real: int, size: int
    ) -> Tensor:
        """``real`` tokens from ``start`` on, with fillers behind that nobody will see."""
        embeds = values["inputs_embeds"]
        device, length = embeds.device, embeds.shape[1]
        given = {
            name: _block(value, start, real, size)
            for name, value in values.items()
            if value.ndim > 1 and value.shape[1] == length
        }
        place = self.memory.place_text(real, size)
        positions = torch.arange(place.start, place.start + size, device=device)
        given |= {
            "position_ids": positions.expand(run.positions),
            "attention_mask": torch.ones(1, size, dtype=torch.int64, device=device),
            "modality": torch.full((1, size), Modality.TEXT, device=device),
        }
        results = run({**given, **place.slots, **self.memory.buffers})
        self.memory.keep_text(place)
        return results[run.result][:, :real]

    def _begin(self, inputs: Mapping[str, Tensor], *, lasting: bool = False) -> None:
        """A turn of the stream: text of turn 0 stays for ever."""
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        if ids.ndim != 2 or ids.shape[0] != 1 or (mask is not None and not bool(mask.all())):
            raise PreconditionError(
                f"a stream is one sequence without padding, and input_ids are {list(ids.shape)}",
                hint="one session per stream, and no padding",
            )
        self.memory.begin_turn(lasting=lasting)


_STREAM = "stream"
"""What a saved session says that it is."""

_FRAMES = "frames."
"""Prefix of what the encoder remembers, in the state of a session."""


def _block(value: Tensor, start: int, real: int, size: int) -> Tensor:
    """``real`` tokens of ``[1, tokens, ...]`` from ``start`` on, and zeros up to ``size``."""
    part = value[:, start : start + real]
    return torch.cat([part, part.new_zeros(1, size - real, *part.shape[2:])], 1)


def _positions_taken(stage: Stage, positions: Tensor) -> int:
    """How many positions a chunk takes, whose first is 0."""
    cut = stage.cuts[0] if stage.cuts else None
    return cut.tokens[1] if cut is not None and cut.renumbered else int(positions.max()) + 1


def _require_streamable(model: Any, program: Program) -> None:
    """A model and a rewritten chunk that a stream can be made of."""
    stage = program["language_model"]
    if not any(stage.facts.get("visual_tokens", ())):
        raise NoVisualTokensError(
            "no token of the chunk comes from vision",
            hint="give input_ids with the placeholders of the frames, and the pixels",
        )
    if "vision_encoder" not in program:
        raise PreconditionError(
            f"{program.model_type} has no vision encoder", hint="choose a vision-language model"
        )
    if stage.facts["batch"] != 1 or any(stage.facts["padding_tokens"]):
        raise PreconditionError(
            "a chunk is one sequence without padding", hint="one session per stream"
        )
    kinds = families.attention_kinds(model.config.get_text_config())
    if kinds:
        raise PreconditionError(
            f"layers of {program.model_type} attend by {', '.join(kinds)}: which tokens they see "
            "depends on how far away those are, and a stream forgets and moves tokens",
            hint="choose a model whose layers attend to everything before",
        )
    for cut in stage.cuts:
        if cut.renumbered and cut.layer > 0:
            raise PreconditionError(
                f"{cut.made_by} numbers tokens anew from layer {cut.layer} on: text that follows "
                "would need other positions in each layer",
                hint="set its option positions=keep",
            )
