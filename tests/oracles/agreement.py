"""An optimized model against an eager reference: same tokens, logits and generated text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import zoo

import vlmopt
from oracles.methods import Choose
from oracles.reduced import ReducedOracle

Plan = list[tuple[int, Choose]]
Kept = dict[str, torch.Tensor]


def check(
    model: Any,
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
        tokens: to generate.
    """
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
    generated = optimized.generate(
        **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None
    )
    assert generated.tolist() == oracle.generate(tokens).tolist()
    return oracle


def assert_equals_oracle(
    model: Any,
    inputs: dict[str, torch.Tensor],
    text: str,
    plan: Callable[[Kept], Plan],
    *,
    tokens: int = 16,
) -> ReducedOracle:
    """:func:`check` for choices that an oracle can only take over, such as random ones."""
    visual = zoo.visual(inputs)
    return check(
        model,
        inputs,
        text,
        lambda kept: ReducedOracle(model, inputs, visual, plan(kept)),
        tokens=tokens,
    )


def _places(mask: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row)[:, 0].tolist() for row in mask]


def _real(slots: torch.Tensor, real: torch.Tensor) -> list[list[int]]:
    """Slots of each sample without fillers and padding."""
    return [
        [slot for slot in row.tolist() if slot >= 0 and there[slot]]
        for row, there in zip(slots, real, strict=True)
    ]
