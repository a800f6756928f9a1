"""Running a pipeline: order, snapshots, verification, timing, and what goes to the debug folder.

Environment, read at each run:

- ``VLMOPT_VERIFY``: default of ``verify``;
- ``VLMOPT_DISABLE``: names of passes, separated by commas, that pipelines skip;
- ``VLMOPT_DEBUG_DIR``: every run adds a numbered folder there, with the program as text after
  each pass, what each pass changed as a diff, and after a failure the program as a folder that
  reproduces it;
- ``VLMOPT_PRINT``: the same texts on stderr: ``all`` of them, those of passes that ``changed``
  something, or what one pass, given by its name, got and made.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
import os
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from torch import fx

from vlmopt.analysis.modality import visual_tokens_by_layer
from vlmopt.errors import (
    NoMatchError,
    OptionError,
    PassFailed,
    PreconditionError,
    UnknownPassError,
    VerifyError,
    VlmoptError,
)
from vlmopt.graph.diff import diff
from vlmopt.graph.diff_text import render
from vlmopt.graph.snapshot import snapshot
from vlmopt.graph.text import argument_text, stage_text, value_text
from vlmopt.graph.verify import LEVELS, Level, verify_program
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Remark
from vlmopt.pipeline.registry import known_passes
from vlmopt.pipeline.spec import format_pipeline, parse_pipeline
from vlmopt.program import Program, fetch_attr


@dataclass(frozen=True)
class PassRecord:
    """One pass of a run.

    Attributes:
        spec: text of the pass with its options.
        result: what the pass reported, with all of its remarks.
        seconds: time of the pass itself, in seconds.
        verify_seconds: time of verification after it, in seconds.
        nodes_added, nodes_removed: nodes of all stages.
    """

    spec: str
    result: PassResult
    seconds: float
    verify_seconds: float
    nodes_added: int
    nodes_removed: int

    def to_json(self) -> dict[str, Any]:
        """JSON values, flat."""
        return {
            "spec": self.spec,
            "changed": self.result.changed,
            "matches": self.result.matches,
            "statistics": dict(self.result.statistics),
            "remarks": [vars(remark) for remark in self.result.remarks],
            "seconds": self.seconds,
            "verify_seconds": self.verify_seconds,
            "nodes_added": self.nodes_added,
            "nodes_removed": self.nodes_removed,
        }


@dataclass(frozen=True)
class Report:
    """A finished run.

    Attributes:
        records: one per pass, in order.
        pipeline: text of the pipeline as it ran, without disabled passes.
        uuid: see :func:`pipeline_uuid`.
        visual_tokens: per layer of the language model, those that it computes; mean over samples.
            Empty where no token comes from vision.
    """

    records: tuple[PassRecord, ...]
    pipeline: str
    uuid: str
    visual_tokens: tuple[float, ...] = ()

    @property
    def mean_visual_tokens(self) -> float | None:
        """Mean over layers: what papers call the budget of a method."""
        if not self.visual_tokens:
            return None
        return sum(self.visual_tokens) / len(self.visual_tokens)

    def to_json(self) -> dict[str, Any]:
        """JSON values; ``schema`` grows when a field changes its meaning."""
        return {
            "schema": 1,
            "pipeline": self.pipeline,
            "uuid": self.uuid,
            "passes": [record.to_json() for record in self.records],
            "visual_tokens": {
                "layers": list(self.visual_tokens),
                "mean": self.mean_visual_tokens,
            },
        }


class Observer(Protocol):
    """Is told of each pass of a run.

    It may read the program, but not change it, and :class:`PassRecord` times are measured without
    it. Printing and dumping are observers too.
    """

    def before_pass(self, program: Program, one: Pass, index: int) -> None:
        """The pass is about to run."""

    def after_pass(self, program: Program, one: Pass, index: int, record: PassRecord) -> None:
        """The pass ran, and the program was verified."""

    def failed(self, program: Program, one: Pass, index: int, error: BaseException) -> None:
        """The pass failed; the program is restored."""


def run_pipeline(
    program: Program,
    pipeline: str | Sequence[Pass],
    *,
    verify: Level | None = None,
    allow_no_match: bool = False,
    observer: Observer | None = None,
) -> Report:
    """Apply passes to ``program``, in place.

    After a failure the program is as the passes before the failing one left it.

    Args:
        verify: what to check before the first pass and after each: ``off``, ``lint`` (structure)
            or ``full`` (also every type, and who made each node); ``VLMOPT_VERIFY``, or ``lint``,
            when left out.
        allow_no_match: a pass that finds nothing to rewrite is no error, but leaves a remark.
        observer: is told before and after each pass.

    Raises:
        VlmoptError: of the pipeline's text, a pass, or verification; the message says in which
            pass, and what ran before.
        PassFailed: a pass raised anything else, or misreported what it did.
    """
    passes = parse_pipeline(pipeline) if isinstance(pipeline, str) else tuple(pipeline)
    level = _verify_level(verify)
    disabled = _disabled_passes()
    passes = tuple(one for one in passes if one.name not in disabled)
    _check_phases(passes)
    text, uuid = format_pipeline(passes), pipeline_uuid(passes)
    observers: list[Observer] = [observer] if observer is not None else []
    if printer := _Printer.from_environment():
        observers.append(printer)
    folder = _DebugFolder.from_environment(program, text, uuid)
    if folder is not None:
        observers.append(folder)
    _verify_input(program, level)

    records: list[PassRecord] = []
    for index, one in enumerate(passes):
        for watching in observers:
            watching.before_pass(program, one, index)
        snapshot = program.clone()
        try:
            record = _run_pass(program, one, index, level, allow_no_match)
        except BaseException as error:
            program.restore(snapshot)
            for watching in observers:
                watching.failed(program, one, index, error)
            where = _where(passes, index)
            if folder is not None and folder.reproducer is not None:
                where += f"\n  reproduce: {folder.reproducer}"
            if isinstance(error, VlmoptError):
                _say_where(error, where)
                raise
            if not isinstance(error, Exception):
                raise  # an interrupt is nobody's fault
            failed = PassFailed(f"{one} raised {type(error).__name__}: {error}")
            _say_where(failed, where)
            raise failed from error
        records.append(record)
        for watching in observers:
            watching.after_pass(program, one, index, record)

    counts = next(filter(None, map(visual_tokens_by_layer, program)), ())
    report = Report(tuple(records), text, uuid, counts)
    if folder is not None:
        folder.write_report(report)
    return report


def pipeline_uuid(passes: Sequence[Pass]) -> str:
    """Identity of a pipeline: hash of its text and of the source of the passes.

    The source is that of the modules of each pass class and its bases; a class made where there
    is no source file, such as in a notebook, counts by its name alone.
    """
    digest = hashlib.sha256(format_pipeline(passes).encode())
    classes = {base for one in passes for base in type(one).__mro__} - {object}
    for name in sorted({base.__module__ for base in classes}):
        digest.update(f"\n{name}\n".encode())
        try:
            digest.update(inspect.getsource(sys.modules[name]).encode())
        except (OSError, TypeError):
            continue  # no source file
    return digest.hexdigest()


# -- before anything runs ----------------------------------------------------------------------


def _verify_level(verify: str | None) -> Level:
    level = verify if verify is not None else os.environ.get("VLMOPT_VERIFY") or "lint"
    if level not in LEVELS:
        source = "verify" if verify is not None else "VLMOPT_VERIFY"
        raise OptionError(f"{source} is {level!r}, not one of {', '.join(LEVELS)}")
    return level


def _disabled_passes() -> set[str]:
    names = {name.strip() for name in os.environ.get("VLMOPT_DISABLE", "").split(",")} - {""}
    _check_names("VLMOPT_DISABLE", names)
    return names


def _check_names(variable: str, names: set[str]) -> None:
    known = known_passes()
    if unknown := sorted(names.difference(known)):
        near = difflib.get_close_matches(unknown[0], known, 1)
        hint = "vlmopt passes lists them"
        raise UnknownPassError(
            f"{variable} names {', '.join(unknown)}, which no pass is called",
            hint=f"{near[0]}; {hint}" if near else hint,
        )


def _check_phases(passes: Sequence[Pass]) -> None:
    order = list(Phase)
    latest: Pass | None = None
    violations = []
    for one in passes:
        if latest is not None and order.index(one.phase) < order.index(latest.phase):
            violations.append(
                f"{one.name} ({one.phase}) comes after {latest.name} ({latest.phase})"
            )
        else:
            latest = one
    if violations:
        raise PreconditionError(
            f"the pipeline goes back to an earlier phase: {'; '.join(violations)}",
            hint=f"put the passes in the order {', '.join(order)}",
        )


def _verify_input(program: Program, level: Level) -> None:
    try:
        verify_program(program, level)
    except VerifyError as error:
        _say_where(error, "the program before any pass of this pipeline")
        raise


# -- one pass ----------------------------------------------------------------------------------


def _run_pass(
    program: Program, one: Pass, index: int, level: Level, allow_no_match: bool
) -> PassRecord:
    before, nodes_before = _fingerprints(program), _nodes(program)
    ctx = PassContext(str(one), index)
    started = time.perf_counter()
    one.requires(program)
    result: object = one.run(program, ctx)
    seconds = time.perf_counter() - started

    if not isinstance(result, PassResult):
        raise PassFailed(f"{one} returned {result!r}, not a PassResult")
    remarks = tuple(dict.fromkeys((*result.remarks, *ctx.remarks)))
    result = replace(result, remarks=remarks)
    after, nodes_after = _fingerprints(program), _nodes(program)
    _check_changed(one, result, before, after)
    if result.matches == 0 and not (one.zero_matches_ok or allow_no_match):
        reason = f": {remarks[-1].text}" if remarks else ""
        raise NoMatchError(
            f"{one} found nothing to rewrite{reason}",
            hint="take it out of the pipeline, or allow this with allow_no_match "
            "(--allow-no-match)",
        )
    if result.matches == 0 and not one.zero_matches_ok:
        result = replace(result, remarks=(*remarks, Remark("warning: found nothing to rewrite")))

    started = time.perf_counter()
    verify_program(program, level)
    added = [key for key in nodes_after if key not in nodes_before]
    if level == "full":
        # a stage may begin as a copy of another, whose nodes are as old as they were there
        known = {key[1:] for key in nodes_before}
        made = [key for key in added if key[0] in before or key[1:] not in known]
        _check_stamps(one, index, [nodes_after[key] for key in made])
    verify_seconds = time.perf_counter() - started
    program.passes = (*program.passes, str(one))
    removed = len(nodes_before.keys() - nodes_after.keys())
    return PassRecord(str(one), result, seconds, verify_seconds, len(added), removed)


def _nodes(program: Program) -> dict[tuple[str, ...], fx.Node]:
    """Nodes by what tells an old one from a new one, also where a pass traced a stage anew."""
    return {
        (stage.name, node.name, node.op, str(node.target)): node
        for stage in program
        for node in stage.graph.nodes
    }


def _fingerprints(program: Program) -> dict[str, str]:
    """Hash of each stage's graph: operators, arguments by name, types, and which weights."""
    found = {}
    for stage in program:
        digest = hashlib.sha256()
        for node in stage.graph.nodes:
            parts = [node.op, str(node.target), node.name]
            parts += [argument_text(value) for value in (*node.args, *node.kwargs.items())]
            parts.append(value_text(node.meta.get("val")))
            if node.op == "get_attr":
                # the snapshot keeps the old tensor alive, so no new one can have its id
                parts.append(str(id(fetch_attr(stage.graph_module, str(node.target)))))
            digest.update("\0".join(parts).encode())
            digest.update(b"\n")
        found[stage.name] = digest.hexdigest()
    return found


