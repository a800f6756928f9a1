"""The Triton kernels in Triton's interpreter, against the references: no GPU is needed.

``TRITON_INTERPRET=1 pytest tests/lowering/triton_interpreted.py``; ``test_triton.py`` runs it so.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

from vlmopt.graph.compare import random_inputs
from vlmopt.lowering.triton import attention as kernels
from vlmopt.lowering.triton import experts as expert_kernels
from vlmopt.ops import attention, experts
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.tracing import capture

# queries, keys, heads, key heads, size: one tile, several, none of them full, a head in two pieces
SHAPES = [(3, 5, 2, 2, 16), (20, 70, 4, 2, 8), (70, 130, 2, 1, 72), (18, 64, 3, 3, 33)]
CASES = [
    (SHAPES[0], torch.float32, "none"),
    (SHAPES[0], torch.float16, "float"),
    (SHAPES[1], torch.bfloat16, "bool"),
    (SHAPES[1], torch.float32, "keys"),
    (SHAPES[2], torch.float16, "none"),
    (SHAPES[2], torch.bfloat16, "keys"),
    (SHAPES[3], torch.float16, "bool"),
    (SHAPES[3], torch.float32, "float"),
]


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Query and key as models make them: tokens before heads in memory."""
    queries, keys, heads, key_heads, size = shape
    generator = torch.Generator().manual_seed(sum(shape))
    query = torch.randn(2, queries, heads, size, generator=generator).to(dtype)
    key = torch.randn(2, keys, key_heads, size, generator=generator).to(dtype)
    return query.transpose(1, 2), key.transpose(1, 2)


def mask_of(kind: str, shape: tuple[int, ...]) -> torch.Tensor | None:
    queries, keys, heads, *_ = shape
    generator = torch.Generator().manual_seed(7)
    if kind == "none":
        return None
    if kind == "keys":  # as padding is hidden
        return torch.rand(2, 1, 1, keys, generator=generator) < 0.8
    shown = torch.rand(2, heads, queries, keys, generator=generator) < 0.7
    shown[1, 0, -1] = False  # a row that sees nothing
    if kind == "bool":
        return shown
    bias = torch.randn(2, heads, queries, keys, generator=generator)
    return bias.masked_fill(~shown, float("-inf"))


def same(found: torch.Tensor, wanted: torch.Tensor) -> None:
    assert found.dtype == wanted.dtype == torch.float32
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=2e-5)


