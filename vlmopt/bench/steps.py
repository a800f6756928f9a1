"""Progress on stderr: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


class Steps:
    """Tells which of several steps is being done; a context manager.

    Args:
        total: number of steps.
        quiet: tell nothing.
    """

    def __init__(self, total: int, *, quiet: bool = False) -> None:
        self.total = total
        self.done = 0
        self._quiet = quiet
        console = Console(stderr=True)
        self._live: Progress | None = None
        if console.is_terminal and not quiet:
            # redrawn seldom: what is measured meanwhile shares the processor with it
            self._live = Progress(
                SpinnerColumn(),
                BarColumn(bar_width=20),
                TextColumn("{task.description}"),
                TimeElapsedColumn(),
                console=console,
                redirect_stdout=False,  # results must reach a pipe
                redirect_stderr=False,
                refresh_per_second=2,
                transient=True,
            )
            self._task = self._live.add_task("", total=total)

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._live is not None:
            self._live.stop()

    def step(self, text: str) -> None:
        """The next step begins."""
        self.done += 1
        line = f"[{self.done}/{self.total}] {text}"
        if self._live is not None:
            self._live.update(self._task, description=line, completed=self.done - 1)
        elif not self._quiet:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def print(self, text: str) -> None:
        """Write a result to stdout, clear of the live line."""
        if self._live is not None:
            self._live.stop()
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
        if self._live is not None:
            self._live.start()

    def detail(self, text: str) -> None:
        """What the present step is at; on a terminal only."""
        if self._live is not None:
            self._live.update(self._task, description=f"[{self.done}/{self.total}] {text}")
