from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from tests.toys import Decoder, decoder
from vlmopt.analysis.cost import node_flops, stage_cost, tokens_per_layer
from vlmopt.program import Cut, Port, Role, Stage
from vlmopt.tracing import capture


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.function(*args)
        return result


def stage_of(function: Any, *args: torch.Tensor) -> Stage:
    return capture(Function(function), args)["model"]


def flops_of(function: Any, *args: torch.Tensor) -> int:
    return stage_cost(stage_of(function, *args)).flops


def test_decoder_agrees_with_the_flop_counter_of_torch() -> None:
    # the math kernel decomposes into products that the counter knows; the CPU kernel hides them
    model = Decoder(layers=2, width=16)
    counter = FlopCounterMode(display=False)
    math_only = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.no_grad(), math_only, counter:
        model(torch.randn(1, 6, 16))
    assert stage_cost(decoder(layers=2)["model"]).flops == counter.get_total_flops() > 0


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (torch.mm, [(3, 5), (5, 7)]),
        (torch.bmm, [(2, 3, 5), (2, 5, 7)]),
        (torch.matmul, [(4, 2, 3, 5), (5, 7)]),
        (torch.addmm, [(7,), (3, 5), (5, 7)]),
        (torch.baddbmm, [(2, 3, 7), (2, 3, 5), (2, 5, 7)]),
        (nn.functional.linear, [(2, 3, 5), (7, 5), (7,)]),
        (lambda x, w: nn.functional.conv1d(x, w, stride=2), [(2, 4, 9), (6, 4, 3)]),
        (lambda x, w: nn.functional.conv2d(x, w, groups=2), [(1, 4, 8, 8), (6, 2, 3, 3)]),
        (lambda x, w: nn.functional.conv_transpose2d(x, w, stride=2), [(1, 4, 5, 5), (4, 6, 3, 3)]),
    ],
)
def test_operator_agrees_with_the_flop_counter_of_torch(function: Any, shapes: Any) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    counter = FlopCounterMode(display=False)
    with counter:
        function(*tensors)
    assert flops_of(function, *tensors) == counter.get_total_flops() > 0


def test_attention_by_hand() -> None:
    query, key, value = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 6)
    scores = 2 * (2 * 4 * 3 * 5) * 8  # one FMA per score and channel
    mixture = 2 * (2 * 4 * 3 * 6) * 5  # one FMA per output and key
    attention = nn.functional.scaled_dot_product_attention
    assert flops_of(attention, query, key, value) == scores + mixture


def test_grouped_attention_counts_every_query_head() -> None:
    query, key = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8)

    def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, k, enable_gqa=True)

    assert flops_of(attention, query, key) == 2 * (4 * 3 * 3) * (8 + 8)


def test_einsum_by_hand() -> None:
    flops = flops_of(
        lambda a, b: torch.einsum("bik,bkj->bij", a, b), torch.randn(2, 3, 5), torch.randn(2, 5, 7)
    )
    assert flops == 2 * 2 * 3 * 5 * 7


def test_elementwise_operators_cost_bytes_but_no_flops() -> None:
    cost = stage_cost(stage_of(lambda x: x.relu() + x, torch.randn(4, 8)))
    assert cost.flops == 0
    assert cost.bytes_moved == 4 * (4 * 8) * (2 + 3)  # relu reads 1 and writes 1; add reads 2


def test_views_move_nothing() -> None:
    cost = stage_cost(stage_of(lambda x: x.view(8, 4).transpose(0, 1), torch.randn(4, 8)))
    assert cost.bytes_moved == 0


def test_lookup_reads_the_rows_that_it_returns() -> None:
    table, rows = torch.randn(1000, 8), torch.tensor([1, 2, 3])
    cost = stage_cost(stage_of(lambda t, r: t.index_select(0, r), table, rows))
    assert cost.bytes_moved == 2 * (3 * 8 * 4) + 3 * 8


def test_costs_of_layers_add_up() -> None:
    cost = stage_cost(decoder(layers=3)["model"])
    head = 2 * 6 * 16 * 4
    assert cost.container == "layers"
    assert [layer.flops for layer in cost.layers.values()] == [23808] * 3
    assert cost.flops == 3 * 23808 + head


def test_shared_weights_count_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4, bias=False)
            self.second = nn.Linear(4, 4, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.second(self.first(x))
            return result

    stage = capture(Tied(), (torch.randn(1, 4),))["model"]
    assert stage_cost(stage).parameter_bytes == 4 * 4 * 4


def test_cache_is_that_of_one_sequence() -> None:
    stage = stage_of(lambda k, v: (k * 2, v * 2), torch.randn(3, 2, 5, 8), torch.randn(3, 2, 5, 8))
    stage.outputs = (Port("k", Role.KEY, 0), Port("v", Role.VALUE, 0))
    assert stage_cost(stage).kv_cache_bytes == 2 * (2 * 5 * 8) * 4


def test_tokens_follow_the_cuts() -> None:
    stage = decoder(layers=2)["model"]
    assert tokens_per_layer(stage, range(4)) == {}
    stage.facts["tokens"] = 20
    stage.cuts = (
        Cut(1, (20, 12), ((10, 2),), "kept_1", "drop"),
        Cut(3, (12, 11), ((2, 1),), "kept_2", "drop"),
    )
    assert tokens_per_layer(stage, range(4)) == {0: 20, 1: 12, 2: 12, 3: 11}


def test_symbolic_sizes_count_as_seen_at_capture() -> None:
    exported = torch.export.export(
        nn.Linear(4, 2, bias=False),
        (torch.randn(6, 4),),
        dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},),
    ).run_decompositions({})
    linear = next(n for n in exported.graph.nodes if n.op == "call_function")
    assert not isinstance(linear.meta["val"].shape[0], int)
    assert node_flops(linear) == 2 * 6 * 4 * 2
