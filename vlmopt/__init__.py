"""vlmopt: a compiler for efficient vision-language models."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlmopt.annotation import annotate
    from vlmopt.denoising.session import DenoiseSession
    from vlmopt.exporting import export
    from vlmopt.pipeline.manager import run_pipeline
    from vlmopt.program import Program, Role
    from vlmopt.runtime.model import optimize
    from vlmopt.runtime.stream import StreamingModel, StreamSession
    from vlmopt.speculative.session import SpeculativeSession
    from vlmopt.storage import load
    from vlmopt.tracing import capture

__version__ = "0.1.0"

_WHERE = {
    "DenoiseSession": "vlmopt.denoising.session",
    "Program": "vlmopt.program",
    "Role": "vlmopt.program",
    "SpeculativeSession": "vlmopt.speculative.session",
    "StreamSession": "vlmopt.runtime.stream",
    "StreamingModel": "vlmopt.runtime.stream",
    "annotate": "vlmopt.annotation",
    "capture": "vlmopt.tracing",
    "export": "vlmopt.exporting",
    "load": "vlmopt.storage",
    "optimize": "vlmopt.runtime.model",
    "run_pipeline": "vlmopt.pipeline.manager",
}

__all__ = [
    "DenoiseSession",
    "Program",
    "Role",
    "SpeculativeSession",
    "StreamSession",
    "StreamingModel",
    "annotate",
    "capture",
    "export",
    "load",
    "optimize",
    "run_pipeline",
]


def __getattr__(name: str) -> Any:
    """Public names on first use: ``import vlmopt`` alone loads no torch."""
    if name not in _WHERE:
        raise AttributeError(f"module 'vlmopt' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)
