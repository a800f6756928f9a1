"""Output folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vlmopt.errors import VlmoptError


@contextmanager
def new_folder(
    out: Path, *, marker: str, overwrite: bool, error: type[VlmoptError]
) -> Iterator[Path]:
    """A temporary folder to fill, which becomes ``out`` when the block ends without an error.

    Args:
        marker: name of the file by which a folder of this kind is known; nothing else is ever
            overwritten.
        overwrite: replace such a folder that exists.
        error: what to raise.

    Raises:
        VlmoptError: of class ``error``: ``out`` exists and must not be replaced, or cannot be
            written.
    """
    _require_free(out, marker, overwrite, error)
    folder = None
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
        yield folder
        folder.chmod(0o777 & ~_umask())  # temporary folders are private, the result is not
        _move(folder, out)
    except OSError as reason:
        raise error(
            f"{out} cannot be written: {reason}", hint="choose another folder, or make room"
        ) from reason
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _require_free(out: Path, marker: str, overwrite: bool, error: type[VlmoptError]) -> None:
    if not out.exists() and not out.is_symlink():
        return
    if not overwrite:
        raise error(f"{out} exists", hint="choose another folder, or overwrite=True (--force)")
    replaceable = out.is_dir() and not out.is_symlink()
    if not replaceable or (any(out.iterdir()) and not (out / marker).is_file()):
        raise error(
            f"{out} is not replaced: it is no folder with a {marker} in it",
            hint="remove it, or choose another folder",
        )


def _move(folder: Path, out: Path) -> None:
    """Put the finished ``folder`` at ``out``; what was there is removed only once it is."""
    if not out.exists():
        folder.replace(out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    out.replace(old / out.name)
    try:
        folder.replace(out)
    except OSError:
        (old / out.name).replace(out)
        raise
    finally:
        if out.exists():
            shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
