"""An optimized model against an eager reference: same tokens, logits and generated text."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import zoo

import vlmopt
from oracles.methods import Choose
from oracles.reduced import ReducedOracle
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program
from vlmopt.runtime.model import Engine

Plan = list[tuple[int, Choose]]
Kept = dict[str, torch.Tensor]


class Captured:
    """One model under many pipelines: prompts of one shape are captured once."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.programs: dict[str, Program] = {}

    def optimize(self, text: str) -> Any:
        """``vlmopt.optimize(model, ..., text, backend="eager")``, for prompts of any shape."""
        engine = Engine(self.model, partial(run_pipeline, pipeline=text), "eager")
        engine.capture = self._program
        return engine.twin

    def _program(self, inputs: dict[str, Any]) -> Program:
        mask = inputs["attention_mask"]
        key = str((mask.shape, bool(mask.all()), zoo.visual(inputs).sum(1).tolist()))
        if key not in self.programs:
            self.programs[key] = vlmopt.capture(self.model, inputs)
        return self.programs[key].clone()


@cache
def captured(family: str) -> Captured:
    """The tiny model of a family, captured once for all tests of a process."""
    return Captured(zoo.build(family))


def check(
    model: Any | Captured,
    inputs: dict[str, Any],
    text: str,
    oracle: ReducedOracle | Callable[[Kept], ReducedOracle],
    *,
    tokens: int = 32,
) -> ReducedOracle:
    """Optimize ``model`` by the pipeline ``text``, and compare on ``inputs``.

    Args:
        oracle: the reference; or a function that makes it from what the optimized model kept at
            each cut, int64 ``[batch, slots]`` by the name of the cut.
        tokens: to generate; 0: none, such as where padding stands on the right.
    """
    if isinstance(model, Captured):
        optimized = model.optimize(text)
    else:
        optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    kept = out.past_key_values.kept
    if not isinstance(oracle, ReducedOracle):
        oracle = oracle(kept)
    stage = optimized.vlmopt.program["language_model"]
    here = oracle.real
    for cut, choice in zip(stage.cuts, oracle.choices, strict=True):
        # of a cut whose tokens come back, the next one knows nothing
        left = here & choice.stays
        here = left if choice.until is None else here
        assert _real(kept[f"{cut.kept}_slots"], oracle.real) == _places(left)
    last = stage.last_cut
    slots = torch.arange(inputs["input_ids"].shape[1]).expand_as(inputs["input_ids"])
    slots = slots if last is None else kept[f"{last.kept}_slots"]
    there = slots >= 0  # -1 fills up a shorter sample
    slots = slots.clamp(min=0)
    wanted = oracle.logits.gather(1, slots[..., None].expand(-1, -1, oracle.logits.shape[-1]))
    real = oracle.real.gather(1, slots) & there
    assert (out.logits - wanted)[real].abs().max() <= 1e-5
    if tokens:
        generated = optimized.generate(
            **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None
        )
        assert generated.tolist() == oracle.generate(tokens).tolist()
    return oracle


def assert_equals_oracle(
    model: Any | Captured,
    inputs: dict[str, torch.Tensor],
    text: str,
    plan: Callable[[Kept], Plan],
    *,
    tokens: int = 16,
) -> ReducedOracle:
    """:func:`check` for choices that an oracle can only take over, such as random ones."""
    visual = zoo.visual(inputs)
    eager = model.model if isinstance(model, Captured) else model
    return check(
        model,
        inputs,
        text,
        lambda kept: ReducedOracle(eager, inputs, visual, plan(kept)),
        tokens=tokens,
    )


def check_batch(
    model: Captured,
    text: str,
    inputs: dict[str, torch.Tensor],
    images: tuple[int, ...] = (),
    *,
    tokens: int = 32,
) -> None:
    """A left-padded batch equals its samples, each alone and without padding.

    The same tokens stay, their logits agree, and so do the ``tokens`` generated.

    Args:
        images: of each sample, default one.
    """
    optimized = model.optimize(text)
    together, kept, written = _answers(optimized, inputs, tokens)
    mask = inputs["attention_mask"].bool()
    for sample, gap in enumerate((~mask).sum(1).tolist()):
        logits, slots, answer = _answers(optimized, zoo.alone(inputs, sample, images), tokens)
        at = [n for n, slot in enumerate(kept[sample].tolist()) if slot >= 0 and mask[sample, slot]]
        assert [slot - gap for slot in kept[sample, at].tolist()] == slots[0].tolist()
        assert (together[sample, at] - logits[0]).abs().max() <= 1e-5
        assert written[sample].tolist() == answer[0].tolist()


def _answers(
    optimized: Any, inputs: dict[str, torch.Tensor], tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of the tokens left, their slots, -1 for fillers, and the tokens generated."""
    with torch.no_grad():
        out = optimized(**inputs)
    last = optimized.vlmopt.program["language_model"].last_cut
    prompt = inputs["input_ids"]
    slots = torch.arange(prompt.shape[1]).expand_as(prompt)
    slots = slots if last is None else out.past_key_values.kept[f"{last.kept}_slots"]
    written = optimized.generate(
        **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None
    )
    return out.logits, slots, written[:, prompt.shape[1] :]


def _places(mask: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row)[:, 0].tolist() for row in mask]


def _real(slots: torch.Tensor, real: torch.Tensor) -> list[list[int]]:
    """Slots of each sample without fillers and padding."""
    return [
        [slot for slot in row.tolist() if slot >= 0 and there[slot]]
        for row, there in zip(slots, real, strict=True)
    ]
