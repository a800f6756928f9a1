"""Calibration: what a pass must know about a model beforehand, measured on sample inputs.

A calibrated pass measures each sample, and makes an artifact of all that it found. Many compare:
each sample is answered by the untouched program and by variants of it, such as one with a head
silenced, or without any visual token from some layer on. Others look at what enters the language
model, or at what it computes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vlmopt import artifacts, families
from vlmopt.analysis.modality import token_stage
from vlmopt.errors import ArtifactError, OptionError
from vlmopt.partial import PartialRows, PartialState
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.passes import Pass
from vlmopt.program import Program
from vlmopt.runtime.model import Engine
from vlmopt.tracing import capture, layout_of, modality_of

Variant = Callable[[Program], Any]
Sample = Mapping[str, Any]
Measure = Callable[[Sample], Any]
"""What a sample adds, as JSON values."""


class Learner(ABC):
    """A measure that learns: each sample changes its tensors."""

    @abstractmethod
    def __call__(self, sample: Sample) -> list[float]:
        """Learn from a sample; returns losses."""

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """All that it needs to go on from here."""

    @abstractmethod
    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`."""

    @abstractmethod
    def result(self) -> dict[str, Tensor]:
        """Tensors of the artifact."""


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


Run = Callable[[Sequence[int], Pass], list[float]]
"""``(key, pass) -> [divergence, *sums]`` for the model rewritten by the pass, over all samples: the
mean divergence of an answer, sums of what :meth:`Searched.trial` gives. What was run once under a
key is not run again."""


class Searched(Compared):
    """A calibrated pass that, knowing how its variants compare, tries settings one by one.

    Rows begin with the number of answers of a sample.
    """

    def measure(self, model: Any, program: Program, sample: Sample) -> Measure:
        answers = _Answers(model, self.variants(program), program, sample)
        return lambda one: [_count_answers(one), *answers.divergences(one)]

    @abstractmethod
    def search(self, program: Program, rows: Tensor, run: Run) -> dict[str, Any]:
        """The values of the artifact.

        Args:
            rows: float64 ``[samples, 1 + variants]``.
            run: tries a setting on all samples.
        """

    @abstractmethod
    def trial(self, reported: Mapping[str, Tensor]) -> list[float]:
        """What one sample adds beside the divergence.

        Args:
            reported: outputs of the rewritten model of the role ``counts``, by name.
        """


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


def observing(
    model: Any, watch: Callable[[Program], None], program: Program, sample: Sample
) -> Engine:
    """An engine whose graphs ``watch`` has changed in place, ready for prompts like ``sample``.

    Args:
        program: captured with ``sample``; stays as it is.
    """
    engine = Engine(model, watch, "eager")
    first = program.clone()
    watch(first)
    engine.add(first, None, sample)
    return engine


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

        engine = observing(model, watched, program, sample)

        def seen(one: Sample) -> Any:
            with torch.no_grad():
                engine.twin(**without_labels(one))
            return found.pop().tolist()

        return seen


