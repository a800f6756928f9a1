"""The commands of docs/command-line.md run, and print what the page shows."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from vlmopt.cli import main

PAGE = Path(__file__).resolve().parents[2] / "docs" / "command-line.md"


def transcripts() -> list[tuple[str, list[str]]]:
    """Each command of the page, with the lines shown below it."""
    found: list[tuple[str, list[str]]] = []
    for line in PAGE.read_text().splitlines():
        if line.startswith("    $ vlmopt "):
            found.append((line.removeprefix("    $ vlmopt "), []))
        elif line.startswith("    ") and found:
            found[-1][1].append(line.removeprefix("    "))
        elif line.startswith("## A model without weights"):
            break
    return found


def _form(line: str) -> str:
    """Numbers and widths of columns depend on versions of the libraries, and on the processor."""
    return " ".join(re.sub(r"\d+(\.\d+)*(e[-+]\d+)?", "#", line).split())


def test_the_commands_print_what_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = transcripts()
    assert [command.split()[0] for command, _ in commands] == [
        "passes",
        "capture",
        "run",
        "diff",
        "inspect",
        "stats",
        "verify",
        "export",
        "env",
    ]
    for command, shown in commands:
        assert main(shlex.split(command)) == 0, command
        printed = capsys.readouterr()
        lines = [_form(line) for line in (printed.err + printed.out).splitlines()]
        at = 0
        for line in map(_form, filter(str.strip, shown)):
            if line != "...":
                assert line in lines[at:], f"vlmopt {command} does not print: {line}"
                at += lines[at:].index(line) + 1