def _check_changed(
    one: Pass, result: PassResult, before: dict[str, str], after: dict[str, str]
) -> None:
    differing = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    if differing and not result.changed:
        raise PassFailed(
            f"{one} reported that it changed nothing, but the graph of "
            f"{', '.join(differing)} differs"
        )
    if result.changed and not differing:
        raise PassFailed(f"{one} reported a change, but every graph is as before")


def _check_stamps(one: Pass, index: int, added: Sequence[fx.Node]) -> None:
    for node in added:
        stamp = (node.meta.get("custom") or {}).get("vlmopt") or {}
        if (stamp.get("pass"), stamp.get("index")) != (one.name, index):
            raise VerifyError(
                "provenance",
                f"%{node.name} was added by {one.name} but does not say so",
                node=node,
                hint="call ctx.stamp for every new node",
            )


def _where(passes: Sequence[Pass], index: int) -> str:
    after = format_pipeline(passes[:index])
    where = f"pass {index + 1} of {len(passes)}, {passes[index]}"
    return f"{where}, after {after}" if after else where


def _say_where(error: VlmoptError, where: str) -> None:
    """Add a line to the message, for those who print only that."""
    error.args = (f"{error}\n  in:  {where}", *error.args[1:])


# -- observers that the environment asks for -----------------------------------------------------


