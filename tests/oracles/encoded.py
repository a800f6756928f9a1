"""Eager references of the methods that read the vision encoder: plain loops on the user's model.

What each family does between encoder and prompt is written out by hand here, and followed by
gradients in the product.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oracles.methods import Choose, Keep
from oracles.reduced import Choice, Recorded

Plan = Callable[["Encoded"], Choose]


class Encoded:
    """What the vision encoder computes of some inputs.

    Attributes:
        attention: received by each visual token, one list per sample.
        keys: of each visual token, ``[visual tokens, size]`` per sample.
        features: what its projector takes, per sample, and what merges; ``None`` where a token has
            no row there of its own.
        apart: between which distances are taken; ``None`` for embeddings.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], family: str) -> None:
        calls = self._record(model, inputs)
        per_token = PATCHES[family](model, calls)
        batch = len(inputs["input_ids"])
        rows = [
            (sum(a for a, _ in patches) / len(patches), sum(k for _, k in patches) / len(patches))
            for patches in per_token
        ]
        size = len(rows) // batch
        samples = [rows[b * size : (b + 1) * size] for b in range(batch)]
        self.attention = [[float(a) for a, _ in sample] for sample in samples]
        self.keys = [torch.stack([k for _, k in sample]) for sample in samples]
        self.project: Any = getattr(model.model, "multi_modal_projector", None)
        self.features = self.entering if family == "llava" else None
        self.apart = self.entering if family in ("llava", "gemma3") else None

    @torch.no_grad()
    def _record(self, model: Any, inputs: dict[str, Any]) -> list[list[Any]]:
        """Queries, keys, mask and scale of attention, one list for each block."""
        tower = model.get_encoder("image")
        inside = dict.fromkeys(tower.modules())
        blocks: dict[Any, list[Any]] = {}
        original = ALL_ATTENTION_FUNCTIONS["sdpa"]

        def attention(module: Any, query: Any, key: Any, value: Any, *args: Any, **kw: Any) -> Any:
            if module in inside:
                mask = args[0] if args else kw.get("attention_mask")
                blocks.setdefault(module, []).append((query, key, mask, kw.get("scaling")))
            return original(module, query, key, value, *args, **kw)

        handles = []
        if hasattr(model.model, "multi_modal_projector"):

            def entering(module: Any, args: Any) -> None:
                self.entering = args[0]

            handles.append(model.model.multi_modal_projector.register_forward_pre_hook(entering))
        ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
        try:
            model(**inputs)
        finally:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = original
            for handle in handles:
                handle.remove()
        return list(blocks.values())


def received(call: Any, row: int | None) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """Attention and key of each row, per image: from one row, or the mean over all."""
    query, key, mask, scale = call
    logits = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if mask is not None:
        hidden = ~mask if mask.dtype == torch.bool else mask < -1e30
        logits = logits.masked_fill(hidden, float("-inf"))
    weights = logits.softmax(-1).mean(1)
    weights = weights[:, row] if row is not None else weights.mean(1)
    keys = key.mean(1)
    return [list(zip(weights[b], keys[b], strict=True)) for b in range(len(keys))]


def _llava(model: Any, blocks: list[list[Any]]) -> list[list[Any]]:
    # the class token is no token of the prompt
    images = received(blocks[model.config.vision_feature_layer][0], 0)
    return [[patch] for image in images for patch in image[1:]]


def _gemma3(model: Any, blocks: list[list[Any]]) -> list[list[Any]]:
    return [[patch] for image in received(blocks[-1][0], None) for patch in image]


