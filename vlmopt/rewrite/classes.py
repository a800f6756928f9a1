"""The class of each token in a layer: padding, text, vision, or special."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from vlmopt.analysis.modality import modality_of_tokens
from vlmopt.errors import PreconditionError
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Cut, Modality, Port, Role, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.tokens import modality_of_kept

SPECIAL = 3
"""Beside the values of :class:`~vlmopt.program.Modality`: text that is a marker of the prompt's
form, such as the turns of a chat."""


class TokenClasses:
    """Makes the classes of the tokens of a stage when they are asked for, once for all layers.

    Args:
        special: ids of special tokens; where there are any, the stage takes ``input_ids`` too.
        prefix: first part of the names of new nodes.
    """

    def __init__(
        self, stage: Stage, special: tuple[int, ...], ctx: PassContext, prefix: str
    ) -> None:
        self.stage = stage
        self.special = special
        self.ctx = ctx
        self.prefix = prefix
        self._whole: fx.Node | None = None
        self._made: dict[str, fx.Node] = {}

    def of(self, layer: int, stream: fx.Node) -> fx.Node | None:
        """Classes of the tokens present in a layer.

        Args:
            stream: a value of that layer, ``[batch, tokens, width]``.

        Returns:
            int64 ``[batch, tokens]``; ``None`` where all are text, as in decoding.

        Raises:
            PreconditionError: it cannot be told which tokens are present.
        """
        if self.stage.find_inputs(Role.KEY):
            return None
        if self._whole is None:
            self._whole = self._of_prompt()
        if self._whole is None:
            return None
        cut = next((cut for cut in reversed(self.stage.cuts) if cut.covers(layer)), None)
        classes = self._whole if cut is None else self._of_kept(cut)
        if classes.meta["val"].shape != stream.meta["val"].shape[:2]:
            raise PreconditionError(
                f"layer {layer} has {tuple(stream.meta['val'].shape[:2])} tokens, and those of "
                f"{tuple(classes.meta['val'].shape)} are known",
                node=stream,
                hint="put passes that change tokens of single layers behind this one",
            )
        return classes

    def _emitter(self, place: fx.Node) -> Emitter:
        return Emitter.of_pass(self.ctx, self.stage, place, self.prefix)

    def _of_prompt(self) -> fx.Node | None:
        stage = self.stage
        if stage.find_inputs(Role.MODALITY) or stage.facts.get("modality"):
            source: fx.Node | None = modality_of_tokens(stage).source
        else:
            source = self._by_mask()
        if source is None or not self.special:
            return source
        ids = input_ids(stage, self.ctx)
        emit = self._emitter(source)
        with stage.graph.inserting_before(_after(source, ids)):
            found: fx.Node = emit.trace(
                _with_special, source, ids, self.special, names=("classes",)
            )
        return found

    def _by_mask(self) -> fx.Node | None:
        """Text and padding, as an attention mask tells them."""
        for port in self.stage.find_inputs(Role.ATTENTION_MASK):
            mask = self.stage.placeholder(port)
            if mask.meta["val"].ndim == 2:
                with self.stage.graph.inserting_before(_after(mask)):
                    found: fx.Node = self._emitter(mask).trace(_by_mask, mask, names=("classes",))
                return found
        return None

    def _of_kept(self, cut: Cut) -> fx.Node:
        assert self._whole is not None, "of the whole prompt first"
        if cut.kept not in self._made:
            kept = self.stage.output_node(cut.kept)
            with self.stage.graph.inserting_before(_after(self._whole, kept)):
                self._made[cut.kept] = self._emitter(kept).trace(
                    modality_of_kept, self._whole, kept, names=("classes",)
                )
        return self._made[cut.kept]


def input_ids(stage: Stage, ctx: PassContext) -> fx.Node:
    """The ids of the prompt, int64 ``[batch, tokens]``: an input, added if need be.

    Raises:
        PreconditionError: whoever calls the stage has none.
    """
    known = stage.find_inputs(Role.INPUT_IDS)
    if known:
        return stage.placeholder(known[0])
    given = stage.find_inputs(Role.MODALITY)
    if not given:
        raise PreconditionError(
            f"stage {stage.name} does not see the ids of tokens",
            hint="use vlmopt.optimize, or leave out the option that names ids",
        )
    shape = stage.placeholder(given[0]).meta["val"].shape
    node = stage.add_input(Port("input_ids", Role.INPUT_IDS), *shape, dtype=torch.int64)
    ctx.stamp(node, 1)
    return node


def _after(*values: fx.Node) -> fx.Node:
    """The node before which something may be inserted that needs all of ``values``."""
    node = max(values).next
    while node.op == "placeholder":
        node = node.next
    return node


def _with_special(modality: Tensor, ids: Tensor, special: tuple[int, ...]) -> Tensor:
    marked = torch.zeros_like(modality, dtype=torch.bool)
    for one in special:
        marked = marked | (ids == one)
    return torch.where(marked & (modality == Modality.TEXT), SPECIAL, modality)


def _by_mask(mask: Tensor) -> Tensor:
    return torch.where(mask != 0, Modality.TEXT, Modality.PADDING)
