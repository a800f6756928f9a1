"""An optimized model against the oracle: same tokens, same logits, same text generated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import zoo

import vlmopt
from oracles.methods import Choose
from oracles.reduced import ReducedOracle

Plan = list[tuple[int, Choose]]


def assert_equals_oracle(
    model: Any,
    inputs: dict[str, torch.Tensor],
    text: str,
    plan: Callable[[dict[str, torch.Tensor]], Plan],
    *,
    tokens: int = 16,
) -> ReducedOracle:
    """Optimize by ``text``, and compare with hiding what ``plan`` chooses.

    Args:
        plan: gets what the optimized model kept at each cut, int64 ``[batch, slots]`` by the name
            of the cut, for the choices that an oracle can only take over (random ones).
        tokens: to generate.
    """
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    kept = out.past_key_values.kept
    oracle = ReducedOracle(model, inputs, zoo.visual(inputs), plan(kept))
    stage = optimized.vlmopt.program["language_model"]
    here = oracle.real
    for cut, choice in zip(stage.cuts, oracle.choices, strict=True):
        here = here & choice.stays
        assert _real(kept[f"{cut.kept}_slots"], oracle.real) == _places(here)
    last = kept[f"{stage.last_cut.kept}_slots"]
    slots = last.clamp(min=0)
    wanted = oracle.logits.gather(1, slots[..., None].expand(-1, -1, oracle.logits.shape[-1]))
    real = oracle.real.gather(1, slots) & (last >= 0)
    assert (out.logits - wanted)[real].abs().max() <= 1e-5
    generated = optimized.generate(
        **inputs, do_sample=False, max_new_tokens=tokens, eos_token_id=None
    )
    assert generated.tolist() == oracle.generate(tokens).tolist()
    return oracle


def _places(mask: torch.Tensor) -> list[list[int]]:
    return [torch.nonzero(row)[:, 0].tolist() for row in mask]


def _real(slots: torch.Tensor, real: torch.Tensor) -> list[list[int]]:
    """Slots of each sample without fillers and padding."""
    return [
        [slot for slot in row.tolist() if slot >= 0 and there[slot]]
        for row, there in zip(slots, real, strict=True)
    ]
