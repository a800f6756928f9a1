"""Methods under test: which there are, and how each is written for one cut."""

from __future__ import annotations

from vlmopt.passes import PASSES
from vlmopt.passes.frames.base import FrameDrop
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.passes.tokens.patch_prune import PatchPrune
from vlmopt.pipeline.options import option_types
from vlmopt.pipeline.registry import find_pass


def token_methods(*, calibrated: bool = False) -> list[str]:
    """Names of the passes that drop visual tokens in the language model, as they come.

    Not those that choose before the vision encoder, or among the frames of a video.

    Args:
        calibrated: those too that cannot do without an artifact.
    """
    found = [(name, find_pass(name)) for name in PASSES]
    drops = [(name, one) for name, one in found if issubclass(one, TokenDrop)]
    return [
        name
        for name, one in drops
        if (calibrated or not needs_artifact(name)) and not issubclass(one, (PatchPrune, FrameDrop))
    ]


def needs_artifact(method: str) -> bool:
    """Whether a method must be told what to look for."""
    return "anchors" in option_types(find_pass(method))


def one_cut(
    method: str, layer: int, keep: float | int, *, last: int | None = None, artifact: str = ""
) -> str:
    """The pipeline that keeps ``keep`` of the visual tokens from ``layer`` on, at their positions.

    What a method scores before the cut begins at layer 0.

    Args:
        last: of the layers; a method that leaves tokens out of single layers does so in all up to
            there, else in ``layer`` only.
        artifact: path of what a calibration found.
    """
    options = option_types(find_pass(method))
    through = layer if last is None or not getattr(find_pass(method), "restores", False) else last
    chosen = [f"layers={','.join(map(str, range(layer, through + 1)))}", f"keep={keep}"]
    if find_pass(method).__dataclass_fields__["positions"].default != "keep":
        chosen.append("positions=keep")
    if "scored" in options:
        chosen.append(f"scored={layer}")
    if "basis" in options:
        chosen.append("basis=4")
    if "tau_att" in options:
        chosen.append("tau_att=0")
    if artifact:
        chosen.append(f"artifact={artifact}")
    return f"{method}{{{' '.join(chosen)}}}"
