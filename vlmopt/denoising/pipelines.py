"""Capturing the denoiser of a diffusers pipeline, with what its loop is like."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmopt.denoising.following import LOOP
from vlmopt.errors import CaptureError
from vlmopt.program import Program
from vlmopt.runtime.encoder import bind
from vlmopt.tracing import capture


class _FirstCallError(Exception):
    """The pipeline has called its transformer; nothing more is needed of it."""

    def __init__(self, inputs: dict[str, Any]) -> None:
        super().__init__()
        self.inputs = inputs


def capture_pipeline(pipe: Any, *args: Any, **kwargs: Any) -> Program:
    """Capture the transformer of a diffusers pipeline with the inputs that a call gives it.

    The pipeline runs up to its first denoising step.

    Args:
        pipe: has a ``transformer`` and a ``scheduler``.
        args, kwargs: of a call of the pipeline, as it is to be accelerated: resolution, number of
            samples, guidance and number of steps are those that plans are for.

    Returns:
        One stage, ``denoiser``. What is known of the loop is kept: plans are checked against it.

    Raises:
        CaptureError: the call does not reach the transformer, or this cannot be traced.
    """
    model: nn.Module = pipe.transformer

    def record(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        raise _FirstCallError(bind(model, given, named))

    handle = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        pipe(*args, **kwargs)
    except _FirstCallError as first:
        inputs = first.inputs
    else:
        raise CaptureError(
            f"{type(pipe).__name__} did not call its transformer",
            hint="give the pipeline what it needs for one image, and at least one step",
        )
    finally:
        handle.remove()
    program = capture(model, {**inputs, "return_dict": False})
    program.metadata[LOOP] = loop_of(pipe)
    return program


def loop_of(pipe: Any) -> dict[str, Any]:
    """What a pipeline tells of the loop that it is in.

    Returns:
        ``scheduler``, the name of its class; ``steps``; ``guidance``, or ``None`` where the
        pipeline does not tell.
    """
    return {
        "scheduler": type(pipe.scheduler).__name__,
        "steps": getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps),
        "guidance": getattr(pipe, "guidance_scale", None),
    }
