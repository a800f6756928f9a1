"""Keys and values of a sequence whose end is a draft: rows of buffers that are held, and free ones.

A draft is written into free rows, and those of the path that is accepted stay. No row moves: where
in a buffer a token lies makes no difference to attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from vlmopt.errors import PreconditionError, StreamFullError
from vlmopt.program import Role, Stage
from vlmopt.runtime.buffered import BufferedStage, empty_state
from vlmopt.speculative.block import Block


class DraftCache:
    """What a model has seen of one sequence; a batch holds branches of it, such as guidance.

    Branches differ in what they begin with, and in its length: it is padded on the left to one.
    Stages for blocks of other sizes may use a cache in turn, if their buffers have as many rows.

    Args:
        stage: one of those that will use it; see :func:`~vlmopt.rewrite.drafted.drafted_stage`.

    Attributes:
        length: tokens seen and kept, padding among them.
    """

    def __init__(self, stage: Stage) -> None:
        self._state = empty_state(stage)
        visible = stage.placeholder(stage.find_inputs(Role.VISIBLE)[0]).meta["val"]
        batch, _, _, capacity = visible.shape
        self._device = visible.device
        self._kept: list[int] = []  # rows, in the order of their tokens
        self._free = list(range(capacity))
        # rows that blocks have written since the last commit, and where their tokens stand
        self._open: list[int] = []
        self._offsets: list[int] = []
        self._mask = np.zeros((0, 0), dtype=bool)  # of the last block
        # on the host, where what becomes of a draft is decided anyway
        self._seen = np.zeros((batch, capacity, 1), dtype=bool)
        # of the token behind the last one that is kept; apart on every branch
        self._position = np.zeros((batch, 1), dtype=np.int64)

    @property
    def length(self) -> int:
        return len(self._kept)

    def load(
        self, past: Sequence[tuple[Tensor, Tensor]], present: Tensor, position: Tensor
    ) -> None:
        """Begin with what another stage, or the model itself, has seen.

        Args:
            past: keys and values of each layer, ``[batch, heads, tokens, width]``.
            present: bool ``[batch, tokens]``, ``False`` for padding.
            position: int64 ``[batch]``, of the next token.

        Raises:
            PreconditionError: the cache holds something, or fewer rows than there are tokens.
        """
        tokens = present.shape[1]
        if self._kept or tokens > len(self._free):
            raise PreconditionError(
                f"{tokens} tokens cannot be put into {len(self._free)} free rows, behind "
                f"{len(self._kept)} that are held",
                hint="begin a new sequence, with larger buffers",
            )
        rows = slice(0, tokens)
        for layer, (key, value) in enumerate(past):
            self._state[f"past_key_{layer}"][:, :, rows] = key
            self._state[f"past_value_{layer}"][:, :, rows] = value
        self._seen[:, rows, 0] = present.cpu().numpy()
        self._kept, self._free = self._free[:tokens], self._free[tokens:]
        self._position[:, 0] = position.cpu().numpy()

    def run(
        self,
        stage: BufferedStage,
        tokens: Mapping[str, Tensor],
        block: Block,
        present: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """All outputs of a stage for a block, by name; :meth:`commit` says what of it stays.

        Args:
            stage: the model, for so many places.
            tokens: ``input_ids`` or ``inputs_embeds``, and others, ``[batch, places, ...]``.
            block: its mask has columns for the blocks that were read since the last commit, too.
            present: bool ``[batch, size]``; ``False`` for padding, which no one sees.

        Raises:
            StreamFullError: the buffers hold fewer free rows.
        """
        places = len(block.mask)
        if len(self._free) < places:
            raise StreamFullError(
                f"a block of {places} tokens needs as many free rows of the buffers, and of "
                f"{self._seen.shape[1]} rows {len(self._kept) + len(self._open)} are taken",
                hint="larger buffers, or a shorter sequence",
            )
        rows = self._free[:places]
        own = rows[: block.size]
        # rows first: they are copied whole
        visible = self._seen.repeat(places, axis=2)
        visible[:, self._open + rows] = block.mask.numpy().T
        position = self._position
        if present is not None:
            there = present.cpu().numpy()
            visible[:, own] &= there[:, :, None]
            visible[:, own, range(block.size)] = True  # itself, or there is nothing
            position = position - (~there).sum(1, keepdims=True)
        places_of = np.maximum(position + block.offsets.numpy(), 0)
        found = torch.from_numpy(places_of).to(self._device).expand(stage.positions)
        slots = torch.tensor(rows, device=self._device)
        shown = torch.from_numpy(visible.transpose(0, 2, 1)[:, None].copy()).to(self._device)
        state = {"slots_0": slots, "visible_0": shown, stage.position_ids: found}
        given = {name: value.to(self._device) for name, value in tokens.items()}
        results = stage({**given, **self._state, **state})
        self._mask = block.mask[: block.size].numpy()
        self._open += own
        self._offsets += block.offsets[: block.size].tolist()
        # rows of fillers are written, and free
        self._free = self._free[block.size :]
        return results

    def commit(self, nodes: Sequence[int], present: Tensor | None = None) -> None:
        """Keep some of the tokens read since the last time; the others' rows are free again.

        Args:
            nodes: of the tokens of the blocks, in the order of their places; a path that begins
                behind the last token that is kept, or none.
            present: as for :meth:`run`, of those tokens.

        Raises:
            PreconditionError: the tokens do not stand one behind the other.
        """
        if not self._is_path(nodes):
            raise PreconditionError(
                f"tokens {list(nodes)} of what was read last do not follow one another",
                hint="pass the nodes of what was accepted, root first",
            )
        rows = [self._open[node] for node in nodes]
        if present is None:
            self._seen[:, rows] = True
            self._position += len(rows)
        else:
            there = present.cpu().numpy()
            self._seen[:, rows, 0] = there
            self._position += there.sum(1, keepdims=True)
        self._kept += rows
        self._free = sorted({*self._free, *self._open} - {*rows})
        self._open, self._offsets = [], []

    def _is_path(self, nodes: Sequence[int]) -> bool:
        if not nodes:
            return True
        last = nodes[-1] - len(self._open) + len(self._mask)
        return (
            0 <= last < len(self._mask)
            and [self._offsets[node] for node in nodes] == list(range(len(nodes)))
            and bool(self._mask[last, list(nodes)].all())
        )

    def tensors(self, role: Role) -> list[Tensor]:
        """Keys or values, ``[batch, heads, length, width]`` of each layer, in order of position."""
        prefix = f"past_{role}_"
        found = {
            int(name.removeprefix(prefix)): buffer
            for name, buffer in self._state.items()
            if name.startswith(prefix)
        }
        return [found[layer][:, :, self._kept] for layer in sorted(found)]
