"""Comprehension-aware pruning: once the model has understood, drop what it does not look at."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt import artifacts
from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.calibration import Watched
from vlmopt.errors import OptionError
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Modality, Port, Program, Role
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.values import CutValues, last_slot


@dataclass(frozen=True, kw_only=True)
class ComprehensionPrune(TokenDrop, Watched):
    """Keep the visual tokens that the last token of the prompt attends to above a threshold.

    At the entry of layer ``k``, a token's score is the attention that it got from the prompt's last
    token in layer ``k - 1``, times the number of visual tokens: 1 is an even share. Those of at
    least ``tau_att`` stay, the best ``keep`` at most; where fewer do, what fills up their places is
    masked. The paper looks for the layer in each prompt: the first behind which the norm of the
    last token reaches ``tau_comp``. Graphs need one layer for all; ``vlmopt calibrate`` finds the
    median, and how much room is needed there.

    Reference: "DocPrune: Efficient Document Question Answering via Background, Question, and
    Comprehension-aware Token Pruning", arXiv 2604.22281. What its attention score is exactly is not
    public.
    """

    name = "comprehension-prune"
    example = "comprehension-prune{layers=16 keep=0.5 tau_att=0.5}"
    reference = "arXiv 2604.22281"
    first_layer = 1
    reads = ("row", "visual")
    bounded = True

    layers: tuple[int, ...] = override(TokenDrop, "layers", (16,), ge=1)
    tau_att: float = option(0.5, "attention that a token needs to stay; 1 is an even share", ge=0)
    attention: str = option(
        "logit_mean",
        "mean over heads of logits, then softmax over visual tokens; or of softmax over all tokens",
        choices=("logit_mean", "prob_mean"),
    )

    tau_comp: float = option(65.0, "for calibration: norm at which a prompt is understood", gt=0)
    quantile: float = option(
        0.9, "for calibration: share of prompts for which there is room enough", ge=0, le=1
    )
    artifact: str = option("", "JSON file of a calibration; layers and keep are those it found")

    def cuts(self) -> list[tuple[int, float | int]]:
        if not self.artifact:
            return super().cuts()
        found = artifacts.read(self.artifact, self.name)
        return [(int(found["layer"]), float(found["keep"]))]

    def requires(self, program: Program) -> None:
        if self.artifact:
            found = artifacts.read(self.artifact, self.name, program)
            if found["layer"] is None:
                raise OptionError(
                    f"{self.name}: most prompts of {self.artifact} never reach a norm of "
                    f"{found['tau_comp']:g}",
                    hint="calibrate with a smaller tau_comp; the artifact has quantiles of norms",
                )
        super().requires(program)

    def watch(self, program: Program) -> None:
        stage = token_stage(program)
        modality = modality_of_tokens(stage)
        layers = find_layers(stage, after=modality.anchor)
        output, ctx = stage.graph.output_node(), PassContext(str(self))
        emit = Emitter.of_pass(ctx, stage, output, self.name)
        with stage.graph.inserting_before(output):
            found = []
            for layer in range(1, len(layers)):
                values = CutValues(
                    stage, layers, layer, modality.source, modality.visual, emit, {}, program, ctx
                )
                given = (modality.source, values.hidden, self.read(values, "row"))
                found.append(emit.trace(self.look, *given))
            whole = emit.trace(lambda *rows: torch.stack(rows, 1), *found)
        stage.add_output(Port("comprehension", Role.OTHER), whole)

    def look(self, modality: Tensor, hidden: Tensor, row: Tensor) -> Tensor:
        """Norm of the last token, and share of the visual tokens that pass: ``[batch, 2]``."""
        norm = select.take(hidden.float(), last_slot(modality))[:, 0].norm(dim=-1)
        visual = modality == Modality.VISION
        passing = visual & self.passing(self.score(row, visual))
        return torch.stack([norm, passing.sum(-1) / visual.sum(-1).clamp(min=1)], -1)

    def summarise(self, program: Program, rows: list[Any]) -> dict[str, Any]:
        """The layer that most prompts reach the norm before, and the room that they need there."""
        seen = torch.tensor([prompt for batch in rows for prompt in batch], dtype=torch.float64)
        norms, shares = seen.unbind(-1)  # [prompts, layers but the last]
        first = self.understood(norms).median()
        keep = 0.0
        if first < norms.shape[1]:
            room = shares[:, first].quantile(self.quantile, interpolation="higher")
            keep = math.ceil(float(room) * 1e6) / 1e6
        spread = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
        return {
            "tau_comp": self.tau_comp,
            "layer": int(first) + 1 if first < norms.shape[1] else None,
            "keep": keep,
            "norms": [[round(q, 3) for q in row] for row in norms.quantile(spread, dim=0).tolist()],
        }

    def understood(self, norms: Tensor) -> Tensor:
        """First layer behind which the norm is at least ``tau_comp``; their number if none.

        Args:
            norms: ``[prompts, layers]``.

        Returns:
            int64 ``[prompts]``.
        """
        reached = (norms >= self.tau_comp).long()
        first = reached.argmax(-1)
        return torch.where(reached.any(-1), first, norms.shape[1])

    def read(self, values: CutValues, name: str) -> fx.Node:
        if name != "row":
            return super().read(values, name)
        return values["last_logits" if self.attention == "logit_mean" else "last_attention"]

    def score(self, row: Tensor, visual: Tensor) -> Tensor:  # type: ignore[override]
        """Attention to each token, in even shares.

        Args:
            row: logits or attention of the last token, float32 ``[batch, tokens]``.
            visual: bool, likewise.
        """
        if self.attention == "logit_mean":
            row = torch.softmax(row.masked_fill(~visual, float("-inf")), dim=-1)
        return torch.where(visual, row, 0.0) * visual.sum(-1, keepdim=True)

    def passing(self, score: Tensor) -> Tensor:
        return score >= self.tau_att
