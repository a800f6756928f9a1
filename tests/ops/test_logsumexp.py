"""The logsumexp of attention, alone and beside attention, and the k-th largest of rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from vlmopt.lowering.shared_attention import has_shared_attention, with_shared_attention
from vlmopt.ops.logsumexp import (
    attention_logsumexp,
    attention_logsumexp_reference,
    attention_with_logsumexp,
)
from vlmopt.ops.ranking import kth_largest, kth_largest_reference


def inputs(key_heads: int = 2, queries: int = 150, keys: int = 150, **options: Any) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, queries, 8), (2, key_heads, keys, 8), (2, key_heads, keys, 8))
    return [torch.randn(shape, generator=generator, **options) for shape in shapes]


def by_hand(query: Tensor, key: Tensor, seen: Tensor, scale: float = 8**-0.5) -> Tensor:
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1).double()
    logits = (query.double() @ key.transpose(-1, -2) * scale).masked_fill(~seen, float("-inf"))
    top = logits.amax(-1).clamp(min=-1e30)
    sums = (logits - top[..., None]).exp().sum(-1).log() + top
    return torch.where(sums > float("-inf"), sums, 0.0).float()


@pytest.mark.parametrize("function", [attention_logsumexp, attention_logsumexp_reference])
@pytest.mark.parametrize("kind", ["whole", "causal", "bool", "added"])
def test_sums_of_exponentials(function: Any, kind: str) -> None:
    query, key, _ = inputs(queries=150 if kind != "causal" else 140)
    shape = (2, 1, query.shape[2], 150)
    seen, mask = torch.ones(shape, dtype=torch.bool), None
    if kind == "causal":
        seen = seen.tril(10)
    elif kind != "whole":
        seen = mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) > 0.5
        seen[0, 0, 3] = False  # a query that sees nothing
    if kind == "added":
        mask = torch.zeros(shape).masked_fill(~seen, float("-inf"))
    found = function(query, key, mask, kind == "causal", 0.3)
    torch.testing.assert_close(found, by_hand(query, key, seen, 0.3), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["whole", "causal", "bool"])
def test_one_kernel_gives_both(kind: str, dtype: torch.dtype) -> None:
    query, key, value = inputs(key_heads=4, dtype=dtype)
    mask = torch.rand(2, 1, 150, 150) > 0.3 if kind == "bool" else None
    causal = kind == "causal"
    found, sums = attention_with_logsumexp(query, key, value, mask, causal, None)
    given: dict[str, Any] = {"attn_mask": mask, "is_causal": causal}
    wanted = functional.scaled_dot_product_attention(query, key, value, **given)
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, wanted, atol=limit, rtol=limit)
    expected = attention_logsumexp(query, key, mask, causal)
    torch.testing.assert_close(sums, expected, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("causal", [False, True])
def test_gradients(causal: bool) -> None:
    tensors = [one.requires_grad_() for one in inputs(key_heads=4, queries=20, keys=20)]
    query, key, value = tensors

    def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        mask = torch.ones(20, 20, dtype=torch.bool)
        logits = query @ key.transpose(-1, -2) * 8**-0.5
        logits = logits.masked_fill(~(mask.tril() if causal else mask), float("-inf"))
        return (logits.logsumexp(-1).sin() + (logits.softmax(-1) @ value).sum(-1)).sum()

    def by_operators(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result = functional.scaled_dot_product_attention(query, key, value, is_causal=causal)
        sums = attention_logsumexp(query, key, None, causal)
        return (sums.sin() + result.sum(-1)).sum()

    def by_one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        result, sums = attention_with_logsumexp(query, key, value, None, causal, None)
        return (sums.sin() + result.sum(-1)).sum()

    wanted = torch.autograd.grad(plain(*tensors), tensors)
    for function in (by_operators, by_one):
        found = torch.autograd.grad(function(query, key, value), tensors)
        for one, other in zip(found, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_what_tracing_is_told() -> None:
    query, key, value = inputs(key_heads=4, queries=20, keys=20)
    torch.library.opcheck(attention_logsumexp, (query, key, None, True))
    torch.library.opcheck(attention_with_logsumexp, (query, key, value, None, True, None))
    torch.library.opcheck(kth_largest, (torch.randn(2, 3, 7), 2))


def traced(function: Any, *values: Tensor) -> fx.GraphModule:
    return make_fx(function, tracing_mode="fake", pre_dispatch=True)(*values)


def targets(gm: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in gm.graph.nodes}


def test_lowering_makes_one_of_the_two() -> None:
    values = inputs(key_heads=4)

    def both(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        result = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        return result * 2, torch.ops.vlmopt.attention_logsumexp(query, key, None, True) + 1

    gm = traced(both, *values)
    assert has_shared_attention(gm)
    shared = with_shared_attention(gm)
    assert "aten.scaled_dot_product_attention.default" not in targets(shared)
    assert "aten.scaled_dot_product_attention.default" in targets(gm)  # as it was
    for found, wanted in zip(shared(*values), gm(*values), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("other", ["causal", "scale", "heads"])
def test_sums_of_another_attention_stay_alone(other: str) -> None:
    values = inputs(key_heads=2 if other == "heads" else 4)

    def both(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        given: dict[str, Any] = {"is_causal": other == "causal", "enable_gqa": other == "heads"}
        result = functional.scaled_dot_product_attention(query, key, value, **given)
        scale = 0.5 if other == "scale" else None
        return result, torch.ops.vlmopt.attention_logsumexp(query, key, None, False, scale)

    assert not has_shared_attention(traced(both, *values))


@pytest.mark.parametrize("function", [kth_largest, kth_largest_reference])
def test_the_kth_largest(function: Any) -> None:
    values = torch.randint(0, 9, (3, 700, 13), generator=torch.Generator().manual_seed(2)).float()
    for k in (1, 4, 13):
        wanted = values.sort(-1, descending=True).values[..., k - 1 : k]
        assert torch.equal(function(values, k), wanted)
