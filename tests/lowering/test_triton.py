"""The Triton kernels where there is no GPU: interpreted, compiled, and left alone on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from torch._subclasses import FakeTensorMode

from vlmopt.ops import attention, experts

ROOT = Path(__file__).resolve().parents[2]

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")


@needs_triton
@pytest.mark.parametrize(("file", "interpret"), [("interpreted", "1"), ("compiled", "0")])
def test_kernels(file: str, interpret: str, tmp_path: Path) -> None:
    """In a process of its own: Triton reads the variable once, when it is imported."""
    cases = Path(__file__).with_name(f"triton_{file}.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", str(cases), "-q", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={
            **os.environ,
            "TRITON_INTERPRET": interpret,
            "TRITON_CACHE_DIR": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
    assert " skipped" not in done.stdout


def test_kernels_run_on_cuda_only() -> None:
    assert not attention.uses_kernels(torch.empty(1))
    with FakeTensorMode():
        here = attention.uses_kernels(torch.empty(1, device="cuda:0"))
        grouped = experts.uses_kernel(torch.empty(1, 1, device="cuda:0"))
        assert not experts.uses_kernel(torch.empty(1, 1, device="cuda:0", dtype=torch.float64))
    assert here == grouped == (find_spec("triton") is not None)


def test_inductor_calls_the_operators() -> None:
    def scores(query: torch.Tensor, key: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        rows = attention.attention_rows(query[:, :, -1:] * 2, key)
        sums = attention.attention_mass(query * 2, key, weights, causal=True)
        given = attention.attention_mass(query * 2, key, weights, over="keys")
        return (rows + sums).mean(1)[:, 0] + given.mean(1)[:, 0]

    torch.manual_seed(0)
    query, key = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8)
    weights = torch.rand(2, 1, 9)
    wanted = scores(query, key, weights)
    found, (code,) = run_and_get_code(torch.compile(scores), query, key, weights)
    torch._dynamo.reset()
    torch.testing.assert_close(found, wanted)
    assert code.count("torch.ops.vlmopt.attention_rows.default(") == 1
    assert code.count("torch.ops.vlmopt.attention_mass.default(") == 2


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_kernels_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, 700, 8, 72, device="cuda").to(dtype).transpose(1, 2)
    key = torch.randn(2, 900, 2, 72, device="cuda").to(dtype).transpose(1, 2)
    mask = torch.rand(2, 1, 1, 900, device="cuda") < 0.8

    def scores(query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        found = [attention.attention_rows(query[:, :, -3:], key, mask)]
        for over, length in (("queries", 700), ("keys", 900)):
            weights = torch.full((2, 3, length), 1 / length, device="cuda")
            found.append(attention.attention_mass(query, key, weights, mask, True, None, over))
        return found

    assert attention.uses_kernels(query)
    found = scores(query, key)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "uses_kernels", lambda query: False)
        wanted = scores(query.float(), key.float())
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    compiled = torch.compile(scores)(query, key)
    torch._dynamo.reset()
    for others in (scores(query, key), compiled):
        assert all(torch.equal(one, other) for one, other in zip(found, others, strict=True))


@needs_triton
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_grouped_products_on_a_gpu(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rows = torch.randn(1000, 136, device="cuda").to(dtype)
    rows[900:] = float("nan")  # of skipped pairs: not read
    weights = torch.randn(6, 200, 136, device="cuda").to(dtype).transpose(1, 2)
    ends = torch.tensor([64, 64, 65, 400, 400, 900], dtype=torch.int32, device="cuda")
    torch.cuda.set_sync_debug_mode("error")  # the host never waits for the ends
    try:
        found = experts.grouped_mm(rows, weights, ends)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted = experts.grouped_mm_reference(rows.nan_to_num(), weights, ends)
    torch.testing.assert_close(found[:900], wanted[:900], atol=1e-2, rtol=1e-2)
    assert not found[900:].any()
    assert torch.equal(found, experts.grouped_mm(rows, weights, ends))
