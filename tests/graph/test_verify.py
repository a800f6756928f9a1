import operator
import re
import time
from collections.abc import Callable

import pytest
import torch
from torch import fx

from tests.toys import decoder
from vlmopt.errors import VerifyError
from vlmopt.graph.verify import Level, verify_program
from vlmopt.program import Cut, Port, Program, Role, Stage

aten = torch.ops.aten


@pytest.fixture(scope="module")
def captured() -> Program:
    return decoder(layers=2)


@pytest.fixture
def stage(captured: Program) -> Stage:
    return captured.clone()["model"]


def node(stage: Stage, name: str) -> fx.Node:
    found: fx.Node = next(n for n in stage.graph.nodes if n.name == name)
    return found


def violation(stage: Stage, level: Level = "lint") -> str:
    """The message without the line on where it is, which holds line numbers of the toy."""
    with pytest.raises(VerifyError) as caught:
        verify_program(Program({stage.name: stage}, "toy"), level)
    assert str(caught.value).startswith(f"{caught.value.invariant}: ")
    return re.sub(r"\n  at: .*", "", str(caught.value))


@pytest.mark.parametrize("level", ["off", "lint", "full"])
def test_captured_program_is_sound(captured: Program, level: Level) -> None:
    verify_program(captured, level)


def test_unknown_level(captured: Program) -> None:
    with pytest.raises(ValueError, match="level is 'all', not one of off, lint, full"):
        verify_program(captured, "all")  # type: ignore[arg-type]


def test_level_off_checks_nothing(stage: Stage) -> None:
    stage.inputs = ()
    verify_program(Program({"model": stage}, "toy"), "off")


def test_stage_under_another_name(stage: Stage) -> None:
    with pytest.raises(VerifyError, match=r"^stages: stage model is filed under decoder$"):
        verify_program(Program({"decoder": stage}, "toy"))


def test_value_read_before_it_is_computed(stage: Stage) -> None:
    node(stage, "gelu").append(node(stage, "linear_1"))
    assert violation(stage) == "order: %gelu reads %linear_1 before it is computed"


def test_missing_weight(stage: Stage) -> None:
    del stage.graph_module.get_submodule("head").weight
    assert violation(stage) == "attributes: no tensor is called head.weight"


def test_orphaned_weights(stage: Stage) -> None:
    for name in "abcd":
        stage.graph_module.register_buffer(name, torch.zeros(1))
    assert violation(stage) == (
        "attributes: stage model holds weights that no node reads: a, b, c and 1 more\n"
        "  try: delete them with the nodes that read them"
    )


def test_lint_of_fx(stage: Stage) -> None:
    node(stage, "gelu_1").name = "gelu"
    assert violation(stage) == "lint: Node redefined name gelu!"


def test_mutating_operator(stage: Stage) -> None:
    node(stage, "add").target = aten.add_.Tensor
    assert violation(stage) == "mutation: aten.add_.Tensor writes into its input"


def test_operator_of_another_library(stage: Stage) -> None:
    node(stage, "gelu").target = torch.ops.prims.sin.default
    assert violation(stage) == (
        "operators: prims.sin.default is neither an ATen nor a vlmopt operator\n"
        "  try: choose another implementation before capturing; for the experts of a mixture: "
        "model.set_experts_implementation('batched_mm')"
    )


def test_python_function(stage: Stage) -> None:
    node(stage, "gelu").target = torch.nn.functional.gelu
    assert violation(stage) == "operators: gelu is a Python function, no operator"


def test_arithmetic_on_sizes_is_allowed(stage: Stage) -> None:
    graph = stage.graph
    with graph.inserting_before(node(stage, "layer_norm")):
        size = graph.call_function(aten.sym_size.int, (node(stage, "x"), 1))
        double = graph.call_function(operator.mul, (size, 2))
    size.meta["val"], double.meta["val"] = 6, 12
    verify_program(Program({"model": stage}, "toy"), "full")


def test_call_of_a_module(stage: Stage) -> None:
    stage.graph_module.add_module("extra", torch.nn.ReLU())
    with stage.graph.inserting_after(node(stage, "gelu")):
        made = stage.graph.call_module("extra", (node(stage, "gelu"),))
    made.meta["val"] = node(stage, "gelu").meta["val"]
    assert violation(stage) == "operators: call_module does not belong in a flat graph"


