"""Linear layers on packed weights."""

from __future__ import annotations

import pytest
import torch
import zoo
from torch import nn

import vlmopt
from vlmopt.errors import PreconditionError
from vlmopt.graph.compare import random_inputs
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
    result = ops.packed_linear(rows, ops.pack(layer.weight), layer.bias)
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
    assert (ops.packed_linear(rows, again, layer.bias) - layer(rows)).abs().max() <= 1e-6


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


@pytest.mark.parametrize("family", ["qwen3_vl_moe", "kimi_k25"])
def test_experts_run_on_packed_weights(family: str) -> None:
    model, inputs = zoo.build(family, layers=2), zoo.inputs(family, batch=2)
    stage = vlmopt.capture(model, inputs)["language_model"]
    gm = stage.graph_module
    packed_gm = with_packed_weights(gm)
    targets = [node.target for node in packed_gm.graph.nodes]
    assert torch.ops.vlmopt.packed_grouped_mm.default in targets
    assert torch.ops.vlmopt.grouped_mm.default not in targets
    given = random_inputs(stage, 3)
    with torch.no_grad():
        for found, wanted in zip(packed_gm(*given), gm(*given), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
