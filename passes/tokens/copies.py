"""What all methods share that let some layers see copies of visual tokens besides the prompt's.

A method says how many copies there are and what they hold before each layer; the rest is here:
running the layers on more tokens, and the decode stage that must agree.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import Layers, find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.analysis.sublayers import sublayers
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens import select
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Modality, Program
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.tokens import CutSite, cut_decode, remove_unused
from vlmopt.rewrite.values import CutValues
from vlmopt.rewrite.widen import Copies, attention_of_last, widen_layer


@dataclass(frozen=True, kw_only=True)
class TokenCopies(Pass):
    """Base of the methods that add copies of visual tokens in some layers, one after the other.

    All samples must have equally many visual tokens, and nothing may have cut before. The copies
    are gone behind the last of these layers.
    """

    family = "tokens"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY

    layers: tuple[int, ...] = option(
        tuple(range(12, 19)),
        "layers that see copies, one after the other",
        ge=0,
        increasing=True,
        min_items=1,
    )

    @abstractmethod
    def known(self, tokens: int) -> tuple[Tensor, ...]:
        """What :meth:`update` takes besides, for so many visual tokens.

        Raises:
            OptionError: the method cannot do with this number.
        """

    def learnt(self, layer: int) -> tuple[Tensor, ...]:
        """What :meth:`update` takes behind that, before ``layer``; it gets the model's type."""
        return ()

    @abstractmethod
    def copies(self, tokens: int) -> int:
        """Copies of a sample of so many visual tokens, while there are any."""

    @abstractmethod
    def update(
        self,
        hidden: Tensor,
        slots: Tensor,
        attention: Tensor,
        rows: Tensor,
        live: Tensor,
        region: Tensor,
        *known: Tensor,
    ) -> tuple[Tensor, ...]:
        """The copies before a layer.

        Args:
            hidden: residual stream, ``[batch, tokens, width]``.
            slots: of the visual tokens, int64 ``[batch, visual tokens]``.
            attention: that the last token would pay to them in this layer, mean over heads,
                float32 ``[batch, visual tokens]``.
            rows: residual stream of the copies, ``[batch, copies, width]``.
            live: bool ``[batch, 1]``, whether there are copies; at first there are none.
            region: what of, int64 ``[batch, 1]``, as the method numbers regions.

        Returns:
            ``rows``, the slots of the tokens that they are copies of, int64 ``[batch, copies]``,
            ``live`` and ``region``.
        """

    def requires(self, program: Program) -> None:
        stage = token_stage(program)
        modality = modality_of_tokens(stage)
        layers = find_layers(stage, after=modality.anchor)
        if list(self.layers) != list(range(self.layers[0], self.layers[-1] + 1)):
            raise OptionError(
                f"{self.name}: layers {', '.join(map(str, self.layers))} do not follow one another",
                hint="copies live from layer to layer; leave none out",
            )
        if self.layers[-1] >= len(layers):
            raise PreconditionError(
                f"{self.name} cannot copy at layer {self.layers[-1]}: stage {stage.name} has "
                f"layers 0 to {len(layers) - 1}",
                hint=f"choose layers up to {len(layers) - 1}",
            )
        if stage.cuts:
            raise PreconditionError(
                f"{self.name} cannot copy at layer {self.layers[0]}: {stage.cuts[0].made_by} has "
                f"already cut at layer {stage.cuts[0].layer}, and patches need the whole grid",
                hint=f"put {self.name} first, and cut at later layers",
            )
        if len(set(modality.visual)) > 1:
            raise PreconditionError(
                f"{self.name}: samples have {', '.join(map(str, modality.visual))} visual tokens",
                hint="batch prompts with equally many images",
            )
        self.known(modality.visual[0])

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = token_stage(program)
        visual = modality_of_tokens(stage).visual
        known, count = self.known(visual[0]), self.copies(visual[0])
        state: tuple[fx.Node, ...] = ()
        for match, layer in enumerate(self.layers, start=1):
            modality = modality_of_tokens(stage)
            layers = find_layers(stage, after=modality.anchor)
            site = CutSite(
                stage,
                layer,
                layers.entries[layer],
                modality.source,
                None,
                visual,
                tuple(present + count for present in visual),
                match=match,
                prefix=self.name.replace("-", "_"),
                ctx=ctx,
                until=(sublayers(layers, layer).out, layer + 1),
            )

            def step(
                emit: Emitter,
                kinds: fx.Node,
                site: CutSite = site,
                layers: Layers = layers,
                before: tuple[fx.Node, ...] = state,
            ) -> tuple[Copies, tuple[fx.Node, ...]]:
                if not before:
                    before = emit.trace(self._nothing, site.hidden, kinds, count)
                rows, parents, live, region = before
                values = CutValues(stage, layers, site.layer, kinds, visual, emit)
                attention = attention_of_last(values, Copies(rows, parents, live))
                like = site.hidden.meta["val"]
                given = [value.to(like.device) for value in known]
                given += [value.to(like.device, like.dtype) for value in self.learnt(site.layer)]
                rows, parents, live, region = emit.trace(
                    self._step,
                    *(site.hidden, kinds, attention, rows, live, region, visual[0]),
                    *map(emit.constant, given),
                    names=("rows", "parents", "live", "region"),
                )
                return Copies(rows, parents, live), (region,)

            copies, left = widen_layer(site, layers, count, step, state)
            state = (copies.rows, copies.parents, copies.live, *left)
        remove_unused(stage)
        if "decode" not in program and any(port.kept for port in stage.outputs):
            raise PreconditionError(
                f"{self.name}: the cache would hold copies that decoding could not tell from "
                "tokens",
                hint="use vlmopt.optimize, which rewrites decoding too, or run with "
                "use_cache=False",
            )
        if "decode" in program:
            for match, cut in enumerate(stage.cuts, start=1):
                cut_decode(
                    program["decode"],
                    stage,
                    cut,
                    ctx,
                    match=match,
                    prefix=self.name.replace("-", "_"),
                )
        return PassResult(True, len(self.layers), {"copies": count})

    @staticmethod
    def _nothing(hidden: Tensor, modality: Tensor, count: int) -> tuple[Tensor, ...]:
        batch, width = hidden.shape[0], hidden.shape[2]
        number = torch.zeros(batch, 1, dtype=torch.int64, device=hidden.device)
        first = (modality == Modality.VISION).long().argmax(-1, keepdim=True)
        parents = first.expand(-1, count)
        return hidden.new_zeros(batch, count, width), parents, number != 0, number

    def _step(
        self,
        hidden: Tensor,
        modality: Tensor,
        attention: Tensor,
        rows: Tensor,
        live: Tensor,
        region: Tensor,
        visual: int,
        *known: Tensor,
    ) -> tuple[Tensor, ...]:
        slots, _ = select.visual_slots(modality == Modality.VISION, visual)
        return self.update(hidden, slots, attention.gather(1, slots), rows, live, region, *known)