class Learning(Calibrated):
    """A calibrated pass that learns tensors, from what its :class:`Learner` sees."""

    @abstractmethod
    def measure(self, model: Any, program: Program, sample: Sample) -> Learner: ...


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

    What is done is kept in ``PATH.partial``: called again after an interruption, it goes on from
    there, and deletes that file in the end.

    Args:
        model: a Hugging Face model; run in eval mode, left as it was.
        samples: inputs as its processor returns them, always in the same order; ``labels`` tell
            which tokens are answers to compare (-100 for the others), by default the next token.
        passes: the pass, with options.
        path: file to write: ``.safetensors`` for a pass that learns tensors, else JSON.
        progress: called with the samples done, and how many there are, if that is known.

    Returns:
        The values of the artifact.

    Raises:
        OptionError: the pass needs no calibration.
        ArtifactError: the file exists and ``overwrite`` is false, or its name does not fit; there
            are no samples; the partial file is of another calibration.
        VlmoptError: see :func:`vlmopt.capture`.
    """
    if not isinstance(passes, Calibrated):
        raise OptionError(
            f"{passes.name} needs no calibration",
            hint="vlmopt passes NAME tells which options take an artifact",
        )
    if isinstance(passes, Searched) and not isinstance(samples, Sequence):
        samples = list(samples)  # run once for each setting
    path = Path(path)
    artifacts.require_writable(path, isinstance(passes, Learning), overwrite=overwrite)
    total = len(samples) if isinstance(samples, Sequence) else None
    remaining = iter(samples)
    first = next(remaining, None)
    if first is None:
        raise ArtifactError("there are no samples to calibrate on", hint="give at least one")
    training = model.training
    model.eval()
    try:
        program = capture(model, without_labels(first))
        measure = passes.measure(model, program, first)
        done = _begin(path.with_name(path.name + ".partial"), str(passes), measure)
        for count, sample in enumerate(chain([first], remaining), start=1):
            if count > len(done.rows):
                done.add(measure(sample))
            if progress is not None:
                progress(count, total)
        partials = [done]
        if isinstance(passes, Searched):
            assert isinstance(samples, Sequence), "made so above"
            trials = _Trials(model, samples, passes, path, progress, (program, first))
            rows = torch.tensor(done.rows, dtype=torch.float64)
            values = passes.search(program, rows, trials.run)
            partials.append(trials.done)
        else:
            values = passes.summarise(program, done.rows)
    finally:
        model.train(training)
    values = {"options": str(passes), "samples": len(done.rows), **values}
    tensors = measure.result() if isinstance(measure, Learner) else None
    artifacts.write(path, passes.name, program, values, tensors, overwrite=overwrite)
    for partial_file in partials:
        partial_file.remove()
    return values


def _begin(path: Path, options: str, measure: Measure | Learner) -> PartialRows | PartialState:
    if not isinstance(measure, Learner):
        return PartialRows(path, options)
    done = PartialState(path, options, measure.state)
    if done.tensors:
        measure.restore(done.tensors)
    return done


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
            reference, _ = _answers(self.model, sample)
            found = [_answers(engine.twin, sample)[0] for engine in self.engines]
        return [float(_divergence(reference, other)) for other in found]


class _Trials:
    """Runs a model rewritten in different ways on all samples, and remembers the results.

    Args:
        path: of the artifact; results are kept beside it.
        captured: the model as captured with a sample.
    """

    def __init__(
        self,
        model: Any,
        samples: Sequence[Sample],
        passes: Searched,
        path: Path,
        progress: Callable[[int, int | None], None] | None,
        captured: tuple[Program, Sample],
    ) -> None:
        self.model = model
        self.samples = samples
        self.passes = passes
        self.progress = progress
        self.done = PartialRows(path.with_name(path.name + ".trials.partial"), str(passes))
        program, sample = captured
        self._programs = {self._key(sample): program}

    def run(self, key: Sequence[int], one: Pass) -> list[float]:
        for row in self.done.rows:
            if row["key"] == list(key):
                return list(row["found"])
        engine = Engine(self.model, partial(run_pipeline, pipeline=[one]), "eager")
        engine.capture = self._capture
        harm, answers = 0.0, 0
        sums: list[float] = []
        for sample in self.samples:
            with torch.no_grad():
                reference, _ = _answers(self.model, sample)
                found, result = _answers(engine.twin, sample)
            count = _count_answers(sample)
            harm += count * float(_divergence(reference, found))
            answers += count
            added = self.passes.trial(result.past_key_values.reported)
            sums = [
                one + other for one, other in zip(sums or [0.0] * len(added), added, strict=True)
            ]
        outcome = [harm / answers, *sums]
        self.done.add({"key": list(key), "found": outcome})
        if self.progress is not None:
            self.progress(len(self.done.rows), None)
        return outcome

    def _capture(self, inputs: dict[str, Any]) -> Program:
        """One capture serves all trials of prompts of one shape."""
        key = self._key(inputs)
        if key not in self._programs:
            self._programs[key] = capture(self.model, inputs)
        return self._programs[key].clone()

    def _key(self, inputs: Sample) -> str:
        visual = families.visual_token_ids(self.model.config)
        modality = modality_of(inputs["input_ids"], inputs.get("attention_mask"), visual)
        return str(layout_of(modality))


def _entering(model: Any, sample: Sample) -> tuple[Tensor, Tensor]:
    """Embeddings of a prompt, and the modality of each."""
    entered: list[Tensor] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        entered.append(kwargs["inputs_embeds"])

    hook = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        with torch.no_grad():
            model(**without_labels(sample))
    finally:
        hook.remove()
    visual = families.visual_token_ids(model.config)
    return entered[0], modality_of(sample["input_ids"], sample.get("attention_mask"), visual)


def _answers(model: Any, sample: Sample) -> tuple[Tensor, Any]:
    """Log-probabilities of the answers, and what the model returns.

    Answers are the tokens that ``labels`` of the sample name (not -100), given those before them;
    without labels the token after the prompt.

    Returns:
        float64 ``[answers, vocabulary]``.
    """
    labels = sample.get("labels")
    result = model(**without_labels(sample))
    logits = result.logits
    if labels is None:
        found = logits[:, -1]
    else:
        # counted from the end: tokens that were dropped stood before
        asked = (labels[:, 1:] != -100)[:, -logits.shape[1] + 1 :]
        found = logits[:, :-1][asked]
    return torch.log_softmax(found.double(), dim=-1), result


def without_labels(sample: Sample) -> dict[str, Any]:
    """The prompt of a sample, and nothing of its answers."""
    return {name: value for name, value in sample.items() if name != "labels"}


def _count_answers(sample: Sample) -> int:
    labels = sample.get("labels")
    return len(sample["input_ids"]) if labels is None else int((labels[:, 1:] != -100).sum())


def _divergence(reference: Tensor, other: Tensor) -> Tensor:
    return (reference.exp() * (reference - other)).sum(-1).mean()
