"""What all methods that skip experts share.

A method says which pairs of token and expert stay; finding the mixtures of experts, the class of
each token, and leaving the other pairs out of the products is here.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt import artifacts
from vlmopt.analysis.cost import Pairs
from vlmopt.analysis.experts import ExpertBlock, find_experts
from vlmopt.analysis.modality import modality_of_tokens
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Modality, Port, Program, Role, Stage
from vlmopt.rewrite.capacity import best_pairs, compute_pairs
from vlmopt.rewrite.classes import SPECIAL, TokenClasses
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.experts import skip_pairs
from vlmopt.rewrite.tokens import remove_unused


@dataclass(frozen=True, kw_only=True)
class ExpertSkip(Pass):
    """Base of the methods that skip some of the experts that a router chose for a token.

    Subclasses give :meth:`stays`. Pairs that it drops weigh nothing, and are not computed; the
    weights of the others stay as they are. Experts that all tokens share are no matter of a
    router and always run. Padding takes no expert, special tokens all of theirs; in decoding all
    tokens are text.
    """

    family = "experts"
    phase = Phase.REDUCE
    semantics = Semantics.LOSSY
    needs_vision = False

    special: tuple[int, ...] = option(
        (), "ids of tokens that keep all of their experts: the tokenizer's all_special_ids", ge=0
    )

    capacity: tuple[float, ...] = option(
        (),
        "share of all pairs that a graph of fixed sizes computes at most, those of highest score; "
        "one for all layers with experts, or one for each. None: as many as stay",
        gt=0,
        le=1,
    )

    count: bool = option(
        False, "count the pairs, in all and computed: past_key_values.reported['expert_pairs']"
    )

    @abstractmethod
    def stays(self, weights: Tensor, classes: Tensor, *constants: float) -> Tensor:
        """Which pairs of token and expert are computed; a pure function that is traced.

        Args:
            weights: of the chosen experts, after the router's normalisation and before its factor,
                float32 ``[tokens, k]``.
            classes: int64 ``[tokens, 1]``, values of :class:`~vlmopt.program.Modality`.
            constants: those of the layer.

        Returns:
            bool ``[tokens, k]``.
        """

    def constants(self, program: Program) -> Mapping[int, tuple[float, ...]]:
        """What :meth:`stays` gets in each layer, by number of the layer."""
        return {}

    def skipped_shares(self, program: Program) -> tuple[Pairs, Mapping[int, tuple[float, float]]]:
        """The shares of pairs that go, of text and of vision, by layer, and how they are known."""
        return Pairs.AT_MOST, {}

    def is_scored(self, program: Program) -> bool:
        """Whether :meth:`stays` gets scores over all experts in place of weights."""
        return False

    def score(self, weights: Tensor, classes: Tensor, *constants: float) -> Tensor:
        """What pairs are ranked by where not all that stay can be computed; a pure function.

        Arguments as for :meth:`stays`.

        Returns:
            float32 ``[tokens, k]``.
        """
        return weights

    def pair_limits(self, program: Program) -> Mapping[tuple[str, int], int]:
        """Where as many pairs are computed whatever the values: how many, by stage and layer.

        Raises:
            OptionError: there are not as many capacities as layers with experts.
        """
        if not self.capacity:
            return {}
        blocks = list(blocks_of(program))
        layers = sorted({block.layer for _, block in blocks})
        if len(self.capacity) not in (1, len(layers)):
            raise OptionError(
                f"{self.name}: option capacity has {len(self.capacity)} values, and {len(layers)} "
                "layers have experts"
            )
        shares = self.capacity if len(self.capacity) > 1 else self.capacity * len(layers)
        return {
            (stage.name, block.layer): rounded_up(
                shares[layers.index(block.layer)] * block.ids.meta["val"].numel()
            )
            for stage, block in blocks
        }

    def select(
        self, weights: Tensor, ids: Tensor, *given: Tensor, constants: tuple[float, ...], count: int
    ) -> tuple[Tensor, Tensor]:
        """The pairs that are computed where their number is fixed.

        See :data:`~vlmopt.rewrite.capacity.Select`.
        """
        classes = given[0].reshape(-1, 1) if given else _all_text(ids)
        score = self.score(weights, classes, *constants)
        # special tokens give way to none
        first = torch.where(classes == SPECIAL, torch.full_like(score, float("inf")), score)
        return best_pairs(first, self._stays(weights, ids, *given, constants=constants), count)

    def is_neutral(self, program: Program) -> bool:
        """Whether these options keep all pairs of all tokens."""
        return False

    def requires(self, program: Program) -> None:
        found = [find_experts(stage) for stage in _stages(program)]
        if not any(experts.blocks for experts in found):
            misses = [miss for experts in found for miss in experts.misses]
            if misses:
                raise misses[0]
            raise PreconditionError(
                "no layer of this model has a mixture of experts",
                hint="use a pass that drops tokens",
            )
        for (stage, layer), count in self.pair_limits(program).items():
            if not isinstance(count, int):
                raise PreconditionError(
                    f"{self.name}: the number of pairs in layer {layer} of stage {stage} is to be "
                    "fixed, and its graph is for prompts of any length",
                    hint="torch.compile(dynamic=False), or leave out capacity, margin and static",
                )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        limits = self.pair_limits(program)
        if not limits and self.is_neutral(program):
            blocks = sum(len(find_experts(stage).blocks) for stage in _stages(program))
            ctx.remark("all experts of all tokens are kept")
            return PassResult(changed=False, matches=blocks)
        constants, scored = self.constants(program), self.is_scored(program)
        known, shares = self.skipped_shares(program)
        matches = 0
        for stage in _stages(program):
            experts = find_experts(stage)
            for miss in experts.misses:
                ctx.remark(miss.what, node=miss.node, stage=stage.name)
            classes = TokenClasses(stage, self.special, ctx, self.name)
            counts: list[fx.Node] = []
            for block in experts.blocks:
                matches += 1
                present = classes.of(block.layer, block.stream)
                given = () if present is None else (present,)
                fixed = constants.get(block.layer, ())
                count = limits.get((stage.name, block.layer))
                rewrite: Callable[..., fx.Node] = skip_pairs
                rule: Callable[..., Any] = partial(self._stays, constants=fixed)
                if count is not None:
                    rewrite = compute_pairs
                    rule = partial(self.select, constants=fixed, count=count)
                kept = rewrite(
                    stage,
                    block,
                    rule,
                    given,
                    ctx,
                    prefix=self.name,
                    match=matches,
                    scored=scored,
                )
                if count is not None:
                    tokens, k = block.ids.meta["val"].shape
                    ctx.remark(
                        f"layer {block.layer} computes {count} of {tokens * k} pairs of token and "
                        "expert, whatever the prompt",
                        node=kept,
                        stage=stage.name,
                    )
                if self.count and present is not None:
                    emit = Emitter.of_pass(ctx, stage, kept, self.name, matches)
                    with stage.graph.inserting_before(kept.next):
                        counts.append(emit.trace(_count, kept, present, names=("pairs",)))
            # where their number is fixed, rows are no more than the pairs that are computed
            free = [b.layer for b in experts.blocks if (stage.name, b.layer) not in limits]
            if free:
                stage.facts["skipped_pairs"] = {
                    "known": str(known),
                    "layers": {str(layer): list(shares.get(layer, (0.0, 0.0))) for layer in free},
                }
            if counts:
                _report(stage, counts, ctx, self.name)
            remove_unused(stage)
        return PassResult(changed=matches > 0, matches=matches)

    def _stays(
        self, weights: Tensor, ids: Tensor, *given: Tensor, constants: tuple[float, ...]
    ) -> Tensor:
        if not given:
            return self.stays(weights, _all_text(ids), *constants)
        classes = given[0].reshape(-1, 1)
        kept = self.stays(weights, classes, *constants) | (classes == SPECIAL)
        return kept & (classes != Modality.PADDING)


def rounded_up(count: float) -> int:
    """The next whole number, what floating point adds aside; at least 1."""
    return max(1, math.ceil(count - 1e-6))


def _all_text(ids: Tensor) -> Tensor:
    return torch.full_like(ids[:, :1], Modality.TEXT)


def _count(kept: Tensor, classes: Tensor) -> Tensor:
    """int64 ``[3, 2]``: pairs of text, vision and special tokens, in all and computed."""
    kinds = torch.tensor(COUNTED, device=classes.device)
    of_kind = classes.reshape(-1, 1, 1) == kinds.reshape(1, -1, 1)
    pairs = torch.stack([torch.ones_like(kept), kept], dim=-1).sum(1)
    return (of_kind * pairs[:, None, :]).sum(0)


COUNTED = (Modality.TEXT, Modality.VISION, SPECIAL)
PAIRS = "expert_pairs"
"""Output that holds the counts, int64 ``[blocks, 3, 2]``."""


def _report(stage: Stage, counts: list[fx.Node], ctx: PassContext, prefix: str) -> None:
    emit = Emitter.of_pass(ctx, stage, counts[-1], prefix)
    with stage.graph.inserting_before(stage.graph.output_node()):
        together = emit.call(torch.ops.aten.stack.default, counts, name=PAIRS)
    stage.add_output(Port(PAIRS, Role.COUNTS), together)


def _stages(program: Program) -> list[Stage]:
    """Those in which tokens of text flow."""
    return [
        stage
        for stage in program
        if stage.name == "model"
        or any(port.role in (Role.KEY, Role.MODALITY) for port in (*stage.inputs, *stage.outputs))
    ]


def visual_tokens(stage: Stage, layer: int) -> int:
    """Visual tokens that are present in a layer, over the whole batch."""
    if stage.find_inputs(Role.KEY) or not any(stage.facts.get("visual_tokens", ())):
        return 0
    return sum(modality_of_tokens(stage, layer).visual)


def blocks_of(program: Program) -> Iterator[tuple[Stage, ExpertBlock]]:
    """All mixtures of experts, each with its stage."""
    for stage in _stages(program):
        for block in find_experts(stage).blocks:
            yield stage, block


def layers_with_experts(program: Program) -> tuple[int, ...]:
    """Layers that hold a mixture of experts, in order."""
    return tuple(sorted({block.layer for _, block in blocks_of(program)}))


def read_calibrated(path: str, name: str, program: Program) -> dict[str, Any]:
    """What a calibration of pass ``name`` found.

    Raises:
        ArtifactError: the artifact is missing, or of another model.
        OptionError: it is for other layers.
    """
    layers, found = list(layers_with_experts(program)), artifacts.read(path, name, program)
    if found["layers"] != layers:
        raise OptionError(
            f"{name}: {path} is for layers {found['layers']}, and there are experts in {layers}"
        )
    return found
