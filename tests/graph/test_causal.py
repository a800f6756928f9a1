from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import zoo
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

import vlmopt
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Stage
from vlmopt.tracing import capture

aten = torch.ops.aten


class Attention(nn.Module):
    """Two attentions with one mask, made while it runs from the number of tokens."""

    def __init__(self, mask: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mask = mask

    def forward(self, x: Tensor) -> Tensor:
        mask = self.mask(x)
        once = scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.5)
        return scaled_dot_product_attention(once, x, x, mask, scale=0.5)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    slots = torch.arange(x.shape[-2])
    return slots[:, None], slots[None]


def causal(x: Tensor) -> Tensor:
    query, key = positions(x)
    return (key <= query).expand(x.shape[0], 1, -1, -1)


def added(x: Tensor) -> Tensor:
    return torch.where(causal(x), 0.0, torch.finfo(x.dtype).min)


def visible(x: Tensor) -> Tensor:
    query, key = positions(x)
    return key >= query * 0


def window(x: Tensor) -> Tensor:
    query, key = positions(x)
    return (key <= query) & (key > query - 3)


def weighted(x: Tensor) -> Tensor:
    return torch.where(causal(x), 0.5, float("-inf"))


def of_input(x: Tensor) -> Tensor:
    return causal(x) & (x[..., :1] * 0 == 0)


def random(x: Tensor) -> Tensor:
    return causal(x) & (torch.rand(x.shape[-2], x.shape[-2]) < 2)


def attention_of(mask: Callable[[Tensor], Tensor]) -> tuple[Stage, Tensor]:
    x = torch.randn(2, 3, 6, 4, generator=torch.Generator().manual_seed(0))
    return capture(Attention(mask), (x,))["model"], x


@pytest.mark.parametrize(("mask", "is_causal"), [(causal, True), (added, True), (visible, False)])
def test_a_constant_mask_is_said_in_one_word(
    mask: Callable[[Tensor], Tensor], is_causal: bool
) -> None:
    stage, x = attention_of(mask)
    (before,) = stage.graph_module(x)
    assert drop_constant_masks(stage.graph) == 2
    stage.graph_module.recompile()
    nodes = [node for node in stage.graph.nodes if node.op == "call_function"]
    assert {node.target for node in nodes} == {aten.scaled_dot_product_attention.default}
    wanted = {"is_causal": True, "scale": 0.5} if is_causal else {"scale": 0.5}
    assert [len(node.args) for node in nodes] == [3, 3]
    assert all(node.kwargs == wanted for node in nodes)
    torch.testing.assert_close(stage.graph_module(x), (before,), rtol=0, atol=1e-6)


@pytest.mark.parametrize("mask", [window, weighted, of_input, random])
def test_every_other_mask_stays(mask: Callable[[Tensor], Tensor]) -> None:
    stage, _ = attention_of(mask)
    before = str(stage.graph)
    assert drop_constant_masks(stage.graph) == 0
    assert str(stage.graph) == before


def test_a_mask_over_more_keys_than_queries_stays() -> None:
    class Continued(nn.Module):
        def forward(self, query: Tensor, key: Tensor) -> Tensor:
            rows, columns = torch.arange(2)[:, None], torch.arange(5)[None]
            return scaled_dot_product_attention(query, key, key, attn_mask=columns <= rows)

    stage = capture(Continued(), (torch.randn(1, 2, 4), torch.randn(1, 5, 4)))["model"]
    assert drop_constant_masks(stage.graph) == 0


def test_an_unpadded_prompt_has_no_mask_before_and_after_a_cut() -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    for _ in range(2):
        stage = program["language_model"]
        found = stage.graph.find_nodes(
            op="call_function", target=aten.scaled_dot_product_attention.default
        )
        assert len(found) == 4
        assert all(node.kwargs["is_causal"] and len(node.args) == 3 for node in found)
        if not stage.cuts:
            run_pipeline(program, "v2drop{layers=2 keep=0.5}", verify="full")
    padded = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava", batch=2))
    found = padded["language_model"].graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert all(isinstance(node.args[3], torch.fx.Node) for node in found)
