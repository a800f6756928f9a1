"""The Triton kernels compiled for GPUs, as they are launched: no GPU is needed for that.

``test_triton.py`` runs this file in a process of its own, as it takes the place of the driver.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from vlmopt.lowering.triton import attention as kernels
from vlmopt.lowering.triton import experts


class Driver:
    """Of a GPU that is not there: enough to compile for it."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> Any:
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        return self.capability  # Triton remembers the target of a device

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compile_for(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[Any]]:
    """Turns launches into compilations for a capability; returns the list that they go to."""

    def choose(capability: int) -> list[Any]:
        compiled = []

        def launch(kernel: Any, grid: tuple[int, ...]) -> Any:
            def run(*args: Any, **constants: Any) -> None:
                given = [arg.dtype if isinstance(arg, torch.Tensor) else arg for arg in args]
                compiled.append(kernel.warmup(*given, grid=grid, **constants))

            return run

        monkeypatch.setattr(JITFunction, "__getitem__", launch)
        triton.runtime.driver.set_active(Driver(capability))
        return compiled

    return choose


MULTIPLY = {75: "fma.rn.f32", 80: "mma.sync", 90: "wgmma"}
"""How each case multiplies, in PTX."""


def check(kernel: Any, capability: int) -> None:
    text = kernel.asm["ptx"]
    assert f".target sm_{capability}" in text
    assert not re.search(r"\b(atom|red)\.", text)  # sums in a fixed order
    assert "tf32" not in text  # nothing is rounded before it is multiplied
    assert kernel.metadata.shared <= 64 * 1024
    assert kernel.asm["cubin"]


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "masked"),
    [
        (90, torch.bfloat16, (4, 2, 300, 300, 40), True),
        (75, torch.float32, (4, 2, 300, 300, 40), False),
        (80, torch.float16, (1, 1, 1, 1, 8), True),  # Triton makes constants of sizes of 1
    ],
)
def test_every_kernel_compiles(
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    masked: bool,
    compile_for: Callable[[int], list[Any]],
) -> None:
    heads, key_heads, queries, keys, size = shape
    compiled = compile_for(capability)
    with FakeTensorMode():
        query = torch.empty(1, heads, queries, size, dtype=dtype, device="cuda:0")
        key = torch.empty(1, key_heads, keys, size, dtype=dtype, device="cuda:0")
        mask = torch.empty(1, 1, 1, keys, dtype=torch.bool, device="cuda:0") if masked else None
        positions = torch.empty(1, queries, dtype=torch.int64, device="cuda:0") if masked else None
        kernels.attention_rows(query, key, mask, positions, None)
        for over in ("queries", "keys"):
            length = queries if over == "queries" else keys
            weights = torch.empty(1, key_heads, length, device="cuda:0")
            kernels.attention_mass(query, key, weights, mask, masked, None, over)
    names = [kernel.metadata.name for kernel in compiled]
    assert names == [
        "_rows_kernel",
        "_normalize_kernel",
        "_statistics_kernel",
        "_column_sums_kernel",
        "_row_sums_kernel",
    ]
    for kernel in compiled:
        check(kernel, capability)
    assert all(
        MULTIPLY[capability] in kernel.asm["ptx"]
        for kernel in compiled
        if "_norm" not in kernel.metadata.name
    )


@pytest.mark.parametrize(
    ("capability", "dtype", "shape", "transposed"),
    [
        (90, torch.bfloat16, (4096, 60, 2048, 1408), True),
        (80, torch.float16, (4096, 8, 512, 512), False),
        (75, torch.float32, (70, 3, 40, 24), True),
        (80, torch.bfloat16, (1, 1, 1, 1), False),  # sizes of 1 are constants
    ],
)
def test_grouped_products_compile(
    capability: int,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    transposed: bool,
    compile_for: Callable[[int], list[Any]],
) -> None:
    count, groups, width, columns = shape
    compiled = compile_for(capability)
    with FakeTensorMode():
        rows = torch.empty(count, width, dtype=dtype, device="cuda:0")
        weights = torch.empty(groups, width, columns, dtype=dtype, device="cuda:0")
        if transposed:
            weights = weights.new_empty(groups, columns, width).transpose(1, 2)
        ends = torch.empty(groups, dtype=torch.int32, device="cuda:0")
        assert experts.grouped_mm(rows, weights, ends).shape == (count, columns)
    (kernel,) = compiled
    check(kernel, capability)
    assert MULTIPLY[capability] in kernel.asm["ptx"]
