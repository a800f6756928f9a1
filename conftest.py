"""What holds for the whole test suite: no second copies, no surprises from outside."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

import torch
from hypothesis import settings


class _NoSecondCopies(MetaPathFinder):
    """Refuses ``import passes`` and ``import lowering``.

    Both folders lie in the root, on ``sys.path``, but are ``vlmopt.passes`` and
    ``vlmopt.lowering``: under another name every class would exist twice, and ``isinstance`` fail.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in ("passes", "lowering"):
            raise ModuleNotFoundError(f"import vlmopt.{fullname}, not {fullname}", name=fullname)
        return None


sys.meta_path.insert(0, _NoSecondCopies())

# the reader's own settings would change what the tests see, and no test may download anything
for _name in ("VLMOPT_VERIFY", "VLMOPT_DISABLE", "VLMOPT_DEBUG_DIR", "VLMOPT_PRINT"):
    os.environ.pop(_name, None)
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# pytest-xdist: as many threads in all as there are cores
_workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
torch.set_num_threads(max(1, torch.get_num_threads() // _workers))

# the same examples in every run; pytest --hypothesis-profile=explore looks further
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("explore", max_examples=1000, deadline=None, print_blob=True)
settings.load_profile("repeatable")
