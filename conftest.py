"""Guards and settings for the whole test suite."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

from hypothesis import settings


class _NoSecondCopies:
    """``passes`` and ``lowering`` lie in the working directory, but are ``vlmopt.passes`` and
    ``vlmopt.lowering``: a second copy of every class would break ``isinstance``."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name in ("passes", "lowering"):
            raise ModuleNotFoundError(f"import vlmopt.{name}, not {name}")
        return None


sys.meta_path.insert(0, _NoSecondCopies())  # type: ignore[arg-type]
settings.register_profile("vlmopt", derandomize=True, deadline=None)
settings.load_profile("vlmopt")
