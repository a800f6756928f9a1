"""Streams of frames through an encoder that reuses what did not change.

A pass such as ``stc-cacher`` makes two stages of an encoder; :class:`FrameEncoder` compiles both,
and its sessions, one per stream, say which of them a frame goes through and hold what the stream
has to remember. Arithmetic: "Accelerating Streaming Video Large Language Models via Hierarchical
Token Compression", arXiv 2512.00891; the rule for scene cuts is not in it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmopt.errors import ArtifactError, PreconditionError
from vlmopt.program import Port, Program, Role
from vlmopt.rewrite.reuse import CHANGED, REUSE, STATE
from vlmopt.runtime.encoder import inputs_of
from vlmopt.runtime.model import compile_stage, require_backend


@dataclass(frozen=True)
class EncodedFrames:
    """A chunk of frames, encoded.

    Attributes:
        outputs: of the encoder, by name.
        reference: the chunk was computed in full, and its last frame is remembered.
        similarity: float32 ``[frames]``, how much each frame resembles the reference frame;
            ``None`` where none was looked at.
        changed: int64 ``[frames]``, how many rows of each frame differ from the reference frame;
            ``None`` where nobody counts.
    """

    outputs: dict[str, Tensor]
    reference: bool
    similarity: Tensor | None = None
    changed: Tensor | None = None

    def misses(self, rows: int) -> bool:
        """Whether more rows changed than were computed, where none may be left out."""
        return self.changed is not None and int(self.changed.max()) > rows


class FrameStages(ABC):
    """The two stages of an encoder, whatever runs them; see :meth:`session`.

    Attributes:
        interval: chunks from one computed in full to the next.
        rows: of a frame, computed in the others.
        state: what a stream remembers, outputs of the first stage and inputs of the second.
    """

    def __init__(self, interval: int, rows: int, state: tuple[Port, ...]) -> None:
        self.interval = interval
        self.rows = rows
        self.state = state

    def session(self, *, cut: float | None = None) -> FrameSession:
        """A new stream, which shares nothing with others but the weights.

        Args:
            cut: frames less similar than this to the reference frame are computed in full.
        """
        return FrameSession(self, cut)

    def encode_in_full(
        self, values: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[Tensor]]:
        """Outputs of the encoder by name, and its state in the order of :attr:`state`."""
        named = self._encode_in_full(values)
        return named, [named.pop(port.name) for port in self.state]

    def encode_changes(self, values: Mapping[str, Tensor], state: list[Tensor]) -> EncodedFrames:
        """A chunk of which some rows are taken from the state."""
        named = self._encode_changes(values, state)
        similarity = named.pop(Role.FRAME_SIMILARITY.value)
        return EncodedFrames(named, False, similarity, named.pop(CHANGED, None))

    @abstractmethod
    def empty_state(self) -> list[Tensor]:
        """Zeros in the place of :attr:`state`, of its shapes and types."""

    @abstractmethod
    def _encode_in_full(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs of the first stage by name, from its inputs by name."""

    @abstractmethod
    def _encode_changes(
        self, values: Mapping[str, Tensor], state: list[Tensor]
    ) -> dict[str, Tensor]:
        """Likewise of the second."""


OTHER_FRAMES = "give as many frames at once as the program was captured with, of the same size"
"""What to try where inputs have other shapes."""


class FrameEncoder(FrameStages):
    """The two stages of an encoder, compiled; see :meth:`session`.

    Args:
        program: on which a pass has run that reuses frames.
        backend: see :func:`vlmopt.optimize`.

    Raises:
        OptionError: unknown backend.
        PreconditionError: no pass has made an encoder for streams.
    """

    def __init__(self, program: Program, *, backend: str = "inductor") -> None:
        require_backend(backend)
        facts = next((stage.facts[REUSE] for stage in program if REUSE in stage.facts), None)
        if facts is None:
            raise PreconditionError(
                f"this {program.model_type} program has no encoder that reuses frames",
                hint="run a pass first: vlmopt.run_pipeline(program, 'stc-cacher')",
            )
        self.stage, self.selective = (program[name] for name in facts["stages"])
        state = tuple(port for port in self.selective.inputs if port.role in STATE)
        super().__init__(facts["interval"], facts["rows"], state)
        self._run = compile_stage(self.stage, backend)
        self._run_selective = compile_stage(self.selective, backend)

    def empty_state(self) -> list[Tensor]:
        return [self.selective.zeros(port) for port in self.state]

    def _encode_in_full(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        given = inputs_of(self.stage, values, "encoder", hint=OTHER_FRAMES)
        with torch.no_grad():
            results = self._run(*given)
        return {p.name: r for p, r in zip(self.stage.outputs, results, strict=True)}

    def _encode_changes(
        self, values: Mapping[str, Tensor], state: list[Tensor]
    ) -> dict[str, Tensor]:
        given = inputs_of(self.stage, values, "encoder", hint=OTHER_FRAMES)
        with torch.no_grad():
            results = self._run_selective(*given, *state)
        return {p.name: r for p, r in zip(self.selective.outputs, results, strict=True)}


class FrameSession:
    """One stream: what it remembers of its reference frame, in buffers that stay where they are.

    Attributes:
        since: chunks since the reference frame, ``None`` before the first.
    """

    def __init__(self, encoder: FrameStages, cut: float | None) -> None:
        self.encoder = encoder
        self.cut = cut
        self.since: int | None = None
        self._state = encoder.empty_state()

    @property
    def nbytes(self) -> int:
        """Memory of the state; it never grows."""
        return sum(tensor.nbytes for tensor in self._state)

    def encode(self, **values: Tensor) -> EncodedFrames:
        """Encode the next chunk of frames.

        Args:
            values: the encoder's inputs, by the names of its ports.

        Raises:
            PreconditionError: other shapes than those captured.
        """
        tried = EncodedFrames({}, True)
        if self.since is not None and self.since + 1 < self.encoder.interval:
            tried = self.encoder.encode_changes(values, self._state)
            if not self._is_cut(tried) and not tried.misses(self.encoder.rows):
                self.since += 1
                return tried
        outputs, state = self.encoder.encode_in_full(values)
        for buffer, value in zip(self._state, state, strict=True):
            buffer.copy_(value)
        self.since = 0
        return replace(tried, outputs=outputs, reference=True)

    def _is_cut(self, found: EncodedFrames) -> bool:
        assert found.similarity is not None
        return self.cut is not None and float(found.similarity.min()) < self.cut

    def state_dict(self) -> dict[str, Tensor]:
        """All that the stream remembers, as tensors that do not change any more."""
        names = (port.name for port in self.encoder.state)
        state = {name: value.clone() for name, value in zip(names, self._state, strict=True)}
        return state | {"since": torch.tensor(-1 if self.since is None else self.since)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Go on where a session stood when it gave this; see :meth:`state_dict`.

        Raises:
            ArtifactError: it is of another encoder.
        """
        wanted = {
            port.name: value for port, value in zip(self.encoder.state, self._state, strict=True)
        }
        for name, buffer in wanted.items():
            found = state.get(name)
            if found is None or found.shape != buffer.shape or found.dtype != buffer.dtype:
                raise ArtifactError(
                    f"the state of a session holds {name} "
                    f"{None if found is None else list(found.shape)}, and this encoder needs "
                    f"{list(buffer.shape)} of {buffer.dtype}",
                    hint="load the state of a session of the same program",
                )
        since = int(state["since"]) if "since" in state else -1
        for name, buffer in wanted.items():
            buffer.copy_(state[name])
        self.since = None if since < 0 else since
