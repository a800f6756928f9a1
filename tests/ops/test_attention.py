"""Attention scores: against a plain softmax, in blocks, masked, grouped; never a full matrix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from vlmopt.ops import DECOMPOSITIONS
from vlmopt.ops.attention import (
    OVER,
    attention_mass,
    attention_mass_reference,
    attention_rows,
    attention_rows_reference,
)
from vlmopt.ops.attention_gradient import attention_mass_backward


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


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (130, 130), (257, 300), (150, 9)])
def test_mass_in_blocks_is_that_of_the_matrix(
    queries: int, keys: int, causal: bool, over: str
) -> None:
    query, key = tensors(queries, keys)
    weights = torch.rand(2, 3, queries if over == "queries" else keys)
    mask = torch.rand(2, 1, 1, keys) < 0.9
    found = attention_mass(query, key, weights, mask, causal, over=over)
    place = torch.arange(keys)
    hidden = ~mask.expand(2, 4, queries, keys)
    if causal:
        hidden = hidden | (place > torch.arange(queries)[:, None] + keys - queries)
    equation = "bgq,bhqt->bhgt" if over == "queries" else "bgt,bhqt->bhgq"
    wanted = torch.einsum(equation, weights, plain(query, key, hidden))
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    reference = attention_mass_reference(query, key, weights, mask, causal, over=over)
    torch.testing.assert_close(found, reference, atol=1e-5, rtol=1e-5)


def test_sums_over_a_subset_of_keys() -> None:
    query, key = tensors(4, 9)
    subset = torch.zeros(2, 1, 9)
    subset[..., 2:5] = 1
    given = attention_mass(query, key, subset, over="keys")[:, :, 0]
    torch.testing.assert_close(given, attention_rows(query, key)[..., 2:5].sum(-1))
    rest = attention_mass(query, key, 1 - subset, over="keys")[:, :, 0]
    torch.testing.assert_close(given + rest, torch.ones(2, 4, 4))


@pytest.mark.parametrize("function", [attention_mass, attention_mass_reference])
def test_sums_run_over_queries_or_keys(function: Any) -> None:
    query, key = tensors(4, 9)
    with pytest.raises(ValueError, match="over is 'heads', not one of queries, keys"):
        function(query, key, torch.ones(2, 1, 4), over="heads")


def test_bfloat16_is_computed_in_float32() -> None:
    query, key = (value.bfloat16() for value in tensors(4, 9))
    rows = attention_rows(query, key)
    assert rows.dtype == torch.float32
    torch.testing.assert_close(rows, attention_rows(query.float(), key.float()))


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("over", OVER)
def test_no_matrix_of_all_rows_is_ever_held(over: str, backward: bool) -> None:
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
    arguments = (query, key, weights, None, True, None, over)
    with Watch():
        if backward:
            attention_mass_backward._init_fn(torch.ones(2, 2, 1, 1024), *arguments)
        else:
            attention_mass._init_fn(*arguments)
    assert 0 < largest <= 2 * 2 * 1024 * 1024 * 4 / 8


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("over", OVER)
def test_gradients_of_the_mass_are_those_of_the_matrix(over: str, causal: bool) -> None:
    torch.manual_seed(0)
    query, key = (value.requires_grad_() for value in tensors(140, 9))
    weights = torch.rand(2, 3, 140 if over == "queries" else 9, requires_grad=True)
    mask = torch.rand(2, 1, 140, 9) < 0.7
    mask[..., 0] = True  # the matrix has no gradient where a row sees nothing
    mask[0, 0, 3] = causal
    inputs = (query, key, weights)
    to_result = torch.randn(2, 4, 3, 9 if over == "queries" else 140)
    found, wanted = (
        torch.autograd.grad(function(*inputs, mask, causal, 0.4, over), inputs, to_result)
        for function in (attention_mass, attention_mass_reference)
    )
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other.nan_to_num(0.0), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_the_rows_are_those_of_a_softmax(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    inputs = [value.to(dtype).requires_grad_() for value in tensors(3, 11)]
    positions = torch.tensor([[0, 5, 10], [3, 3, 7]])
    to_result = torch.randn(2, 4, 3, 11)
    functions: tuple[Any, ...] = (attention_rows, attention_rows_reference)
    found, wanted = (
        torch.autograd.grad(function(*inputs, None, positions), inputs, to_result)
        for function in functions
    )
    for one, other in zip(found, wanted, strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other)


def test_a_gradient_for_the_mask_is_refused() -> None:
    query, key = tensors(3, 5)
    bias = torch.zeros(2, 1, 3, 5, requires_grad=True)
    for scores in (
        attention_rows(query, key, bias),
        attention_mass(query, key, torch.ones(2, 1, 3), bias),
    ):
        with pytest.raises(NotImplementedError, match="no gradient for their mask; detach it"):
            scores.sum().backward()


def test_training_compiles_through_the_scores() -> None:
    """Tokens chosen by scores, and weighed by them: choices pass no gradient on, weights do."""

    def loss(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        weights = query.new_ones(2, 1, query.shape[2])
        mass = attention_mass(query, key, weights, None, True).mean(1)[:, 0]
        kept = mass.topk(3).indices
        rows = attention_rows(query[:, :, -1:], key).mean(1)[:, 0]
        return (rows.gather(1, kept) * mass.gather(1, kept)).sum()

    inputs = [value.requires_grad_() for value in tensors(6, 6)]
    wanted = torch.autograd.grad(loss(*inputs), inputs)
    found = torch.autograd.grad(torch.compile(loss, backend="aot_eager")(*inputs), inputs)
    torch._dynamo.reset()
    for one, other in zip(found, wanted, strict=True):
        assert other.abs().sum() > 0
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("training", [False, True])
def test_operators_keep_their_contracts(training: bool) -> None:
    query, key = (value.requires_grad_(training) for value in tensors(4, 6))
    mask = torch.ones(2, 1, 4, 6, dtype=torch.bool)
    weights = torch.rand(2, 2, 4)
    torch.library.opcheck(torch.ops.vlmopt.attention_rows.default, (query, key, mask))
    mass = torch.ops.vlmopt.attention_mass.default
    torch.library.opcheck(mass, (query, key, weights, mask, True))
    torch.library.opcheck(mass, (query, key, torch.rand(2, 2, 6), mask, True, None, "keys"))
    if not training:
        torch.library.opcheck(
            torch.ops.vlmopt.attention_mass_backward.default,
            (torch.rand(2, 4, 2, 6), query, key, weights, mask, True, None, "queries"),
        )


@pytest.mark.parametrize("over", OVER)
def test_the_decomposition_is_of_standard_operators(over: str, tmp_path: Path) -> None:
    class Mass(torch.nn.Module):
        def forward(
            self, query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor
        ) -> torch.Tensor:
            return torch.ops.vlmopt.attention_mass(query, key, weights, None, True, None, over)

    inputs = (*tensors(5, 7), torch.rand(2, 1, 5 if over == "queries" else 7))
    exported = torch.export.export(Mass(), inputs).run_decompositions(dict(DECOMPOSITIONS))
    torch.onnx.export(exported, f=tmp_path / "mass.onnx", dynamo=True, verbose=False)
    wanted = attention_mass(*inputs, None, True, None, over)
    session = onnxruntime.InferenceSession(tmp_path / "mass.onnx")
    names = [value.name for value in session.get_inputs()]
    feed = {name: value.numpy() for name, value in zip(names, inputs, strict=True)}
    (found,) = session.run(None, feed)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-6, rtol=1e-5)
