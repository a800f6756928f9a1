"""Where a measurement was made: no figure is worth anything without it."""

from __future__ import annotations

import datetime as dt
import platform
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vlmopt


@dataclass(frozen=True)
class Environment:
    """Machine, software and day.

    Attributes:
        device: model name of the CPU or GPU.
        threads: CPU threads that torch uses.
        date: of the run, UTC, ISO 8601.
    """

    device: str
    threads: int
    torch: str
    transformers: str
    vlmopt: str
    date: str

    @classmethod
    def here(cls, device: str = "cpu") -> Environment:
        """Of this process, now."""
        return cls(
            device=torch.cuda.get_device_name() if device.startswith("cuda") else cpu_name(),
            threads=torch.get_num_threads(),
            torch=torch.__version__,
            transformers=metadata.version("transformers"),
            vlmopt=vlmopt.__version__,
            date=dt.datetime.now(dt.UTC).date().isoformat(),
        )

    def text(self) -> str:
        """One line."""
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        return f"{self.device}, {threads}, torch {self.torch}, {self.date}"

    def to_json(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)


def cpu_name() -> str:
    """Model name of the processor, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        if names:
            return names[0]
    return platform.processor() or platform.machine()
