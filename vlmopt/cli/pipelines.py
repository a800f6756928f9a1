"""Pipelines on the command line: reading ``-p``, running it, and telling what it did."""

from __future__ import annotations

import hashlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmopt.errors import ArtifactError

if TYPE_CHECKING:
    from vlmopt.graph.diff import ProgramDiff
    from vlmopt.graph.diff_text import Heading, PassLine
    from vlmopt.graph.verify import Level
    from vlmopt.pipeline.passes import Semantics
    from vlmopt.program import Program


LEVELS: tuple[Level, ...] = ("off", "lint", "full")  # as there, without importing torch


@dataclass(frozen=True)
class PipelineRun:
    """A program before and after a pipeline, with the difference and what stands around it."""

    program: Program
    diff: ProgramDiff
    heading: Heading


def read_pipeline(text: str) -> str:
    """The pipeline named by ``-p``: the text itself, or of the file after ``@``."""
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text(encoding="utf-8").strip()
    except OSError as error:
        raise ArtifactError(f"the pipeline file {text[1:]} cannot be read") from error


def run(
    source: str, program: Program, pipeline: str, *, verify: Level, allow_no_match: bool
) -> PipelineRun:
    """Apply a pipeline to ``program``, in place, and compare."""
    from vlmopt.graph.diff import diff
    from vlmopt.graph.diff_text import Heading
    from vlmopt.graph.snapshot import snapshot
    from vlmopt.pipeline.manager import run_pipeline

    before = snapshot(program)
    report = run_pipeline(program, pipeline, verify=verify, allow_no_match=allow_no_match)
    difference = diff(before, program)
    command = shlex.join(["vlmopt", "diff", source, "-p", pipeline])
    heading = Heading(
        before=source,
        after=pipeline,
        verified=None if verify == "off" else verify,
        passes=_pass_lines(report.records, difference),
        reproduce=f"{command} (pipeline hash {pipeline_hash(pipeline)})",
    )
    return PipelineRun(program, difference, heading)


def pipeline_hash(pipeline: str) -> str:
    """Six digits that tell two pipelines apart, whatever spaces they are written with."""
    return hashlib.sha256(" ".join(pipeline.split()).encode()).hexdigest()[:6]


def _pass_lines(records: Sequence[Any], diff: ProgramDiff) -> tuple[PassLine, ...]:
    from vlmopt.graph.diff_text import PassLine

    lines = []
    for index, record in enumerate(records):
        hunks = [h for h in diff.hunks() if h.made_by is not None and h.made_by.index == index]
        name = pass_name(record.spec)
        remarks = [remark.text for remark in record.result.remarks]
        note = remarks[-1] if remarks else ""
        lines.append(
            PassLine(
                name=name,
                matches=record.result.matches,
                changed=record.result.changed,
                semantics=str(semantics_of(record.spec)),
                added=sum(len(hunk.added) + hunk.gather_nodes for hunk in hunks),
                removed=sum(len(hunk.removed) for hunk in hunks),
                touched=sum(
                    len(hunk.rewired) + len(hunk.retyped) + sum(len(r.nodes) for r in hunk.ripples)
                    for hunk in hunks
                ),
                note=note,
            )
        )
    return tuple(lines)


def pass_name(spec: str) -> str:
    """Name of the pass in a text such as ``v2drop{layers=3 keep=0.5}``."""
    return spec.split("{", 1)[0].strip()


def semantics_of(spec: str) -> Semantics:
    """What the pass of a text promises."""
    from vlmopt.pipeline.registry import find_pass

    return find_pass(pass_name(spec)).semantics


def pipeline_options(function: Any) -> Any:
    """Options of every command that runs a pipeline besides ``-p``."""
    for option in (
        click.option(
            "--allow-no-match",
            is_flag=True,
            help="A pass that finds nothing to rewrite is no error.",
        ),
        click.option(
            "--verify",
            type=click.Choice(LEVELS),
            default="full",
            show_default=True,
            help="How thoroughly to check the graphs after every pass.",
        ),
    ):
        function = option(function)
    return function


PIPELINE_HELP = "Pipeline, such as 'v2drop{layers=3 keep=0.5} | fold-constants', or @FILE."
