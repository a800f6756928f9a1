"""Classes of tokens by the embeddings of the vocabulary that are nearest to them.

Cosines are float32. An id is an anchor when tokens of a class are near it; a token is in the group
of some anchors when one of them is among its nearest ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from vlmopt import artifacts
from vlmopt.analysis.modality import embedding_table
from vlmopt.errors import ArtifactError
from vlmopt.program import Program

LEAST_SHARE = 0.01
"""Of visual tokens, that an id must be nearest to before it can be an anchor."""

FREQUENT = 16
"""Ids of each sample that are looked at for anchors."""


def cosines(tokens: Tensor, vectors: Tensor) -> Tensor:
    """float32 ``[..., ids]`` of ``[..., width]`` and ``[ids, width]``."""
    normalize = torch.nn.functional.normalize
    return normalize(tokens.float(), dim=-1) @ normalize(vectors.float(), dim=-1).T


def in_group(tokens: Tensor, table: Tensor, anchors: Sequence[int], top_k: int) -> Tensor:
    """Whether an anchor is among the ``top_k`` nearest ids of each token: the exact test.

    Args:
        tokens: ``[..., width]``.
        table: embeddings of the vocabulary, ``[ids, width]``.

    Returns:
        bool ``[...]``.
    """
    nearest = cosines(tokens, table).topk(top_k, dim=-1).indices
    return torch.isin(nearest, torch.tensor(anchors, device=nearest.device)).any(-1)


def class_margin(tokens: Tensor, table: Tensor, *, anchors: Sequence[int], top_k: int) -> Tensor:
    """By how much the nearest anchor beats the ``top_k``-th nearest id of all.

    Returns:
        float32 ``[...]``, not negative where :func:`in_group` holds, and only there, ties apart.
    """
    near = cosines(tokens, table)
    best = near[..., list(anchors)].amax(-1)
    return best - near.topk(top_k, dim=-1).values[..., -1]


def threshold_margin(tokens: Tensor, vectors: Tensor, thresholds: Tensor) -> Tensor:
    """By how much the nearest anchor beats its threshold: :func:`class_margin` without the table.

    Args:
        vectors: of the anchors, ``[anchors, width]``.
        thresholds: cosine of each, ``[anchors]``.
    """
    return (cosines(tokens, vectors) - thresholds).amax(-1)


def measure(tokens: Tensor, table: Tensor, anchors: Sequence[int], top_k: int) -> dict[str, Any]:
    """What :func:`summarise` needs to know of one sample.

    Args:
        tokens: visual tokens, ``[tokens, width]``.
        anchors: the ids to look at; if there are none, those that are nearest most often.
    """
    near = cosines(tokens, table)
    nearest = near.topk(top_k, dim=-1).indices
    counts = Counter(nearest[:, 0].tolist())
    found: dict[str, Any] = {}
    for id_ in anchors or [id_ for id_, _ in counts.most_common(FREQUENT)]:
        first = nearest[:, 0] == id_
        total = torch.nn.functional.normalize(tokens[first].float(), dim=-1).sum(0)
        found[str(id_)] = {
            "first": int(first.sum()),
            "sum": [round(value, 6) for value in total.tolist()],
            "cosine": near[:, id_].tolist(),
            "member": (nearest == id_).any(-1).tolist(),
        }
    return {"tokens": len(tokens), "ids": found}


def summarise(
    rows: Sequence[Mapping[str, Any]], table: Tensor, anchors: Sequence[int], similarity: float
) -> dict[str, Any]:
    """Anchors with their vectors, a threshold for each, and what share of tokens is theirs.

    Raises:
        ArtifactError: no id has a class of nearly equal tokens.
    """
    chosen = sorted(anchors) or _constant_classes(rows, similarity)
    if not chosen:
        raise ArtifactError(
            f"no id is nearest to visual tokens with a mean cosine above {similarity}: this model "
            "has no classes of nearly equal tokens, or the samples are too few",
            hint="give more samples, lower similarity, or name anchors",
        )
    thresholds = [round(_threshold(rows, str(anchor)), 6) for anchor in chosen]
    total = agreeing = group = 0
    members = [0] * len(chosen)
    for row in rows:
        exact = torch.zeros(row["tokens"], dtype=torch.bool)
        fast = exact.clone()
        for at, anchor in enumerate(chosen):
            if (found := row["ids"].get(str(anchor))) is not None:
                member = torch.tensor(found["member"], dtype=torch.bool)
                members[at] += int(member.sum())
                exact |= member
                fast |= torch.tensor(found["cosine"]) >= thresholds[at]
        total += row["tokens"]
        agreeing += int((exact == fast).sum())
        group += int(exact.sum())
    vectors = torch.nn.functional.normalize(table[chosen].float(), dim=-1)
    return {
        "anchors": chosen,
        "thresholds": thresholds,
        "shares": [round(count / total, 6) for count in members],
        "group": round(group / total, 6),
        "agreement": round(agreeing / total, 6),
        "vectors": [[round(value, 7) for value in vector] for vector in vectors.tolist()],
    }


def _constant_classes(rows: Sequence[Mapping[str, Any]], similarity: float) -> list[int]:
    """Ids whose tokens are nearly the same, over all samples: a mean cosine between any two."""
    sums: dict[str, Tensor] = {}
    counts: Counter[str] = Counter()
    for row in rows:
        for id_, found in row["ids"].items():
            sums[id_] = sums.get(id_, torch.zeros(())) + torch.tensor(found["sum"]).double()
            counts[id_] += found["first"]
    total = sum(row["tokens"] for row in rows)
    chosen = []
    for id_, count in counts.items():
        if count < 2 or count < LEAST_SHARE * total:
            continue
        pairs = count * (count - 1)
        if (float(sums[id_].square().sum()) - count) / pairs > similarity:
            chosen.append(int(id_))
    return sorted(chosen)


def _threshold(rows: Sequence[Mapping[str, Any]], anchor: str) -> float:
    """The cosine above which tokens are taken for members, with the fewest mistakes."""
    seen = [row["ids"][anchor] for row in rows if anchor in row["ids"]]
    cosine = torch.tensor([value for found in seen for value in found["cosine"]]).double()
    member = torch.tensor([value for found in seen for value in found["member"]], dtype=torch.bool)
    cosine, order = cosine.sort(descending=True)
    member = member[order].long()
    # above the first i tokens: members there, and others behind, are taken rightly
    right = torch.zeros(len(cosine) + 1, dtype=torch.int64)
    right[1:] = member.cumsum(0) - (1 - member).cumsum(0)
    cut = int(right.argmax())
    ends = torch.cat([cosine[:1] + 1e-3, cosine, cosine[-1:] - 1e-3])
    return float((ends[cut] + ends[cut + 1]) / 2)


def require(path: str, program: Program) -> None:
    """Check that an artifact of embedlens is for the model of a program.

    Raises:
        ArtifactError: see :func:`vlmopt.artifacts.read` and :func:`check`.
    """
    check(artifacts.read(path, "embedlens", program), path, embedding_table(program))


def anchors_of(path: str) -> tuple[Tensor, Tensor]:
    """Vectors ``[anchors, width]`` and thresholds ``[anchors]`` of an artifact, float32."""
    found = artifacts.read(path, "embedlens")
    return torch.tensor(found["vectors"]), torch.tensor(found["thresholds"])


def check(found: Mapping[str, Any], path: str, table: Tensor | None) -> None:
    """Check an artifact against the table of the model that it is used on.

    Raises:
        ArtifactError: parts are missing or do not fit one another, or the anchors have other
            embeddings in this model.
    """
    again = "calibrate on this model"
    try:
        count, vectors = len(found["anchors"]), torch.tensor(found["vectors"])
        whole = count > 0 and len(found["thresholds"]) == count and vectors.ndim == 2
    except (KeyError, TypeError, ValueError) as error:
        raise ArtifactError(f"{path} lacks parts: {error}", hint=again) from error
    if not whole or len(vectors) != count:
        raise ArtifactError(f"{path} has parts that do not fit one another", hint=again)
    if table is None or table.is_meta or isinstance(table, FakeTensor):
        return
    ids = found["anchors"]
    same = max(ids) < len(table) and table.shape[1] == vectors.shape[1]
    if not same or bool((cosines(table[ids].detach(), vectors).diagonal() < 0.999).any()):
        raise ArtifactError(
            f"{path} was made with other embeddings: its anchors {ids} are no such vectors here",
            hint="ids and vectors belong to one checkpoint; " + again,
        )
