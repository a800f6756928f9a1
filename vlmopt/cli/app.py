"""The command group, and the import of every command into it."""

from __future__ import annotations

import click


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vlmopt", prog_name="vlmopt")
def app() -> None:
    r"""A compiler for efficient vision-language models.

    \b
    Examples:
      vlmopt diff digits -p 'v2drop{layers=2 keep=0.5}'
      vlmopt passes v2drop
    """


# commands register themselves with the group above; they import torch only when they run
from vlmopt.cli import calibrating, inspecting, transforming  # noqa: E402, F401