@pytest.mark.parametrize(("shape", "dtype", "kind"), CASES)
def test_rows(shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    query, key = tensors(shape, dtype)
    mask = mask_of(kind, shape)
    positions = torch.randint(-1, shape[1], (2, shape[0])) if kind in ("none", "bool") else None
    found = kernels.attention_rows(query, key, mask, positions, None)
    same(found, attention.attention_rows_reference(query, key, mask, positions))


@pytest.mark.parametrize(
    ("causal", "over"), [(False, "queries"), (True, "queries"), (True, "keys")]
)
@pytest.mark.parametrize(("shape", "dtype", "kind"), CASES)
def test_mass(
    shape: tuple[int, ...], dtype: torch.dtype, kind: str, causal: bool, over: str
) -> None:
    query, key = tensors(shape, dtype)
    weights = torch.rand(2, 3, shape[over == "keys"])  # more groups than one program sums
    arguments = (query, key, weights, mask_of(kind, shape), causal, 0.3, over)
    same(kernels.attention_mass(*arguments), attention.attention_mass_reference(*arguments))


def test_many_blocks_of_keys_make_one_softmax() -> None:
    shape = (1, 4200, 1, 1, 4)
    query, key = tensors(shape)
    same(
        kernels.attention_rows(query, key, None, None, 5.0),
        attention.attention_rows_reference(query, key, scale=5.0),
    )


def test_large_logits_and_whole_blocks_hidden() -> None:
    shape = (20, 200, 2, 2, 16)
    query, key = tensors(shape)
    shown = torch.zeros(2, 1, 1, 200, dtype=torch.bool)
    shown[0, ..., 150:] = True  # nothing in the first blocks
    rows = kernels.attention_rows(query, key, shown, None, 100.0)
    same(rows, attention.attention_rows_reference(query, key, shown, None, 100.0))
    assert not rows[1].any()
    weights = torch.ones(2, 1, 20)
    arguments = (query, key, weights, shown, False, 100.0)
    mass = kernels.attention_mass(*arguments, "queries")
    same(mass, attention.attention_mass_reference(*arguments))
    torch.testing.assert_close(mass[0].sum(-1), torch.full((2, 1), 20.0))


def test_a_row_that_is_not_a_number_is_zeros() -> None:
    query, key = tensors((3, 70, 2, 2, 16))
    query[0, 0, 1] = float("nan")
    rows = kernels.attention_rows(query, key, None, None, None)
    same(rows, attention.attention_rows_reference(query, key))
    assert not rows[0, 0, 1].any()
    for over in attention.OVER:
        weights = torch.ones(2, 1, (3, 70)[over == "keys"])
        arguments = (query, key, weights, None, False, None, over)
        same(kernels.attention_mass(*arguments), attention.attention_mass_reference(*arguments))


def test_types_may_differ_and_heads_may_lie_anyhow() -> None:
    query, key = tensors((5, 70, 2, 2, 16))
    key = key.bfloat16()
    query = query.transpose(2, 3).contiguous().transpose(2, 3)  # elements of a head far apart
    same(
        kernels.attention_rows(query, key, None, None, None),
        attention.attention_rows_reference(query, key),
    )


@pytest.mark.parametrize("change", ["batch", "heads", "size", "weights", "mask"])
def test_nothing_is_read_beyond_the_end(change: str) -> None:
    query, key = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 5, 8)
    weights, mask = torch.zeros(2, 1, 3), torch.zeros(2, 1, 1, 5)
    if change == "batch":
        key = key[:1]
    elif change == "heads":
        key = torch.zeros(2, 3, 5, 8)
    elif change == "size":
        key = key[..., :4]
    elif change == "weights":
        weights = weights[..., :2]
    else:
        mask = mask[..., :4]
    with pytest.raises(
        (ValueError, RuntimeError), match=r"do not fit|must match the existing size"
    ):
        kernels.attention_mass(query, key, weights, mask, False, None, "queries")


def test_the_operators_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    query, key = tensors((5, 70, 4, 2, 16))
    weights = torch.rand(2, 1, 5)
    wanted = attention.attention_mass(query, key, weights, causal=True)
    calls = []
    for name in ("attention_rows", "attention_mass"):
        kernel = getattr(kernels, name)

        def spy(*args: Any, kernel: Any = kernel, name: str = name) -> Any:
            calls.append(name)
            return kernel(*args)

        monkeypatch.setattr(kernels, name, spy)
    monkeypatch.setattr(attention, "uses_kernels", lambda query: True)
    same(attention.attention_mass(query, key, weights, causal=True), wanted)
    same(attention.attention_rows(query, key), attention.attention_rows_reference(query, key))
    assert calls == ["attention_mass", "attention_rows"]


@pytest.mark.parametrize(
    "passes", ["fastv{layers=2 keep=0.5}", "alvts{layers=1,2 keep=0.5 rank=16}"]
)
def test_a_method_keeps_the_same_tokens(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    program = capture(zoo.build("llava"), zoo.inputs("llava"))
    run_pipeline(program, passes)
    stage = program["language_model"]
    assert any("vlmopt.attention" in str(node.target) for node in stage.graph.nodes)
    for seed in range(3):
        inputs = random_inputs(stage, seed)
        results = []
        for kernels_used in (False, True):
            monkeypatch.setattr(attention, "uses_kernels", lambda query, used=kernels_used: used)
            with torch.no_grad():
                results.append(stage.graph_module(*inputs))
        for wanted, found in zip(*results, strict=True):
            if wanted.is_floating_point():
                torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4, equal_nan=True)
            else:  # the slots that stay
                assert found.tolist() == wanted.tolist()


