"""What calibration finds out about a model, as files: written once, checked when read.

An artifact holds the name of the pass it is for, a fingerprint of the model it was made with, and
values that the pass understands. It is JSON; where there are tensors, a safetensors file with the
JSON in its header.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlmopt.errors import ArtifactError
from vlmopt.program import Program

SCHEMA = 1


def fingerprint(model_type: str, weights: Iterable[Tensor]) -> str:
    """Tells architectures apart: by type, shapes and dtypes of all weights, in hexadecimal.

    The values of the weights make no difference: what a calibration found out about a model serves
    its fine-tuned versions too. Capture records it, for any prompt and whatever passes do later.
    """
    seen = sorted({(tuple(weight.shape), str(weight.dtype)) for weight in weights})
    return hashlib.sha256(f"{model_type} {seen!r}".encode()).hexdigest()[:16]


def write(
    path: str | Path,
    name: str,
    program: Program,
    values: Mapping[str, Any],
    tensors: Mapping[str, Tensor] | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write an artifact for the pass ``name``.

    Raises:
        ArtifactError: see :func:`require_writable`.
    """
    path = Path(path)
    require_writable(path, tensors is not None, overwrite=overwrite)
    content = {
        "schema": SCHEMA,
        "pass": name,
        "model": program.metadata["fingerprint"],
        "model_type": program.model_type,
        **values,
    }
    if tensors is None:
        path.write_text(json.dumps(content, indent=1) + "\n")
    else:
        whole = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(whole, path, metadata={_HEADER: json.dumps(content)})


def require_writable(path: Path, with_tensors: bool, *, overwrite: bool) -> None:
    """Raise what :func:`write` would, before work is spent on what cannot be written.

    Raises:
        ArtifactError: the file exists, and ``overwrite`` is false; or it holds tensors, and its
            name does not end in ``.safetensors``, or the other way round.
    """
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} exists already", hint="choose another name, or overwrite it")
    if with_tensors != (path.suffix == _SUFFIX):
        kind = "tensors" if with_tensors else "no tensors"
        raise ArtifactError(
            f"this calibration makes {kind}, which {path.name} is no name for",
            hint=f"end the name in {_SUFFIX if with_tensors else '.json'}",
        )


_SUFFIX = ".safetensors"
_HEADER = "vlmopt"
"""Key of the JSON in the header of a safetensors file."""


def tensor(path: str | Path, name: str) -> Tensor:
    """A tensor of an artifact that :func:`read` accepted.

    Raises:
        ArtifactError: it holds none of this name.
    """
    with safe_open(path, "pt") as file:
        if name not in file.keys():  # noqa: SIM118 - no container of its keys
            raise ArtifactError(
                f"{path} holds no {name}", hint="calibrate with the options that the pass has now"
            )
        found: Tensor = file.get_tensor(name)
    return found


def _content(path: Path) -> str:
    if path.suffix != _SUFFIX:
        return path.read_text()
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get(_HEADER, "{}")


def read(
    path: str | Path, name: str, program: Program | None = None, *, again: str = ""
) -> dict[str, Any]:
    """The values of an artifact for the pass ``name``.

    Args:
        program: the program it is to be used on. Where there is none, or one that Dynamo has
            captured, no fingerprint is checked.
        again: how to make one, where that is not by calibration.

    Raises:
        ArtifactError: no such file, not an artifact, or one for another pass, version or model.
    """
    path = Path(path)
    again = again or f"make one: vlmopt calibrate MODEL -p {name} --data ... -o {path}"
    try:
        content = json.loads(_content(path))
    except OSError as error:
        raise ArtifactError(
            f"{path} cannot be read: {error.strerror or error}", hint=again
        ) from error
    except ValueError as error:
        raise ArtifactError(f"{path} is not JSON: {error}", hint=again) from error
    except SafetensorError as error:
        raise ArtifactError(f"{path} is no safetensors file: {error}", hint=again) from error
    if not isinstance(content, dict) or "schema" not in content:
        raise ArtifactError(f"{path} is not an artifact of a calibration", hint=again)
    if content["schema"] != SCHEMA:
        raise ArtifactError(
            f"{path} has schema {content['schema']}, this vlmopt reads {SCHEMA}", hint=again
        )
    if content.get("pass") != name:
        raise ArtifactError(f"{path} is for {content.get('pass')}, not for {name}", hint=again)
    known = program.metadata.get("fingerprint") if program is not None else None
    if program is not None and known is not None and content.get("model") != known:
        raise ArtifactError(
            f"{path} was made with another model ({content.get('model_type')}, fingerprint "
            f"{content.get('model')}; this is {program.model_type}, {known})",
            hint=again,
        )
    return content
