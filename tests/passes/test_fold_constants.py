"""fold-constants: what it removes, what it must leave, and that values stay bit-equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.toys import decoder
from vlmopt.graph.text import op_text
from vlmopt.passes.cleanup.fold_constants import FoldConstants
from vlmopt.pipeline.manager import PassRecord, run_pipeline
from vlmopt.program import Program
from vlmopt.tracing import capture


class Apply(nn.Module):
    """A function as a module, with one weight."""

    def __init__(self, function: Callable[..., Tensor | tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.arange(4.0))

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self.function(x, self.weight)


X = torch.linspace(-1, 1, 12).reshape(3, 4)


def captured(function: Callable[..., Tensor | tuple[Tensor, ...]]) -> Program:
    return capture(Apply(function), (X,))


def fold(program: Program, spec: str = "fold-constants") -> PassRecord:
    """Run the pass, twice: the second time there is nothing left to do."""
    (record,) = run_pipeline(program, spec, verify="full").records
    (again,) = run_pipeline(program, spec, verify="full").records
    assert (again.result.changed, again.result.matches) == (False, 0)
    return record


def operators(program: Program) -> list[str]:
    return [op_text(node) for node in program["model"].graph.nodes if node.op == "call_function"]


def outputs(program: Program) -> tuple[Tensor, ...]:
    values: tuple[Tensor, ...] = program["model"].graph_module(X)
    return values


def test_constants_become_one_buffer() -> None:
    program = captured(lambda x, w: x * w + (torch.arange(4) * 2).float().unsqueeze(0).sin())
    before = outputs(program)
    record = fold(program)
    assert operators(program) == ["mul", "add"]
    assert record.result.statistics == {
        "dead_nodes": 0,
        "repeated_nodes": 0,
        "constants": 1,
        "constant_bytes": 16,
    }
    (stored,) = (value for name, value in program["model"].graph_module.named_buffers())
    assert torch.equal(stored, (torch.arange(4) * 2).float().unsqueeze(0).sin())
    (constant,) = (n for n in program["model"].graph.nodes if n.name == "folded_constant_1")
    assert constant.meta["custom"]["vlmopt"] == {"pass": "fold-constants", "index": 0, "match": 1}
    assert torch.equal(outputs(program)[0], before[0])


def test_a_small_view_stores_no_large_tensor() -> None:
    program = captured(lambda x, w: x * w + torch.arange(1000.0).neg()[:4])
    fold(program)
    (stored,) = (value for _, value in program["model"].graph_module.named_buffers())
    assert stored.untyped_storage().nbytes() == 16


def test_the_size_limit_holds_on_the_way_too() -> None:
    def function(x: Tensor, w: Tensor) -> Tensor:
        return x * w + torch.arange(100).float().sum()

    kept = captured(function)
    assert fold(kept, "fold-constants{max_bytes=799}").result.matches == 0
    assert operators(kept) == ["mul", "arange", "_to_copy", "sum", "add"]
    folded = captured(function)
    assert fold(folded, "fold-constants{max_bytes=800}").result.matches == 1
    assert operators(folded) == ["mul", "add"]


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x, w: x * w + torch.rand(4).sin(), id="random"),
        pytest.param(lambda x, w: x * w + torch.zeros(4), id="bare factory"),
        pytest.param(lambda x, w: x * w + torch.ones(1).expand(3, 4), id="broadcast"),
        pytest.param(lambda x, w: x * w.sin(), id="weight"),
        pytest.param(lambda x, w: torch.rand(4) + torch.rand(4) + x * w, id="two draws"),
        pytest.param(lambda x, w: x * w + torch.zeros(4, dtype=torch.int64) + (x - 1), id="plain"),
    ],
)
def test_what_must_stay_stays(function: Callable[..., Tensor]) -> None:
    program = captured(function)
    before = operators(program)
    assert not fold(program).result.changed
    assert operators(program) == before


def test_a_broadcast_stays_but_what_it_spreads_is_folded() -> None:
    program = captured(lambda x, w: x * w + torch.ones(1).mul(3).expand(3, 4))
    before = outputs(program)
    assert fold(program).result.statistics["constants"] == 1
    assert operators(program) == ["mul", "expand", "add"]
    assert torch.equal(outputs(program)[0], before[0])


def test_symbolic_shapes_are_not_folded() -> None:
    class Positions(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + torch.arange(x.shape[0]).float().unsqueeze(1)

    size = torch.export.Dim("size", min=2, max=64)
    exported = torch.export.export(Positions(), (X,), dynamic_shapes={"x": {0: size}})
    program = captured(lambda x, w: x * w)
    stage = program["model"]
    graph_module = exported.run_decompositions({}).module(check_guards=False)
    assert isinstance(graph_module, torch.fx.GraphModule)
    stage.graph_module = graph_module
    before = [node.name for node in stage.graph.nodes]
    assert FoldConstants()._constants(stage) == []
    assert [node.name for node in stage.graph.nodes] == before


def test_repeated_nodes_are_merged() -> None:
    program = captured(lambda x, w: (x * w).relu() + (x * w).relu().neg())
    before = outputs(program)
    assert fold(program).result.statistics["repeated_nodes"] == 2
    assert operators(program) == ["mul", "relu", "neg", "add"]
    assert torch.equal(outputs(program)[0], before[0])


def test_equal_numbers_of_other_types_are_other_arguments() -> None:
    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        counts = (x * w).long()
        return (counts + 1).neg(), (counts + 1.0).neg()

    program = captured(function)
    fold(program)
    assert [value.dtype for value in outputs(program)] == [torch.int64, torch.float32]


def test_two_outputs_stay_two_tensors() -> None:
    program = captured(lambda x, w: ((x * w).clone(), (x * w).clone()))
    assert fold(program).result.statistics["repeated_nodes"] == 1
    first, second = outputs(program)
    assert operators(program) == ["mul", "clone", "clone"]
    assert first.data_ptr() != second.data_ptr()


def test_two_outputs_do_not_become_views_of_one_tensor() -> None:
    program = captured(lambda x, w: ((x * w).t(), (x * w).unsqueeze(0)))
    before = outputs(program)
    assert not fold(program).result.changed
    first, second = outputs(program)
    first.zero_()
    assert torch.equal(second, before[1])


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param(lambda value: value, id="itself"),
        pytest.param(lambda value: value.expand(3, 4), id="a view that stays"),
    ],
)
def test_a_caller_cannot_write_into_a_constant(shape: Callable[[Tensor], Tensor]) -> None:
    program = captured(lambda x, w: (x * w, shape(torch.arange(4.0) * 2)))
    before = outputs(program)[1].clone()
    assert fold(program).result.statistics["constants"] == 1
    outputs(program)[1][..., :1].select(0, 0).fill_(7)
    assert torch.equal(outputs(program)[1], before)


def test_dead_nodes_go_with_their_weights() -> None:
    program = captured(lambda x, w: x.relu())
    stage = program["model"]
    stage.graph_module.register_buffer("unused", torch.zeros(4))
    graph, first = stage.graph, next(iter(stage.graph.nodes))
    with graph.inserting_after(first):
        weight = graph.get_attr("unused")
    with graph.inserting_after(weight):
        dead = graph.call_function(torch.ops.aten.sin.default, (weight,))
    mode = stage.fake_mode()
    weight.meta["val"] = dead.meta["val"] = mode.from_tensor(torch.zeros(4), static_shapes=True)
    assert fold(program).result.statistics["dead_nodes"] == 2
    assert operators(program) == ["relu"]
    assert not hasattr(stage.graph_module, "unused")


def test_a_program_without_any_of_it_is_left_alone() -> None:
    program = decoder(layers=1)
    assert not fold(program).result.changed
    assert program.passes == ("fold-constants", "fold-constants")
