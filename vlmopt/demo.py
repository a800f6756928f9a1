"""The main job on the bundled model: answer questions about unseen images with fewer tokens."""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

PASSES = "v2drop{layers=4 keep=0.25}"


def main(arguments: Sequence[str] = ()) -> int:
    """Run the demonstration and print what it finds.

    Args:
        arguments: command-line arguments; ``--questions N``, ``--passes TEXT``.

    Returns:
        0.
    """
    parser = argparse.ArgumentParser(prog="vlmopt demo", description=__doc__)
    parser.add_argument("--questions", type=int, default=120, help="held-out questions asked")
    parser.add_argument("--passes", default=PASSES, help="pipeline to apply")
    chosen = parser.parse_args(list(arguments))
    _run(chosen.questions, chosen.passes)
    return 0


def _run(questions: int, passes: str) -> None:
    import vlmopt
    from vlmopt import digits
    from vlmopt.graph.diff import diff
    from vlmopt.graph.diff_text import Display, render
    from vlmopt.lowering.onnx import export_program

    model, processor = digits.load_model()
    samples = digits.heldout_samples(questions)
    scene, question = samples[0]
    one = dict(digits.batch(processor, [scene], [question]))

    _progress(f"capturing {model.config.model_type} and applying {passes}")
    before = vlmopt.capture(model, one)
    after = before.clone()
    vlmopt.run_pipeline(after, passes, verify="full")
    print(render(diff(before, after), display=Display.INLINE))
    print()

    _progress(f"answering {questions} questions about held-out scenes, twice")
    optimized = vlmopt.optimize(model, one, passes, backend="eager")
    print(f"{'':12}{'all tokens':>14}{'with vlmopt':>14}    ({questions} held-out questions)")
    full = digits.evaluate(model, processor, samples)
    fewer = digits.evaluate(optimized, processor, samples)
    for kind, tally in full.items():
        print(f"{kind:12}{tally.accuracy:14.1%}{fewer[kind].accuracy:14.1%}")
    for cut in after["language_model"].cuts:
        (present, kept), *_ = cut.visual
        print(f"visual tokens from layer {cut.layer} on: {present} -> {kept}")
    print()

    _progress("exporting to ONNX and checking in ONNX Runtime")
    with tempfile.TemporaryDirectory() as folder:
        report = export_program(after, Path(folder) / "onnx", stages=["language_model", "decode"])
        print(report.text().replace(folder, "."))


def _progress(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)
