"""What calibration finds out about a model, as JSON files: written once, checked when read.

An artifact holds the name of the pass it is for, a fingerprint of the model it was made with, and
values that the pass understands.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vlmopt.errors import ArtifactError
from vlmopt.program import Program

SCHEMA = 1


def fingerprint(program: Program) -> str:
    """Tells architectures apart: type, names, shapes and dtypes of all weights, in hexadecimal.

    Prompts and passes make no difference, nor do the values of the weights: what a calibration
    found out about a model serves its fine-tuned versions too.
    """
    digest = hashlib.sha256(program.model_type.encode())
    seen = sorted({(tuple(w.shape), str(w.dtype)) for w in program.named_weights().values()})
    digest.update(repr(seen).encode())
    return digest.hexdigest()[:16]


def write(
    path: str | Path,
    name: str,
    program: Program,
    values: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write an artifact for the pass ``name``.

    Raises:
        ArtifactError: the file exists, and ``overwrite`` is false.
    """
    path = Path(path)
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} exists already", hint="choose another name, or overwrite it")
    content = {
        "schema": SCHEMA,
        "pass": name,
        "model": fingerprint(program),
        "model_type": program.model_type,
        **values,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")


def read(path: str | Path, name: str, program: Program | None = None) -> dict[str, Any]:
    """The values of an artifact for the pass ``name``.

    Args:
        program: the program it is to be used on; ``None``, or one without weights, checks no
            fingerprint.

    Raises:
        ArtifactError: no such file, not an artifact, or one for another pass, version or model.
    """
    path = Path(path)
    again = f"make one: vlmopt calibrate MODEL -p {name} --data ... -o {path}"
    try:
        content = json.loads(path.read_text())
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}", hint=again
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}", hint=again) from error
    if not isinstance(content, dict) or "schema" not in content:
        raise ArtifactError(f"{path} is not an artifact of a calibration", hint=again)
    if content["schema"] != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {content['schema']}, this vlmopt reads {SCHEMA}", hint=again
        )
    if content.get("pass") != name:
        raise ArtifactError(f"{path} is for {content.get('pass')}, not for {name}", hint=again)
    known = program is not None and program.named_weights()  # a graph of Dynamo's has none
    if program is not None and known and content.get("model") != fingerprint(program):
        raise ArtifactError(
            f"{path} was made with another model ({content.get('model_type')}, fingerprint "
            f"{content.get('model')}; this is {program.model_type}, {fingerprint(program)})",
            hint=again,
        )
    return content
