"""HAWK: keep what the instruction looks for, by attention without positions, head by head."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt import artifacts
from vlmopt.analysis.modality import token_stage
from vlmopt.calibration import Compared, Variant
from vlmopt.errors import ArtifactError, OptionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Modality, Program
from vlmopt.rewrite.classes import input_ids
from vlmopt.rewrite.heads import without_each_head
from vlmopt.rewrite.values import last_place


@dataclass(frozen=True, kw_only=True)
class Hawk(TokenDrop, Compared):
    """Keep the visual tokens that the instruction matches in the first layer, positions aside.

    The mean query of the instruction meets the keys of layer 0 without rotary positions; each
    head's scores are normalised over the visual tokens and weighted by how much the head matters,
    an offline artifact (``vlmopt calibrate``). Without one all heads weigh the same.

    Reference: "HAWK: Head Importance-Aware Visual Token Pruning in Multimodal Models",
    arXiv 2604.07812.
    """

    name = "hawk"
    example = "hawk{keep=0.2}"
    reference = "arXiv 2604.07812"
    reads = ("instruction_logits_unrotated", "valid")
    compact = True
    rounding = "ceil"

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.2,))
    norm: str = option(
        "l2",
        "over visual tokens, per head; none: as the paper writes it",
        choices=("l2", "softmax", "minmax", "none"),
    )
    markers: tuple[int, ...] = option(
        (),
        "ids of the tokens that end vision and a message: the instruction is what stands between "
        "the last of each; empty: all text behind vision",
        ge=0,
    )
    weights: str = option("", "JSON file with a weight per head; empty for equal weights")
    all_layers: bool = option(False, "for calibration: leave a head out of all layers, not one")

    def requires(self, program: Program) -> None:
        super().requires(program)
        if len(self.markers) not in (0, 2):
            raise OptionError(
                f"{self.name}: option markers has {len(self.markers)} values",
                hint="give two ids, or none",
            )
        if self.weights:
            artifacts.read(self.weights, self.name, program)

    def variants(self, program: Program) -> list[Variant]:
        """The cut layer's attention without head 0, without head 1, and so on."""
        return without_each_head(program, None if self.all_layers else self.layers[0])

    def conclude(self, rows: Tensor) -> dict[str, Any]:
        """How much each head's absence changes answers, above the least such, as shares."""
        above = rows - rows.amin(-1, keepdim=True)
        total = above.sum(-1, keepdim=True)
        shares = torch.where(total > 0, above / total, 1 / above.shape[-1]).mean(0)
        return {"weights": [round(share, 6) for share in shares.tolist()]}

    def begin(self, program: Program, ctx: PassContext) -> dict[str, fx.Node]:
        if not self.markers:
            return {}
        ids = input_ids(token_stage(program), ctx)
        with self.at_entry(program, ctx, ids) as values:
            if values.kept is not None:
                ids = values.emit.call(torch.ops.aten.gather.default, ids, 1, values.kept)
            asked = values.emit.trace(self.asked, values.modality, ids, names=("instruction",))
        return {"instruction": asked}

    def asked(self, modality: Tensor, ids: Tensor) -> Tensor:
        """``modality`` with padding in place of text that is not between the ``markers``.

        Where there is none, the marker of vision stands in.

        Args:
            modality, ids: int64 ``[batch, tokens]``.
        """
        place = torch.arange(modality.shape[1], device=modality.device)
        start = last_place(ids == self.markers[0])
        end = last_place((ids == self.markers[1]) & (place > start))
        between = (place > start) & ((place < end) | (end < 0)) & (modality == Modality.TEXT)
        wanted = between | (~between.any(-1, keepdim=True) & (place == start))
        return torch.where((modality == Modality.TEXT) & ~wanted, Modality.PADDING, modality)

    def score(self, logits: Tensor, valid: Tensor) -> Tensor:  # type: ignore[override]
        """Weighted sum over heads.

        Args:
            logits: mean over the instruction of query times key, scaled, float32
                ``[batch, visual tokens, heads]``.
            valid: bool ``[batch, visual tokens]``.

        Returns:
            float32 ``[batch, visual tokens]``.
        """
        logits = torch.nan_to_num(logits.float(), nan=0.0, posinf=0.0, neginf=0.0)
        there = valid[..., None]
        if self.norm == "softmax":
            share = torch.softmax(logits.masked_fill(~there, float("-inf")), dim=1)
        elif self.norm == "minmax":
            heads_first = logits.transpose(1, 2)
            share = select.min_max(heads_first, valid[:, None]).transpose(1, 2)
        elif self.norm == "none":
            share = logits
        else:
            known = logits * there
            share = known / known.norm(dim=1, keepdim=True).clamp(min=1e-12)
        return (share * self._weights(logits.shape[-1]).to(logits.device)).sum(-1)

    def _weights(self, heads: int) -> Tensor:
        if not self.weights:
            return torch.full((heads,), 1.0 / heads)
        values = artifacts.read(self.weights, self.name)["weights"]
        if len(values) != heads:
            raise ArtifactError(
                f"{self.weights} weighs {len(values)} heads, this model has {heads}",
                hint="calibrate on this model",
            )
        return torch.tensor(values, dtype=torch.float32)
