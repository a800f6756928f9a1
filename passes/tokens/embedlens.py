"""EmbedLens: drop the tokens that enter the language model as sinks or dead ones."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from vlmopt.analysis.modality import embedding_table
from vlmopt.calibration import Embedded
from vlmopt.errors import ArtifactError, OptionError
from vlmopt.passes.tokens import classes, select
from vlmopt.passes.tokens.base import TokenDrop
from vlmopt.pipeline.options import option, override
from vlmopt.program import Modality, Program
from vlmopt.rewrite.values import CutValues


@dataclass(frozen=True, kw_only=True)
class EmbedLens(TokenDrop, Embedded):
    """Drop visual tokens that carry nothing: those of the classes of sinks and of dead tokens.

    The class of a token shows in the ids of the vocabulary whose embeddings are nearest to it by
    cosine: anchors among the nearest three. ``vlmopt calibrate`` finds anchors, ids to which
    nearly equal tokens of many images come close, and for each of them a threshold that stands in
    for the comparison with the whole vocabulary. Given ``anchors`` instead, that comparison is
    made in the graph: the exact test, too dear but for checks. The number dropped is fixed.

    Reference: "What Do Visual Tokens Really Encode? Uncovering Sparsity and Redundancy in
    Multimodal Large Language Models", arXiv 2603.00510.
    """

    name = "embedlens"
    example = "embedlens{keep=0.6 artifact=embedlens.json}"
    reference = "arXiv 2603.00510"
    reads = ("anchor_margin", "ordinal")

    layers: tuple[int, ...] = override(TokenDrop, "layers", (0,))
    keep: tuple[float | int, ...] = override(TokenDrop, "keep", (0.6,))
    artifact: str = option("", "JSON file of a calibration, with anchors and thresholds")
    anchors: tuple[int, ...] = option((), "ids of the vocabulary, for the exact test", ge=0)
    top_k: int = option(3, "nearest ids that are looked at", ge=1)
    drop: str = option(
        "group",
        "what to drop first: the classes of the anchors, the others, or others at random",
        choices=("group", "others", "random"),
    )
    seed: int = option(0, "seed of the random choice", ge=0)
    similarity: float = option(
        0.9, "for calibration: mean cosine that makes tokens near an id a class", gt=0, lt=1
    )

    def requires(self, program: Program) -> None:
        super().requires(program)
        if bool(self.artifact) == bool(self.anchors):
            raise OptionError(
                f"{self.name} needs an artifact, or anchors, and not both",
                hint=f"vlmopt calibrate MODEL -p {self.name} --data ... -o {self.name}.json",
            )
        if self.artifact:
            classes.require(self.artifact, program)
            return
        table = embedding_table(program)
        if table is None or table.is_meta or isinstance(table, FakeTensor):
            raise ArtifactError(
                f"{self.name} compares tokens with embeddings, and this program has none",
                hint="capture the model with its weights, or give an artifact",
            )
        if max(self.anchors) >= len(table):
            raise OptionError(
                f"{self.name}: there is no id {max(self.anchors)}, the vocabulary has {len(table)}",
                hint="ids are those of the model's own tokenizer",
            )

    def read(self, values: CutValues, name: str) -> fx.Node:
        if name != "anchor_margin":
            return super().read(values, name)
        if self.artifact:
            device = values.hidden.meta["val"].device
            near = (value.to(device) for value in classes.anchors_of(self.artifact))
            given: tuple[Any, ...] = (
                classes.threshold_margin,
                values.hidden,
                *map(values.emit.constant, near),
            )
        else:
            assert values.program is not None
            table = self._table(values.program)
            exact = partial(classes.class_margin, anchors=self.anchors, top_k=self.top_k)
            given = exact, values.hidden, values.emit.constant(table)
        margin: fx.Node = values.emit.trace(*given, names=("margin",))
        return margin

    def score(self, margin: Tensor, ordinal: Tensor) -> Tensor:  # type: ignore[override]
        """High for what stays.

        Args:
            margin: float32 ``[batch, tokens]``, not negative for tokens of the classes.
            ordinal: int64 ``[batch, tokens]``, number of each visual token among its sample's.
        """
        if self.drop == "random":
            blind = select.hashed(ordinal, self.seed)
            return torch.where(margin >= 0, float(2**25), blind)
        return margin if self.drop == "others" else -margin

    def look(self, program: Program, hidden: Tensor, modality: Tensor) -> Any:
        tokens = hidden[modality == Modality.VISION]
        return classes.measure(tokens, self._table(program), self.anchors, self.top_k)

    def summarise(self, program: Program, rows: list[Any]) -> dict[str, Any]:
        return classes.summarise(rows, self._table(program), self.anchors, self.similarity)

    def _table(self, program: Program) -> Tensor:
        table = embedding_table(program)
        if table is None:
            raise ArtifactError(f"{self.name}: this {program.model_type} embeds no token ids")
        return table.detach()