def _input_lines(program: Program, uuid: str | None = None) -> list[str]:
    header = [f"# input; passes so far: {' | '.join(program.passes) or 'none'}"]
    if uuid is not None:
        header.append(f"# pipeline {uuid}")
    return [*header, "", *map(stage_text, program)]


def _after_lines(program: Program, one: Pass, record: PassRecord) -> list[str]:
    if not record.result.changed:
        return [f"# {one}: unchanged"]
    return [f"# {one}", "", *map(stage_text, program)]


def _failed_lines(one: Pass, error: BaseException) -> list[str]:
    return [f"# {one}: failed", f"{type(error).__name__}: {error}"]


class _Printer:
    """Observer that prints the program to stderr.

    Args:
        what: ``all``, ``changed``, or the name of a pass.
    """

    def __init__(self, what: str) -> None:
        self.what = what

    @classmethod
    def from_environment(cls) -> _Printer | None:
        what = os.environ.get("VLMOPT_PRINT", "").strip()
        if not what:
            return None
        if what not in ("all", "changed"):
            _check_names("VLMOPT_PRINT", {what})
        return cls(what)

    def before_pass(self, program: Program, one: Pass, index: int) -> None:
        if self.what == one.name or (index == 0 and self.what in ("all", "changed")):
            self._print(_input_lines(program))

    def after_pass(self, program: Program, one: Pass, index: int, record: PassRecord) -> None:
        if self.what in ("all", one.name) or (self.what == "changed" and record.result.changed):
            self._print(_after_lines(program, one, record))

    def failed(self, program: Program, one: Pass, index: int, error: BaseException) -> None:
        if self.what in ("all", one.name):
            self._print(_failed_lines(one, error))

    def _print(self, lines: Sequence[str]) -> None:
        print(*lines, sep="\n", file=sys.stderr)  # noqa: T201 - asked for by the user


