"""Analysis ``encoder``: blocks of a vision encoder, and the tokens in front of the patches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from vlmopt.analysis.layers import Layers, find_layers, layer_of
from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_mask, is_causal
from vlmopt.graph.reach import is_weight, reached, sources
from vlmopt.program import Program, Stage

aten = torch.ops.aten


@dataclass(frozen=True)
class Encoder:
    """Blocks in which every patch attends to every other of its image.

    Attributes:
        special: learned tokens in front of the patches (class token, registers).
        patches: patches of an image.
        batch: images.
    """

    stage: Stage
    layers: Layers
    special: int
    patches: int
    batch: int

    @property
    def tokens(self) -> int:
        """Special tokens and patches."""
        return self.special + self.patches


def encoder_stage(program: Program) -> Stage:
    """The stage that encodes images: ``vision_encoder``, or the only one of a plain module.

    Raises:
        PreconditionError: there is none.
    """
    for name in ("vision_encoder", "model"):
        if name in program:
            return program[name]
    raise PreconditionError(
        f"this {program.model_type} program has no vision encoder: its stages are "
        f"{', '.join(program.stages)}",
        hint="capture the encoder as a module of its own: vlmopt.capture(encoder, inputs)",
    )


def find_encoder(stage: Stage) -> Encoder:
    """What is known of the encoder in a stage, masks that hide nothing having been dropped.

    Raises:
        PreconditionError: patches of an image do not form one sequence in which all attend to all.
    """
    _require_images(stage)
    layers = find_layers(stage)
    entry = layers.entries[0]
    batch, tokens, _ = entry.meta["val"].shape
    if not isinstance(tokens, int) or not isinstance(batch, int):
        raise PreconditionError(
            f"the number of patches in stage {stage.name} is not known when the graph is rewritten",
            node=entry,
            hint="capture with images of one size",
        )
    require_open(stage, layers)
    special = special_tokens(stage, layers)
    return Encoder(stage, layers, special, tokens - special, batch)


def special_tokens(stage: Stage, layers: Layers) -> int:
    """Learned tokens in front of the patches of an image, the class token first.

    Raises:
        PreconditionError: there are some behind the patches.
    """
    entry = layers.entries[0]
    if entry.meta["val"].ndim != 3:  # patches of all images in one row
        return 0
    runs = _Origins(stage.graph).runs(entry)
    if any(learned for learned, _ in runs[1:]):
        raise PreconditionError(
            f"stage {stage.name} has learned tokens behind its patches, which are read by position",
            node=entry,
        )
    return runs[0][1] if runs[0][0] and len(runs) > 1 else 0


def _require_images(stage: Stage) -> None:
    """Refuse blocks that take the patches of all images in one row."""
    projections: list[Any] = [
        node
        for node in stage.graph.find_nodes(op="call_function", target=aten.linear.default)
        if layer_of(node) is not None
    ]
    if projections and all(node.args[0].meta["val"].ndim == 2 for node in projections):
        raise PreconditionError(
            f"the blocks of stage {stage.name} take the patches of all images in one row "
            "[patches, width], cut into images or windows for attention at fixed places",
            node=projections[0],
            hint="reduce tokens in the language model instead, for example with v2drop",
        )


def require_open(stage: Stage, layers: Layers) -> None:
    """Refuse attention in which some tokens do not see some others.

    Raises:
        PreconditionError: there is some.
    """
    for node in layers.of:
        if node.target is not aten.scaled_dot_product_attention.default:
            continue
        mask = attention_mask(node)
        if is_causal(node):
            raise PreconditionError(
                f"the blocks of stage {stage.name} are a decoder's: no token sees a later one",
                node=node,
                hint="there are other passes for decoders, for example v2drop",
            )
        if mask is not None:
            above = reached([mask], sources)
            read = sorted(value.name for value in above if value.op == "placeholder")
            why = (
                f"as {', '.join(read)} says when it is run" if read else "such as those of another"
            )
            raise PreconditionError(
                f"attention in stage {stage.name} hides some patches from others, {why}: which of "
                "them may become one is not known",
                node=node,
                hint="reduce tokens in the language model instead, for example with v2drop"
                if read
                else "capture with one image",
            )


class _Origins:
    """Which rows of a value come from learned parameters alone."""

    def __init__(self, graph: fx.Graph) -> None:
        self.from_inputs: set[fx.Node] = set()
        for node in graph.nodes:
            given = node.op == "placeholder" and not is_weight(node)
            if given or any(value in self.from_inputs for value in node.all_input_nodes):
                self.from_inputs.add(node)

    def runs(self, node: fx.Node) -> list[tuple[bool, int]]:
        """``(learned, length)`` of runs of rows along dimension 1, in order."""
        runs = self._runs(node)
        joined: list[tuple[bool, int]] = []
        for learned, length in runs:
            if joined and joined[-1][0] == learned:
                joined[-1] = learned, joined[-1][1] + length
            elif length:
                joined.append((learned, length))
        return joined

    def _runs(self, node: fx.Node) -> list[tuple[bool, int]]:
        shape = node.meta["val"].shape
        length = int(shape[1])
        if node not in self.from_inputs:
            return [(True, length)]
        if node.target is aten.cat.default:
            dim = node.args[1] if len(node.args) > 1 else 0
            if dim in (1, 1 - len(shape)):
                parts: Any = node.args[0]
                return [run for part in parts for run in self._runs(part)]
        source = self._source(node)
        if source is None:
            return [(False, length)]
        runs = self._runs(source)
        if node.target is aten.slice.Tensor and node.args[1:2] in ((1,), (1 - len(shape),)):
            rows = [learned for learned, count in runs for _ in range(count)]
            given: list[Any] = [*node.args[2:5], None, None, None]
            start, stop, step = given[:3]
            stop = None if stop is None else min(int(stop), len(rows))
            return [(learned, 1) for learned in rows[slice(start, stop, step)]]
        return runs

    def _source(self, node: fx.Node) -> fx.Node | None:
        """The value whose rows an operator works on one by one, if there is just one."""
        from_inputs = [value for value in node.all_input_nodes if value in self.from_inputs]
        if len(from_inputs) != 1:
            return None
        (source,) = from_inputs
        have, value = node.meta["val"], source.meta["val"]
        by_rows = torch.Tag.pointwise in getattr(node.target, "tags", ()) or node.target in _BY_ROWS
        if not by_rows or not isinstance(value, torch.Tensor) or value.ndim != have.ndim:
            return None
        sliced = node.target is aten.slice.Tensor
        return source if sliced or value.shape[1] == have.shape[1] else None


_BY_ROWS = {
    aten.slice.Tensor,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.dropout.default,
    aten.layer_norm.default,
    aten.linear.default,
}
