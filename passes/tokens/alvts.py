"""ALVTS: each layer sees the visual tokens that it would attend to; the others skip it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from vlmopt.analysis.sublayers import attention_of, projection_of
from vlmopt.errors import ArtifactError, PreconditionError
from vlmopt.graph.attention import is_causal
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.program import Modality
from vlmopt.rewrite.values import CutValues, compute_rows


@dataclass(frozen=True, kw_only=True)
class Alvts(TokenDrop):
    """Let only some visual tokens through each layer, chosen anew by each.

    A copy of the layer's query and key projections, of low rank and without rotary positions and
    heads, gives an attention map; a token's score is what it gets from visual tokens times what it
    gets from text. Tokens that skip a layer keep their state and have no key in it: nothing is ever
    deleted. The copies come from a singular value decomposition of the weights; the calibration
    that the paper adds is not done here.

    Reference: "One Layer's Trash is Another Layer's Treasure: Adaptive Layer-wise Visual Token
    Selection in LVLMs", arXiv 2606.14277.
    """

    name = "alvts"
    example = "alvts{layers=2,3,4 keep=0.33}"
    reference = "arXiv 2606.14277"
    reads = ("selector_mass",)
    restores = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (2,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.33,))
    rank: int = option(256, "rank of the copies, at most the width", ge=1)

    def read(self, values: CutValues, name: str) -> fx.Node:
        if name != "selector_mass":
            return super().read(values, name)
        attention = attention_of(values.layers, values.layer)
        inputs: Any = attention.args
        query, key = (projection_of(value) for value in inputs[:2])
        if query.args[0] is not key.args[0]:
            raise PreconditionError(
                f"{self.name} copies projections of one input, and query and key of layer "
                f"{values.layer} are projected from different ones",
                node=query,
                hint="choose another method for a model with latent attention",
            )
        weights = [values.weight(linear.args[1]) for linear in (query, key)]
        if any(weight.is_meta or isinstance(weight, FakeTensor) for weight in weights):
            raise ArtifactError(
                f"{self.name} decomposes weights, and this program has none",
                node=query,
                hint="capture the model with its weights",
            )
        _, heads, _, size = inputs[0].meta["val"].shape
        left, right = map(values.emit.constant, selectors(weights[0], weights[1], heads, self.rank))
        (rows,) = compute_rows(values, [query.args[0]])
        result: fx.Node = values.emit.trace(
            selector_mass,
            rows,
            values.modality,
            values.mask_of(attention),
            is_causal(attention),
            left,
            right,
            1 / (heads * size**0.5),
            names=("mass",),
        )
        return result

    @staticmethod
    def score(mass: Tensor) -> Tensor:  # type: ignore[override]
        """What a token gets from visual tokens times what it gets from text.

        Args:
            mass: float32 ``[batch, tokens, 2]``.
        """
        return mass[..., 0] * mass[..., 1]


def selectors(query: Tensor, key: Tensor, heads: int, rank: int) -> tuple[Tensor, Tensor]:
    """``(left, right)`` with ``x left (y right)^T`` close to the summed products of all heads.

    Args:
        query: weight of the query projection, ``[heads * size, width]``.
        key: of the key projection, ``[key heads * size, width]``.

    Returns:
        float32 ``[width, rank]`` twice.
    """
    size = query.shape[0] // heads
    groups = heads // (key.shape[0] // size)
    repeated = key.float().unflatten(0, (-1, size)).repeat_interleave(groups, dim=0).flatten(0, 1)
    query_up, query_down = _factors(query.float(), rank)
    key_up, key_down = _factors(repeated, rank)
    return query_down.T @ (query_up.T @ key_up), key_down.T


def _factors(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``weight`` as a product over ``rank`` dimensions, singular values shared between the two."""
    up, values, down = torch.linalg.svd(weight, full_matrices=False)
    root = values[:rank].sqrt()
    return up[:, :rank] * root, root[:, None] * down[:rank]


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

    Returns:
        float32 ``[batch, tokens, 2]``.
    """
    rows = rows.float()
    groups = torch.stack([modality == kind for kind in (Modality.VISION, Modality.TEXT)], 1)
    weights = groups.float() / groups.sum(-1, keepdim=True).clamp(min=1)
    query, key = (rows @ left)[:, None], (rows @ right)[:, None]
    mass = torch.ops.vlmopt.attention_mass(query, key, weights, mask, causal, scale)
    return mass[:, 0].transpose(1, 2)