def _smolvlm(model: Any, blocks: list[list[Any]]) -> list[list[Any]]:
    tokens = []
    for image in received(blocks[-1][0], None):
        side = math.isqrt(len(image))
        tokens += [
            [image[(2 * y + dy) * side + 2 * x + dx] for dy in (0, 1) for dx in (0, 1)]
            for y in range(side // 2)
            for x in range(side // 2)
        ]
    return tokens


def _qwen2_5_vl(model: Any, blocks: list[list[Any]]) -> list[list[Any]]:
    rows = [patch for call in blocks[-1] for image in received(call, None) for patch in image]
    groups = [rows[at : at + 4] for at in range(0, len(rows), 4)]
    tokens: list[Any] = [None] * len(groups)
    for group, token in zip(groups, _windows(len(groups)), strict=True):
        tokens[token] = group
    return tokens


def _windows(tokens: int) -> list[int]:
    """The token in each place: images of 4 x 4 tokens, in windows of 2 x 2."""
    return [
        image * 16 + (2 * wy + y) * 4 + 2 * wx + x
        for image in range(tokens // 16)
        for wy in (0, 1)
        for wx in (0, 1)
        for y in (0, 1)
        for x in (0, 1)
    ]


PATCHES = {"llava": _llava, "gemma3": _gemma3, "smolvlm": _smolvlm, "qwen2_5_vl": _qwen2_5_vl}


def _imposed(
    encoded: Encoded, choose: Callable[[int, int], tuple[list[int], dict[int, list[int]]]]
) -> Choose:
    """``choose(sample, visual tokens)`` gives those that stay, and members by anchor."""

    def imposed(recorded: Recorded, layer: int) -> Choice:
        stays = recorded.present.clone()
        rows = recorded.hidden[layer].clone()
        for sample in range(len(stays)):
            slots = torch.nonzero(recorded.visual[sample])[:, 0].tolist()
            kept, members = choose(sample, len(slots))
            for at, slot in enumerate(slots):
                stays[sample, slot] = at in kept
            for anchor, joined in members.items():
                if not joined:
                    continue
                if encoded.features is None:
                    own = recorded.hidden[layer][sample]
                    mean = own[[slots[at] for at in joined]].mean(0)
                    rows[sample, slots[anchor]] = own[slots[anchor]] + mean
                else:
                    own = encoded.features[sample]
                    with torch.no_grad():
                        row = encoded.project((own[anchor] + own[joined].mean(0))[None, None])
                    rows[sample, slots[anchor]] = row[0, 0]
        return Choice(layer, stays, rows)

    return imposed


def _ranked(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda at: (-values[at], at))


def _join(keys: torch.Tensor, anchors: list[int], others: list[int]) -> dict[int, list[int]]:
    unit = torch.nn.functional.normalize(keys, dim=-1)
    members: dict[int, list[int]] = {anchor: [] for anchor in anchors}
    for other in others:
        members[max(anchors, key=lambda a: (float(unit[a] @ unit[other]), -a))].append(other)
    return members


def visionzip(encoded: Encoded, keep: Keep, context: float) -> Choose:
    def choose(sample: int, count: int) -> tuple[list[int], dict[int, list[int]]]:
        total = keep(count, count)
        contextual = int(total * context + 0.5)
        dominant = _ranked(encoded.attention[sample])[: total - contextual]
        rest = [at for at in range(count) if at not in dominant]
        step = max(1, len(rest) // max(1, contextual))
        anchors = rest[::step][:contextual]
        others = [at for at in rest if at not in anchors]
        return dominant + anchors, _join(encoded.keys[sample], anchors, others)

    return _imposed(encoded, choose)


def duet_encoder(encoded: Encoded, dominant: int, context: int, width: int) -> Choose:
    def choose(sample: int, count: int) -> tuple[list[int], dict[int, list[int]]]:
        order = _ranked(encoded.attention[sample])
        first, rest = order[:dominant], order[dominant:]
        pool = rest[: min(max(1, width * context), len(rest))]
        anchors = pool[:: max(1, len(pool) // max(1, context))][:context]
        others = [at for at in pool if at not in anchors]
        return first + anchors, _join(encoded.keys[sample], anchors, others)

    return _imposed(encoded, choose)


def _greedy(rows: torch.Tensor, weight: list[float], start: int, count: int) -> list[int]:
    unit = torch.nn.functional.normalize(rows.float(), dim=-1)
    picked = [start]
    while len(picked) < count:
        apart = (1 - unit @ unit[picked].T).clamp(min=0).amin(-1)
        worth = [-1.0 if at in picked else float(apart[at]) * weight[at] for at in range(len(unit))]
        picked.append(_ranked(worth)[0])
    return picked


def score(encoded: Encoded, keep: Keep, alpha: float) -> Choose:
    def imposed(recorded: Recorded, layer: int) -> Choice:
        def choose(sample: int, count: int) -> tuple[list[int], dict[int, list[int]]]:
            rows = recorded.hidden[layer][sample][recorded.visual[sample]]
            if encoded.apart is not None:
                rows = encoded.apart[sample]
            salience = encoded.attention[sample]
            weight = [value**alpha for value in salience]
            start = _ranked(salience)[0]
            return _greedy(rows, weight, start, keep(count, count)), {}

        return _imposed(encoded, choose)(recorded, layer)

    return imposed


class Entering:
    """What enters the first linear layer behind all merging of patches.

    Attributes:
        rows: float64 ``[visual tokens, width]``, one tensor per sample, in the order of the prompt.
        project: what makes tokens of such rows, in float64.
    """

    def __init__(self, model: Any, inputs: dict[str, Any], family: str) -> None:
        tail = TAILS[family]
        seen: list[torch.Tensor] = []

        def watch(module: Any, args: Any, output: Any) -> None:
            seen.append(output if tail.behind else args[0])

        handle = model.get_submodule(tail.module + tail.watched).register_forward_hook(watch)
        with torch.no_grad():
            model(**inputs)
        handle.remove()
        (rows,) = seen
        rows = rows.reshape(-1, rows.shape[-1]).double()
        if family == "qwen2_5_vl":
            tokens = sorted(range(len(rows)), key=_windows(len(rows)).__getitem__)
            rows = rows[tokens]
        self.rows = list(rows.chunk(len(inputs["input_ids"])))
        whole = copy.deepcopy(model.get_submodule(tail.module)).double()
        self.project: Callable[[torch.Tensor], torch.Tensor] = partial(tail.project, whole)


@dataclass(frozen=True)
class Tail:
    """Where rows are watched, and what is made of them.

    Attributes:
        module: its path.
        watched: path of the part of it which the rows enter.
        project: ``(module, rows) -> tokens``.
        behind: they leave it.
    """

    module: str
    watched: str
    project: Callable[[Any, torch.Tensor], torch.Tensor]
    behind: bool = False


def _called(module: Any, rows: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = module(rows)
    return tokens


def _two_layers(module: Any, rows: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = module.linear_2(module.act(module.linear_1(rows)))
    return tokens


def _two_layers_qwen3(module: Any, rows: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = module.linear_fc2(module.act_fn(module.linear_fc1(rows)))
    return tokens


def _gated(module: Any, rows: torch.Tensor) -> torch.Tensor:
    value, gate = module.linear_1(rows).chunk(2, dim=-1)
    tokens: torch.Tensor = module.linear_2(module.act(gate) * value)
    return tokens


def _matrix(module: Any, rows: torch.Tensor) -> torch.Tensor:
    tokens: torch.Tensor = rows @ module.mm_input_projection_weight
    return tokens


_PROJECTOR = "model.multi_modal_projector"
TAILS = {
    "llava": Tail(_PROJECTOR, "", _called),
    "internvl": Tail(_PROJECTOR, ".linear_1", _two_layers),
    "aya_vision": Tail(_PROJECTOR, ".linear_1", _gated),
    "gemma3": Tail(_PROJECTOR, ".mm_soft_emb_norm", _matrix, behind=True),
    "smolvlm": Tail("model.connector.modality_projection", "", _called),
    "qwen2_vl": Tail("model.visual.merger.mlp", "", _called),
    "qwen2_5_vl": Tail("model.visual.merger.mlp", "", _called),
    "qwen3_vl": Tail("model.visual.merger", ".linear_fc1", _two_layers_qwen3),
}


def sensitivity(
    entering: Entering, sample: int, directions: torch.Tensor, step: float
) -> torch.Tensor:
    """By central differences in float64, as the paper has it: one number per visual token."""
    rows = entering.rows[sample]
    with torch.no_grad():
        moved = [
            (entering.project(rows + step * one) - entering.project(rows - step * one)) / (2 * step)
            for one in directions.double()
        ]
    return torch.stack([each.norm(dim=-1) for each in moved]).mean(0)


def zoo_prune(entering: Entering, keep: Keep, directions: torch.Tensor, step: float) -> Choose:
    def imposed(recorded: Recorded, layer: int) -> Choice:
        stays = recorded.present.clone()
        for sample in range(len(stays)):
            slots = torch.nonzero(recorded.visual[sample])[:, 0]
            found = sensitivity(entering, sample, directions, step)
            low, high = found.min(), found.max()
            equal = bool(high - low <= 1e-6 * high)
            weight = torch.ones_like(found) if equal else (found - low) / (high - low)
            start = 0 if equal else _ranked(found.tolist())[0]
            own = recorded.hidden[layer][sample][recorded.visual[sample]]
            kept = _greedy(own, weight.tolist(), start, keep(len(slots), len(slots)))
            stays[sample, slots] = torch.tensor([at in kept for at in range(len(slots))])
        return Choice(layer, stays)

    return imposed
