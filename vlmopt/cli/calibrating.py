"""The command that measures a model for a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmopt.cli.app import app
from vlmopt.cli.output import Output, command
from vlmopt.cli.source import SAMPLES_HELP, load_model, load_pipeline, load_samples

if TYPE_CHECKING:
    from vlmopt.pipeline.passes import Pass


@command(
    app,
    examples=(
        "vlmopt calibrate digits -p information-horizon --data digits -o horizon.json\n"
        "vlmopt calibrate digits-dit -p 'soda{anchors=8}' --steps 20 -o soda.safetensors"
    ),
    writes="FILE",
)
@click.argument("model")
@click.option("-p", "--pass", "text", required=True, metavar="PASS", help="The pass, with options.")
@click.option("--data", metavar="SAMPLES", help="Where samples come from.")
@click.option("--generations", default=10, show_default=True, help="Of digits-dit: to watch.")
@click.option("--steps", default=20, show_default=True, help="Of digits-dit: of the loop.")
@click.option(
    "--scheduler", default="DDIMScheduler", show_default=True, help="Of digits-dit: of diffusers."
)
@click.option("--guidance", default=1.5, show_default=True, help="Of digits-dit: its weight.")
def calibrate(out: Output, model: str, text: str, data: str | None, **loop: Any) -> None:
    """Measure MODEL on samples for a pass that needs it, and write what it needs (-o).

    For a pass of the family denoise, whole generations are watched, and --data is not needed.
    """
    target = out.reserve()
    from vlmopt.calibration import calibrate as measure
    from vlmopt.errors import OptionError
    from vlmopt.pipeline.spec import parse_pipeline

    passes = parse_pipeline(text)
    if len(passes) != 1:
        raise OptionError(f"{text!r} is not one pass", hint="calibrate one at a time")
    if passes[0].family == "denoise":
        _calibrate_loop(out, target, model, passes[0], loop)
        return
    if data is None:
        raise click.UsageError("say where samples come from: --data SAMPLES")
    loaded, samples = load_model(model), load_samples(data)
    with out.bar("samples", "settings") as progress:
        values = measure(loaded, samples, passes[0], target, overwrite=out.force, progress=progress)
    out.progress(f"wrote {target}")
    lines = [f"{name}: {shown}" for name, shown in _rows(values)]
    out.print("\n".join(lines), values)


def _calibrate_loop(
    out: Output, target: Path, model: str, one: Pass, loop: Mapping[str, Any]
) -> None:
    """Watch generations, write tables and plan, and show the plan."""
    from vlmopt.denoising.picture import plan_lines
    from vlmopt.errors import OptionError
    from vlmopt.passes.denoise.measuring import calibrate as measure
    from vlmopt.passes.denoise.soda import Soda

    if not isinstance(one, Soda):
        raise OptionError(f"{one.name} needs no calibration", hint="give its options to vlmopt run")
    pipe, calls = load_pipeline(model, **loop)
    with out.bar("generations") as progress:
        plan, rows = measure(pipe, calls, one, target, overwrite=out.force, progress=progress)
    out.progress(f"wrote {target}")
    out.print_lines(plan_lines(plan, rows), {"plan": plan.to_json()})


def _rows(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Names and values of an artifact; ``weights.text`` for what is inside ``weights``."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _rows(value, f"{prefix}{name}.")
        elif isinstance(value, list):
            yield prefix + name, " ".join(map(str, value))
        else:
            yield prefix + name, str(value)


calibrate.help = f"{calibrate.help}\n\n{SAMPLES_HELP}"
