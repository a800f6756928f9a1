"""Random small graphs: the rewritten graph equals gathering the tokens first and running then.

A drawn program is a chain of steps in which ``h`` is ``[batch, tokens, width]``. Each step is
ordinary code that takes its sizes from its inputs, so the reference runs it as it stands on the
shorter tensors. Steps that mix tokens by position may be refused; what is not must be right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from vlmopt.errors import UnsupportedOperatorError
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program, Role
from vlmopt.tracing import capture

WIDTH, HEADS = 8, 2
HEAD = WIDTH // HEADS


@dataclass
class Given:
    """Values from outside the layer, with the tokens that the layer has.

    Attributes:
        scale: ``[batch, tokens, 1]``; ``shared``: ``[1, tokens, 1]``.
        table: ``[tokens, width]``.
        ids: int64 ``[batch, tokens]``.
        visible: bool ``[batch, 1, tokens, tokens]``; ``bias``: float ``[1, 1, tokens, tokens]``.
        cos: ``[batch, tokens, head]``.
        positions: int64 ``[batch or 1, tokens]``: the number that each token had before any left.
        earlier: the stream entering the layer.
        weight: ``[width, width]``; the only one without tokens.
    """

    scale: Tensor
    shared: Tensor
    table: Tensor
    ids: Tensor
    visible: Tensor
    bias: Tensor
    cos: Tensor
    positions: Tensor
    earlier: Tensor
    weight: Tensor


Step = Callable[[Tensor, Given], Tensor]


def heads_of(h: Tensor) -> Tensor:
    return h.view(h.shape[0], h.shape[1], HEADS, HEAD).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], WIDTH)


def attention(h: Tensor, **how: Any) -> Tensor:
    x = heads_of(h)
    return joined(F.scaled_dot_product_attention(x, x + 1, x, **how))


def by_hand(h: Tensor, g: Given) -> Tensor:
    x = heads_of(h)
    scores = torch.matmul(x, x.transpose(-1, -2)) / 3
    return joined(scores.masked_fill(~g.visible, float("-inf")).softmax(-1) @ x)


def grouped_heads(h: Tensor, g: Given) -> Tensor:
    shared = h[..., :HEAD].unsqueeze(1)[:, :, None].expand(-1, -1, HEADS, -1, -1)
    key = shared.reshape(h.shape[0], HEADS, h.shape[1], HEAD)
    return joined(F.scaled_dot_product_attention(heads_of(h), key, key))


def rotary(h: Tensor, g: Given) -> Tensor:
    x, cos = heads_of(h), g.cos.unsqueeze(1)
    turned = torch.cat([-x[..., HEAD // 2 :], x[..., : HEAD // 2]], -1)
    return joined(x * cos + turned * (1 - cos))


def flattened(h: Tensor, g: Given) -> Tensor:
    rows = h.reshape(-1, WIDTH)
    return F.linear(rows, g.weight).view(h.shape)


def rms_norm(h: Tensor, g: Given) -> Tensor:
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)


EXPERTS, CHOSEN = 4, 2


def experts(h: Tensor, g: Given, *, sort: str = "sort") -> Tensor:
    """A mixture of experts as transformers computes it: rows sorted by expert and put back."""
    rows = h.flatten(0, 1)
    share, chosen = F.linear(rows, g.weight[:EXPERTS]).softmax(-1).topk(CHOSEN)
    keys, order = sorted_by(chosen.view(-1), sort)
    out = by_expert(rows[order // CHOSEN], keys, g) * share.view(-1)[order][:, None]
    back = torch.empty_like(order)
    back[order] = torch.arange(order.shape[0])
    return out[back].view(-1, CHOSEN, WIDTH).sum(1).view(h.shape)


def sorted_by(keys: Tensor, sort: str) -> tuple[Tensor, Tensor]:
    if sort == "sort":
        return keys.sort()  # type: ignore[return-value]
    return keys, keys.argsort()


def by_expert(rows: Tensor, keys: Tensor, g: Given) -> Tensor:
    ends = torch.histc(keys.float(), EXPERTS, 0, EXPERTS - 1).cumsum(0, dtype=torch.int32)
    weights = torch.stack([g.weight * (expert + 1) for expert in range(EXPERTS)])
    result: Tensor = torch.ops.vlmopt.grouped_mm(rows, weights, ends)
    return result


def experts_of_others(h: Tensor, g: Given) -> Tensor:
    rows = h.flatten(0, 1)
    order = rows[:, 0].argsort()
    out = by_expert(rows[order], g.ids.view(-1) % EXPERTS, g)
    return out[order.argsort()].view(h.shape)


def ranked(h: Tensor, g: Given) -> Tensor:
    """Every token, and how it compares with those before and after it."""
    rows = h.flatten(0, 1)
    order = rows[:, 0].argsort()
    return rows[order].diff(dim=0, append=rows[:1])[order.argsort()].view(h.shape)


PLAIN: dict[str, Step] = {
    "linear": lambda h, g: F.linear(h, g.weight, g.weight[0]),
    "matmul": lambda h, g: h @ g.weight,
    "einsum": lambda h, g: torch.einsum("btd,de->bte", h, g.weight),
    "gelu": lambda h, g: F.gelu(h) + F.silu(h) - torch.tanh(h).abs().clamp(max=0.5),
    "layer_norm": lambda h, g: F.layer_norm(h, (WIDTH,), g.weight[0], g.weight[1]),
    "rms_norm": rms_norm,
    "residual": lambda h, g: h + g.earlier,
    "scale": lambda h, g: h * g.scale,
    "shared": lambda h, g: h * g.shared.exp(),
    "table": lambda h, g: h + g.table,
    "flattened": flattened,
    "flatten": lambda h, g: h.flatten(0, 1).unflatten(0, h.shape[:2]).neg(),
    "chunk": lambda h, g: torch.cat(h.chunk(2, dim=-1)[::-1], dim=-1),
    "split": lambda h, g: torch.cat([p * 2 for p in h.split([3, 5], dim=-1)], dim=-1),
    "glu": lambda h, g: F.glu(torch.cat([h, h + 1], -1), dim=-1),
    "slice": lambda h, g: F.pad(h[..., 2:6], (2, 2)),
    "select": lambda h, g: h + h[..., 3].unsqueeze(-1),
    "permute": lambda h, g: (g.weight @ h.permute(0, 2, 1)).permute(0, 2, 1),
    "transpose": lambda h, g: h.transpose(0, 1).contiguous().transpose(0, 1) + 1,
    "squeeze": lambda h, g: h.unsqueeze(2).squeeze(2) - 1,
    "stack": lambda h, g: torch.stack([h, g.earlier], dim=0).sum(0),
    "expand": lambda h, g: h + g.scale.expand(-1, -1, WIDTH),
    "where": lambda h, g: torch.where(g.ids[..., None] > 2, h, h * 0.5),
    "masked_fill": lambda h, g: h.masked_fill((g.ids == 1)[..., None], 0.25),
    "embedding": lambda h, g: h + F.embedding(g.ids, g.weight),
    "feature_index": lambda h, g: h[..., [1, 0, 3, 2, 5, 4, 7, 6]],
    "index_select": lambda h, g: h.index_select(-1, torch.arange(WIDTH).flip(0)),
    "gather": lambda h, g: h.gather(-1, h.argsort(dim=-1)),
    "sort": lambda h, g: h.sort(dim=-1).values,
    "topk": lambda h, g: h - h.topk(2, dim=-1).values.sum(-1, keepdim=True),
    "cumsum": lambda h, g: h.cumsum(-1),
    "mean": lambda h, g: h - h.mean(-1, keepdim=True) + h.amax(-1, keepdim=True),
    "norm": lambda h, g: h / (torch.linalg.vector_norm(h, dim=-1, keepdim=True) + 1),
    "var": lambda h, g: h * h.var(-1, keepdim=True),
    "softmax": lambda h, g: h.softmax(-1) + h.log_softmax(-1),
    "cast": lambda h, g: h.double().float() + h.to(torch.bfloat16).float(),
    "positions": lambda h, g: h + g.positions[..., None] * 0.1,
    "attention": lambda h, g: attention(h),
    "causal": lambda h, g: attention(h, is_causal=True),
    "masked": lambda h, g: attention(h, attn_mask=g.visible),
    "biased": lambda h, g: attention(h, attn_mask=g.bias),
    "by_hand": by_hand,
    "grouped": grouped_heads,
    "rotary": rotary,
    "repeat": lambda h, g: joined(heads_of(h)[:, :1].repeat_interleave(HEADS, dim=1)),
    "addmm": lambda h, g: torch.addmm(g.weight[0], h.flatten(0, 1), g.weight).view_as(h),
    "bmm": lambda h, g: torch.bmm(h, g.weight.expand(h.shape[0], -1, -1)),
    "last": lambda h, g: h + h[:, -1:],
    "like": lambda h, g: h + torch.ones_like(h) * torch.zeros_like(h[..., :1]),
    "logical": lambda h, g: torch.logical_not(h > 0).float() + h,
    "clone": lambda h, g: h.clone(),
    "max": lambda h, g: torch.maximum(h, g.earlier) + torch.minimum(h, g.scale),
    "argmax": lambda h, g: h + h.argmax(-1, keepdim=True),
    "detach": lambda h, g: h.detach().contiguous() * 2,
    "repeat_rows": lambda h, g: h.flatten(0, 1).repeat(3, 1).view(3, *h.shape).sum(0),
    "scatter": lambda h, g: h.scatter(-1, h.topk(2, dim=-1).indices, 0.5),
    "scatter_rows": lambda h, g: torch.zeros_like(g.earlier).scatter(
        -1, h.argsort(dim=-1), g.earlier
    ),
    "complex": lambda h, g: (
        torch.view_as_real(torch.view_as_complex(h.view(*h.shape[:2], -1, 2)) * 1j * g.cos)
        .flatten(2)
        .clone()
    ),
    "experts": experts,
    "experts_argsort": lambda h, g: experts(h, g, sort="argsort"),
}
"""Steps that treat every token alike, or mix tokens by attention: never refused."""

MIXING: dict[str, Step] = {
    "full": lambda h, g: h + h.new_full((h.shape[0], h.shape[1], 1), 0.5),
    "max": lambda h, g: h / (1 + h.abs().max()),
    "cumsum": lambda h, g: h.cumsum(1),
    "flip": lambda h, g: h.flip(1),
    "roll": lambda h, g: h.roll(1, dims=1),
    "mean": lambda h, g: h + h.mean(1, keepdim=True),
    "sum": lambda h, g: h + h.sum(1, keepdim=True),
    "amax": lambda h, g: h + h.amax(1, keepdim=True),
    "sort": lambda h, g: h.sort(dim=1).values,
    "softmax": lambda h, g: h.softmax(1),
    "first": lambda h, g: h + h[:, :1],
    "second": lambda h, g: h + h[:, 1:2],
    "shift": lambda h, g: torch.cat([h[:, 1:], h[:, :1]], dim=1),
    "pairs": lambda h, g: h.reshape(h.shape[0], -1, 2 * WIDTH).reshape(h.shape),
    "conv": lambda h, g: F.conv1d(h.transpose(1, 2), g.weight[..., None]).transpose(1, 2),
    "pool": lambda h, g: F.avg_pool1d(h.transpose(1, 2), 3, 1, 1).transpose(1, 2),
    "tokens_as_width": lambda h, g: h + h.transpose(1, 2).mean(-1)[:, None],
    "argsort": lambda h, g: h + h.argsort(dim=1),
    "double": lambda h, g: torch.cat([h, g.earlier], dim=1)[:, : h.shape[1]],
    "outer": lambda h, g: h + (h @ h.transpose(1, 2)).mean(-1, keepdim=True),
    "index": lambda h, g: h + h[:, [0, 1]].sum(1, keepdim=True),
    "scatter": lambda h, g: h.scatter(1, torch.zeros_like(h[:, :1], dtype=torch.int64), 1.0),
    "scatter_some": lambda h, g: h.scatter(-1, g.ids[:, :3, None], 1.0),
    "repeat_tokens": lambda h, g: h.repeat(1, 2, 1)[:, : h.shape[1]] + h,
    "experts_of_others": experts_of_others,
    "ranked": ranked,
    "sorted_rows": lambda h, g: h.flatten(0, 1)[h[..., 0].flatten().argsort()].view(h.shape),
    "sorted_first": lambda h, g: h + h.flatten(0, 1)[h[..., 0].flatten().argsort()][:1],
    "sorted_last": lambda h, g: h + h.flatten(0, 1)[h[..., 0].flatten().argsort()][-1:],
    "sorted_keys": lambda h, g: h + h.flatten(0, 1)[:, 0].sort().values.view(*h.shape[:2], 1),
    "order": lambda h, g: h + h.flatten(0, 1)[:, 0].argsort().view(*h.shape[:2], 1),
    "sorted_with_others": lambda h, g: (
        h.flatten(0, 1)[h[..., 0].flatten().argsort()] + g.earlier.flatten(0, 1)
    ).view(h.shape),
    "two_orders": lambda h, g: (
        h.flatten(0, 1)[h[..., 0].flatten().argsort()]
        + h.flatten(0, 1)[h[..., 1].flatten().argsort()]
    ).view(h.shape),
}
"""Steps for which the place of a token among all counts: right, or refused."""


class Drawn(nn.Module):
    """Two layers: the tokens are cut where the second one, the drawn program, begins."""

    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([First(), Second(steps)])

    def forward(
        self, x: Tensor, modality: Tensor, scale: Tensor, ids: Tensor, visible: Tensor, cos: Tensor
    ) -> Tensor:
        tokens = x.shape[1]
        place = torch.arange(tokens)
        x = self.layers[0](x)
        given = (scale, ids, visible, cos, place[None], x, *outside(place))
        result: Tensor = self.layers[1](x, *given)
        return result


def outside(place: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values computed from positions alone: ``shared``, ``table`` and ``bias``."""
    number = place.float()
    table = (number[:, None] * torch.arange(1, WIDTH + 1)).sin()
    bias = -(number[:, None] - number[None]).abs()
    return (number[None, :, None] * 0.1).cos(), table, bias[None, None]


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(x)


