"""Stages that keep keys and values in buffers, compiled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmopt.program import Port, Role, Stage
from vlmopt.runtime.model import arguments_of, compile_stage

STATE = (Role.KEY, Role.VALUE, Role.STREAM_MEMORY)
"""What such stages change in place."""


class BufferedStage:
    """A stage on buffers, compiled: what it remembers is written where it was read.

    Args:
        stage: see :func:`~vlmopt.rewrite.buffers.keep_in_buffers`.
        backend: see :func:`vlmopt.optimize`.

    Attributes:
        position_ids: name of the input that takes positions.
        positions: its shape.
    """

    def __init__(self, stage: Stage, backend: str) -> None:
        self.stage = stage
        (positions,) = stage.find_inputs(Role.POSITION_IDS)
        self.position_ids = positions.name
        self.positions = tuple(stage.placeholder(positions).meta["val"].shape)
        read = {_remembered(port): port.name for port in stage.inputs}
        writes = {
            at: read[_remembered(port)]
            for at, port in enumerate(stage.outputs)
            if port.role in STATE
        }
        self._run = compile_stage(stage, backend, writes=writes)
        self._names = [port.name for port in stage.outputs if port.role not in STATE]

    def __call__(self, values: Mapping[str, Any]) -> dict[str, Tensor]:
        """The outputs by name, but for the state; of the inputs, that is changed in place."""
        with torch.no_grad():
            results = self._run(*arguments_of(self.stage, values))
        return dict(zip(self._names, results, strict=True))


def empty_state(stage: Stage) -> dict[str, Tensor]:
    """The inputs that a stage remembers things in, by name: zeros, and no row filled."""
    remembered = (*STATE, Role.FILLED)
    return {port.name: stage.zeros(port) for port in stage.inputs if port.role in remembered}


def _remembered(port: Port) -> tuple[Role, int | str]:
    return port.role, port.name if port.layer is None else port.layer
