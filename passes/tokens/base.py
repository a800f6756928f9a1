"""What all methods that drop tokens inside the language model share.

A method states where it cuts, what it reads there, and a score; the rest is here: placing the
cuts, selecting per sample, shortening everything after, and the decode stage that must agree.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, ClassVar

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
from vlmopt.rewrite.positions import has_one_axis
from vlmopt.rewrite.projector import Projector
from vlmopt.rewrite.tokens import Choice, CutSite, cut_decode, cut_tokens, emitting, remove_unused
from vlmopt.rewrite.values import PER_SAMPLE, CutValues

COMPUTED = ("visual", "valid", "ordinal", "count", "quota", "present", "project")
"""Names in ``reads`` that are no values of the graph."""

_ROUNDINGS: dict[str, Callable[[Fraction], int]] = {
    "floor": math.floor,
    "ceil": math.ceil,
    "round": round,
}


@dataclass(frozen=True, kw_only=True)
class TokenDrop(Pass):
    """Base of the methods that keep some visual tokens, and drop or merge the others.

    Subclasses give ``score``, which gets the values named in ``reads``, in that order: those of
    :data:`vlmopt.rewrite.values.VALUES`, and

    - ``visual``: bool ``[batch, tokens]``;
    - ``valid``: bool ``[batch, visual tokens]``, False where a sample has fewer (``compact``);
    - ``ordinal``: number of each visual token among its sample's, int64 ``[batch, tokens]``;
    - ``count``: the most visual tokens that any sample keeps, an int;
    - ``quota``, ``present``: how many each sample keeps, and has, int64 ``[batch, 1]``;
    - ``project``: the :class:`~vlmopt.rewrite.projector.Projector` that :meth:`projector` gives;
    - ``history``: sum of ``layer_score`` over ``scored_layers()``, float32 ``[batch, tokens]``.

    A method with ``merges`` also gives ``merge``; one with ``layer_reads`` gives ``layer_score``,
    which gets those attributes of :class:`~vlmopt.analysis.sublayers.Sublayers`, and ``real``:
    bool ``[batch, tokens]``, False for padding.

    Attributes:
        compact: values and scores hold the visual tokens only, ``[batch, visual tokens, ...]``.
        restores: the tokens come back after the layer at which they were left out.
        bounded: ``keep`` is the most that may stay, and ``passing`` tells which do.
        least: visual tokens that stay of any.
        rounding: of a share to a number of tokens.
    """

    family = "tokens"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    first_layer: ClassVar[int] = 0
    reads: ClassVar[tuple[str, ...]] = ()
    layer_reads: ClassVar[tuple[str, ...]] = ()
    compact: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    restores: ClassVar[bool] = False
    bounded: ClassVar[bool] = False
    least: ClassVar[int] = 1
    rounding: ClassVar[str] = "floor"

    layers: tuple[int, ...] = option(
        (2,), "layers whose input is cut, counted from 0", ge=0, increasing=True, min_items=1
    )
    keep: tuple[float | int, ...] = option(
        (0.5,),
        "visual tokens kept at each cut: a share (0 to 1), or a count (2 and up)",
        ge=0,
        min_items=1,
    )
    of: str = option(
        "present",
        "what a share is of: the visual tokens present at the cut, or the original ones",
        choices=("present", "original"),
    )
    positions: str = option(
        "keep",
        "keep the positions of the tokens that stay, renumber them without gaps, or auto: renumber "
        "unless positions have several axes (M-RoPE)",
        choices=("keep", "renumber", "auto"),
    )

    @abstractmethod
    def score(self, *values: Any) -> Tensor:
        """float32 ``[batch, tokens]``; the highest stay."""

    def passing(self, score: Tensor) -> Tensor:
        """Tokens that may stay, where the method is ``bounded``.

        Up to ``least`` of the best ones stay even where none passes.

        Args:
            score: float32 ``[batch, tokens]``.

        Returns:
            bool ``[batch, tokens]``.
        """
        raise NotImplementedError

    def merge(self, tokens: Tensor, score: Tensor, kept: Tensor, *values: Any) -> Tensor:
        """What the kept tokens become.

        Args:
            tokens: residual stream of the visual tokens, ``[batch, visual tokens, width]``; or
                what enters the projector.
            score: of each, float32 ``[batch, visual tokens]``.
            kept: bool ``[batch, visual tokens]``.
            values: those named in ``reads``.

        Returns:
            Like ``tokens``; only the rows of kept tokens matter.
        """
        raise NotImplementedError

    def layer_score(self, *values: Tensor) -> Tensor:
        """float32 ``[batch, tokens]``, from the values of one layer named in ``layer_reads``."""
        raise NotImplementedError

    def read(self, values: CutValues, name: str) -> fx.Node:
        """One of the values named in ``reads``; a method may add names of its own."""
        return values[name]

    def projector(self, program: Program, entry: fx.Node) -> Projector | None:
        """The projector, for a method that reads ``project``, or that merges in front of it.

        Merging then happens on ``encoded_features``.

        Args:
            entry: what enters the layer of the cut.
        """
        return None

    def begin(self, program: Program, ctx: PassContext) -> dict[str, fx.Node]:
        """What to do before the first cut.

        Returns:
            Per-token values that cuts may read by these names, ``[batch, tokens]``.
        """
        return {}

    @contextmanager
    def at_entry(self, program: Program, ctx: PassContext, *after: fx.Node) -> Iterator[CutValues]:
        """Values at the entry of the language model, with an emitter there, ``after`` these."""
        stage = token_stage(program)
        modality = modality_of_tokens(stage)
        layers = find_layers(stage, after=modality.anchor)
        entry, counts = layers.entries[0], modality.visual
        site = CutSite(
            stage,
            0,
            entry,
            modality.source,
            modality.kept,
            counts,
            counts,
            match=1,
            prefix=_identifier(self.name),
            ctx=ctx,
        )
        with emitting(site, entry, *after) as (emit, here, _):
            yield CutValues(stage, layers, 0, here, counts, emit, {}, program, ctx, modality.kept)

    def is_fixed(self) -> bool:
        """Whether the choice is made when the graph is rewritten: it must not depend on values."""
        return False

    def scored_layers(self) -> tuple[int, ...]:
        """Layers whose ``layer_score`` counts."""
        return ()

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
            later = [
                cut
                for cut in stage.cuts
                if cut.layer >= layer or (cut.until is not None and layer < cut.until)
            ]
            if later:
                raise PreconditionError(
                    f"{self.name} cannot cut at layer {layer}: {later[0].made_by} has already cut "
                    f"at layer {later[0].layer}",
                    hint="put the pass that cuts earlier first, and cut each layer once",
                )
        if self.restores and self.positions != "keep":
            raise OptionError(
                f"{self.name} cannot renumber positions: the tokens that it leaves out come back",
                hint="use positions=keep",
            )
        scored = self.scored_layers()
        if self.layer_reads and not any(layer < self.layers[0] for layer in scored):
            raise PreconditionError(
                f"{self.name} has nothing to go by at layer {self.layers[0]}: it scores layers "
                f"{scored[0]} to {scored[-1]}",
                hint="score more layers, or cut later",
            )
        if self.positions == "renumber" and not has_one_axis(stage):
            raise PreconditionError(
                f"{self.name} cannot renumber positions: this model has several axes of them",
                hint="use positions=keep",
            )

    def cuts(self) -> list[tuple[int, float | int]]:
        """``(layer, keep)`` of each cut; one ``keep`` serves all layers."""
        if len(self.keep) not in (1, len(self.layers)):
            raise OptionError(
                f"{self.name}: option keep has {len(self.keep)} values for "
                f"{len(self.layers)} layer{'s' if len(self.layers) != 1 else ''}",
                hint="give one value, or one per layer: "
                f"{self.name}{{layers={','.join(map(str, self.layers))} keep=0.5}}",
            )
        keep = self.keep if len(self.keep) > 1 else self.keep * len(self.layers)
        return list(zip(self.layers, keep, strict=True))

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        stage = token_stage(program)
        before = len(stage.cuts)
        carried = self.begin(program, ctx)
        since = 0
        for layer, keep in self.cuts():
            carried = self._cut(program, layer, keep, since, carried, ctx)
            since = layer
        remove_unused(stage)  # what was carried past the last cut
        made = stage.cuts[before:]
        if "decode" in program:
            for match, cut in enumerate(made, start=1):
                cut_decode(
                    program["decode"], stage, cut, ctx, match=match, prefix=_identifier(self.name)
                )
        dropped = sum(before - after for cut in made for before, after in cut.visual)
        statistics = {"tokens_dropped": dropped, "cuts": len(made)}
        return PassResult(changed=bool(made), matches=len(self.cuts()), statistics=statistics)

    def _cut(
        self,
        program: Program,
        layer: int,
        keep: float | int,
        since: int,
        carried: dict[str, fx.Node],
        ctx: PassContext,
    ) -> dict[str, fx.Node]:
        stage = token_stage(program)
        modality = modality_of_tokens(stage)
        layers = find_layers(stage, after=modality.anchor)
        original = stage.facts["visual_tokens"]
        base = original if self.of == "original" else modality.visual
        quotas = [
            min(quota, present)
            for quota, present in zip(
                self.quotas(program, base, keep), modality.visual, strict=True
            )
        ]
        site = CutSite(
            stage,
            layer,
            layers.entries[layer],
            modality.source,
            modality.kept,
            modality.visual,
            tuple(quotas),
            match=len(stage.cuts) + 1,
            prefix=_identifier(self.name),
            ctx=ctx,
            renumber=self.positions == "renumber"
            or (self.positions == "auto" and has_one_axis(stage)),
            fillers=self.bounded or modality.fillers,
        )
        if self.restores:
            site = replace(site, until=(sublayers(layers, layer).out, layer + 1))
        if self.is_fixed():
            site = replace(site, fixed=self._fixed_slots(site, keep))
        if self.layer_reads:
            carried = self._accumulate(site, layers, since, carried)
        if quotas == list(modality.visual) and not self.bounded:
            ctx.remark(
                f"layer {layer}: keep={keep} keeps all {max(quotas)} visual tokens",
                stage=stage.name,
            )
            return carried
        names = [name for name in self.reads if name not in COMPUTED]
        if self.merges and "hidden" not in names:
            names.append("hidden")
        projector = self.projector(program, site.hidden)
        if self.merges and projector is not None and "encoded_features" not in names:
            names.append("encoded_features")

        def read(emit: Emitter, modality: fx.Node) -> list[fx.Node]:
            known = (stage, layers, layer, modality, site.visual, emit, carried)
            values = CutValues(*known, program, ctx, site.kept)
            counted = site.modality if self.of == "original" else modality
            weights = projector.in_stage(stage, emit) if projector is not None else []
            return [counted, *weights, *(self.read(values, name) for name in names)]

        def choose(modality: Tensor, length: Any, counted: Tensor, *passed: Tensor) -> Choice:
            def quota() -> Tensor:
                return self._quotas((counted == Modality.VISION).sum(1, keepdim=True), keep)

            if site.fixed:
                slots = torch.tensor(site.fixed, device=modality.device)
                every = slots.expand(modality.shape[0], -1)
                return modality, every, None, None
            project = None
            values = passed
            if projector is not None:
                weights, values = passed[: len(projector.weights)], passed[len(projector.weights) :]
                project = projector.with_weights(weights)
            given = dict(zip(names, values, strict=True))
            return self._choose(site, modality, length, quota, given, project)

        return cut_tokens(site, choose, read, carried)

    def _choose(
        self,
        site: CutSite,
        modality: Tensor,
        length: Any,
        quota: Callable[[], Tensor],
        given: dict[str, Any],
        project: Projector | None = None,
    ) -> Choice:
        visual = modality == Modality.VISION
        hidden = given["hidden"] if self.merges else None
        slots_of_visual = valid = None
        if self.compact or self.merges:
            slots_of_visual, valid = select.visual_slots(visual, max(site.visual))
            given = {
                name: value if name in PER_SAMPLE else select.take(value, slots_of_visual)
                for name, value in given.items()
            }
        computed: dict[str, Callable[[], Any]] = {
            "visual": lambda: visual,
            "valid": lambda: valid,
            "ordinal": lambda: select.ordinal(visual),
            "count": lambda: max(site.quotas),
            "quota": quota,
            "present": lambda: visual.sum(1, keepdim=True),
            "project": lambda: project,
        }
        values = [given[name] if name in given else computed[name]() for name in self.reads]
        own = self.score(*values).float()
        score = own if slots_of_visual is None else select.put(own, slots_of_visual, visual)
        valid_slots = None
        if not site.ragged and len(set(site.quotas)) == 1:
            slots = select.keep_best(score, visual, length)
        else:
            wanted = quota()
            if self.bounded:
                passed = (visual & self.passing(score)).sum(1, keepdim=True)
                wanted = torch.minimum(wanted, passed.clamp(min=self.least))
            slots, valid_slots = select.keep_best_ragged(
                score, visual, modality == Modality.PADDING, wanted, length
            )
        if hidden is None:
            return score, slots, valid_slots, None
        assert slots_of_visual is not None
        assert valid is not None
        stays = torch.ones_like(slots, dtype=torch.bool) if valid_slots is None else valid_slots
        kept = torch.zeros_like(visual).scatter(1, slots, stays).gather(1, slots_of_visual) & valid
        if project is None:
            merged = self.merge(given["hidden"], own, kept, *values).to(hidden.dtype)
        else:
            rows = self.merge(given["encoded_features"], own, kept, *values)
            merged = _project(project, rows, kept, max(site.quotas), given["hidden"])
        merged = torch.where(kept[..., None], merged, given["hidden"])
        index = slots_of_visual[..., None].expand_as(merged)
        return score, slots, valid_slots, select.take(hidden.scatter(1, index, merged), slots)

    def _accumulate(
        self, site: CutSite, layers: Layers, since: int, carried: dict[str, fx.Node]
    ) -> dict[str, fx.Node]:
        """Add the scores of the layers from ``since`` on to what was carried from before."""
        history = carried.get("history")
        for layer in self.scored_layers():
            if not since <= layer < site.layer:
                continue
            parts = sublayers(layers, layer)
            if parts.out.meta["val"].shape[1] != site.hidden.meta["val"].shape[1]:
                raise PreconditionError(
                    f"{self.name} scores layer {layer}, before a cut of another pass",
                    node=parts.out,
                    hint="score layers after that cut only",
                )
            with emitting(site, parts.attention_out, parts.ffn_out) as (emit, modality, _):
                given = {"real": emit.call(torch.ops.aten.ne.Scalar, modality, Modality.PADDING)}
                values = [given.get(n) or getattr(parts, n) for n in self.layer_reads]
                own = emit.trace(self.layer_score, *values, names=(f"layer_{layer}",))
                if history is not None:
                    own = emit.call(torch.ops.aten.add.Tensor, history, own, name="history")
                history = own
        return {} if history is None else {"history": history}

    def _fixed_slots(self, site: CutSite, keep: float | int) -> tuple[int, ...]:
        """The tokens that stay, by slot among those present, from what capture saw of prompts."""
        stage = site.stage
        layout = stage.facts.get("layout")
        earlier = stage.last_cut.slots if stage.last_cut else None
        if not layout or earlier == ():
            raise PreconditionError(
                f"{self.name} with fixed tokens: where visual tokens stand is not known here",
                hint="leave out fixed, or use vlmopt.optimize; an earlier cut must be fixed too",
            )
        if any(sample != layout[0] for sample in layout):
            raise PreconditionError(
                f"{self.name} with fixed tokens: the samples of this batch differ in layout",
                hint="leave out fixed, or batch prompts that hold their images at the same place",
            )
        whole = torch.tensor([kind for kind, length in layout[0] for _ in range(length)])
        modality = whole[None] if earlier is None else whole[torch.tensor(earlier)][None]
        counted = whole[None] if self.of == "original" else modality
        quota = self._quotas((counted == Modality.VISION).sum(1, keepdim=True), keep)
        length = modality.shape[1] - site.visual[0] + site.quotas[0]
        one = replace(site, visual=site.visual[:1], quotas=site.quotas[:1])
        _, slots, _, _ = self._choose(one, modality, length, lambda: quota, {})
        return tuple(slots[0].tolist())

    def quotas(self, program: Program, counts: Sequence[int], keep: float | int) -> list[int]:
        """Visual tokens that each sample keeps of ``counts``."""
        return [self.quota(count, keep) for count in counts]

    def quota(self, count: int, keep: float | int) -> int:
        """Visual tokens to keep of ``count``, by exact arithmetic.

        ``keep`` is a share from 0 to 1, or a count from 2 up.
        """
        if keep > 1:
            return min(int(keep), count)
        wanted = _ROUNDINGS[self.rounding](count * Fraction(str(keep)))
        return min(max(self.least, wanted), count)

    def _quotas(self, count: Tensor, keep: float | int) -> Tensor:
        """:meth:`quota` of each element of an int64 tensor."""
        if keep > 1:
            return count.clamp(max=int(keep))
        share = Fraction(str(keep))
        top, bottom = share.numerator, share.denominator
        if self.rounding == "ceil":
            wanted = torch.div(count * top + bottom - 1, bottom, rounding_mode="floor")
        elif self.rounding == "round":  # halves to even
            doubled = torch.div(2 * count * top + bottom, 2 * bottom, rounding_mode="floor")
            half = (2 * count * top) % (2 * bottom) == bottom
            wanted = torch.where(half & (doubled % 2 == 1), doubled - 1, doubled)
        else:
            wanted = torch.div(count * top, bottom, rounding_mode="floor")
        return torch.minimum(wanted.clamp(min=self.least), count)


def _project(project: Projector, rows: Tensor, kept: Tensor, count: int, hidden: Tensor) -> Tensor:
    """``hidden`` with the projections of ``rows`` where ``kept``: at most ``count`` per sample."""
    first = torch.sort((~kept).long(), dim=-1, stable=True).indices[:, :count]
    projected = project(select.take(rows, first)).to(hidden.dtype)
    return hidden.scatter(1, first[..., None].expand_as(projected), projected)


def _identifier(name: str) -> str:
    return name.replace("-", "_")
