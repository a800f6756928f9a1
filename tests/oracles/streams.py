"""Encoders that reuse rows of a reference frame, once more: row by row in the user's own blocks.

From the method's card ("Accelerating Streaming Video Large Language Models via Hierarchical Token
Compression", arXiv 2512.00891); shares no code with the product. Frames are computed one by one,
rows one by one, with the whole attention matrix written out.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from oracles.methods import Choose, Keep, best
from oracles.reduced import Choice, Recorded
from oracles.vit import Parts

Rows = Callable[[Tensor], Tensor]


def _unchanged(rows: Tensor, places: list[int]) -> Tensor:
    return rows


@dataclass
class Layer:
    """One block, as functions of rows ``[rows, width]``.

    Attributes:
        normed: what attention reads of the residual stream.
        attended, fed: what is added to it, of attention's output and of the stream.
        between: of the stream between both halves, behind all.
        turn: rotation of queries and keys ``[heads, rows, size]`` at places.
        windows: number of the window that each row is in; rows of others are not seen.
    """

    normed: Rows
    query: Rows
    key: Rows
    value: Rows
    attended: Rows
    fed: Rows
    heads: int
    between: Rows = lambda rows: rows
    after: Rows = lambda rows: rows
    turn: Callable[[Tensor, list[int]], Tensor] = _unchanged
    windows: list[int] | None = None

    @classmethod
    def of_weights(cls, weights: dict[str, Tensor], *, heads: int, eps: float) -> Layer:
        """A SigLIP layer."""

        def linear(name: str) -> Rows:
            return lambda rows: rows @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

        def norm(name: str) -> Rows:
            scale, shift = weights[f"{name}.weight"], weights[f"{name}.bias"]
            return lambda rows: functional.layer_norm(rows, scale.shape, scale, shift, eps)

        def fed(rows: Tensor) -> Tensor:
            hidden = linear("mlp.0")(norm("layer_norm2")(rows))
            return linear("mlp.2")(functional.gelu(hidden, approximate="tanh"))

        q, k, v, out = (linear(f"self_attn.{name}_proj") for name in ("q", "k", "v", "out"))
        return cls(norm("layer_norm1"), q, k, v, out, fed, heads)

    @classmethod
    def of_block(cls, block: Any, parts: Parts) -> Layer:
        """A block of a Hugging Face or timm encoder."""
        attention = getattr(block, parts.attention)
        before, behind = (getattr(block, name) for name in parts.norms)
        heads = next(
            getattr(attention, name)
            for name in ("num_heads", "num_attention_heads")
            if hasattr(attention, name)
        )
        if len(parts.projections) == 1:
            whole = getattr(attention, parts.projections[0])
            q, k, v = (lambda rows, at=at: whole(rows).chunk(3, -1)[at] for at in range(3))
        else:
            q, k, v = (getattr(attention, name) for name in parts.projections)
        first, second = (_scale(block, name) for name in parts.scales or ("", ""))
        out = getattr(attention, parts.out)
        return cls(
            before,
            q,
            k,
            v,
            lambda rows: first(out(rows)),
            lambda rows: second(block.mlp(behind(rows))),
            heads,
        )


def _scale(block: Any, name: str) -> Rows:
    if not name:
        return lambda rows: rows
    scale = block.get_submodule(name) if isinstance(getattr(block, name), torch.nn.Module) else None
    return scale if scale is not None else lambda rows: getattr(block, name) * rows


@dataclass
class StreamedLayer:
    """A block and what it remembers of the reference frame.

    Attributes:
        state: keys, values, and what attention and the network added: ``[tokens, width]`` each.
        keys: of the frames of the last selective pass.
        chosen: rows of each of these frames that were computed.
        similarity: mean cosine of each of these frames' keys with those of the state.
    """

    layer: Layer
    state: tuple[Tensor, Tensor, Tensor, Tensor] = ()  # type: ignore[assignment]
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    chosen: list[list[int]] = field(default_factory=list)
    similarity: list[float] = field(default_factory=list)

    def reference(self, frames: Tensor) -> Tensor:
        """All of ``[frames, tokens, width]``; the last frame is remembered."""
        layer, found = self.layer, []
        for x in frames:
            places = list(range(len(x)))
            u = layer.normed(x)
            key, value = layer.key(u), layer.value(u)
            added = layer.attended(self._attend(layer.query(u), places, key, value))
            y = layer.between(x + added)
            fed = layer.fed(y)
            found.append(layer.after(y + fed))
            self.state = key, value, added, fed
        return torch.stack(found)

    def selective(self, frames: Tensor, count: int) -> Tensor:
        """As much as the method computes of ``[frames, tokens, width]``."""
        layer, found, keys = self.layer, [], []
        key0, value0, added0, fed0 = self.state
        self.chosen, self.similarity = [], []
        for x in frames:
            u = layer.normed(x)
            key = layer.key(u)
            alike = [_cosine(one, other) for one, other in zip(key, key0, strict=True)]
            rows = sorted(sorted(range(len(x)), key=lambda row: (alike[row], row))[:count])
            value, added, fed = value0.clone(), added0.clone(), fed0.clone()
            for row in rows:
                value[row] = layer.value(u[row : row + 1])[0]
            for row in rows:
                mixed = self._attend(layer.query(u[row : row + 1]), [row], key, value)
                added[row] = layer.attended(mixed)[0]
            y = layer.between(x + added)
            for row in rows:
                fed[row] = layer.fed(y[row : row + 1])[0]
            found.append(layer.after(y + fed))
            keys.append(key)
            self.chosen.append(rows)
            self.similarity.append(sum(alike) / len(alike))
        self.keys = torch.stack(keys)
        return torch.stack(found)

    def _attend(self, query: Tensor, places: list[int], key: Tensor, value: Tensor) -> Tensor:
        layer = self.layer
        q, k, v = (
            one.unflatten(-1, (layer.heads, -1)).transpose(0, 1) for one in (query, key, value)
        )
        q, k = layer.turn(q, places), layer.turn(k, list(range(len(key))))
        logits = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
        if layer.windows is not None:
            own = torch.tensor([layer.windows[place] for place in places])
            logits[:, own[:, None] != torch.tensor(layer.windows)] = float("-inf")
        weights = logits.softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)


def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.double(), other.double()
    return float(one @ other) / max(float(one.norm() * other.norm()), 1e-8)


class StreamedEncoder:
    """A model whose blocks reuse rows while :meth:`active`; whatever is around them is its own.

    Args:
        count: rows of a frame to compute.
        frames: whose rows stand behind each other, where a model wants them so.

    Attributes:
        layers: of the blocks, in order.
    """

    def __init__(self, model: Any, parts: Parts, count: int, frames: int = 1) -> None:
        self.model, self.count, self.frames = model, count, frames
        self.blocks = list(model.get_submodule(parts.blocks))
        self.layers = [StreamedLayer(Layer.of_block(block, parts)) for block in self.blocks]

    def __call__(self, full: bool, **inputs: Any) -> Any:
        with self.active(full), torch.no_grad():
            return self.model(**inputs)

    @contextlib.contextmanager
    def active(self, full: bool) -> Iterator[None]:
        """Let the model compute a reference frame, or a frame that reuses it."""
        try:
            for block, streamed in zip(self.blocks, self.layers, strict=True):
                block.forward = self._block(streamed, full)
            yield
        finally:
            for block in self.blocks:
                del block.forward

    def _block(self, streamed: StreamedLayer, full: bool) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *_: Any, **given: Any) -> Tensor:
            frames = hidden_states
            if frames.ndim == 2:  # rows of all frames, one behind the other
                frames = frames.unflatten(0, (self.frames, -1))
                ends = given["cu_seqlens"].tolist()[1:]
                streamed.layer.windows = [
                    sum(end <= place for end in ends) for place in range(frames.shape[1])
                ]
                turns = [
                    one.unflatten(0, (self.frames, -1)) for one in given["position_embeddings"]
                ]
                assert all(one.equal(one[:1].expand_as(one)) for one in turns)
                streamed.layer.turn = _rotation(turns[0][0], turns[1][0])
            out = streamed.reference(frames) if full else streamed.selective(frames, self.count)
            return out.reshape(hidden_states.shape)

        return forward


def _rotation(cos: Tensor, sin: Tensor) -> Callable[[Tensor, list[int]], Tensor]:
    def turn(rows: Tensor, places: list[int]) -> Tensor:
        half = rows.shape[-1] // 2
        other = torch.cat([-rows[..., half:], rows[..., :half]], -1)
        return rows * cos[places] + other * sin[places]

    return turn


# -- tokens of frames that are new ------------------------------------------------------------


def evs(frames: int, keep: Keep) -> Choose:
    """The first frame, and what differs most from its place one frame before."""

    def choose(recorded: Recorded, layer: int) -> Choice:
        def score(sample: int, slots: list[int]) -> list[float]:
            rows = recorded.hidden[layer][sample, slots].double()
            size = len(slots) // frames
            distance = [1 - _cosine(rows[at], rows[at - size]) for at in range(size, len(slots))]
            return [math.inf] * size + distance

        return best(recorded, layer, score, keep)

    return choose


def stc_pruner(frames: int, keep: Keep, *, dual: bool = False) -> Choose:
    """In each frame what is least like the frame and the mean of all until then."""

    def novel(rows: Tensor, past: list[Tensor]) -> list[float]:
        mean = torch.stack(past).mean(0)
        if dual:
            own = rows.mean(0)
            return [1 - 0.5 * (_cosine(row, mean) + _cosine(row, own)) for row in rows]
        unit = [row / row.norm() for row in rows]
        anchors = mean / mean.norm(), torch.stack(unit).mean(0)
        return [
            -sum(
                math.exp(-float((row - anchor).square().sum()) / (2 * scale))
                for anchor in anchors
                for scale in (1 / 8, 1 / 4, 1 / 2, 1, 2)
            )
            for row in unit
        ]

    def choose(recorded: Recorded, layer: int) -> Choice:
        stays = recorded.present.clone()
        for sample in range(len(stays)):
            slots = torch.nonzero(recorded.visual[sample] & recorded.present[sample])[:, 0].tolist()
            size = len(slots) // frames
            past: list[Tensor] = []
            channels: list[int] = []
            for start in range(0, len(slots), size):
                own = slots[start : start + size]
                rows = recorded.hidden[layer][sample, own].double()
                if not channels:
                    spread = rows.var(0, correction=0).tolist()
                    order = sorted(range(len(spread)), key=lambda at: (spread[at], at))
                    channels = order[: len(spread) // 2]
                rows = rows[:, channels]
                past.append(rows.mean(0))
                found = novel(rows, past)
                ranked = sorted(range(size), key=lambda at: (-found[at], at))
                stays[sample, [own[at] for at in ranked[keep(size, size) :]]] = False
        return Choice(layer, stays)

    return choose
