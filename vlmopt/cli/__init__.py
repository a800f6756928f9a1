"""The command ``vlmopt``: inspect, transform, compare and export captured models.

Data goes to stdout, progress and warnings to stderr. Exit codes: 0 done; 1 a difference or a
violation was found; 2 wrong usage or a bad pipeline; 3 a pass or a lowering failed; 4 an input
cannot be read or captured; 5 outputs differ numerically; 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    import click

    from vlmopt.cli.app import app
    from vlmopt.cli.output import ExitCode, reader_left

    try:
        code = app.main(
            args=None if arguments is None else list(arguments),
            prog_name="vlmopt",
            standalone_mode=False,
        )
        sys.stdout.flush()
    except click.ClickException as error:
        error.show(sys.stderr)
        return ExitCode.USAGE
    except (KeyboardInterrupt, click.Abort):
        print("interrupted", file=sys.stderr)
        return ExitCode.INTERRUPTED
    except BrokenPipeError:
        return reader_left()
    return code if isinstance(code, int) else ExitCode.DONE
