"""Commands that look and change nothing: passes, inspect, stats, verify, env."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import inspect as python_inspect
import os
import platform
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import TYPE_CHECKING, Any

import click

from vlmopt.cli import pipelines
from vlmopt.cli.app import app
from vlmopt.cli.output import ExitCode, Output, command
from vlmopt.cli.source import SOURCE_HELP, load_program
from vlmopt.errors import ArtifactError

if TYPE_CHECKING:
    from torch import fx

    from vlmopt.graph.compare import Comparison
    from vlmopt.graph.verify import Level
    from vlmopt.pipeline.passes import Pass, Semantics
    from vlmopt.program import Program, Stage

SCHEMA = 1


# -- passes ------------------------------------------------------------------------------------


@command(app, examples="vlmopt passes --family tokens\nvlmopt passes v2drop --format json")
@click.argument("name", required=False)
@click.option("--family", help="Only the passes of this family.")
def passes(out: Output, name: str | None, family: str | None) -> None:
    """List all passes; with NAME, the options and the promise of one."""
    from vlmopt.pipeline.registry import find_pass, known_passes

    if name is not None:
        one = find_pass(name)
        out.emit(_pass_page(one), {"schema": SCHEMA, "passes": [_pass_json(one)]})
        return
    found = [find_pass(known) for known in sorted(known_passes())]
    found = [one for one in found if family is None or one.family == family]
    width = max((len(one.name) for one in found), default=0)
    lines = [f"{one.name:<{width}}  {one.semantics:<7}  {_summary(one)}" for one in found]
    document = {"schema": SCHEMA, "passes": [_pass_json(one) for one in found]}
    out.emit("\n".join(lines), document)


def _summary(one: type[Pass]) -> str:
    return (python_inspect.getdoc(one) or "").split("\n", 1)[0]


def _pass_page(one: type[Pass]) -> str:
    from vlmopt.pipeline.options import option_rows

    lines = [f"{one.name}  ({one.family}, {one.phase}, {one.semantics})", ""]
    lines += [python_inspect.getdoc(one) or "", "", "options:"]
    options = option_rows(one)
    width = max((len(option.name) for option in options), default=0)
    lines += [f"  {row.name:<{width}}  {row.help} (default {row.default})" for row in options]
    if not options:
        lines.append("  none")
    if one.example:
        lines += ["", f"example: {one.example}"]
    return "\n".join(lines)


def _pass_json(one: type[Pass]) -> dict[str, Any]:
    from vlmopt.pipeline.options import option_rows

    return {
        "name": one.name,
        "family": one.family,
        "phase": str(one.phase),
        "semantics": str(one.semantics),
        "summary": _summary(one),
        "reference": one.reference,
        "example": one.example,
        "options": [vars(row) for row in option_rows(one)],
    }


# -- inspect -----------------------------------------------------------------------------------


@command(app, examples="vlmopt inspect llava.vlm --depth 3\nvlmopt inspect digits --node add_7")
@click.argument("program")
@click.option("--stage", "stage_name", help="Only this stage.")
@click.option("--node", "node_name", help="One node with its producers and users.")
@click.option("--depth", type=click.IntRange(min=1), help="Components of module paths shown.")
def inspect(
    out: Output,
    program: str,
    stage_name: str | None,
    node_name: str | None,
    depth: int | None,
) -> None:
    """Print the graphs of PROGRAM, or everything known about one node."""
    from vlmopt.graph.text import stage_text

    loaded = load_program(program, weights=False)
    stages = list(loaded) if stage_name is None else [_stage(loaded, stage_name)]
    if node_name is not None:
        stage, node = _find_node(stages, node_name.removeprefix("%"))
        out.emit(_node_page(stage, node), {"schema": SCHEMA, "node": _node_json(stage, node)})
        return
    text = "\n\n".join(stage_text(stage, depth=depth) for stage in stages)
    document = {
        "schema": SCHEMA,
        "passes": list(loaded.passes),
        "stages": [
            {
                "name": stage.name,
                "nodes": [_node_json(stage, node) for node in stage.graph.nodes],
            }
            for stage in stages
        ],
    }
    out.emit(text, document)


inspect.help = f"{inspect.help}\n\n{SOURCE_HELP.replace('SOURCE is', 'PROGRAM is')}"


def _stage(program: Program, name: str) -> Stage:
    if name not in program:
        raise ArtifactError(
            f"the program has no stage {name}", hint=f"its stages are {', '.join(program.stages)}"
        )
    return program[name]


def _find_node(stages: Sequence[Stage], name: str) -> tuple[Stage, fx.Node]:
    found = [(stage, node) for stage in stages for node in stage.graph.nodes if node.name == name]
    if not found:
        raise ArtifactError(f"no node is called %{name}", hint="vlmopt inspect prints all nodes")
    if len(found) > 1:
        raise ArtifactError(
            f"%{name} is in stages {', '.join(stage.name for stage, _ in found)}",
            hint="choose one with --stage",
        )
    return found[0]


def _node_page(stage: Stage, node: fx.Node) -> str:
    from vlmopt.analysis.cost import node_cost
    from vlmopt.graph.snapshot import provenance
    from vlmopt.graph.stats import bytes_text, si
    from vlmopt.graph.text import align, module_path, node_text, source_location

    cost = node_cost(node)
    made_by = provenance(node)
    facts = [
        ("stage", stage.name),
        ("module", module_path(node) or "(top)"),
        ("source", source_location(node) or "unknown"),
        ("made by", "capture" if made_by is None else str(made_by)),
        ("cost", f"{si(cost.flops)}FLOPs, {bytes_text(cost.bytes_moved)} moved"),
    ]
    lines = [node_text(node), *(f"  {key:<8} {value}" for key, value in facts)]
    for title, neighbours in (("reads", node.all_input_nodes), ("read by", list(node.users))):
        lines.append(f"  {title}:")
        rows = [tuple(node_text(other).rsplit("  ", 1)) for other in neighbours]
        lines += [
            f"    {line}" for line in align((r[0], r[-1] if len(r) > 1 else "") for r in rows)
        ]
        if not neighbours:
            lines.append("    nothing")
    return "\n".join(lines)


def _node_json(stage: Stage, node: fx.Node) -> dict[str, Any]:
    from vlmopt.graph.snapshot import provenance
    from vlmopt.graph.text import call_text, module_path, source_location, value_text

    made_by = provenance(node)
    return {
        "name": node.name,
        "stage": stage.name,
        "kind": node.op,
        "target": str(node.target),
        "text": call_text(node),
        "type": None if node.op == "output" else value_text(node.meta.get("val")),
        "module": module_path(node),
        "source": source_location(node),
        "pass": None if made_by is None else made_by.pass_name,
        "reads": [other.name for other in node.all_input_nodes],
        "read_by": [other.name for other in node.users],
    }


# -- stats -------------------------------------------------------------------------------------


@command(
    app,
    examples="vlmopt stats llava.vlm\nvlmopt stats llava.vlm -p 'v2drop{layers=3 keep=0.5}'",
)
@click.argument("programs", nargs=-1, required=True)
@click.option("-p", "--pipeline", help=pipelines.PIPELINE_HELP)
@click.option("--operators/--no-operators", default=True, help="Count nodes by operator.")
@pipelines.pipeline_options
def stats(
    out: Output,
    programs: Sequence[str],
    pipeline: str | None,
    operators: bool,
    verify: Level,
    allow_no_match: bool,
) -> None:
    """FLOPs, bytes, weights, cache, tokens per layer and operators of PROGRAMS side by side.

    With -p, each program is also shown as the pipeline leaves it.
    """
    from vlmopt.graph.stats import program_stats, stats_json, stats_text

    columns = []
    for source in programs:
        program = load_program(source, weights=False)
        columns.append(program_stats(program, source))
        if pipeline is not None:
            text = pipelines.read_pipeline(pipeline)
            pipelines.run(source, program, text, verify=verify, allow_no_match=allow_no_match)
            columns.append(program_stats(program, text))
    out.emit(stats_text(columns, operators=operators), stats_json(columns))


# -- verify ------------------------------------------------------------------------------------


@command(
    app, examples="vlmopt verify llava.vlm\nvlmopt verify fast.vlm --against llava.vlm --seed 1"
)
@click.argument("program")
@click.option("--against", metavar="REF", help="Compare outputs with this program's.")
@click.option(
    "--level",
    type=click.Choice(pipelines.LEVELS),
    default="full",
    show_default=True,
    help="How thoroughly to check the graphs.",
)
@click.option(
    "--semantics",
    type=click.Choice(["exact", "numeric", "lossy"]),
    help="What to hold the program to; by default what its weakest pass promises.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Seed of the inputs.")
def verify(
    out: Output, program: str, against: str | None, level: Level, semantics: str | None, seed: int
) -> ExitCode:
    """Check the invariants of PROGRAM; with --against, its outputs too."""
    from vlmopt.graph.compare import compare_programs
    from vlmopt.graph.verify import verify_program
    from vlmopt.pipeline.passes import Semantics

    loaded = load_program(program, weights=against is not None)
    verify_program(loaded, level)
    text = f"{program}: all invariants hold ({level}; stages {', '.join(loaded.stages)})"
    document: dict[str, Any] = {"schema": SCHEMA, "program": program, "level": level, "ok": True}
    if against is None:
        out.emit(text, document)
        return ExitCode.DONE
    reference = load_program(against)
    held_to = Semantics(semantics) if semantics else _promise(loaded, reference)
    comparison = compare_programs(loaded, reference, held_to, seed=seed)
    document |= {"against": against, **_comparison_json(comparison)}
    out.emit(f"{text}\n{_comparison_text(comparison, against)}", document)
    return ExitCode.DONE if comparison.ok else ExitCode.MISMATCH


def _promise(program: Program, reference: Program) -> Semantics:
    """What the passes promise that were applied to the program beyond those of the reference."""
    from vlmopt.graph.compare import weakest

    pairs = zip(program.passes, reference.passes, strict=False)
    common = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    applied = (*program.passes[common:], *reference.passes[common:])
    return weakest([pipelines.semantics_of(spec) for spec in applied])


def _comparison_text(comparison: Comparison, against: str) -> str:
    lines = [f"compared with {against}, held to {comparison.semantics}:"]
    width = max((len(f"{o.stage}.{o.output}") for o in comparison.outputs), default=0)
    for output in comparison.outputs:
        name = f"{output.stage}.{output.output}"
        gap = "" if output.difference is None else f"relative difference {output.difference:.1e}"
        kept = "on kept tokens" if output.on_kept else ""
        rest = ", ".join(part for part in (gap, kept, output.note) if part)
        lines.append(f"{' ' if output.ok else '!'} {name:<{width}}  {rest}")
    return "\n".join(lines)


def _comparison_json(comparison: Comparison) -> dict[str, Any]:
    return {
        "ok": comparison.ok,
        "semantics": str(comparison.semantics),
        "outputs": [vars(output) for output in comparison.outputs],
    }


# -- env ---------------------------------------------------------------------------------------


@command(app, examples="vlmopt env\nvlmopt env --format json")
def env(out: Output) -> None:
    """Versions, devices and variables in force: what an issue needs."""
    versions = {name: _version(name) for name in _PACKAGES}
    variables = {k: v for k, v in sorted(os.environ.items()) if k.startswith("VLMOPT_")}
    devices = _devices()
    document = {
        "schema": SCHEMA,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": versions,
        "devices": devices,
        "variables": variables,
    }
    sections: list[Mapping[str, Any]] = [
        {"python": document["python"], "platform": document["platform"]},
        versions,
        {"devices": ", ".join(devices)},
        variables,
    ]
    lines = [f"{key:<13} {value}" for section in sections for key, value in section.items()]
    out.emit("\n".join(lines), document)


_PACKAGES = ("vlmopt", "torch", "transformers", "triton", "onnx", "onnxscript", "onnxruntime")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    cuda = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return [f"cpu ({torch.get_num_threads()} threads)", *cuda]