class _DebugFolder:
    """Observer that writes every state of the program into a folder of its own.

    Attributes:
        reproducer: the command that repeats a failure.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.reproducer: str | None = None

    @classmethod
    def from_environment(cls, program: Program, text: str, uuid: str) -> _DebugFolder | None:
        root = os.environ.get("VLMOPT_DEBUG_DIR")
        if not root:
            return None
        made = cls(_new_folder(Path(root)))
        made._write("pipeline.txt", [text])
        made._write("000-input.txt", _input_lines(program, uuid))
        return made

    def before_pass(self, program: Program, one: Pass, index: int) -> None:
        self.before = snapshot(program)

    def after_pass(self, program: Program, one: Pass, index: int, record: PassRecord) -> None:
        name = _file_name(one, index)
        self._write(f"{name}.txt", _after_lines(program, one, record))
        if record.result.changed:
            self._write(f"{name}.diff", [render(diff(self.before, program))])

    def failed(self, program: Program, one: Pass, index: int, error: BaseException) -> None:
        name = _file_name(one, index)
        self._write(f"{name}.txt", _failed_lines(one, error))
        saved = self.folder / f"{name}-input"
        try:
            program.save(saved)
        except (VlmoptError, OSError) as reason:  # the failure of the pass is the one to tell
            self._write("reproduce.txt", [f"the program could not be saved: {reason}"])
            return
        self.reproducer = shlex.join(["vlmopt", "run", str(saved), "-p", str(one)])
        self._write("reproduce.txt", [self.reproducer])

    def write_report(self, report: Report) -> None:
        self._write("report.json", [json.dumps(report.to_json(), indent=2)])

    def _write(self, name: str, lines: Sequence[str]) -> None:
        (self.folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _file_name(one: Pass, index: int) -> str:
    return f"{index + 1:03d}-{one.name}"


def _new_folder(root: Path) -> Path:
    for folder in _numbered(root):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue  # of an earlier run, or of another process
        return folder
    raise AssertionError("numbers do not end")


def _numbered(root: Path) -> Iterator[Path]:
    number = 0
    while True:
        yield root / f"{number:03d}"
        number += 1