# rows, width, columns, ends: tiles full and not, groups that are empty, rows behind the last group
GROUPS = [
    (7, 5, 3, [2, 5, 5, 7]),
    (150, 70, 90, [0, 0, 65, 65, 140]),
    (200, 40, 64, [64, 128, 128, 128, 128, 129]),
    (9, 33, 20, [1, 1, 2, 3, 3, 4, 5, 5, 5, 6]),
    (70, 16, 16, [0, 0, 0]),
    (1, 1, 1, [1]),
    (30, 8, 8, []),
    (0, 8, 8, [0, 0]),
]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GROUPS)
def test_grouped_products(case: tuple[Any, ...], dtype: torch.dtype, transposed: bool) -> None:
    count, width, columns, ends = case
    generator = torch.Generator().manual_seed(count)
    rows = torch.randn(count, width, generator=generator).to(dtype)
    weights = torch.randn(len(ends), width, columns, generator=generator).to(dtype)
    if transposed:  # as models keep them
        weights = weights.transpose(1, 2).contiguous().transpose(1, 2)
    last = ends[-1] if ends else 0
    rows[last:] = float("nan")  # rows of skipped pairs are not read
    for kind in (torch.int32, torch.int64):
        found = expert_kernels.grouped_mm(rows, weights, torch.tensor(ends, dtype=kind))
        assert found.dtype == dtype
        assert found.shape == (count, columns)
        assert not found[last:].any()
        start = 0
        for group, end in enumerate(ends):
            wanted = (rows[start:end].double() @ weights[group].double()).to(dtype)
            torch.testing.assert_close(found[start:end], wanted)
            start = end


def test_rows_may_lie_anyhow_and_ends_go_no_further_than_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(12, 40, generator=generator).t()[:20]
    weights = torch.randn(2, 12, 30, generator=generator)
    found = expert_kernels.grouped_mm(rows, weights, torch.tensor([3, 0, 50, 0])[::2])
    torch.testing.assert_close(found[:3], rows[:3] @ weights[0])
    torch.testing.assert_close(found[3:], rows[3:] @ weights[1])


@pytest.mark.parametrize("change", ["width", "ends", "dtype", "double"])
def test_operands_of_grouped_products_must_fit(change: str) -> None:
    rows, weights, ends = torch.zeros(4, 8), torch.zeros(2, 8, 3), torch.tensor([1, 4])
    if change == "width":
        rows = rows[:, :4]
    elif change == "ends":
        ends = ends[:1]
    elif change == "dtype":
        rows = rows.bfloat16()
    else:
        rows, weights = rows.double(), weights.double()
    with pytest.raises(ValueError, match="do not fit"):
        expert_kernels.grouped_mm(rows, weights, ends)


def test_skipped_pairs_through_the_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that skips experts, with the kernel in the place of every grouped product."""
    program = capture(zoo.build("kimi_k25", layers=2), zoo.inputs("kimi_k25"))
    run_pipeline(program, "modes{text=0.45 vision=0.55}")
    stage = program["language_model"]
    for node in stage.graph.find_nodes(
        op="call_function", target=torch.ops.aten._grouped_mm.default
    ):
        node.target = torch.ops.vlmopt.grouped_mm.default
        node.args, node.kwargs = node.args[:3], {}
    stage.graph_module.recompile()
    inputs = random_inputs(stage, 3)
    calls = []

    def spy(*args: Any, kernel: Any = expert_kernels.grouped_mm) -> Any:
        calls.append(int(args[2][-1]) < len(args[0]))
        return kernel(*args)

    monkeypatch.setattr(expert_kernels, "grouped_mm", spy)
    results = []
    for used in (False, True):
        monkeypatch.setattr(experts, "uses_kernel", lambda rows, used=used: used)
        with torch.no_grad():
            results.append(stage.graph_module(*inputs))
    assert calls
    assert any(calls)  # some pairs were skipped
    for wanted, found in zip(*results, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4, equal_nan=True)
