"""What all commands share: their common options, where text goes, colours, exit codes."""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmopt import errors

if TYPE_CHECKING:
    from rich.text import Text


class ExitCode(IntEnum):
    """Exit codes of the command."""

    DONE = 0
    FOUND = 1
    USAGE = 2
    FAILED = 3
    UNREADABLE = 4
    MISMATCH = 5
    INTERRUPTED = 130


_CODES: tuple[tuple[type[errors.VlmoptError], ExitCode], ...] = (
    (errors.PipelineSyntaxError, ExitCode.USAGE),
    (errors.UnknownPassError, ExitCode.USAGE),
    (errors.OptionError, ExitCode.USAGE),
    (errors.CaptureError, ExitCode.UNREADABLE),
    (errors.ArtifactError, ExitCode.UNREADABLE),
    (errors.VerifyError, ExitCode.FOUND),
)


def exit_code_of(error: errors.VlmoptError) -> ExitCode:
    """The exit code that tells a script what kind of error it was."""
    return next((code for kind, code in _CODES if isinstance(error, kind)), ExitCode.FAILED)


@dataclass(frozen=True)
class Output:
    """Where and how a command writes.

    Attributes:
        format: ``text`` or ``json``.
        path: file (or folder, for commands that write programs) named by ``-o``.
        force: existing files may be overwritten.
        color: ``auto``, ``always`` or ``never``.
        quiet: no progress on stderr; ``verbose``: tracebacks of errors, and all warnings.
    """

    format: str = "text"
    path: Path | None = None
    force: bool = False
    color: str = "auto"
    quiet: bool = False
    verbose: bool = False

    def emit(self, text: str, document: Mapping[str, Any], *, signed: bool = False) -> None:
        """Write a result: the text, or the JSON document.

        Args:
            signed: lines start with signs (``+ - ~ !``) and may be coloured by them.
        """
        if self.format == "json":
            text, signed = json.dumps(document, indent=2), False
        if self.path is not None:
            try:
                self.reserve().write_text(text + "\n", encoding="utf-8")
            except OSError as reason:
                raise errors.ArtifactError(f"{self.path} cannot be written: {reason}") from reason
            self.progress(f"wrote {self.path}")
        else:
            self.print(text, document, signed=signed)

    def print(self, text: str, document: Mapping[str, Any], *, signed: bool = False) -> None:
        """As :meth:`emit`, but to stdout whatever ``-o`` says."""
        if self.format == "json":
            print(json.dumps(document, indent=2))
        elif signed and self.in_color:
            _print_colored(text)
        else:
            print(text)

    def print_lines(self, lines: Sequence[Text], document: Mapping[str, Any]) -> None:
        """As :meth:`print`, of text that has its own colours."""
        if self.format == "json" or not self.in_color:
            self.print("\n".join(line.plain for line in lines), document)
            return
        from rich.console import Console

        console = Console(force_terminal=True, soft_wrap=True, highlight=False)
        for line in lines:
            console.print(line)

    def progress(self, text: str) -> None:
        """Say what is going on, on stderr, unless ``-q`` was given."""
        if not self.quiet:
            print(text, file=sys.stderr)

    @contextmanager
    def bar(self, *phases: str) -> Iterator[Callable[[int, int | None], None]]:
        """Progress bars on stderr, moved by calls with what is done and the total, if known.

        Args:
            phases: what is counted; the next phase begins with another total.
        """
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), disable=self.quiet) as progress:
            remaining = list(phases)
            tasks: dict[int | None, Any] = {}

            def move(done: int, total: int | None) -> None:
                if total not in tasks:
                    name = remaining.pop(0) if len(remaining) > 1 else remaining[0]
                    tasks[total] = progress.add_task(name, total=total)
                progress.update(tasks[total], completed=done)

            yield move

    def reserve(self) -> Path:
        """The path of ``-o``, once it is sure that nothing is overwritten against the user's will.

        Raises:
            click.UsageError: something is there and ``--force`` was not given, or there is no -o.
        """
        if self.path is None:
            raise click.UsageError("say where to write: -o PATH")
        if self.path.exists() and not self.force:
            raise click.UsageError(f"{self.path} exists; --force overwrites it")
        return self.path

    @property
    def in_color(self) -> bool:
        """Colours on a terminal only; ``NO_COLOR`` wins over everything but ``--color always``."""
        if self.color != "auto":
            return self.color == "always"
        return sys.stdout.isatty() and not os.environ.get("NO_COLOR")


_STYLES = {
    "+": "green",
    "-": "red",
    "~": "yellow",
    "!": "yellow",
    "@": "bold",
    " ": "dim",
    "=": "dim",
}


def _print_colored(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(force_terminal=True, soft_wrap=True, highlight=False)
    for line in text.split("\n"):
        is_hunk = line[:2] in ("+ ", "- ", "~ ", "! ", "@@", "= ") or line.startswith("  %")
        console.print(Text(line, style=_STYLES[line[0]] if is_hunk else ""))


def reader_left() -> ExitCode:
    """Ending a pipe early (``| head``) is no error: the reader has seen enough."""
    # keep the interpreter from flushing the rest into the closed pipe at exit
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return ExitCode.DONE


def command(group: click.Group, *, examples: str, writes: str = "FILE") -> Callable[..., Any]:
    """Register a command with the options that all of them have.

    The function gets an :class:`Output` first. A :class:`~vlmopt.errors.VlmoptError` becomes a
    message on stderr and an exit code.

    Args:
        examples: shown at the end of ``--help``.
        writes: what ``-o`` names.
    """

    def register(function: Callable[..., Any]) -> click.Command:
        @functools.wraps(function)
        def run(
            output_format: str,
            output_path: Path | None,
            force: bool,
            color: str,
            quiet: bool,
            verbose: bool,
            **options: Any,
        ) -> ExitCode:
            out = Output(output_format, output_path, force, color, quiet, verbose)
            try:
                with warnings.catch_warnings():
                    if not verbose:
                        warnings.simplefilter("ignore")
                    code = function(out, **options) or ExitCode.DONE
                sys.stdout.flush()
                return code
            except BrokenPipeError:  # caught here, since click would exit with 1
                return reader_left()
            except errors.VlmoptError as error:
                if verbose:
                    traceback.print_exception(error)
                else:
                    print(f"error: {error}", file=sys.stderr)
                return exit_code_of(error)

        decorated: Any = run
        for option in reversed(_common_options(writes)):
            decorated = option(decorated)
        epilog = "\b\nExamples:\n" + "\n".join(f"  {line}" for line in examples.splitlines())
        name = function.__name__.rstrip("_")
        return group.command(
            name, epilog=epilog, context_settings={"help_option_names": ["-h", "--help"]}
        )(decorated)

    return register


def _common_options(writes: str) -> list[Callable[..., Any]]:
    return [
        click.option(
            "--format",
            "output_format",
            type=click.Choice(["text", "json"]),
            default="text",
            show_default=True,
            help="Text for people, JSON for scripts.",
        ),
        click.option(
            "-o",
            "output_path",
            type=click.Path(path_type=Path),
            metavar=writes,
            help=f"Write to this {'folder' if writes == 'DIR' else 'file'}.",
        ),
        click.option("--force", is_flag=True, help="Overwrite what -o names."),
        click.option(
            "--color",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            show_default=True,
            help="Colours; auto is on a terminal, unless NO_COLOR is set.",
        ),
        click.option("-q", "--quiet", is_flag=True, help="No progress messages."),
        click.option("-v", "--verbose", is_flag=True, help="Tracebacks and all warnings."),
    ]
