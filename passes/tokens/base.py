"""What all methods that drop tokens inside the language model share.

A method states where it cuts, what it reads there, and a score; the rest is here: placing the
cuts, selecting per sample, shortening everything after, and the decode stage that must agree.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import Layers, find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.passes.tokens import select
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Modality, Program, Stage
from vlmopt.rewrite.tokens import CutSite, cut_decode, cut_tokens


@dataclass(frozen=True, kw_only=True)
class TokenDrop(Pass):
    """Base of the methods that keep the visual tokens with the highest scores at some layers.

    Subclasses declare the options ``layers`` and ``keep``, the names in ``reads``, and ``score``,
    which gets the values named there, in that order:

    - ``hidden``: residual stream entering the layer, ``[batch, tokens, width]``;
    - ``previous_hidden``: the one entering the layer before;
    - ``ordinal``: number of each visual token among its sample's, int64 ``[batch, tokens]``.
    """

    family = "tokens"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    first_layer: ClassVar[int] = 0
    reads: ClassVar[tuple[str, ...]]

    @abstractmethod
    def score(self, *values: Tensor) -> Tensor:
        """float32 ``[batch, tokens]``; the highest stay."""

    def requires(self, program: Program) -> None:
        stage = token_stage(program)
        layers = find_layers(stage, after=modality_of_tokens(stage).anchor)
        for layer, _ in self.cuts():
            if not self.first_layer <= layer < len(layers):
                raise PreconditionError(
                    f"{self.name} cannot cut at layer {layer}: stage {stage.name} has layers "
                    f"0 to {len(layers) - 1}, and the method needs "
                    f"{self.first_layer} earlier layer{'s' if self.first_layer != 1 else ''}",
                    hint=f"choose layers from {self.first_layer} to {len(layers) - 1}",
                )
            later = [cut for cut in stage.cuts if cut.layer >= layer]
            if later:
                raise PreconditionError(
                    f"{self.name} cannot cut at layer {layer}: {later[0].made_by} has already cut "
                    f"at layer {later[0].layer}",
                    hint="put the pass that cuts earlier first, and cut each layer once",
                )

    def cuts(self) -> list[tuple[int, float | int]]:
        """``(layer, keep)`` of each cut; one ``keep`` serves all layers."""
        layers: tuple[int, ...] = self.layers  # type: ignore[attr-defined]
        keep: tuple[float | int, ...] = self.keep  # type: ignore[attr-defined]
        if len(keep) not in (1, len(layers)):
            raise OptionError(
                f"{self.name}: option keep has {len(keep)} values for "
                f"{len(layers)} layer{'s' if len(layers) != 1 else ''}",
                hint="give one value, or one per layer: "
                f"{self.name}{{layers={','.join(map(str, layers))} keep=0.5}}",
            )
        return list(zip(layers, keep if len(keep) > 1 else keep * len(layers), strict=True))

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = token_stage(program)
        before = len(stage.cuts)
        for layer, keep in self.cuts():
            self._cut(stage, layer, keep, ctx)
        made = stage.cuts[before:]
        if "decode" in program:
            for match, cut in enumerate(made, start=1):
                cut_decode(
                    program["decode"], stage, cut, ctx, match=match, prefix=_identifier(self.name)
                )
        dropped = sum(before - after for cut in made for before, after in cut.visual)
        return PassResult(
            changed=bool(made),
            matches=len(self.cuts()),
            statistics={"tokens_dropped": dropped, "cuts": len(made)},
        )

    def _cut(self, stage: Stage, layer: int, keep: float | int, ctx: PassContext) -> None:
        modality = modality_of_tokens(stage)
        layers = find_layers(stage, after=modality.anchor)
        quotas = [quota(count, keep) for count in modality.visual]
        if quotas == list(modality.visual):
            ctx.remark(
                f"layer {layer}: keep={keep} keeps all {max(quotas)} visual tokens",
                stage=stage.name,
            )
            return
        hidden = layers.entries[layer]
        site = CutSite(
            stage,
            layer,
            hidden,
            modality.source,
            modality.kept,
            modality.visual,
            tuple(quotas),
            match=len(stage.cuts) + 1,
            prefix=_identifier(self.name),
            ctx=ctx,
        )
        nodes = {name: _NODES[name](layers, layer) for name in self.reads if name in _NODES}

        def choose(
            modality: Tensor, length: Any, *values: Tensor
        ) -> tuple[Tensor, Tensor, Tensor | None]:
            visual = modality == Modality.VISION
            given = dict(zip(nodes, values, strict=True), ordinal=select.ordinal(visual))
            score = self.score(*(given[name] for name in self.reads)).float()
            if len(set(quotas)) == 1 and len(set(site.visual)) == 1:
                return score, select.keep_best(score, visual, length), None
            count = visual.sum(1, keepdim=True)
            slots, valid = select.keep_best_ragged(
                score, visual, modality == Modality.PADDING, quota_of(count, keep), length
            )
            return score, slots, valid

        cut_tokens(site, choose, list(nodes.values()))


def quota(count: int, keep: float | int) -> int:
    """Visual tokens to keep of ``count``: at least one of any, by exact arithmetic.

    ``keep`` is a share from 0 to 1, or a count from 2 up.
    """
    if count == 0:
        return 0
    if keep > 1:
        return min(int(keep), count)
    share = Fraction(str(keep))
    return max(1, count * share.numerator // share.denominator)


def quota_of(count: Tensor, keep: float | int) -> Tensor:
    """:func:`quota` of each element of an int64 tensor."""
    if keep > 1:
        return count.clamp(max=int(keep))
    share = Fraction(str(keep))
    wanted = torch.div(count * share.numerator, share.denominator, rounding_mode="floor")
    return torch.minimum(wanted.clamp(min=1), count)


def _identifier(name: str) -> str:
    return name.replace("-", "_")


_NODES: dict[str, Callable[[Layers, int], fx.Node]] = {
    "hidden": lambda layers, layer: layers.entries[layer],
    "previous_hidden": lambda layers, layer: layers.entries[layer - 1],
}
"""Values of the graph that a score may read, by name."""