class Second(nn.Module):
    def __init__(self, steps: tuple[Step, ...]) -> None:
        super().__init__()
        self.steps = steps
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(
        self,
        h: Tensor,
        scale: Tensor,
        ids: Tensor,
        visible: Tensor,
        cos: Tensor,
        positions: Tensor,
        earlier: Tensor,
        shared: Tensor,
        table: Tensor,
        bias: Tensor,
    ) -> Tensor:
        given = Given(
            scale, shared, table, ids, visible, bias, cos, positions, earlier, self.weight
        )
        out = h + F.linear(h, self.weight)
        for step in self.steps:
            out = step(out, given)
        return out


def inputs_of(batch: int, tokens: int, seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    visual = 4
    modality = torch.ones(batch, tokens, dtype=torch.int64)
    for row in modality:  # images begin at different places; the last token is text
        start = int(torch.randint(0, tokens - visual, (1,), generator=generator))
        row[start : start + visual] = 2
    visible = torch.rand(batch, 1, tokens, tokens, generator=generator) > 0.3
    visible |= torch.eye(tokens, dtype=torch.bool)
    return (
        torch.randn(batch, tokens, WIDTH, generator=generator),
        modality,
        torch.rand(batch, tokens, 1, generator=generator) + 0.5,
        torch.randint(0, WIDTH, (batch, tokens), generator=generator),
        visible,
        torch.rand(batch, tokens, HEAD, generator=generator),
    )


def captured(steps: tuple[Step, ...], inputs: tuple[Tensor, ...]) -> tuple[Drawn, Program]:
    torch.manual_seed(0)
    model = Drawn(steps).eval()
    return model, capture(model, inputs, roles={"modality": Role.MODALITY})


def gathered_first(model: Drawn, inputs: tuple[Tensor, ...], kept: Tensor) -> Tensor:
    """The second layer, as it stands, on the tokens that stay."""
    x, _, scale, ids, visible, cos = inputs
    whole = torch.arange(x.shape[1])

    def rows(value: Tensor) -> Tensor:
        return torch.stack([row[slots] for row, slots in zip(value, kept, strict=True)])

    def square(value: Tensor) -> Tensor:
        pairs = zip(value.expand(len(kept), -1, -1, -1), kept, strict=True)
        return torch.stack([one[:, slots][:, :, slots] for one, slots in pairs])

    shared, table, bias = outside(whole)
    stream = rows(model.layers[0](x))
    result: Tensor = model.layers[1](
        stream,
        rows(scale),
        rows(ids),
        square(visible),
        rows(cos),
        kept,
        stream,
        rows(shared.expand(len(kept), -1, -1)),
        rows(table.expand(len(kept), -1, -1)),
        square(bias),
    )
    return result


def check(steps: tuple[Step, ...], batch: int, tokens: int, seed: int) -> None:
    inputs = inputs_of(batch, tokens, seed)
    model, program = captured(steps, inputs)
    run_pipeline(program, "random-drop{layers=1 keep=0.5}", verify="full")
    with torch.no_grad():
        out, kept = program["model"].graph_module(*inputs)
        wanted = gathered_first(model, inputs, kept)
    assert kept.shape == (batch, tokens - 2)
    assert out.shape == wanted.shape
    assert torch.allclose(out, wanted, rtol=1e-4, atol=1e-5, equal_nan=True)


def right_or_refused(
    steps: tuple[Step, ...], batch: int, tokens: int, seed: int
) -> UnsupportedOperatorError | None:
    try:
        check(steps, batch, tokens, seed)
    except UnsupportedOperatorError as error:
        return error
    return None


SIZES: dict[str, Any] = {
    "batch": st.integers(1, 3),
    "tokens": st.integers(6, 9),
    "seed": st.integers(0, 1000),
}
IN_CI = settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("batch", [1, 2])
def test_each_step(name: str, batch: int) -> None:
    check((PLAIN[name],), batch, 7, seed=1)


@given(names=st.lists(st.sampled_from(sorted(PLAIN)), min_size=2, max_size=6), **SIZES)
@IN_CI
def test_chains(names: list[str], batch: int, tokens: int, seed: int) -> None:
    check(tuple(PLAIN[name] for name in names), batch, tokens, seed)


@pytest.mark.parametrize("name", MIXING)
@pytest.mark.parametrize("batch", [1, 2])
def test_a_step_that_mixes_tokens_is_right_or_refused(name: str, batch: int) -> None:
    refusal = right_or_refused((MIXING[name],), batch, 8, seed=2)
    if refusal is not None:
        assert refusal.node is not None
        assert "test_axis_rules.py" in str(refusal)
        assert "\n  try: " in str(refusal)


@given(
    before=st.lists(st.sampled_from(sorted(PLAIN)), max_size=2),
    mixing=st.sampled_from(sorted(MIXING)),
    after=st.lists(st.sampled_from(sorted(PLAIN)), max_size=2),
    **SIZES,
)
@IN_CI
def test_chains_that_mix_tokens_are_right_or_refused(
    before: list[str], mixing: str, after: list[str], batch: int, tokens: int, seed: int
) -> None:
    steps = (
        *(PLAIN[name] for name in before),
        MIXING[mixing],
        *(PLAIN[name] for name in after),
    )
    refusal = right_or_refused(steps, batch, tokens - tokens % 2, seed)
    assert refusal is None or refusal.node is not None
