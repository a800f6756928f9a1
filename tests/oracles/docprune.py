"""DocPrune once more, from its card: plain loops, one sample and one page at a time."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from oracles.methods import Choose
from oracles.reduced import Choice, Recorded, ReducedOracle


def comprehension(
    threshold: float, most: int, *, share: float = 0.0, of: str = "logit_mean"
) -> Choose:
    """Visual tokens that the last token attends to in the layer before.

    Args:
        most: that stay; or ``share`` of those of each sample.
    """

    def choose(recorded: Recorded, layer: int) -> Choice:
        stays = recorded.present.clone()
        query, key, _, scale = recorded.heads[layer - 1]
        for sample in range(len(stays)):
            last = max(torch.nonzero(recorded.real[sample])[:, 0].tolist())
            slots = torch.nonzero(recorded.visual[sample] & recorded.present[sample])[:, 0].tolist()
            heads, groups = query.shape[1], query.shape[1] // key.shape[1]
            if of == "logit_mean":
                logits = [
                    sum(
                        float(query[sample, h, last] @ key[sample, h // groups, slot]) * scale
                        for h in range(heads)
                    )
                    / heads
                    for slot in slots
                ]
                total = sum(math.exp(value) for value in logits)
                scores = [math.exp(value) / total * len(slots) for value in logits]
            else:
                row = recorded.attention(layer - 1)[sample, :, last].mean(0)
                scores = [float(row[slot]) * len(slots) for slot in slots]
            ranked = sorted(range(len(slots)), key=lambda at: (-scores[at], at))
            room = int(share * len(slots)) if share else most
            kept = [at for at in ranked[:room] if scores[at] >= threshold] or ranked[:1]
            for at, slot in enumerate(slots):
                stays[sample, slot] = at in kept
        return Choice(layer, stays)

    return choose


def pages(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """White pages with smears of ink: uint8 ``[pages, size, size, 3]``, all different."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.full((count, size, size, 3), 255, dtype=torch.uint8)
    for page in range(count):
        for y in range(0, size, 8):
            for x in range(0, size, 8):
                amount = float(torch.rand(1, generator=generator)) - 0.2 * page
                ink = torch.rand(8, 8, generator=generator) < amount
                colour = torch.randint(0, 250, (8, 8, 3), generator=generator, dtype=torch.uint8)
                block = out[page, y : y + 8, x : x + 8]
                out[page, y : y + 8, x : x + 8] = torch.where(ink[..., None], colour, block)
    return out


