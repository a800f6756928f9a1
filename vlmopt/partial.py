"""What an interrupted calibration has done so far, so that the next one goes on from there."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from vlmopt.errors import ArtifactError

SAVE_EVERY = 16
"""Samples between two savings of tensors, which may be large."""


class PartialRows:
    """Rows, one JSON line each after a line that says whose: each is safe as soon as it is added.

    Args:
        options: of the pass that is calibrated.

    Raises:
        ArtifactError: the file is of another calibration.
    """

    def __init__(self, path: Path, options: str) -> None:
        self.path = path
        self.rows: list[Any] = []
        if not path.exists():
            path.write_text(json.dumps({"options": options}) + "\n")
            return
        lines = path.read_text().splitlines()
        if not lines or json.loads(lines[0]) != {"options": options}:
            raise _other(path)
        self.rows = [json.loads(line) for line in lines[1:]]

    def add(self, row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


class PartialState:
    """Rows and the tensors that they led to, saved together every :data:`SAVE_EVERY` samples.

    Args:
        options: of the pass that is calibrated.
        state: the tensors as they are now.

    Attributes:
        tensors: those that were saved; none when it begins anew.

    Raises:
        ArtifactError: the file is of another calibration.
    """

    def __init__(self, path: Path, options: str, state: Callable[[], Mapping[str, Tensor]]) -> None:
        self.path = path
        self.rows: list[Any] = []
        self.tensors: dict[str, Tensor] = {}
        self._options, self._state = options, state
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            saved = file.metadata()
        if saved["options"] != options:
            raise _other(path)
        self.rows = json.loads(saved["rows"])
        self.tensors = load_file(path)

    def add(self, row: Any) -> None:
        self.rows.append(row)
        if len(self.rows) % SAVE_EVERY:
            return
        # written whole or not at all
        unfinished = self.path.with_name(self.path.name + ".tmp")
        header = {"options": self._options, "rows": json.dumps(self.rows)}
        tensors = {name: value.cpu().contiguous() for name, value in self._state().items()}
        save_file(tensors, unfinished, metadata=header)
        unfinished.replace(self.path)

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)


def _other(path: Path) -> ArtifactError:
    return ArtifactError(
        f"{path} is what is left of another calibration", hint="delete it to start anew"
    )
