"""ZOO-Prune: keep visual tokens to which the projector is sensitive, and that differ."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from vlmopt.ops.selection import farthest_point
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.pipeline.passes import PassContext, PassResult
from vlmopt.program import Program
from vlmopt.rewrite.encoded import NEEDS_ROUTES
from vlmopt.rewrite.projector import Projector, find_projector


@dataclass(frozen=True, kw_only=True)
class ZooPrune(TokenDrop):
    """Keep visual tokens by sensitivity of the projector times distance, picked greedily.

    A token's sensitivity is how far its projection moves when what enters the projector's first
    linear layer moves along random unit vectors, the same for all tokens: the mean norm of the
    derivative, which the paper estimates by finite differences and which is computed exactly here.
    Where patches are merged into one token, side by side or by pooling, the merged vector moves.
    First the most sensitive token is picked, then always the one of largest product of its
    sensitivity (scaled to 0 to 1) and its cosine distance, as an embedding, to those picked. A
    projector that is one linear layer is equally sensitive everywhere: then only distance counts.
    Needs no attention.

    Reference: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in
    Vision-Language Models", arXiv 2509.24837.
    """

    name = "zoo-prune"
    example = "zoo-prune{keep=64}"
    reference = "arXiv 2509.24837"
    reads = ("encoded_rows", "hidden", "valid", "count", "project")
    compact = True
    needs_capture = NEEDS_ROUTES

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.11,))
    positions: str = override(TokenDrop, "positions", "auto")
    directions: int = option(64, "random directions", ge=1)
    seed: int = option(0, "seed of the directions", ge=0)

    def requires(self, program: Program) -> None:
        super().requires(program)
        find_projector(program)

    def projector(self, program: Program, entry: fx.Node) -> Projector:
        return find_projector(program)

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        if find_projector(program).is_linear:
            ctx.remark("the projector is linear: tokens are chosen by distance alone")
        return super().run(program, ctx)

    def score(  # type: ignore[override]
        self, rows: Tensor, hidden: Tensor, valid: Tensor, count: int, project: Projector
    ) -> Tensor:
        """Earlier picks score higher.

        Args:
            rows: what makes a token each, ``[batch, visual tokens, width]``.
            hidden: embeddings, ``[batch, visual tokens, width of the language model]``.
            valid: bool ``[batch, visual tokens]``.
            count: picks.
            project: what makes tokens of rows.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        unit = unit_vectors(self.directions, project.width, self.seed).to(rows.device)
        sensitivity = project.derivatives(rows, unit)
        start = sensitivity.masked_fill(~valid, -1.0).argmax(-1)
        weight = select.min_max(sensitivity, valid)
        weight = torch.where((weight.amax(-1, keepdim=True) > 0), weight, 1.0)
        picks = farthest_point(hidden, valid, weight, start, count, "cosine")
        return select.by_order(picks, hidden.shape[1])


def unit_vectors(count: int, width: int, seed: int) -> Tensor:
    """Random directions, the same wherever they are drawn: float32 ``[count, width]``."""
    drawn = np.random.default_rng(seed).standard_normal((count, width), dtype=np.float32)
    # as a list: a constant of the graph, and no random operator in it
    return torch.tensor((drawn / np.linalg.norm(drawn, axis=1, keepdims=True)).tolist())
