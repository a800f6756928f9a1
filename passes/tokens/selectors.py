"""Selectors of visual tokens: attention of one layer in few dimensions, and how it is learnt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import find_layers, layer_of
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.analysis.sublayers import attention_of, projection_of
from vlmopt.calibration import Sample, observing, without_labels
from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_arguments, attention_mask, is_causal
from vlmopt.learning import LayerLearner
from vlmopt.program import Modality, Program, Stage, fetch_attr


@dataclass(frozen=True)
class Selector:
    """Low-rank copies of a layer's query and key projections, weights ``up @ down``.

    Attributes:
        query_up, key_up: float32 ``[heads * size, rank]``.
        query_down, key_down: float32 ``[rank, width]``.
    """

    query_up: Tensor
    query_down: Tensor
    key_up: Tensor
    key_down: Tensor

    @classmethod
    def of(cls, query: Tensor, key: Tensor, heads: int, rank: int) -> Selector:
        """By singular value decomposition.

        Args:
            query: weight of the query projection, ``[heads * size, width]``.
            key: of the key projection, ``[key heads * size, width]``.
        """
        query, key = query.detach().float(), key.detach().float()
        size = query.shape[0] // heads
        groups = heads // (key.shape[0] // size)
        repeated = key.unflatten(0, (-1, size)).repeat_interleave(groups, dim=0)
        return cls(*_factors(query, rank), *_factors(repeated.flatten(0, 1), rank))

    def sides(self, heads: int = 1) -> tuple[Tensor, Tensor]:
        """``(left, right)``, ``[maps, width, rank]`` and ``[width, rank]``.

        ``x left (y right)^T`` is the product of query and key.

        Args:
            heads: one map for each of so many; 1 for one map of their sum.
        """
        query, key = (up.unflatten(0, (heads, -1)) for up in (self.query_up, self.key_up))
        return self.query_down.T @ (query.transpose(1, 2) @ key), self.key_down.T

    def tensors(self) -> list[Tensor]:
        return [self.query_up, self.query_down, self.key_up, self.key_down]


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``weight`` as a product over ``rank`` dimensions, singular values shared between the two."""
    up, values, down = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return up[:, :rank] * root, root[:, None] * down[:rank]


@dataclass(frozen=True)
class Projections:
    """Where a layer's attention is computed.

    Attributes:
        attention: its operator.
        rows: what query and key are projected from.
        query, key: weights.
        heads: query heads.
        size: of a head.
    """

    attention: fx.Node
    rows: fx.Node
    query: Tensor
    key: Tensor
    heads: int
    size: int

    @classmethod
    def of(cls, stage: Stage, attention: fx.Node) -> Projections:
        """Find them.

        Raises:
            PreconditionError: query and key have no such projections of one value.
        """
        given: Any = attention.args
        query, key = (projection_of(value) for value in given[:2])
        rows = query.args[0]
        if key.args[0] is not rows or not isinstance(rows, fx.Node):
            place = layer_of(attention)
            raise PreconditionError(
                "selectors copy projections of one input, and query and key of layer "
                f"{place[1] if place else '?'} are projected from different ones",
                node=query,
                hint="choose another method for a model with latent attention",
            )
        weights = [
            fetch_attr(stage.graph_module, str(linear.args[1].target))  # type: ignore[union-attr]
            for linear in (query, key)
        ]
        _, heads, _, size = given[0].meta["val"].shape
        return cls(attention, rows, weights[0], weights[1], heads, size)

    def maps(self, per_head: bool) -> tuple[int, float]:
        """How many maps a selector has, and the scale of its products: of a mean over heads."""
        heads, one = (self.heads, 1) if per_head else (1, self.heads)
        return heads, 1 / (one * self.size**0.5)


def groups_of(modality: Tensor) -> Tensor:
    """What makes means over visual queries, and over text queries, of sums.

    Returns:
        float32 ``[batch, 2, tokens]``.
    """
    groups = torch.stack([modality == kind for kind in (Modality.VISION, Modality.TEXT)], 1)
    return groups.float() / groups.sum(-1, keepdim=True).clamp(min=1)


