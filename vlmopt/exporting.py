"""``vlmopt.export``: from a model, or a program, to ONNX files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from vlmopt.errors import OptionError
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program
from vlmopt.tracing import capture

if TYPE_CHECKING:
    from vlmopt.lowering.onnx import OnnxReport


def export(
    source: nn.Module | Program,
    directory: str | Path,
    passes: str | None = None,
    *,
    inputs: Any = None,
    opset: int = 20,
    overwrite: bool = False,
) -> OnnxReport:
    """Capture, rewrite, and write every stage as ONNX, checked in ONNX Runtime.

    Args:
        source: a model, captured with ``inputs``; or a program, which is left as it is.
        directory: folder to write ``<stage>.onnx`` and ``manifest.json`` into; appears whole or
            not at all.
        passes: pipeline text; without it the stages are exported as they are.
        inputs: example inputs of a model, as for :func:`vlmopt.capture`.
        opset: version of the ONNX operator set, from 18 to 25.
        overwrite: replace what an earlier export wrote there.

    Returns:
        Files, sizes, operators, and the largest error of each output against eager.

    Raises:
        OptionError: a model without inputs, or a program with.
        LoweringError: something cannot be exported, or runs differently in ONNX Runtime.
        VlmoptError: see :func:`vlmopt.capture` and :func:`vlmopt.run_pipeline`.
    """
    from vlmopt.lowering.onnx import export_program

    if isinstance(source, Program):
        if inputs is not None:
            raise OptionError(
                "a program is exported for the inputs that it was captured with",
                hint="leave inputs out, or give the model instead of the program",
            )
        program = source.clone() if passes else source
    elif inputs is None:
        raise OptionError(
            f"to export a {type(source).__name__}, example inputs are needed",
            hint="vlmopt.export(model, directory, inputs=processor(...))",
        )
    else:
        program = capture(source, inputs)
    if passes:
        run_pipeline(program, passes)
    return export_program(program, Path(directory), opset=opset, overwrite=overwrite)
