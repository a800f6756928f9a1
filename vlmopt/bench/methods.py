"""Methods under test: which there are, and how each is written for one cut."""

from __future__ import annotations

from vlmopt.passes import PASSES
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.patch_prune import PatchPrune
from vlmopt.pipeline.options import option_types
from vlmopt.pipeline.registry import find_pass


def token_methods() -> list[str]:
    """Names of the passes that drop visual tokens in the language model, as they come.

    Not those that must be told what to look for, nor those that choose before the vision encoder.
    """
    found = [(name, find_pass(name)) for name in PASSES]
    drops = [(name, one) for name, one in found if issubclass(one, TokenDrop)]
    return [
        name
        for name, one in drops
        if "anchors" not in option_types(one) and not issubclass(one, PatchPrune)
    ]


def one_cut(method: str, layer: int, keep: float | int) -> str:
    """The pipeline that keeps ``keep`` of the visual tokens from ``layer`` on, at their positions.

    What a method scores before the cut begins at layer 0.
    """
    options = option_types(find_pass(method))
    chosen = [f"layers={layer}", f"keep={keep}"]
    if find_pass(method).__dataclass_fields__["positions"].default != "keep":
        chosen.append("positions=keep")
    if "scored" in options:
        chosen.append(f"scored={layer}")
    if "basis" in options:
        chosen.append("basis=4")
    if "tau_att" in options:
        chosen.append("tau_att=0")
    return f"{method}{{{' '.join(chosen)}}}"
