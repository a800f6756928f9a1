"""Commands that make something: capture, run, diff, export, demo."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from vlmopt.cli import pipelines
from vlmopt.cli.app import app
from vlmopt.cli.output import ExitCode, Output, command
from vlmopt.cli.source import SOURCE_HELP, load_program

if TYPE_CHECKING:
    from vlmopt.graph.verify import Level
    from vlmopt.program import Program

SCHEMA = 1


@command(
    app,
    examples="vlmopt capture digits -o digits.vlm\nvlmopt capture my_models:llava -o llava.vlm",
    writes="DIR",
)
@click.argument("source")
def capture(out: Output, source: str) -> None:
    """Capture SOURCE as a program folder, or without -o only say what it consists of."""
    target = out.reserve() if out.path is not None else None
    program = load_program(source)
    if target is not None:
        program.save(target, overwrite=out.force)
        out.progress(f"wrote {target}")
    out.print(_program_text(program), _program_json(source, program))


capture.help = f"{capture.help}\n\n{SOURCE_HELP}"


def _program_text(program: Program) -> str:
    from vlmopt.graph.text import align, port_text

    lines = [f"{program.model_type}: {', '.join(program.stages)}"]
    for stage in program:
        calls = sum(node.op == "call_function" for node in stage.graph.nodes)
        lines.append(f"{stage.name}  {calls} nodes")
        ports = [("in", port) for port in stage.inputs] + [("out", port) for port in stage.outputs]
        rows = [(f"  {direction:<3}  {port.name}", port_text(port)) for direction, port in ports]
        lines += align(rows)
    return "\n".join(lines)


def _program_json(source: str, program: Program) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "source": source,
        "model_type": program.model_type,
        "passes": list(program.passes),
        "stages": [
            {
                "name": stage.name,
                "nodes": sum(node.op == "call_function" for node in stage.graph.nodes),
                "inputs": [vars(port) for port in stage.inputs],
                "outputs": [vars(port) for port in stage.outputs],
            }
            for stage in program
        ],
    }


@command(
    app,
    examples=(
        "vlmopt run llava.vlm -p 'v2drop{layers=3 keep=0.5}' -o fast.vlm\n"
        "vlmopt run digits -p @pipeline.txt --format json"
    ),
    writes="DIR",
)
@click.argument("program")
@click.option("-p", "--pipeline", required=True, help=pipelines.PIPELINE_HELP)
@pipelines.pipeline_options
def run(out: Output, program: str, pipeline: str, verify: Level, allow_no_match: bool) -> None:
    """Apply a pipeline to PROGRAM and print what it did and saves."""
    from vlmopt.graph.diff_text import Display, diff_json, render

    target = out.reserve() if out.path is not None else None
    text = pipelines.read_pipeline(pipeline)
    loaded = load_program(program)
    done = pipelines.run(program, loaded, text, verify=verify, allow_no_match=allow_no_match)
    if target is not None:
        loaded.save(target, overwrite=out.force)
        out.progress(f"wrote {target}")
    shown = render(done.diff, done.heading, display=Display.SUMMARY)
    out.print(shown, diff_json(done.diff, done.heading), signed=True)


@command(
    app,
    examples=(
        "vlmopt diff llava.vlm -p 'v2drop{layers=3,17 keep=0.33}'\n"
        "vlmopt diff before.vlm after.vlm --exit-code --display summary"
    ),
)
@click.argument("before")
@click.argument("after", required=False)
@click.option("-p", "--pipeline", help=pipelines.PIPELINE_HELP)
@click.option(
    "--display",
    type=click.Choice(["inline", "split", "summary"]),
    default="inline",
    show_default=True,
    help="Hunks in one column, side by side, or left out.",
)
@click.option("--context", type=click.IntRange(min=0), default=1, show_default=True)
@click.option("--fold/--no-fold", default=True, help="Fold equal hunks and changes of size.")
@click.option("--only", metavar="PASS", help="Only the hunks of this pass.")
@click.option("--module", metavar="GLOB", help="Only the hunks of these modules.")
@click.option("--exit-code", is_flag=True, help="Exit with 1 when there is a difference.")
@pipelines.pipeline_options
def diff(
    out: Output,
    before: str,
    after: str | None,
    pipeline: str | None,
    display: str,
    context: int,
    fold: bool,
    only: str | None,
    module: str | None,
    exit_code: bool,
    verify: Level,
    allow_no_match: bool,
) -> ExitCode:
    """What changed: between two programs, or in one by a pipeline (-p)."""
    from vlmopt.graph.diff import diff as compare
    from vlmopt.graph.diff_text import Display, Heading, diff_json, render

    if (after is None) == (pipeline is None):
        raise click.UsageError("give either a second program or a pipeline (-p)")
    if after is not None:
        result = compare(load_program(before, weights=False), load_program(after, weights=False))
        heading = Heading(before, after, reproduce=f"vlmopt diff {before} {after}")
    else:
        text = pipelines.read_pipeline(pipeline or "")
        loaded = load_program(before, weights=False)
        done = pipelines.run(before, loaded, text, verify=verify, allow_no_match=allow_no_match)
        result, heading = done.diff, done.heading
    shown = render(
        result,
        heading,
        display=Display(display),
        context=context,
        fold=fold,
        only=only,
        module=module,
    )
    out.emit(shown, diff_json(result, heading), signed=True)
    return ExitCode.FOUND if exit_code and result.changed else ExitCode.DONE


@command(
    app,
    examples=(
        "vlmopt export llava.vlm -o llava.onnx\n"
        "vlmopt export digits -p 'v2drop{layers=2 keep=0.5}' -o fast.onnx --opset 20"
    ),
    writes="DIR",
)
@click.argument("program")
@click.option("-p", "--pipeline", help=pipelines.PIPELINE_HELP)
@click.option(
    "--opset", type=int, default=20, show_default=True, help="Version of the ONNX operator set."
)
@pipelines.pipeline_options
def export(
    out: Output,
    program: str,
    pipeline: str | None,
    opset: int,
    verify: Level,
    allow_no_match: bool,
) -> None:
    """Export PROGRAM to ONNX, one file per stage."""
    target = out.reserve()
    from vlmopt.lowering.onnx import export_program

    loaded = load_program(program)
    if pipeline is not None:
        text = pipelines.read_pipeline(pipeline)
        pipelines.run(program, loaded, text, verify=verify, allow_no_match=allow_no_match)
    report = export_program(loaded, target, opset=opset, overwrite=out.force)
    out.print(report.text(), report.to_json())


@command(app, examples="vlmopt demo\nvlmopt demo -p 'v2drop{layers=3 keep=0.5}'")
@click.option(
    "--questions",
    type=click.IntRange(min=1),
    default=120,
    show_default=True,
    help="How many are asked about held-out scenes.",
)
@click.option("-p", "--pipeline", help=pipelines.PIPELINE_HELP)
@click.option(
    "--rounds",
    type=click.IntRange(min=0),
    default=9,
    show_default=True,
    help="Runs of each when measuring speed; 0: do not measure.",
)
def demo(out: Output, questions: int, pipeline: str | None, rounds: int) -> None:
    """Show on the bundled model what vlmopt does."""
    from vlmopt.demo import PASSES, main

    passes = PASSES if pipeline is None else pipelines.read_pipeline(pipeline)
    main(questions=questions, passes=passes, rounds=rounds, quiet=out.quiet)
