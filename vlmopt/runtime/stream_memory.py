"""What a stream remembers, in buffers that stay where they are, and what it forgets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import ArtifactError, StreamFullError
from vlmopt.program import Stage
from vlmopt.rewrite.rotation import Rotation
from vlmopt.runtime.buffered import empty_state

EVICTIONS = ("oldest", "refuse")


@dataclass(frozen=True)
class Room:
    """How much each stream of a model may remember, and where it lies.

    The buffers of a group of layers hold chunks first, then text; room for a block of text more,
    whose fillers need rows to be written to.

    Attributes:
        chunks, text, block: how many chunks, how many tokens of text, and how many of them run at
            once.
        groups: of each layer; layers of a group hold the same tokens of a chunk.
        tokens: by group, of a chunk.
        positions: that the model knows, ``None`` for any number.
        rotation: moves keys to other positions, where that can be done.
        evict: one of :data:`EVICTIONS`.
    """

    chunks: int
    text: int
    block: int
    groups: tuple[int, ...]
    tokens: tuple[int, ...]
    positions: int | None
    rotation: Rotation | None
    evict: str

    @property
    def capacities(self) -> tuple[int, ...]:
        """Rows of the buffers, by group."""
        return tuple(self.chunks * size + self.text + self.block for size in self.tokens)


@dataclass(frozen=True)
class Place:
    """Where tokens go.

    Attributes:
        start: position of the first.
        rows: numbers of the chunk, or of the tokens of text.
        slots: int64 by name of the stage's input, rows of the buffers.
    """

    start: int
    rows: Tensor
    slots: Mapping[str, Tensor]


class StreamMemory:
    """Keys and values of one stream, and whatever passes remember.

    Args:
        stage: a prefill stage on buffers, whose inputs tell their sizes.

    Attributes:
        buffers: by name of the stages' inputs.
        seen: chunks.
        turn: number of the text that is being written; text of turn 0 is never forgotten.
    """

    def __init__(self, stage: Stage, room: Room) -> None:
        self.room = room
        self.buffers = empty_state(stage)
        self.device = stage.placeholder(stage.inputs[0]).meta["val"].device
        self.seen = self.turn = self._turns_begun = 0
        # first position of each chunk, and the one behind it; place and turn of each token of text
        self._spans = torch.full((room.chunks, 2), -1)
        self._places = torch.full((room.text + room.block,), -1)
        self._turns = torch.full_like(self._places, -1)

    @property
    def nbytes(self) -> int:
        """Of all buffers; it never grows."""
        return sum(buffer.nbytes for buffer in self.buffers.values())

    @property
    def chunks(self) -> int:
        """How many are remembered."""
        return int((self._spans[:, 0] >= 0).sum())

    @property
    def text(self) -> int:
        """How many tokens of text are remembered."""
        return int((self._turns >= 0).sum())

    @property
    def tokens(self) -> tuple[int, ...]:
        """By layer, how many tokens are remembered."""
        filled = [int(self._filled(group).sum()) for group in range(len(self.room.tokens))]
        return tuple(filled[group] for group in self.room.groups)

    @property
    def position(self) -> int:
        """Of the next token."""
        return self._behind(self._spans)

    def begin_turn(self, *, lasting: bool = False) -> None:
        """What is written from now on is forgotten together, or never."""
        self._turns_begun += not lasting
        self.turn = 0 if lasting else self._turns_begun

    # chunks -----------------------------------------------------------------------------------

    def require_room(self) -> None:
        """Check that a chunk may come.

        Raises:
            StreamFullError: one would have to be forgotten, and none may.
        """
        if self.seen >= self.room.chunks and self.room.evict == "refuse":
            raise StreamFullError(
                f"{self.room.chunks} chunks are remembered, and none may be forgotten",
                hint="a larger chunks, or evict='oldest'",
            )

    def place_chunk(self, positions: int) -> Place:
        """Where a chunk goes that takes so many positions; the oldest is forgotten if need be.

        Raises:
            StreamFullError: there are not as many positions; nothing has changed then.
        """
        ring = self.seen % self.room.chunks
        start = self._start(positions, instead_of=ring)
        self._spans[ring] = -1
        slots = {}
        for group, size in enumerate(self.room.tokens):
            self._filled(group)[ring * size : (ring + 1) * size] = False
            rows = torch.arange(ring * size, (ring + 1) * size, device=self.device)
            slots[f"slots_{group}"] = rows
        return Place(start, torch.tensor([ring]), slots)

    def keep_chunk(self, place: Place, positions: int, there: Mapping[int, Tensor]) -> None:
        """A chunk has been written.

        Args:
            there: by group, which of its rows hold tokens, where not all do.
        """
        ring = int(place.rows)
        for group, size in enumerate(self.room.tokens):
            found = there.get(group, True)
            self._filled(group)[ring * size : (ring + 1) * size] = found
        self._spans[ring] = torch.tensor([place.start, place.start + positions])
        self.seen += 1

    # text -------------------------------------------------------------------------------------

    def make_room_for_text(self, tokens: int) -> None:
        """Forget text, turn by turn, until so many tokens more fit.

        Raises:
            StreamFullError: they do not, whatever is forgotten; nothing is then.
        """
        old = self._turns[(self._turns > 0) & (self._turns != self.turn)]
        free = len(old) if self.room.evict == "oldest" else 0
        if self.text - free + tokens > self.room.text:
            raise StreamFullError(
                f"{tokens} tokens of text do not fit: {self.room.text} may be remembered, and "
                f"{self.text} are",
                hint="a larger text, or shorter questions",
            )
        for turn in sorted(set(old.tolist())):
            if self.text + tokens <= self.room.text:
                break
            self.forget_turn(turn)

    def place_text(self, tokens: int, size: int) -> Place:
        """Where ``tokens`` of text go, in a block of ``size``; see :meth:`make_room_for_text`.

        Raises:
            StreamFullError: there are not as many positions.
        """
        start = self._start(tokens)
        free = (self._turns < 0).nonzero()[:size, 0]
        slots = {
            f"slots_{group}": (free + self.room.chunks * each).to(self.device)
            for group, each in enumerate(self.room.tokens)
        }
        return Place(start, free[:tokens], slots)

    def keep_text(self, place: Place) -> None:
        """Text has been written."""
        self._turns[place.rows] = self.turn
        self._places[place.rows] = torch.arange(place.start, place.start + len(place.rows))
        self._mark(place.rows, True)

    def forget_turn(self, turn: int) -> None:
        """Forget the text of a turn."""
        (rows,) = (self._turns == turn).nonzero(as_tuple=True)
        self._turns[rows] = -1
        self._places[rows] = -1
        self._mark(rows, False)

    # positions --------------------------------------------------------------------------------

    def _behind(self, spans: Tensor) -> int:
        return max(int(spans[:, 1].max()), int(self._places.max()) + 1, 0)

    def _start(self, positions: int, *, instead_of: int | None = None) -> int:
        """The next position, where as many are left; cached keys move to lower ones if need be.

        Args:
            instead_of: the chunk that will be forgotten.
        """
        spans = self._spans.clone()
        if instead_of is not None:
            spans[instead_of] = -1
        start, limit, rotation = self._behind(spans), self.room.positions, self.room.rotation
        if limit is None or start + positions <= limit:
            return start
        # close the gap between what stays for ever and the rest
        lasting = int(torch.where(self._turns == 0, self._places, -1).max()) + 1
        present = [*spans[spans[:, 0] >= 0, 0], *self._places[self._turns > 0]]
        back = int(min(present)) - lasting if present else 0
        if start - back + positions > limit or rotation is None:
            why = "" if rotation is not None else ", and its keys cannot be moved to lower ones"
            raise StreamFullError(
                f"the model knows {limit} positions{why}; the next tokens would take "
                f"{start - back} to {start - back + positions - 1}",
                hint="remember fewer chunks and less text",
            )
        self._move(rotation, back)
        return start - back

    def _move(self, rotation: Rotation, back: int) -> None:
        """Move everything but lasting text ``back`` positions."""
        lasting = (self._turns == 0).nonzero()[:, 0]
        for layer, group in enumerate(self.room.groups):
            keys = self.buffers[f"past_key_{layer}"]
            stay = (lasting + self.room.chunks * self.room.tokens[group]).to(self.device)
            saved = keys[:, :, stay]
            keys.copy_(rotation(keys, -back))
            keys[:, :, stay] = saved
        self._spans[self._spans[:, 0] >= 0] -= back
        self._places[self._turns > 0] -= back

    def _filled(self, group: int) -> Tensor:
        return self.buffers[f"filled_{group}"]

    def _mark(self, rows: Tensor, there: bool) -> None:
        for group, size in enumerate(self.room.tokens):
            self._filled(group)[(rows + self.room.chunks * size).to(self.device)] = there

    # saved and restored -----------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """All of it, as tensors that do not change any more."""
        books = {name.removeprefix("_"): torch.as_tensor(getattr(self, name)) for name in _BOOKS}
        return {name: value.clone() for name, value in (self.buffers | books).items()}

    def require_fits(self, state: Mapping[str, Tensor]) -> None:
        """Check that a state is of a memory like this.

        Raises:
            ArtifactError: it is of another model, pipeline or room.
        """
        for name, wanted in self.state_dict().items():
            found = state.get(name)
            if found is None or found.shape != wanted.shape or found.dtype != wanted.dtype:
                raise ArtifactError(
                    f"the state holds {name} {None if found is None else list(found.shape)}, and "
                    f"this session needs {list(wanted.shape)} of {wanted.dtype}",
                    hint="load the state of a session of the same model, pipeline and memory",
                )

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take what :meth:`state_dict` of another gave; see :meth:`require_fits`."""
        self.require_fits(state)
        for name, buffer in self.buffers.items():
            buffer.copy_(state[name])
        for name in _BOOKS:
            value = state[name.removeprefix("_")]
            setattr(self, name, int(value) if value.ndim == 0 else value.clone().cpu())


_BOOKS = ("seen", "turn", "_turns_begun", "_spans", "_places", "_turns")
"""What a memory knows of its buffers."""
