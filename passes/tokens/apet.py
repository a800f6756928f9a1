"""ApET: keep the visual tokens that a small basis cannot express, merge the rest into them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vlmopt.errors import OptionError, PreconditionError
from vlmopt.ops.linear import solve_small
from vlmopt.ops.selection import farthest_point
from vlmopt.passes.tokens.assign import assigned_merge, nearest
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.program import Program
from vlmopt.rewrite.projector import Projector, find_projector
from vlmopt.rewrite.values import CutValues


@dataclass(frozen=True, kw_only=True)
class ApET(TokenDrop):
    """Keep the visual tokens with the largest error of linear approximation; merge the others.

    A basis of a few tokens, far from each other, approximates all tokens by ridge regression. The
    tokens with the largest errors stay; the last few of these give their places to the basis
    (``mode``), and every dropped token is averaged into the most similar of the others. Needs no
    attention.

    Reference: "ApET: Approximation-Error Guided Token Compression for Efficient VLMs",
    arXiv 2602.19870. The official code starts the basis at random; here it starts with the token
    of largest norm.
    """

    name = "apet"
    example = "apet{keep=96}"
    reference = "arXiv 2602.19870"
    reads = ("rows", "valid", "count")
    compact = True
    merges = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.2,))
    basis: int = option(10, "tokens of the basis", ge=1)
    ridge: float = option(1e-5, "regularisation of the approximation", gt=0)
    mode: str = option(
        "overwrite",
        "basis tokens replace the last kept ones, are averaged with them, or stay at places of "
        "their own",
        choices=("overwrite", "blend", "own"),
    )
    space: str = option(
        "embeddings",
        "what is compared and merged: embeddings, or what enters the projector, as in the first "
        "stage of the official LLaVA code",
        choices=("embeddings", "features"),
    )
    pairing: str = option(
        "index",
        "which basis token goes to which place: by position, or by error",
        choices=("index", "error"),
    )

    def requires(self, program: Program) -> None:
        super().requires(program)
        if self.space == "features":
            if self.layers != (0,):
                raise OptionError(
                    f"{self.name} cuts at layer {self.layers[-1]}, where tokens are no features",
                    hint="use space=features with layers=0",
                )
            find_projector(program)

    def projector(self, program: Program, entry: fx.Node) -> Projector | None:
        return find_projector(program) if self.space == "features" else None

    def read(self, values: CutValues, name: str) -> fx.Node:
        if name == "rows":
            name = "encoded_features" if self.space == "features" else "hidden"
        return super().read(values, name)

    def score(self, hidden: Tensor, valid: Tensor, count: int) -> Tensor:  # type: ignore[override]
        """Error of approximation; with ``mode=own`` the basis comes first.

        Args:
            hidden: embeddings or features, ``[batch, visual tokens, width]``.
            valid: bool ``[batch, visual tokens]``.
            count: visual tokens that stay.

        Returns:
            float32 ``[batch, visual tokens]``.

        Raises:
            PreconditionError: not more tokens stay than the basis has.
        """
        if count <= self.basis:
            raise PreconditionError(
                f"{self.name} keeps {count} visual tokens, not more than its basis of {self.basis}",
                hint="keep more, or set a smaller basis",
            )
        picks = self.basis_of(hidden, valid)
        error = approximation_error(hidden, picks, self.ridge)
        return error.scatter(1, picks, float("inf")) if self.mode == "own" else error

    def basis_of(self, hidden: Tensor, valid: Tensor) -> Tensor:
        """Farthest-point sampling from the token of largest norm: int64 ``[batch, basis]``."""
        start = hidden.float().norm(dim=-1).masked_fill(~valid, -1.0).argmax(-1)
        return farthest_point(hidden, valid, None, start, self.basis, "squared")

    def merge(  # type: ignore[override]
        self, tokens: Tensor, score: Tensor, kept: Tensor, hidden: Tensor, valid: Tensor, count: int
    ) -> Tensor:
        """Basis tokens at their places, dropped tokens averaged into anchors.

        Args:
            tokens, hidden: ``[batch, visual tokens, width]``.
            score: errors.
            kept, valid: bool ``[batch, visual tokens]``.
            count: visual tokens that stay, at most.
        """
        return self.merged(tokens, score, kept, valid, self.basis_of(tokens, valid))

    def merged(
        self, tokens: Tensor, score: Tensor, kept: Tensor, valid: Tensor, picks: Tensor
    ) -> Tensor:
        """:meth:`merge` for a given basis, int64 ``[batch, basis]``."""
        rows = tokens.float()
        order = torch.sort(
            torch.where(kept, score, float("-inf")), dim=-1, descending=True, stable=True
        ).indices
        place = torch.arange(rows.shape[1], device=rows.device).expand_as(order)
        rank = torch.zeros_like(order).scatter(1, order, place)
        own = torch.zeros_like(kept).scatter(1, picks, True)
        if self.mode == "own":
            anchors = kept & ~own
        else:
            anchors = kept & (rank < kept.sum(-1, keepdim=True) - self.basis)
            rows = self._with_basis(rows, kept & ~anchors, rank, picks)
        target = torch.where(valid & ~kept, nearest(rows, anchors), place)
        return assigned_merge(rows, target, torch.ones_like(score))

    def _with_basis(self, rows: Tensor, slots: Tensor, rank: Tensor, picks: Tensor) -> Tensor:
        """Rows with the basis at ``slots`` (bool, as many per sample as the basis has)."""
        key = rank if self.pairing == "error" else torch.arange(rows.shape[1], device=rows.device)
        key = torch.where(slots, key, rows.shape[1])
        places = torch.sort(key, dim=-1, stable=True).indices[:, : self.basis]
        index = places[..., None].expand(-1, -1, rows.shape[2])
        basis = rows.gather(1, picks[..., None].expand(-1, -1, rows.shape[2]))
        if self.mode == "blend":
            basis = 0.5 * basis + 0.5 * rows.gather(1, index)
        return rows.scatter(1, index, basis)


def approximation_error(hidden: Tensor, picks: Tensor, ridge: float) -> Tensor:
    """Distance of each token from its ridge approximation by the tokens ``picks``.

    Args:
        hidden: ``[batch, tokens, width]``.
        picks: int64 ``[batch, basis]``.

    Returns:
        float32 ``[batch, tokens]``.
    """
    rows = hidden.float()
    basis = rows.gather(1, picks[..., None].expand(-1, -1, rows.shape[2]))
    gram = basis @ basis.transpose(1, 2)
    gram = gram + ridge * torch.eye(gram.shape[-1], device=gram.device)
    weights = solve_small(gram, basis @ rows.transpose(1, 2))
    return (rows - weights.transpose(1, 2) @ basis).norm(dim=-1)