def selector_mass(
    rows: Tensor,
    modality: Tensor,
    mask: Tensor | None,
    causal: bool,
    left: Tensor,
    right: Tensor,
    scale: float,
) -> Tensor:
    """Mean attention that each token gets from visual tokens, and from text.

    Args:
        rows: input of the projections, ``[batch, tokens, width]``.
        modality: int64 ``[batch, tokens]``.
        mask: attention mask of the layer.
        left, right: see :meth:`Selector.sides`.

    Returns:
        float32 ``[batch, tokens, 2]``, the mean over maps.
    """
    rows = rows.float()[:, None]
    given = (groups_of(modality), mask, causal, scale)
    mass = torch.ops.vlmopt.attention_mass(rows @ left, rows @ right, *given)
    return mass.mean(1).transpose(1, 2)


class SelectorLearner(LayerLearner):
    """Makes the scores of selectors those of the model's own attention, each layer by itself.

    The model runs as it is; each layer's step is taken as the run comes by.

    Args:
        program, sample: the captured model, and the sample that it was captured with.
        layers: those that get a selector.
        per_head: a map for each head.
        rate: AdamW's learning rate.
    """

    def __init__(
        self,
        model: Any,
        program: Program,
        sample: Sample,
        layers: Sequence[int],
        rank: int,
        per_head: bool,
        rate: float,
    ) -> None:
        self.layers = tuple(layers)
        self._maps: dict[int, tuple[int, float]] = {}
        self.selectors: dict[int, Selector] = {}
        stage = token_stage(program)
        for layer, found in self._projections(stage):
            self._maps[layer] = found.maps(per_head)
            self.selectors[layer] = Selector.of(found.query, found.key, found.heads, rank)
        named = {
            layer: dict(zip(_NAMES, selector.tensors(), strict=True))
            for layer, selector in self.selectors.items()
        }
        super().__init__(named, rate)
        self._losses: dict[int, float] = {}
        self._engine = observing(model, self._watch, program, sample)

    def __call__(self, sample: Sample) -> list[float]:
        """The loss of each layer before its step."""
        with torch.no_grad():
            self._engine.twin(**without_labels(sample))
        return [self._losses[layer] for layer in self.layers]

    def result(self) -> dict[str, Tensor]:
        """``LAYER.left`` and ``LAYER.right`` of each, see :meth:`Selector.sides`."""
        sides = {
            layer: selector.sides(self._maps[layer][0])
            for layer, selector in self.selectors.items()
        }
        return {
            f"{layer}.{name}": side.detach()
            for layer, pair in sides.items()
            for name, side in zip(("left", "right"), pair, strict=True)
        }

    def _projections(self, stage: Stage) -> list[tuple[int, Projections]]:
        layers = find_layers(stage, after=modality_of_tokens(stage).anchor)
        return [
            (layer, Projections.of(stage, attention_of(layers, layer))) for layer in self.layers
        ]

    def _watch(self, program: Program) -> None:
        """Have each layer's attention tell what it reads."""
        stage = token_stage(program)
        modality = modality_of_tokens(stage).source
        for layer, found in self._projections(stage):
            attention = found.attention
            given = attention_arguments(attention)
            seen = (found.rows, given["query"], given["key"], attention_mask(attention), modality)
            how = (is_causal(attention), given.get("scale"))
            with stage.graph.inserting_after(max(attention, modality)):
                stage.graph.call_function(self._learn, (layer, *seen, *how))
        stage.graph_module.recompile()

    def _learn(
        self,
        layer: int,
        rows: Tensor,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None,
        modality: Tensor,
        causal: bool,
        scale: float | None,
    ) -> None:
        maps, own_scale = self._maps[layer]
        mass = torch.ops.vlmopt.attention_mass
        wanted = mass(query, key, groups_of(modality), mask, causal, scale).mean(1).prod(1)
        visual = modality == Modality.VISION
        with torch.enable_grad():
            left, right = self.selectors[layer].sides(maps)
            found = selector_mass(rows, modality, mask, causal, left, right, own_scale).prod(-1)
            # scores go as the inverse square of the tokens: AdamW would see nothing of their errors
            difference = (found - wanted)[visual] * modality.shape[1] ** 2
            loss = difference.square().mean()
            self._losses[layer] = self.step(layer, loss)


_NAMES = ("query_up", "query_down", "key_up", "key_down")
