import operator
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import fx

from tests.toys import decoder
from vlmopt.graph.text import (
    align,
    dtype_text,
    graph_text,
    module_path,
    node_text,
    source_location,
    stage_text,
    value_text,
)
from vlmopt.program import Program

aten = torch.ops.aten


@pytest.fixture(scope="module")
def program() -> Program:
    return decoder(layers=1)


def node(program: Program, name: str) -> fx.Node:
    found: fx.Node = next(n for n in program["model"].graph.nodes if n.name == name)
    return found


def test_node_is_one_line(program: Program) -> None:
    assert_expected_inline(
        node_text(node(program, "add_1")), """%add_1 = add(%add, %linear_2)  f32[1,6,16]"""
    )


def test_node_with_several_results_shows_all_types(program: Program) -> None:
    assert_expected_inline(
        node_text(node(program, "unbind")),
        """%unbind = unbind(%permute)  (f32[1,2,6,8], f32[1,2,6,8], f32[1,2,6,8])""",
    )


def test_weight_shows_its_path(program: Program) -> None:
    assert_expected_inline(
        node_text(node(program, "p_head_weight")),
        """%p_head_weight = weight(head.weight)  f32[4,16]""",
    )


def test_keyword_arguments_and_special_values() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = graph.call_function(
        aten.full_like.default, (x, float("-inf")), {"dtype": torch.bfloat16, "device": "cpu"}
    )
    item = graph.call_function(operator.getitem, (made, slice(None, 3)))
    assert_expected_inline(
        "\n".join(map(node_text, graph.nodes)),
        """\
%x = input()  -
%full_like_default = full_like(%x, -inf, dtype=bf16, device='cpu')  -
%getitem = getitem(%full_like_default, :3:)  -""",
    )
    assert item.args[0] is made


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (torch.zeros(2, 3, dtype=torch.bool), "b8[2,3]"),
        (torch.zeros((), dtype=torch.bfloat16), "bf16[]"),
        ([torch.zeros(1), torch.zeros(2, dtype=torch.int64)], "(f32[1], i64[2])"),
        (None, "-"),
        (3, "int 3"),
    ],
)
def test_type_of_a_value(value: Any, text: str) -> None:
    assert value_text(value) == text


def test_rare_dtype_keeps_the_name_of_torch() -> None:
    assert dtype_text(torch.float8_e4m3fn) == "float8_e4m3fn"


def test_module_path_and_source_line_of_a_node(program: Program) -> None:
    assert module_path(node(program, "linear_1")) == "layers.0.up"
    location = source_location(node(program, "linear_1"))
    # the line of the user's module, not the one inside torch.nn.Linear
    assert location is not None
    assert location.startswith("toys.py:")


def test_node_without_provenance_has_no_place() -> None:
    bare = fx.Graph().placeholder("x")
    assert module_path(bare) == ""
    assert source_location(bare) is None


def test_windows_path_is_shortened_too() -> None:
    bare = fx.Graph().placeholder("x")
    bare.meta["stack_trace"] = 'File "C:\\src\\model.py", line 7, in forward'
    assert source_location(bare) == "model.py:7"


def test_long_call_does_not_widen_the_column() -> None:
    rows = [("a", "f32[1]"), ("bb", "f32[2]"), ("c" * 100, "f32[3]")]
    assert align(rows) == ["a   f32[1]", "bb  f32[2]", f"{'c' * 100}  f32[3]"]


def test_graph_grouped_by_module(program: Program) -> None:
    text = graph_text(program["model"].graph, depth=1)
    assert [line.split("  ")[0] for line in text.splitlines() if line.startswith("@@")] == [
        "@@ layers",
        "@@ head",
        "@@ (top)",
    ]


def test_stage_starts_with_its_ports(program: Program) -> None:
    assert_expected_inline(
        "\n".join(stage_text(program["model"]).splitlines()[:3]),
        """\
stage model: 17 nodes, 9 weights
  in   %x                  f32[1,6,16]  other
  out  output = %linear_3  f32[1,6,4]  other""",
    )