def test_missing_metadata(stage: Stage) -> None:
    del node(stage, "gelu").meta["val"]
    assert violation(stage) == 'metadata: %gelu has no meta["val"]'


def test_port_without_placeholder(stage: Stage) -> None:
    stage.inputs = (*stage.inputs, Port("mask", Role.ATTENTION_MASK))
    assert violation(stage) == (
        "signature: stage model has placeholders nothing (from position 1) but input ports mask "
        "(from position 1)"
    )


def test_value_without_port(stage: Stage) -> None:
    output = stage.graph.output_node()
    output.args = ((*output.args[0], node(stage, "add_3")),)  # type: ignore[misc]
    assert violation(stage) == "signature: stage model returns 2 values through 1 ports"


def test_output_that_is_no_tuple(stage: Stage) -> None:
    output = stage.graph.output_node()
    output.args = (output.args[0][0],)  # type: ignore[index]
    assert violation(stage) == "signature: stage model does not return one tuple of values"


def test_two_outputs_of_one_name(stage: Stage) -> None:
    output = stage.graph.output_node()
    output.args = (output.args[0] * 2,)  # type: ignore[operator]
    stage.outputs = stage.outputs * 2
    assert violation(stage) == "signature: stage model has more than one output called output"


def test_port_that_refers_to_no_list_of_kept_tokens(stage: Stage) -> None:
    stage.outputs = (Port("output", kept="kept_1"),)
    assert violation(stage) == (
        "kept: port output of stage model refers to kept_1, which is no kept port"
    )


def test_cut_that_refers_to_no_port(stage: Stage) -> None:
    stage.outputs = (Port("output", Role.KEPT),)
    stage.cuts = (Cut(1, (6, 4), ((4, 2),), "gone", "drop"),)
    assert violation(stage) == (
        "kept: the cut at layer 1 of stage model refers to gone, which is no kept port"
    )


def stale_shape(stage: Stage) -> None:
    """What a token slice leaves behind when its author trusts ``graph.lint``."""
    graph, add = stage.graph, node(stage, "add_1")
    with graph.inserting_after(add), stage.fake_mode():
        short = graph.call_function(aten.slice.Tensor, (add, 1, 0, 4))
        short.meta["val"] = torch.empty(1, 4, 16)
    node(stage, "layer_norm_1").replace_input_with(add, short)


def stale_dtype(stage: Stage) -> None:
    with stage.fake_mode():
        node(stage, "gelu").meta["val"] = torch.empty(1, 6, 32, dtype=torch.bfloat16)


def wrong_weight(stage: Stage) -> None:
    stage.graph_module.get_submodule("head").weight = torch.nn.Parameter(torch.zeros(5, 16))


def wrong_arguments(stage: Stage) -> None:
    node(stage, "view").update_arg(1, [1, 5, 3, 2, 8])


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (stale_shape, "%layer_norm_1 is recorded as f32[1,6,16] but is f32[1,4,16]"),
        (stale_dtype, "%gelu is recorded as bf16[1,6,32] but is f32[1,6,32]"),
        (wrong_weight, "%p_head_weight is recorded as f32[4,16] but is f32[5,16]"),
        (
            wrong_arguments,
            "%view cannot be computed from the recorded types of its arguments (shape '[1, 5, 3, "
            "2, 8]' is invalid for input of size 288)",
        ),
    ],
)
def test_only_propagation_finds_stale_types(
    stage: Stage, break_it: Callable[[Stage], None], message: str
) -> None:
    break_it(stage)
    verify_program(Program({"model": stage}, "toy"), "lint")
    assert violation(stage, "full") == f"propagation: {message}"


def test_error_names_node_module_and_line(stage: Stage) -> None:
    stale_dtype(stage)
    with pytest.raises(VerifyError, match=r"at:  %gelu \(layers\.0, toys\.py:\d+\)$"):
        verify_program(Program({"model": stage}, "toy"))


def test_equal_layers_are_propagated_once() -> None:
    program = decoder(layers=24)
    start = time.perf_counter()
    verify_program(program, "full")
    assert time.perf_counter() - start < 1.5  # 440 nodes; a shared runner is slow
