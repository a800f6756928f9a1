"""What a SOURCE on the command line may be, and how it becomes a program."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmopt.errors import ArtifactError, CaptureError

if TYPE_CHECKING:
    from vlmopt.program import Program

SOURCE_HELP = """\
\b
SOURCE is one of:
  DIR               a program folder, written by vlmopt capture or vlmopt run
  FILE.pt2          a program saved by torch.export.save
  pkg.mod:factory   a Python callable that returns a Program or (model, inputs);
                    naming it imports the module, which runs its code
  digits            the bundled vision-language model
  digits-moe        the one with mixtures of experts
  digits-dit        the bundled diffusion transformer, for 20 steps of DDIM"""

DIGITS_DIT = "digits-dit"

SAMPLES_HELP = """\
\b
MODEL is pkg.mod:factory, a Python callable that returns a model or (model, inputs), or digits or
digits-moe, the bundled models. SAMPLES is pkg.mod:factory, which returns the inputs of one prompt
after the other as the model's processor makes them, or digits. Naming a factory imports the module,
which runs its code. For a denoising loop, MODEL is pkg.mod:factory that returns (pipeline, keyword
arguments of its calls, one after the other), or digits-dit. Interrupted, a calibration goes on
where it stopped when it is called again."""

_FACTORY = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def load_program(source: str, *, weights: bool = True) -> Program:
    """The program that a SOURCE stands for.

    Args:
        weights: whether the program will be run; otherwise those of a folder stay on disk.

    Raises:
        ArtifactError: there is no such thing, or it is of a kind that cannot be read.
        CaptureError: a factory returns something else, or its model cannot be captured.
    """
    path = Path(source)
    if path.is_dir():
        import vlmopt

        return vlmopt.load(path, weights=weights)
    if path.suffix == ".onnx":
        raise ArtifactError(
            f"{source} is an ONNX file; vlmopt writes these but cannot read them",
            hint="capture the PyTorch model: vlmopt capture pkg.mod:factory -o DIR",
        )
    if path.suffix == ".pt2":
        return _read_exported(path)
    if _FACTORY.fullmatch(source):
        return _call_factory(source)
    if _is_bundled(source):
        return _capture_digits(source)
    if source == DIGITS_DIT:
        return _capture_digits_dit()
    raise ArtifactError(
        f"{source} is neither a program folder, nor a .pt2 file, nor pkg.mod:factory, nor digits",
        hint="vlmopt capture --help describes what can be read",
    )


def _read_exported(path: Path) -> Program:
    """A file of ``torch.export.save`` as a program; of its outputs, those that are tensors."""
    from torch import Tensor, fx

    from vlmopt.archives import load_exported
    from vlmopt.graph.canonical import canonical_graph
    from vlmopt.program import Port, Program, Stage

    module, _ = canonical_graph(load_exported(path))
    output = module.graph.output_node()
    values: Any = output.args[0]
    tensors = [
        (f"output_{index}", value)
        for index, value in enumerate(values)
        if isinstance(value, fx.Node) and isinstance(value.meta.get("val"), Tensor)
    ]
    output.args = (tuple(value for _, value in tensors),)
    module.graph.eliminate_dead_code()
    module.recompile()
    inputs = tuple(Port(node.name) for node in module.graph.find_nodes(op="placeholder"))
    stage = Stage("model", module, inputs, tuple(Port(name) for name, _ in tensors))
    return Program({"model": stage}, model_type=path.stem)


def load_model(source: str) -> Any:
    """The Hugging Face model that the argument MODEL of a calibration names.

    Raises:
        ArtifactError: there is no such thing, or a program: its text embeddings are not in it.
        CaptureError: a factory returns something else.
    """
    from torch import nn

    if _is_bundled(source):
        return _load_digits(source)[0]
    if not _FACTORY.fullmatch(source):
        raise ArtifactError(
            f"{source} is neither pkg.mod:factory nor digits",
            hint="a calibration runs the whole model: name a factory that returns it",
        )
    made = _find_factory(source)()
    model = made[0] if isinstance(made, tuple) else made
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{source} returned {type(made).__name__}, not a model")
    return model


def load_samples(source: str) -> Iterable[Any]:
    """Inputs of one prompt after the other, for a calibration.

    Raises:
        ArtifactError: there is no such thing.
    """
    if source == "digits":
        from vlmopt import digits

        return digits.calibration_samples(_load_digits(source)[1])
    if not _FACTORY.fullmatch(source):
        raise ArtifactError(
            f"{source} is neither pkg.mod:factory nor digits",
            hint="name a callable that returns the inputs of one prompt after the other",
        )
    return _find_factory(source)()  # type: ignore[no-any-return]


def load_pipeline(
    source: str, *, generations: int, steps: int, scheduler: str, guidance: float
) -> tuple[Any, list[dict[str, Any]]]:
    """The pipeline that the argument MODEL of a calibration names, and calls of it.

    Args:
        generations, steps, scheduler, guidance: of the bundled model; those of others are in the
            calls that their factory returns.

    Raises:
        ArtifactError: there is no such thing.
        CaptureError: a factory returns something else.
    """
    if source == DIGITS_DIT:
        from vlmopt import digit_diffusion

        pipe = digit_diffusion.DigitPipeline(scheduler=digit_diffusion.load_scheduler(scheduler))
        return pipe, digit_diffusion.calibration_calls(generations, steps=steps, guidance=guidance)
    if not _FACTORY.fullmatch(source):
        raise ArtifactError(
            f"{source} is neither pkg.mod:factory nor {DIGITS_DIT}",
            hint="name a callable that returns (pipeline, calls)",
        )
    made = _find_factory(source)()
    if not (isinstance(made, tuple) and len(made) == 2 and hasattr(made[0], "transformer")):
        raise CaptureError(
            f"{source} returned {type(made).__name__}, not (pipeline, calls)",
            hint="calls are keyword arguments of the pipeline, one dict for each generation",
        )
    return made[0], list(made[1])


def _is_bundled(source: str) -> bool:
    from vlmopt import digits

    return source in digits.MODELS


def _load_digits(name: str) -> tuple[Any, Any]:
    from transformers.utils.logging import disable_progress_bar

    from vlmopt import digits

    disable_progress_bar()  # reading a few megabytes is no news
    return digits.load_model(name=name)


def _capture_digits(name: str) -> Program:
    from vlmopt import digits
    from vlmopt.tracing import capture

    model, processor = _load_digits(name)
    scene, question = digits.heldout_samples(1)[0]
    return capture(model, dict(digits.batch(processor, [scene], [question])))


def _capture_digits_dit() -> Program:
    from vlmopt import digit_diffusion
    from vlmopt.denoising.pipelines import capture_pipeline

    (call,) = digit_diffusion.calibration_calls(1, size=1)
    return capture_pipeline(digit_diffusion.DigitPipeline(), **call)


def _call_factory(source: str) -> Program:
    from torch import nn

    from vlmopt.program import Program
    from vlmopt.tracing import capture

    made = _find_factory(source)()
    if isinstance(made, Program):
        return made
    if isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module):
        return capture(*made)
    raise CaptureError(
        f"{source} returned {type(made).__name__}, not a Program or a pair (model, inputs)"
    )


def _find_factory(source: str) -> Callable[[], Any]:
    module_name, _, name = source.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:  # as python -m does, and an installed script does not
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ArtifactError(
            f"{source}: there is no module {error.name}",
            hint="run in the folder that holds the module, or install it",
        ) from error
    factory = getattr(module, name, None)
    if not callable(factory):
        raise ArtifactError(f"module {module_name} has no callable {name}")
    return factory  # type: ignore[no-any-return]
