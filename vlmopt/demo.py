"""The main job on the bundled model: answer questions about unseen images with fewer tokens."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path

from vlmopt.bench.steps import Steps

PASSES = "v2drop{layers=4 keep=0.25}"

SPEED_SHAPE = "12x512"
SPEED_KEEP = 192


def main(
    *, questions: int = 120, passes: str = PASSES, rounds: int = 9, quiet: bool = False
) -> None:
    """Run the demonstration and print what it finds.

    Args:
        questions: held-out questions asked.
        passes: pipeline to apply.
        rounds: runs of each when measuring speed; 0: do not measure.
        quiet: no progress on stderr.

    Raises:
        VlmoptError: of the pipeline.
    """
    with Steps(5 if rounds else 4, quiet=quiet) as steps:
        _run(questions, passes, rounds, steps)


def _run(questions: int, passes: str, rounds: int, steps: Steps) -> None:
    from transformers.utils import logging

    import vlmopt
    from vlmopt import digits
    from vlmopt.graph.diff import diff
    from vlmopt.graph.diff_text import Display, render
    from vlmopt.lowering.onnx import export_program
    from vlmopt.pipeline.spec import parse_pipeline

    parse_pipeline(passes)  # a mistake must not wait for the model
    logging.disable_progress_bar()  # this one has its own
    model, processor = digits.load_model()
    samples = digits.heldout_samples(questions)
    scene, question = samples[0]
    one = dict(digits.batch(processor, [scene], [question]))

    steps.step(f"capturing {model.config.model_type} and applying {passes}")
    before = vlmopt.capture(model, one)
    after = before.clone()
    vlmopt.run_pipeline(after, passes, verify="full")
    steps.print(render(diff(before, after), display=Display.INLINE) + "\n")

    steps.step(f"answering {questions} questions about held-out scenes with all visual tokens")
    full = digits.evaluate(model, processor, samples)
    steps.step("answering the same questions with fewer")
    optimized = vlmopt.optimize(model, one, passes, backend="eager")
    fewer = digits.evaluate(optimized, processor, samples)
    lines = [f"{'':12}{'all tokens':>14}{'with vlmopt':>14}    ({questions} held-out questions)"]
    lines += [
        f"{kind:12}{tally.accuracy:14.1%}{fewer[kind].accuracy:14.1%}"
        for kind, tally in full.items()
    ]
    for cut in after["language_model"].cuts:
        (present, kept), *_ = cut.visual
        lines.append(f"visual tokens from layer {cut.layer} on: {present} -> {kept}")
    steps.print("\n".join(lines) + "\n")

    if rounds:
        steps.step(f"measuring speed against Inductor on a larger model ({SPEED_SHAPE})")
        steps.print(_speed(rounds, steps) + "\n")

    steps.step("exporting to ONNX and checking in ONNX Runtime")
    with tempfile.TemporaryDirectory() as folder:
        report = export_program(after, Path(folder) / "onnx", stages=["language_model", "decode"])
        steps.print(report.text().replace(folder, "."))


def _speed(rounds: int, steps: Steps) -> str:
    """Measured here and now; the bundled model is too small for its time to say anything."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    from vlmopt.bench import prefill
    from vlmopt.bench.environment import Environment
    from vlmopt.bench.models import parse_shape

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "speed: not measured, since Inductor needs a C++ compiler and finds none"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (result,) = prefill.measure(
            parse_shape(SPEED_SHAPE),
            (SPEED_KEEP,),
            rounds=rounds,
            baselines=("hf",),
            progress=steps.detail,
        )
    (cut,) = result.cuts
    shape, ratio = result.shape, result.speedup(cut)
    slow, fast = (prefill.milliseconds(result.seconds[name]) for name in ("hf", cut.pipeline))
    lines = [
        f"speed of prefill, measured now: {Environment.here().text()}",
        f"a LLaVA with random weights ({shape.layers} layers, width {shape.width}, "
        f"{shape.visual} visual and {shape.text} text tokens), {cut.pipeline}",
        f"{'':12}{'Inductor':>14}{'with vlmopt':>14}",
        f"{'median':12}{slow:>14}{fast:>14}    {ratio.value:.2f} times as fast "
        f"(90 %: {ratio.low:.2f}-{ratio.high:.2f}; FLOPs ideal {cut.ideal:.2f})",
    ]
    if result.noisy:
        lines.append("the machine was busy with other work: these times are rough")
    return "\n".join(lines)
