"""Programs on disk. Not available yet: says so instead of writing half a program."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from vlmopt.errors import ArtifactError


def load(directory: str | Path) -> NoReturn:
    """Refuses.

    Raises:
        ArtifactError: always.
    """
    raise ArtifactError(
        f"{directory}: this version cannot read program folders",
        hint="name the Python factory instead: vlmopt diff pkg.mod:factory -p PIPELINE",
    )


def save(directory: str | Path) -> NoReturn:
    """Refuses.

    Raises:
        ArtifactError: always.
    """
    raise ArtifactError(
        f"{directory}: this version cannot write program folders",
        hint="leave out -o; or export ONNX: vlmopt export pkg.mod:factory -p PIPELINE -o DIR",
    )
