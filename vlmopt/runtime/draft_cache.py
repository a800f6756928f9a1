"""Keys and values of a target model: rows of buffers that a sequence holds, and rows that are free.

A draft is written into free rows, and those of the path that is accepted stay. No row moves: where
in a buffer a token lies makes no difference to attention.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError, StreamFullError
from vlmopt.program import Role, Stage
from vlmopt.runtime.buffered import BufferedStage, empty_state
from vlmopt.speculative.block import Block


class DraftCache:
    """What a target has seen of one sequence; a batch holds branches of it, such as guidance.

    Stages for blocks of other sizes may use it in turn, if their buffers have as many rows.

    Args:
        stage: one of those that will use it; see :func:`~vlmopt.rewrite.drafted.verify_stage`.

    Attributes:
        length: tokens seen and kept.
    """

    def __init__(self, stage: Stage) -> None:
        self._state = empty_state(stage)
        self._filled = self._state["filled_0"]
        # position of the token in each row, -1 where it is free
        self._places = torch.full(self._filled.shape, -1)
        self._written: Tensor | None = None
        self._offsets = torch.empty(0, dtype=torch.int64)
        self.length = 0

    def read(self, stage: BufferedStage, tokens: Mapping[str, Tensor], block: Block) -> Tensor:
        """Hidden states of a block, ``[batch, places, width]``; :meth:`commit` says what stays.

        Args:
            stage: the target, for so many places.
            tokens: ``input_ids`` or ``inputs_embeds``, ``[batch, places, ...]``.

        Raises:
            StreamFullError: the buffers hold fewer free rows.
        """
        results = self.run(stage, tokens, block)
        (port,) = stage.stage.find_outputs(Role.HIDDEN_STATES)
        return results[port.name]

    def run(
        self, stage: BufferedStage, tokens: Mapping[str, Tensor], block: Block
    ) -> dict[str, Tensor]:
        """All outputs of the stage by name; see :meth:`read`."""
        places = len(block.mask)
        free = (self._places < 0).nonzero()[:places, 0]
        if len(free) < places:
            raise StreamFullError(
                f"a block of {places} tokens needs as many free rows of the buffers, and of "
                f"{len(self._places)} rows {self.length} are taken",
                hint="larger buffers, or a shorter sequence",
            )
        (port,) = stage.stage.find_inputs(Role.POSITION_IDS)
        val = stage.stage.placeholder(port).meta["val"]
        device = self._filled.device
        given = {
            **tokens,
            **self._state,
            "slots_0": free.to(device),
            "tree_mask": block.mask.to(device),
            port.name: (block.offsets + self.length).to(device).expand(val.shape),
        }
        results = stage(given)
        self._written, self._offsets = free, block.offsets.cpu()
        return results

    def commit(self, block: Block, nodes: Tensor) -> None:
        """Keep the tokens that waited, and a path of the draft; the others' rows are free again.

        Args:
            block: what was read last.
            nodes: int64 ``[kept]``, nodes of its tree from the root down; see
                :class:`~vlmopt.speculative.acceptance.Accepted`.

        Raises:
            PreconditionError: no block was read since the last time, or the nodes are no path that
                begins at the root.
        """
        if self._written is None:
            raise PreconditionError("there is no block to keep tokens of", hint="read one first")
        kept = torch.cat([torch.arange(block.pending), nodes.cpu() + block.pending])
        if not self._offsets[kept].equal(torch.arange(len(kept))) or not bool(
            block.mask.cpu()[kept[-1], kept].all()
        ):
            raise PreconditionError(
                f"nodes {nodes.tolist()} are no path from the root of the draft",
                hint="pass the nodes of what was accepted",
            )
        rows = self._written[kept]
        self._places[rows] = torch.arange(len(kept)) + self.length
        self._filled[rows.to(self._filled.device)] = True
        self.length += len(kept)
        self._written = None

    def tensors(self, role: Role) -> list[Tensor]:
        """Keys or values, ``[batch, heads, length, width]`` of each layer, in order of position."""
        rows = self._places.argsort(stable=True)[len(self._places) - self.length :]
        prefix = f"past_{role}_"
        found = {
            int(name.removeprefix(prefix)): b
            for name, b in self._state.items()
            if name.startswith(prefix)
        }
        return [found[layer][:, :, rows.to(self._filled.device)] for layer in sorted(found)]
