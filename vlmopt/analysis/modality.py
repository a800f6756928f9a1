"""Analysis ``modality``: which tokens come from vision, at the current end of all cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.errors import NoVisualTokensError
from vlmopt.program import Program, Role, Stage, fetch_attr


@dataclass(frozen=True)
class TokenModality:
    """Modality of the tokens still present.

    Attributes:
        source: int64 ``[batch, tokens]`` over the whole prompt, values of
            :class:`~vlmopt.program.Modality`.
        visual: visual tokens still present, per sample.
        kept: node with the original slot of each token still present, ``None`` before any cut.
        anchor: a value that only the language model depends on, where the stage holds more than
            the language model.
        fillers: fewer visual tokens than ``visual`` says may be left; others stand in for them.
    """

    source: fx.Node
    visual: tuple[int, ...]
    kept: fx.Node | None = None
    anchor: fx.Node | None = None
    fillers: bool = False


def token_stage(program: Program) -> Stage:
    """The stage in which tokens of vision and text flow together.

    Raises:
        NoVisualTokensError: no stage has visual tokens.
    """
    for stage in program:
        if _source(stage) is not None and any(stage.facts.get("visual_tokens", ())):
            return stage
    raise NoVisualTokensError(
        f"no token of this {program.model_type} program comes from vision",
        hint="capture it with inputs that hold an image; for a plain module name the input that "
        "tells modalities: capture(..., roles={'modality': Role.MODALITY})",
    )


def modality_of_tokens(stage: Stage, layer: int | None = None) -> TokenModality:
    """Modality of the tokens still present in a stage that :func:`token_stage` returned.

    Args:
        layer: present in this layer, bands from which tokens come back aside; ``None``: at the
            current end of all cuts.
    """
    anchor_name = stage.facts.get("anchor")
    anchor = _by_name(stage, anchor_name) if anchor_name else None
    source = _source(stage)
    assert source is not None, "token_stage chose a stage without modality"
    gone = [cut for cut in stage.cuts if cut.until is None]
    last = next((cut for cut in reversed(gone) if layer is None or cut.layer <= layer), None)
    if last is not None:
        visual = tuple(after for _, after in last.visual)
        return TokenModality(source, visual, stage.output_node(last.kept), anchor, last.fillers)
    return TokenModality(source, tuple(stage.facts["visual_tokens"]), None, anchor)


def embedding_table(program: Program) -> Tensor | None:
    """The table by which token ids become vectors, ``[vocabulary, width]``.

    ``None`` where no stage embeds ids, or weights are inputs (a graph of Dynamo's).
    """
    for stage in program:
        for port in stage.find_inputs(Role.INPUT_IDS):
            below = [stage.placeholder(port)]
            for node in below:
                if node.target is torch.ops.aten.embedding.default:
                    table: Any = node.args[0]
                    if table.op == "get_attr":
                        return fetch_attr(stage.graph_module, str(table.target))
                    return None
                below.extend(user for user in node.users if user not in below)
    return None


def visual_tokens_by_layer(stage: Stage) -> tuple[float, ...]:
    """Visual tokens that each layer computes, mean over samples; empty where there are none."""
    original = stage.facts.get("visual_tokens", ())
    found = []
    for port in stage.find_outputs(Role.KEY) if any(original) else ():
        counts = tuple(original)
        for cut in stage.cuts:
            if port.layer is not None and cut.covers(port.layer):
                counts = tuple(after for _, after in cut.visual)
        found.append(sum(counts) / len(counts))
    return tuple(found)


def _source(stage: Stage) -> fx.Node | None:
    ports = stage.find_inputs(Role.MODALITY)
    if ports:
        return stage.placeholder(ports[0])
    name = stage.facts.get("modality")
    return _by_name(stage, name) if name else None


def _by_name(stage: Stage, name: str) -> fx.Node:
    for node in stage.graph.nodes:
        if node.name == name:
            return node
    raise AssertionError(f"stage {stage.name} lost its node %{name}")
