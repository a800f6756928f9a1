from typing import Any

import pytest
import torch

from tests.toys import decoder
from vlmopt.errors import ArtifactError
from vlmopt.graph.compare import compare_programs, random_inputs, weakest
from vlmopt.pipeline.passes import Semantics
from vlmopt.program import Modality, Port, Program, Role, Stage, attach_attr, fetch_attr
from vlmopt.tracing import capture

aten = torch.ops.aten


@pytest.fixture(scope="module")
def reference() -> Program:
    return decoder(layers=2)


def perturbed(program: Program, scale: float) -> Program:
    """The program with its output multiplied by ``1 + scale``."""
    twin = program.clone()
    stage = twin["model"]
    output = stage.graph.output_node()
    value: Any = output.args[0][0]  # type: ignore[index]
    with stage.graph.inserting_before(output):
        scaled = stage.graph.call_function(aten.mul.Tensor, (value, 1 + scale))
    scaled.meta["val"] = value.meta["val"]
    output.args = ((scaled,),)
    stage.graph_module.recompile()
    return twin


@pytest.mark.parametrize(
    ("scale", "semantics", "ok", "note"),
    [
        (0.0, Semantics.EXACT, True, ""),
        (1e-5, Semantics.EXACT, False, "is not bit-equal"),
        (1e-5, Semantics.NUMERIC, True, ""),
        (1e-3, Semantics.NUMERIC, False, "differs by more than 1e-04 of its largest value"),
        (1e-1, Semantics.LOSSY, True, ""),
        (float("nan"), Semantics.LOSSY, False, "holds values not finite"),
    ],
)
def test_difference_is_judged_by_the_promise(
    reference: Program, scale: float, semantics: Semantics, ok: bool, note: str
) -> None:
    (output,) = compare_programs(perturbed(reference, scale), reference, semantics).outputs
    assert (output.ok, output.note) == (ok, note)
    if output.difference is not None:
        assert output.difference == pytest.approx(scale, abs=2e-6)


def keep_last(program: Program, count: int, kept: list[int]) -> Program:
    """The program with the last ``count`` tokens of its output, said to be those of ``kept``."""
    twin = program.clone()
    stage = twin["model"]
    output = stage.graph.output_node()
    value: Any = output.args[0][0]  # type: ignore[index]
    with stage.graph.inserting_before(output), stage.fake_mode():
        last = stage.graph.call_function(aten.slice.Tensor, (value, 1, -count, 2**63 - 1))
        slots = stage.graph.call_function(aten.arange.start, (kept[0], kept[-1] + 1))
        rows = stage.graph.call_function(aten.unsqueeze.default, (slots, 0))
        for node, shape in ((last, (1, count, 4)), (slots, (count,)), (rows, (1, count))):
            node.meta["val"] = torch.empty(shape)
    output.args = ((last, rows),)
    stage.outputs = (Port("output", kept="kept_1"), Port("kept_1", Role.KEPT))
    stage.graph_module.recompile()
    return twin


def test_dropped_tokens_are_left_out_of_the_comparison(reference: Program) -> None:
    (right,) = compare_programs(keep_last(reference, 2, [4, 5]), reference, Semantics.LOSSY).outputs
    assert right.on_kept
    assert right.difference == 0.0
    (wrong,) = compare_programs(keep_last(reference, 2, [3, 4]), reference, Semantics.LOSSY).outputs
    assert wrong.difference is not None
    assert wrong.difference > 0.01


def test_shapes_that_differ_without_a_list_of_kept_tokens(reference: Program) -> None:
    program = keep_last(reference, 2, [4, 5])
    program["model"].outputs = (Port("output"), Port("kept_1", Role.KEPT))
    (output,) = compare_programs(program, reference, Semantics.LOSSY).outputs
    assert not output.ok
    assert output.note == "f32[1,2,4], but the reference gives f32[1,6,4]"


def test_stage_with_other_inputs_is_not_compared(reference: Program) -> None:
    comparison = compare_programs(decoder(layers=2, tokens=5), reference, Semantics.EXACT)
    assert [o.note for o in comparison.outputs] == [
        "not compared: its inputs differ from the reference's"
    ]


def test_program_without_weights_cannot_be_run(reference: Program) -> None:
    program = reference.clone()
    module = program["model"].graph_module.get_submodule("head")
    kept = module.weight
    module.weight = torch.nn.Parameter(torch.empty(4, 16, device="meta"))
    try:
        with pytest.raises(ArtifactError, match="was loaded without weights"):
            compare_programs(program, program, Semantics.EXACT)
    finally:
        module.weight = kept


def test_random_inputs_respect_roles() -> None:
    stage = decoder(layers=1)["model"]
    graph = stage.graph
    ports = [
        Port("modality", Role.MODALITY),
        Port("visual", Role.VISUAL_MASK),
        Port("position", Role.POSITION_IDS),
        Port("mask", Role.ATTENTION_MASK),
    ]
    first = stage.placeholder("x")
    with graph.inserting_after(first), stage.fake_mode():
        for port in reversed(ports):
            dtype = torch.bool if port.role is Role.VISUAL_MASK else torch.int64
            graph.placeholder(port.name).meta["val"] = torch.empty(2, 6, dtype=dtype)
    twin = Stage("model", stage.graph_module, (*stage.inputs, *ports), stage.outputs)
    twin.facts.update(padding_tokens=[0, 2], visual_tokens=[3, 2])
    x, modality, visual, position, mask = random_inputs(twin)
    pad, text, vision = Modality.PADDING, Modality.TEXT, Modality.VISION
    assert x.shape == (1, 6, 16)
    assert modality.tolist() == [
        [text, vision, vision, vision, text, text],
        [pad, pad, text, vision, vision, text],
    ]
    assert torch.equal(visual, modality == vision)
    assert position.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert mask.all()


def test_chain_promises_what_its_weakest_pass_does() -> None:
    assert weakest([]) is Semantics.EXACT
    assert weakest([Semantics.LOSSY, Semantics.EXACT, Semantics.NUMERIC]) is Semantics.LOSSY


def test_where_weights_stand_in_memory_makes_no_difference() -> None:
    """Those of a model read from a file stand anywhere, and matmul kernels are chosen by that."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(128, 32, bias=False)
    reference = capture(linear, (torch.ones(1, 1, 128),))
    memory = torch.empty(linear.weight.nbytes + 64, dtype=torch.uint8)
    start = -memory.data_ptr() % 64 + 8
    moved = memory[start : start + linear.weight.nbytes].view(torch.float32).view(32, 128)
    moved.copy_(linear.weight.detach())
    program = reference.clone()
    weight = torch.nn.Parameter(moved, requires_grad=False)
    attach_attr(program["model"].graph_module, "weight", weight)
    (output,) = compare_programs(program, reference, Semantics.EXACT).outputs
    assert output.difference == 0.0
    assert weight.data_ptr() == moved.data_ptr(), "the weights of the program stay where they are"
    assert fetch_attr(program["model"].graph_module, "weight") is weight
    moved[0, 0] += 1
    (output,) = compare_programs(program, reference, Semantics.EXACT).outputs
    assert output.note == "is not bit-equal"
