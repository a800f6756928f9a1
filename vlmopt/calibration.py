"""Calibration: what a pass must know about a model beforehand, measured on sample prompts.

A calibrated pass names variants of a program: a head silenced, all visual tokens gone from some
layer on. Each sample is answered by the untouched program and by every variant, and the pass makes
an artifact of how far the answers lie apart. A measured pass looks at what the language model
reads instead.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmopt import artifacts, families
from vlmopt.errors import ArtifactError, OptionError
from vlmopt.pipeline.passes import Pass
from vlmopt.program import Program
from vlmopt.runtime.model import Engine
from vlmopt.tracing import capture, modality_of

Variant = Callable[[Program], Any]
Sample = Mapping[str, Any]


class Calibrated(ABC):
    """What a pass that can be calibrated adds to :class:`~vlmopt.pipeline.passes.Pass`."""

    @abstractmethod
    def variants(self, program: Program) -> list[Variant]:
        """Rewrites of the program in place, whose answers are compared with its own."""

    @abstractmethod
    def conclude(self, divergences: Tensor) -> dict[str, Any]:
        """The values of the artifact.

        Args:
            divergences: float64 ``[samples, variants]``, Kullback-Leibler divergence in nats of
                the next token's distribution of each variant from that of the untouched program,
                mean over the batch of a sample.
        """


class Measured(ABC):
    """What a pass adds that is calibrated on the tokens that enter the language model."""

    @abstractmethod
    def measure(self, program: Program, hidden: Tensor, modality: Tensor) -> Any:
        """What one sample adds, as JSON values.

        Args:
            hidden: input of the first layer, ``[batch, tokens, width]``.
            modality: int64 ``[batch, tokens]``, values of :class:`~vlmopt.program.Modality`.
        """

    @abstractmethod
    def summarise(self, program: Program, rows: list[Any]) -> dict[str, Any]:
        """The values of the artifact, from what :meth:`measure` returned for each sample."""


def calibrate(
    model: Any,
    samples: Iterable[Sample],
    passes: Pass,
    path: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int | None], None] | None = None,
) -> dict[str, Any]:
    """Measure a model for one pass, and write the artifact.

    What is done is kept in ``PATH.partial``, sample by sample: called again after an interruption,
    it goes on from there, and deletes that file in the end.

    Args:
        model: a Hugging Face vision-language model.
        samples: inputs as its processor returns them, always in the same order.
        passes: the pass, with options.
        path: JSON file to write.
        progress: called with the samples done, and how many there are, if that is known.

    Returns:
        The values of the artifact.

    Raises:
        OptionError: the pass needs no calibration.
        ArtifactError: the file exists and ``overwrite`` is false; there are no samples; the partial
            file is of another calibration.
        VlmoptError: see :func:`vlmopt.capture`.
    """
    if not isinstance(passes, (Calibrated, Measured)):
        raise OptionError(
            f"{passes.name} needs no calibration",
            hint="vlmopt passes NAME tells which options take an artifact",
        )
    path = Path(path)
    if path.exists() and not overwrite:
        raise ArtifactError(f"{path} exists already", hint="choose another name, or overwrite it")
    total = len(samples) if isinstance(samples, Sequence) else None
    if total == 0:
        raise ArtifactError("there are no samples to calibrate on", hint="give at least one")
    done = _Partial(path.with_name(path.name + ".partial"), str(passes))
    answers: _Inputs | _Answers
    answers = _Inputs(model, passes) if isinstance(passes, Measured) else _Answers(model, passes)
    count = 0
    for count, sample in enumerate(samples, start=1):
        if count > len(done.rows):
            done.add(answers.row(sample))
        elif answers.program is None:
            answers.prepare(sample)
        if progress is not None:
            progress(count, total)
    if not count:
        raise ArtifactError("there are no samples to calibrate on", hint="give at least one")
    assert answers.program is not None
    if isinstance(passes, Measured):
        values = passes.summarise(answers.program, done.rows)
    else:
        values = passes.conclude(torch.tensor(done.rows, dtype=torch.float64))
    values = {"options": str(passes), "samples": len(done.rows), **values}
    artifacts.write(path, passes.name, answers.program, values, overwrite=overwrite)
    done.remove()
    return values


class _Answers:
    """The next token's distribution, by the untouched program and by its variants."""

    def __init__(self, model: Any, passes: Calibrated) -> None:
        self.model = model
        self.passes = passes
        self.program: Program | None = None
        self.engines: list[Engine] = []
        self._captured: tuple[Sample, Program] | None = None
        self._sample: Sample = {}

    def prepare(self, sample: Sample) -> None:
        """Make an engine for each variant."""
        self._sample = sample
        self.program = self._capture(dict(sample))
        variants = self.passes.variants(self.program)
        self.engines = [Engine(self.model, variant, "eager") for variant in variants]
        for engine in self.engines:
            engine.capture = self._capture

    def _capture(self, inputs: dict[str, Any]) -> Program:
        """One capture serves all variants of a sample."""
        if self._captured is None or self._captured[0] is not self._sample:
            self._captured = self._sample, capture(self.model, inputs)
        return self._captured[1].clone()

    def row(self, sample: Sample) -> list[float]:
        """Divergences of the variants."""
        if not self.engines:
            self.prepare(sample)
        self._sample = sample
        with torch.no_grad():
            reference = _next_token(self.model, sample)
            found = [_next_token(engine.twin, sample) for engine in self.engines]
        return [float(_divergence(reference, other)) for other in found]


class _Inputs:
    """What enters the language model."""

    def __init__(self, model: Any, passes: Measured) -> None:
        self.model = model
        self.passes = passes
        self.program: Program | None = None

    def prepare(self, sample: Sample) -> None:
        self.program = capture(self.model, dict(sample))

    def row(self, sample: Sample) -> Any:
        """What the pass measures on the sample."""
        if self.program is None:
            self.prepare(sample)
        assert self.program is not None
        entered: list[Tensor] = []

        def note(module: Any, args: Any, kwargs: Any) -> None:
            entered.append(kwargs["inputs_embeds"])

        hook = self.model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
        try:
            with torch.no_grad():
                self.model(**sample)
        finally:
            hook.remove()
        visual = families.visual_token_ids(self.model.config)
        modality = modality_of(sample["input_ids"], sample.get("attention_mask"), visual)
        return self.passes.measure(self.program, entered[0], modality)


def _next_token(model: Any, sample: Sample) -> Tensor:
    """Log-probabilities of the token after the last one that is not padding: float64."""
    logits = model(**sample).logits.double()
    return torch.log_softmax(logits[:, -1], dim=-1)


def _divergence(reference: Tensor, other: Tensor) -> Tensor:
    return (reference.exp() * (reference - other)).sum(-1).mean()


class _Partial:
    """Rows of an interrupted calibration, one JSON line each after a line that says whose."""

    def __init__(self, path: Path, options: str) -> None:
        self.path = path
        self.rows: list[Any] = []
        if not path.exists():
            path.write_text(json.dumps({"options": options}) + "\n")
            return
        lines = path.read_text().splitlines()
        if not lines or json.loads(lines[0]) != {"options": options}:
            raise ArtifactError(
                f"{path} is what is left of another calibration",
                hint="delete it to start anew",
            )
        self.rows = [json.loads(line) for line in lines[1:]]

    def add(self, row: Any) -> None:
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")

    def remove(self) -> None:
        self.path.unlink(missing_ok=True)
