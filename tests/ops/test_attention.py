"""Attention scores: against a plain softmax, in blocks, masked, grouped; never a full matrix."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmopt.ops.attention import (
    attention_mass,
    attention_mass_reference,
    attention_rows,
)


def tensors(queries: int, keys: int, heads: int = 4, key_heads: int = 2) -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(queries * 1000 + keys)
    query = torch.randn(2, heads, queries, 8, generator=generator)
    return query, torch.randn(2, key_heads, keys, 8, generator=generator)


def plain(query: Any, key: Any, hidden: torch.Tensor) -> torch.Tensor:
    """One query head and row at a time."""
    batch, heads, queries, size = query.shape
    out = torch.zeros(batch, heads, queries, key.shape[2])
    for b in range(batch):
        for h in range(heads):
            for q in range(queries):
                logits = key[b, h // (heads // key.shape[1])] @ query[b, h, q] / size**0.5
                seen = ~hidden[b, h, q]
                if seen.any():
                    out[b, h, q, seen] = torch.softmax(logits[seen], 0)
    return out


@pytest.mark.parametrize("kind", ["none", "bool", "float", "keys", "positions"])
def test_rows_are_those_of_a_softmax(kind: str) -> None:
    query, key = tensors(3, 11)
    generator = torch.Generator().manual_seed(7)
    hidden = torch.rand(2, 4, 3, 11, generator=generator) < 0.3
    mask: torch.Tensor | None = None
    positions = None
    if kind == "none":
        hidden = torch.zeros_like(hidden)
    elif kind == "bool":
        hidden[0, 0, 0] = True  # a row that sees nothing
        mask = ~hidden
    elif kind == "float":
        mask = torch.zeros(hidden.shape).masked_fill(hidden, float("-inf"))
    elif kind == "keys":
        mask = ~hidden[:, :1, :1]
        hidden = hidden[:, :1, :1].expand(2, 4, 3, 11)
    else:
        positions = torch.tensor([[0, 5, 10], [3, 3, 7]])
        hidden = torch.arange(11) > positions[:, None, :, None].expand(2, 4, 3, 1)
    rows = attention_rows(query, key, mask, positions)
    torch.testing.assert_close(rows, plain(query, key, hidden), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (130, 130), (257, 300)])
def test_mass_in_blocks_is_that_of_the_matrix(queries: int, keys: int, causal: bool) -> None:
    query, key = tensors(queries, keys)
    weights = torch.rand(2, 3, queries)
    mask = torch.rand(2, 1, 1, keys) < 0.9
    found = attention_mass(query, key, weights, mask, causal)
    place = torch.arange(keys)
    hidden = ~mask.expand(2, 4, queries, keys)
    if causal:
        hidden = hidden | (place > torch.arange(queries)[:, None] + keys - queries)
    wanted = torch.einsum("bgq,bhqt->bhgt", weights, plain(query, key, hidden))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        found, attention_mass_reference(query, key, weights, mask, causal), atol=1e-5, rtol=1e-5
    )


def test_bfloat16_is_computed_in_float32() -> None:
    query, key = (value.bfloat16() for value in tensors(4, 9))
    rows = attention_rows(query, key)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, attention_rows(query.float(), key.float()))


def test_no_matrix_of_all_rows_is_ever_held() -> None:
    query, key = tensors(1024, 1024, heads=2, key_heads=2)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for value in result if isinstance(result, tuple) else (result,):
                if isinstance(value, torch.Tensor):
                    largest = max(largest, value.untyped_storage().nbytes())
            return result

    weights = torch.ones(2, 1, 1024)
    with Watch():
        attention_mass._init_fn(query, key, weights, None, True, None)  # type: ignore[attr-defined]
    assert 0 < largest <= 2 * 2 * 1024 * 1024 * 4 / 8


def test_operators_keep_their_contracts() -> None:
    query, key = tensors(4, 6)
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    weights = torch.rand(2, 2, 4)
    torch.library.opcheck(torch.ops.vlmopt.attention_rows.default, (query, key, mask))
    torch.library.opcheck(
        torch.ops.vlmopt.attention_mass.default, (query, key, weights, mask, True)
    )
