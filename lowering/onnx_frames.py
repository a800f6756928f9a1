"""Streams of frames in ONNX Runtime: the two files of an encoder that reuses rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmopt.errors import ArtifactError, PreconditionError
from vlmopt.lowering.onnx import MANIFEST, SCHEMA, OnnxStage
from vlmopt.program import Port, Role
from vlmopt.rewrite.reuse import REUSE, STATE
from vlmopt.streaming import OTHER_FRAMES, FrameStages


class OnnxFrameEncoder(FrameStages):
    """The two stages of an exported encoder, on the CPU; its sessions are those of PyTorch.

    A session's state may come from a session of the program that was exported, and go back there.

    Args:
        folder: what an export of the program has written, both stages among it.

    Raises:
        ArtifactError: there is no such export there, or none of an encoder for streams.
        LoweringError: ONNX Runtime cannot load it.
    """

    def __init__(self, folder: Path | str) -> None:
        folder = Path(folder)
        stages = _read_manifest(folder)["stages"]
        facts = next((stage[REUSE] for stage in stages.values() if REUSE in stage), None)
        if facts is None:
            raise ArtifactError(
                f"{folder} holds no encoder that reuses frames, only {', '.join(stages)}",
                hint="run 'stc-cacher' on the program before it is exported",
            )
        missing = [name for name in facts["stages"] if name not in stages]
        if missing:
            raise ArtifactError(
                f"{folder} holds {', '.join(stages)}, and a stream needs {', '.join(missing)} too",
                hint="export all stages",
            )
        self._first, self._second = (stages[name] for name in facts["stages"])
        self._state = [port for port in self._second["inputs"] if Role(port["role"]) in STATE]
        ports = (Port(port["name"], Role(port["role"]), port["layer"]) for port in self._state)
        super().__init__(facts["interval"], facts["rows"], tuple(ports))
        self._run = OnnxStage(folder / self._first["file"])
        self._run_selective = OnnxStage(folder / self._second["file"])

    def empty_state(self) -> list[Tensor]:
        return [torch.zeros(port["shape"], dtype=_dtype(port)) for port in self._state]

    def _encode_in_full(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return self._run(**self._given(values))

    def _encode_changes(
        self, values: Mapping[str, Tensor], state: list[Tensor]
    ) -> dict[str, Tensor]:
        names = (port.name for port in self.state)
        return self._run_selective(**self._given(values), **dict(zip(names, state, strict=True)))

    def _given(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of the first stage.

        Raises:
            PreconditionError: other shapes or types than those exported.
        """
        for port in self._first["inputs"]:
            found = values.get(port["name"])
            is_same = found is not None and found.dtype == _dtype(port)
            if found is None or not is_same or list(found.shape) != port["shape"]:
                raise PreconditionError(
                    f"the encoder was exported with {port['name']} {port['shape']} of "
                    f"{port['dtype']}, and is called with "
                    f"{None if found is None else f'{list(found.shape)} of {found.dtype}'}",
                    hint=OTHER_FRAMES,
                )
        return {port["name"]: values[port["name"]] for port in self._first["inputs"]}


def _dtype(port: Mapping[str, Any]) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, port["dtype"])
    return dtype


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} has no {MANIFEST}", hint="export the program first")
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ArtifactError(
            f"{path} is not what an export writes: {error}", hint="export the program again"
        ) from error
    if found.get("schema") != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {found.get('schema')}, and this vlmopt reads {SCHEMA}",
            hint="export the program again",
        )
    return found
