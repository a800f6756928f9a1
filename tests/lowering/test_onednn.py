"""Linear layers on packed weights."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn
from torch.nn import functional

import vlmopt
from vlmopt.errors import PreconditionError
from vlmopt.lowering.onednn import with_packed_weights
from vlmopt.ops import packed as ops
from vlmopt.ops.packed import packed

pytestmark = pytest.mark.skipif(not ops.is_available(), reason="this PyTorch has no oneDNN")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1, 48), (2, 7, 48), (130, 48)])
@pytest.mark.parametrize("biased", [True, False])
def test_a_packed_layer_is_the_layer(
    dtype: torch.dtype, shape: tuple[int, ...], biased: bool
) -> None:
    layer = nn.Linear(48, 20, bias=biased, dtype=dtype)
    rows = torch.randn(shape, dtype=dtype)
    result = torch.ops.vlmopt.packed_linear(rows, ops.pack(layer.weight), layer.bias)
    wanted = layer(rows)
    assert result.shape == wanted.shape
    assert result.stride() == wanted.stride()
    # of bfloat16, one rounding
    assert (result - wanted).abs().max() <= {torch.float32: 1e-5, torch.bfloat16: 1e-2}[dtype]


def test_a_weight_is_packed_once_until_it_changes() -> None:
    layer = nn.Linear(8, 8)
    first = packed(layer.weight)
    assert packed(layer.weight) is first
    with torch.no_grad():
        layer.weight.mul_(2)
    again = packed(layer.weight)
    rows = torch.randn(3, 8)
    assert (ops.linear(rows, again, layer.bias) - layer(rows)).abs().max() <= 1e-6


@pytest.mark.parametrize("part", [(8, 16), (0, 8), (16, 2**63 - 1), (-8, -4)])
def test_part_of_a_weight_is_packed(part: tuple[int, int]) -> None:
    """Once, beside the whole, and beside other parts."""

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.fused = nn.Linear(12, 24)

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            weight, bias = (value[slice(*part)] for value in self.fused.parameters())
            return functional.linear(rows, weight, bias)

    model, rows = Part().eval(), torch.randn(5, 12)
    stage = vlmopt.capture(model, (rows,))["model"]
    results = [with_packed_weights(stage.graph_module) for _ in range(2)]
    one, again = (
        next(value for name, value in gm.named_buffers() if name.startswith("packed"))
        for gm in results
    )
    assert one is again
    whole = packed(model.fused.weight)
    assert whole is not one and whole.shape == (24, 12)
    targets = {node.target for node in results[0].graph.nodes}
    assert torch.ops.aten.linear.default not in targets
    (found,) = results[0](rows)
    torch.testing.assert_close(found, model(rows), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("cut", [(slice(None), slice(0, 8)), (slice(0, 24, 2),)])
def test_other_parts_are_left_alone(cut: tuple[slice, ...]) -> None:
    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.weight = nn.Linear(12, 8), nn.Parameter(torch.randn(24, 8))

        def forward(self, rows: torch.Tensor) -> torch.Tensor:
            weight = self.weight[cut]
            return functional.linear(self.first(rows), weight)

    model, rows = Part().eval(), torch.randn(5, 12)
    gm = with_packed_weights(vlmopt.capture(model, (rows,))["model"].graph_module)
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(torch.ops.aten.linear.default) == 1
    torch.testing.assert_close(gm(rows)[0], model(rows), atol=1e-6, rtol=1e-5)


def test_graphs_stay_as_they_are() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    stage = vlmopt.capture(model, inputs)["language_model"]
    before = stage.graph_module.code
    result = with_packed_weights(stage.graph_module)
    assert stage.graph_module.code == before
    targets = {node.target for node in result.graph.nodes}
    assert torch.ops.aten.linear.default not in targets
    assert torch.ops.vlmopt.packed_linear.default in targets


def test_the_same_tokens_and_logits() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava", batch=2)
    text = "v2drop{layers=1,3 keep=0.5}"
    plain = vlmopt.optimize(model, inputs, text, backend="eager")
    fast = vlmopt.optimize(model, inputs, text, backend="onednn")
    with torch.no_grad():
        assert (fast(**inputs).logits - plain(**inputs).logits).abs().max() <= 1e-5
        tokens = [
            twin.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=None)
            for twin in (plain, fast)
        ]
    assert torch.equal(*tokens)


def test_other_types_are_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).double()
    with pytest.raises(PreconditionError, match="no linear layer here can run on packed weights"):
        vlmopt.optimize(model, (torch.ones(2, 4).double(),), "fold-constants", backend="onednn")