def pixel_values(family: str, sheets: torch.Tensor, mean: float, std: float) -> torch.Tensor:
    """What the processor of a family makes of pages, patches of 8 by 8."""
    values = ((sheets.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    if not family.startswith(("qwen", "glm")):
        return values[:, None] if family == "smolvlm" else values
    rows = []
    for page in values:
        side = page.shape[-1] // 8
        for y, x in _qwen_order(side):
            patch = page[:, 8 * y : 8 * y + 8, 8 * x : 8 * x + 8]
            rows.append(torch.stack([patch, patch], 1).flatten())  # twice, for time
    return torch.stack(rows)


def _qwen_order(side: int) -> list[tuple[int, int]]:
    return [
        (2 * y + dy, 2 * x + dx)
        for y in range(side // 2)
        for x in range(side // 2)
        for dy in (0, 1)
        for dx in (0, 1)
    ]


def row_places(family: str, side: int) -> list[tuple[int, int] | None]:
    """Where on the page the rows of its encoder lie."""
    if family.startswith(("qwen", "glm")):
        places = _qwen_order(side)
        if family == "qwen2_5_vl":  # window by window
            tokens = window_order(side // 2)
            places = [places[4 * token + patch] for token in tokens for patch in range(4)]
        return list(places)
    plain = [(y, x) for y in range(side) for x in range(side)]
    return [None, *plain] if family in ("llava", "internvl", "vipllava") else list(plain)


def window_order(side: int) -> list[int]:
    """Tokens of an image in the order of windows of 2 by 2 of them."""
    return [
        (wy + y) * side + wx + x
        for wy in range(0, side, 2)
        for wx in range(0, side, 2)
        for y in range(min(2, side - wy))
        for x in range(min(2, side - wx))
    ]


def ink(sheet: torch.Tensor, tau_e: float) -> list[list[float]]:
    """Share of background of each patch."""
    gray = [
        [(299 * int(r) + 587 * int(g) + 114 * int(b) + 500) // 1000 for r, g, b in row]
        for row in sheet.tolist()
    ]
    flat = [value for row in gray for value in row]
    mode = min(set(flat), key=lambda value: (-flat.count(value), value))
    side = len(gray) // 8
    return [
        [
            sum(
                abs(gray[8 * y + dy][8 * x + dx] - mode) < tau_e
                for dy in range(8)
                for dx in range(8)
            )
            / 64
            for x in range(side)
        ]
        for y in range(side)
    ]


def groups(
    passing: list[list[bool]], score: list[list[float]], merge: int, most: int
) -> list[tuple[int, int]]:
    """Squares of ``merge`` by ``merge`` patches that stay: any patch passes, the best ``most``."""
    side = len(passing) // merge
    every = [(y, x) for y in range(side) for x in range(side)]

    def inside(square: tuple[int, int]) -> list[tuple[int, int]]:
        return [
            (merge * square[0] + dy, merge * square[1] + dx)
            for dy in range(merge)
            for dx in range(merge)
        ]

    worth = {one: max(score[y][x] for y, x in inside(one)) for one in every}
    ranked = sorted(every, key=lambda one: (-worth[one], every.index(one)))
    good = [one for one in ranked if any(passing[y][x] for y, x in inside(one))]
    return good[:most] or ranked[:1]


def relevance(
    page: torch.Tensor, question: torch.Tensor, grid: tuple[int, int], side: int, sigma: float
) -> list[list[float]]:
    """Similarity of each patch with the question.

    Args:
        page: ``[patches of the retriever, width]``; ``grid`` has their rows and columns.
        question: ``[tokens, width]``.
        side: of the page, in patches of the encoder.
    """
    total = [sum(float(torch.cosine_similarity(e, q, dim=0)) for q in question) for e in page]
    whole = torch.tensor(total).view(1, 1, *grid)
    resized = torch.nn.functional.interpolate(whole, (side, side), mode="bilinear")
    ramp = torch.arange(-3.0, 4.0)
    bell = (-(ramp**2) / (2 * sigma**2)).exp()
    kernel = torch.outer(bell, bell) / bell.sum() ** 2
    padded = torch.nn.functional.pad(resized, (3, 3, 3, 3), mode="replicate")
    smooth = torch.nn.functional.conv2d(padded, kernel[None, None])
    return smooth[0, 0].tolist()  # type: ignore[no-any-return]


class PrunedOracle(ReducedOracle):  # type: ignore[misc]
    """The untouched model with patches hidden from its vision encoder, and tokens behind it.

    Args:
        stay: for each image the squares of patches that stay, see :func:`groups`.
        merge: side of such a square.
        plan: further choices, see :class:`ReducedOracle`.
    """

    def __init__(
        self,
        model: Any,
        inputs: dict[str, Any],
        family: str,
        stay: list[list[tuple[int, int]]],
        side: int,
        merge: int,
        plan: list[tuple[int, Choose]] | None = None,
    ) -> None:
        places = row_places(family, side)
        self.seen_rows = torch.tensor(
            [
                [at is None or (at[0] // merge, at[1] // merge) in kept for at in places]
                for kept in stay
            ]
        )
        visual = inputs["input_ids"] == 3
        across = side // merge

        def choose(recorded: Recorded, layer: int) -> Choice:
            flags = [(y, x) in kept for kept in stay for y in range(across) for x in range(across)]
            stays = torch.ones_like(visual)
            stays[visual] = torch.tensor(flags)
            return Choice(layer, stays)

        super().__init__(model, inputs, visual, [(0, choose), *(plan or [])])

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        tower = set(self.model.get_encoder("image").modules())
        reached: dict[Any, int] = {}
        with super().active():
            original = ALL_ATTENTION_FUNCTIONS["sdpa"]

            def attention(
                module: Any, query: Any, key: Any, value: Any, *args: Any, **kw: Any
            ) -> Any:
                if module in tower:
                    seen = self.seen_rows
                    if (len(query), query.shape[2]) != seen.shape:  # images, or windows, in turn
                        start = reached.get(module, 0)
                        end = start + query.shape[2]
                        reached[module] = end % seen.numel()
                        seen = seen.flatten()[None, start:end]
                        seen = seen | ~seen.any()  # nobody reads what is gone from a whole window
                    args = ()
                    kw["attention_mask"] = seen[:, None, None, :].expand(-1, 1, query.shape[2], -1)
                return original(module, query, key, value, *args, **kw)

            ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
            yield
