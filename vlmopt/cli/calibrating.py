"""The command that measures a model for a pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import click

from vlmopt.cli.app import app
from vlmopt.cli.output import Output, command
from vlmopt.cli.source import SAMPLES_HELP, load_model, load_samples


@command(
    app,
    examples=(
        "vlmopt calibrate digits -p information-horizon --data digits -o horizon.json\n"
        "vlmopt calibrate my_models:llava -p hawk --data my_data:prompts -o hawk.json"
    ),
    writes="FILE",
)
@click.argument("model")
@click.option("-p", "--pass", "text", required=True, metavar="PASS", help="The pass, with options.")
@click.option("--data", required=True, metavar="SAMPLES", help="Where samples come from.")
def calibrate(out: Output, model: str, text: str, data: str) -> None:
    """Measure MODEL on samples for a pass that needs it, and write what it needs (-o)."""
    target = out.reserve()
    from vlmopt.calibration import calibrate as measure
    from vlmopt.errors import OptionError
    from vlmopt.pipeline.spec import parse_pipeline

    passes = parse_pipeline(text)
    if len(passes) != 1:
        raise OptionError(f"{text!r} is not one pass", hint="calibrate one at a time")
    loaded, samples = load_model(model), load_samples(data)
    with out.bar("samples", "settings") as progress:
        values = measure(loaded, samples, passes[0], target, overwrite=out.force, progress=progress)
    out.progress(f"wrote {target}")
    lines = [f"{name}: {shown}" for name, shown in _rows(values)]
    out.print("\n".join(lines), values)


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
