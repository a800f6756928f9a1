"""Calibration: what a pass must know about a model beforehand, measured on sample inputs.

A calibrated pass measures each sample, and makes an artifact of all that it found. Many compare:
each sample is answered by the untouched program and by variants of it, such as one with a head
silenced, or without any visual token from some layer on. Others look at what enters the language
model, or at what it computes.
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
from vlmopt.analysis.modality import token_stage
from vlmopt.errors import ArtifactError, OptionError
from vlmopt.pipeline.passes import Pass
from vlmopt.program import Program
from vlmopt.runtime.model import Engine
from vlmopt.tracing import capture, modality_of

Variant = Callable[[Program], Any]
Sample = Mapping[str, Any]
Measure = Callable[[Sample], Any]
"""What a sample adds, as JSON values."""


class Calibrated(ABC):
    """What a pass that can be calibrated adds to :class:`~vlmopt.pipeline.passes.Pass`."""

    @abstractmethod
    def measure(self, model: Any, program: Program, sample: Sample) -> Measure:
        """A function that measures one sample.

        Args:
            program, sample: the captured model, and the sample that it was captured with.
        """

    def summarise(self, program: Program, rows: list[Any]) -> dict[str, Any]:
        """The values of the artifact, from what was measured on each sample."""
        return self.conclude(torch.tensor(rows, dtype=torch.float64))

    def conclude(self, rows: Tensor) -> dict[str, Any]:
        """:meth:`summarise` where as many numbers are measured on each sample.

        Args:
            rows: float64 ``[samples, values]``.
        """
        raise NotImplementedError


class Compared(Calibrated):
    """A calibrated pass that compares answers.

    Its rows are the Kullback-Leibler divergence in nats of the next token's distribution of each
    variant from that of the untouched program, mean over the batch of a sample.
    """

    @abstractmethod
    def variants(self, program: Program) -> list[Variant]:
        """Rewrites of the program in place, whose answers are compared with its own."""

    def measure(self, model: Any, program: Program, sample: Sample) -> Measure:
        return _Answers(model, self.variants(program), program, sample).divergences


class Embedded(Calibrated):
    """A calibrated pass that looks at what enters the language model."""

    @abstractmethod
    def look(self, program: Program, hidden: Tensor, modality: Tensor) -> Any:
        """What one sample adds, as JSON values.

        Args:
            hidden: input of the first layer, ``[batch, tokens, width]``.
            modality: int64 ``[batch, tokens]``, values of :class:`~vlmopt.program.Modality`.
        """

    def measure(self, model: Any, program: Program, sample: Sample) -> Measure:
        return lambda one: self.look(program, *_entering(model, one))


class Watched(Calibrated):
    """A calibrated pass that looks at what the untouched language model computes of prompts."""

    @abstractmethod
    def watch(self, program: Program) -> None:
        """Add one output behind those of the stage where tokens flow: ``[batch, ...]``."""

    def measure(self, model: Any, program: Program, sample: Sample) -> Measure:
        found: list[Tensor] = []

        def watched(one: Program) -> None:
            self.watch(one)
            module = token_stage(one).graph_module
            module.register_forward_hook(lambda _, args, results: found.append(results[-1]))

        engine = Engine(model, watched, "eager")
        first = program.clone()
        watched(first)
        engine.add(first, None, sample)

        def seen(one: Sample) -> Any:
            with torch.no_grad():
                engine.twin(**one)
            return found.pop().tolist()

        return seen


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
        model: a Hugging Face model; run in eval mode, left as it was.
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
    if not isinstance(passes, Calibrated):
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
    program: Program | None = None
    measure: Measure | None = None
    training = model.training
    model.eval()
    try:
        for count, sample in enumerate(samples, start=1):
            if program is None:
                first, program = sample, capture(model, dict(sample))
            if count > len(done.rows):
                measure = measure or passes.measure(model, program, first)
                done.add(measure(sample))
            if progress is not None:
                progress(count, total)
    finally:
        model.train(training)
    if program is None:
        raise ArtifactError("there are no samples to calibrate on", hint="give at least one")
    values = passes.summarise(program, done.rows)
    values = {"options": str(passes), "samples": len(done.rows), **values}
    artifacts.write(path, passes.name, program, values, overwrite=overwrite)
    done.remove()
    return values


class _Answers:
    """The next token's distribution, by the untouched program and by its variants.

    Args:
        program: the model as captured with ``sample``.
    """

    def __init__(
        self, model: Any, variants: Sequence[Variant], program: Program, sample: Sample
    ) -> None:
        self.model = model
        self._captured = sample, program
        self._sample = sample
        self.engines = [Engine(model, variant, "eager") for variant in variants]
        for engine in self.engines:
            engine.capture = self._capture

    def _capture(self, inputs: dict[str, Any]) -> Program:
        """One capture serves all variants of a sample."""
        if self._captured[0] is not self._sample:
            self._captured = self._sample, capture(self.model, inputs)
        return self._captured[1].clone()

    def divergences(self, sample: Sample) -> list[float]:
        self._sample = sample
        with torch.no_grad():
            reference = _next_token(self.model, sample)
            found = [_next_token(engine.twin, sample) for engine in self.engines]
        return [float(_divergence(reference, other)) for other in found]


def _entering(model: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """Embeddings of a prompt, and the modality of each."""
    entered: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        entered.append(kwargs["inputs_embeds"])

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**sample)
    finally:
        hook.remove()
    visual = families.visual_token_ids(model.config)
    return entered[0], modality_of(sample["input_ids"], sample.get("attention_mask"), visual)


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
