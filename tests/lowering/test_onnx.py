"""Export to ONNX: names, shapes, operators and values, against eager."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from tests import zoo
from vlmopt.errors import ArtifactError, LoweringError
from vlmopt.lowering.onnx import OnnxStage, export_program
from vlmopt.passes.tokens.v2drop import V2Drop
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Program
from vlmopt.tracing import capture

FAMILIES = ("llava", "gemma3", "qwen3_vl")


@cache
def captured(family: str) -> Program:
    return capture(zoo.build(family, layers=2), zoo.inputs(family))


@cache
def dropped(family: str) -> Program:
    program = captured(family).clone()
    v2drop = V2Drop(layers=(1,), keep=(0.5,))
    v2drop.requires(program)
    v2drop.run(program, PassContext(str(v2drop)))
    program.passes = (str(v2drop),)
    return program


def toy(forward: Callable[..., Any], *inputs: Tensor) -> Program:
    """A plain program that computes ``forward``, after one linear layer ``first``."""

    class Toy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(4, 4)

        def forward(self, x: Tensor, *rest: Tensor) -> Any:
            return forward(self.first(x), *rest)

    torch.manual_seed(0)
    return capture(Toy(), inputs or (torch.randn(2, 4),))


def dimensions(path: Path) -> list[Any]:
    graph = onnx.load(path).graph
    values = (*graph.input, *graph.output, *graph.value_info)
    return [dim for value in values for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("family", FAMILIES)
def test_language_model_and_decode_run_as_in_eager(family: str, tmp_path: Path) -> None:
    program = captured(family)
    report = export_program(program, tmp_path / "out", stages=["language_model", "decode"])
    assert [path.name for path in report.files] == ["language_model.onnx", "decode.onnx"]
    for stage, path in zip(report.stages, report.files, strict=True):
        assert set(stage.errors) == {port.name for port in program[stage.name].outputs}
        assert max(stage.errors.values()) < 1e-5
        assert all(dim.WhichOneof("value") == "dim_value" for dim in dimensions(path))
        runner = OnnxStage(path)
        assert runner.inputs == tuple(port.name for port in program[stage.name].inputs)
        assert runner.outputs == tuple(port.name for port in program[stage.name].outputs)
    assert report.stages[1].past == program["decode"].facts["tokens"]
    assert "NonZero" not in report.operators["language_model"]


@pytest.mark.parametrize("family", FAMILIES)
def test_selection_is_written_with_operators_that_npus_take(family: str, tmp_path: Path) -> None:
    program = dropped(family)
    report = export_program(program, tmp_path / "out", stages=["language_model", "decode"])
    assert {"TopK", "GatherElements"} <= set(report.operators["language_model"])
    for path in report.files:
        assert all(dim.WhichOneof("value") == "dim_value" for dim in dimensions(path))


def test_shortened_layers_take_fewer_keys_and_are_described(tmp_path: Path) -> None:
    program = dropped("llava")
    report = export_program(program, tmp_path / "out", stages=["decode"], past=30)
    decode = json.loads((tmp_path / "out" / "manifest.json").read_text())["stages"]["decode"]
    keys = [p["shape"][2] for p in decode["inputs"] if p["role"] == "key"]
    assert (keys, decode["past"]) == ([30, 30 - 8], 30)
    assert [p["shape"][1] for p in decode["inputs"] if p["role"] == "attention_mask"] == [31]
    (kept,) = [p for p in decode["inputs"] if p["role"] == "kept"]
    assert (kept["dtype"], kept["shape"]) == ("int64", [1, 19])
    assert [p.get("kept") for p in decode["outputs"] if p["role"] == "key"] == [None, kept["name"]]
    assert report.stages[0].past == 30

    with pytest.raises(LoweringError, match="cannot have 5 past tokens") as caught:
        export_program(program, tmp_path / "short", stages=["decode"], past=5)
    assert caught.value.hint is not None and "at least 27" in caught.value.hint
    assert not (tmp_path / "short").exists()


def test_all_other_stages_of_llava(tmp_path: Path) -> None:
    names = ["vision_encoder", "projector", "lm_head"]
    report = export_program(captured("llava"), tmp_path / "out", stages=names)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        [*(f"{name}.onnx" for name in names), "manifest.json"]
    )
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert list(manifest["stages"]) == names
    assert manifest["stages"]["vision_encoder"]["inputs"] == [
        {
            "name": "pixel_values",
            "role": "pixel_values",
            "dtype": "float32",
            "shape": [1, 3, 32, 32],
        }
    ]
    document = report.to_json()
    json.dumps(document)
    assert [stage["name"] for stage in document["stages"]] == names
    assert list(report.sizes.values()) == [path.stat().st_size for path in report.files]
    assert "projector.onnx" in report.text() and "largest error" in report.text()
    for path in report.files:  # stack traces would hold this folder
        assert str(Path(zoo.__file__).parent).encode() not in path.read_bytes()


@pytest.mark.parametrize("descending", [True, False])
def test_ties_go_to_the_lower_index(descending: bool, tmp_path: Path) -> None:
    def ranks(x: Tensor, scores: Tensor) -> Any:
        return x, torch.sort(scores, dim=1, descending=descending, stable=True).indices

    scores = torch.tensor([[1.0, 2, 1, 2, 1, 2, 1, 1]] * 2)
    program = toy(ranks, torch.randn(2, 4), scores)
    runner = OnnxStage(export_program(program, tmp_path / "out").files[0])
    x, name = torch.randn(2, 4), program["model"].inputs[1].name
    rows = [[1.0] * 8, [float("inf"), 0, float("inf"), 0, 0, 1, 1, 0]]
    for given in (scores, torch.tensor(rows), torch.tensor(rows).neg()):
        found = runner(**{program["model"].inputs[0].name: x, name: given})
        expected = given.sort(dim=1, descending=descending, stable=True).indices
        assert torch.equal(found[program["model"].outputs[1].name], expected)
    assert found[program["model"].outputs[1].name][0].tolist() == list(range(8))


def test_masked_scatter_needs_no_nonzero(tmp_path: Path) -> None:
    def scatter(x: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
        return x.masked_scatter(mask.unsqueeze(-1).expand(-1, -1, 4) > 0, rows)

    program = toy(scatter, torch.randn(2, 3, 4), torch.ones(2, 3), torch.randn(6, 4))
    report = export_program(program, tmp_path / "out")
    assert "NonZero" not in report.operators["model"]
    runner, stage = OnnxStage(report.files[0]), program["model"]
    for mask in (torch.tensor([[0.0, 1, 0], [1, 0, 1]]), torch.zeros(2, 3), torch.ones(2, 3)):
        inputs = (torch.randn(2, 3, 4), mask, torch.randn(6, 4))
        feed = {port.name: value for port, value in zip(stage.inputs, inputs, strict=True)}
        torch.testing.assert_close(runner(**feed)["output"], stage.graph_module(*inputs)[0])


def test_nothing_is_overwritten_unless_asked(tmp_path: Path) -> None:
    program = toy(torch.relu)
    out = tmp_path / "deep" / "out"
    export_program(program, out, check=False)
    before = (out / "model.onnx").read_bytes()
    with pytest.raises(LoweringError, match="exists"):
        export_program(program, out)
    assert (out / "model.onnx").read_bytes() == before

    (out / "stale.onnx").touch()
    export_program(program, out, overwrite=True, check=False)
    assert not (out / "stale.onnx").exists()

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("x")
    with pytest.raises(LoweringError, match=r"no folder with a manifest\.json in it"):
        export_program(program, precious, overwrite=True)
    assert [path.name for path in precious.iterdir()] == ["thesis.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["deep", "precious"]


@torch.library.custom_op("vlmopt_test::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    return x * 2


@twice.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


def test_operator_without_translation_is_named(tmp_path: Path) -> None:
    program = toy(lambda x: twice(x).relu())
    stage = program["model"]
    node = next(n for n in stage.graph.nodes if "twice" in str(n.target))
    PassContext("doubler{by=2}").stamp(node, 1)
    with pytest.raises(LoweringError) as caught:
        export_program(program, tmp_path / "out")
    message = str(caught.value)
    assert "stage model cannot be written as ONNX: vlmopt_test.twice.default has no" in message
    assert "made by pass doubler" in message
    assert f"at:  %{node.name} (" in message
    assert list(tmp_path.iterdir()) == []

    def doubled(x: Any) -> Any:
        from onnxscript import opset18

        return opset18.Add(x, x)

    table = {torch.ops.vlmopt_test.twice.default: doubled}
    report = export_program(program, tmp_path / "out", translations=table)
    assert report.operators["model"]["Add"] == 1


def test_wrong_translation_is_found_by_the_check(tmp_path: Path) -> None:
    def wrong(x: Any) -> Any:
        from onnxscript import opset18

        return opset18.Identity(x)

    table = {torch.ops.vlmopt_test.twice.default: wrong}
    with pytest.raises(LoweringError, match="output output of stage model differs by"):
        export_program(toy(lambda x: twice(x).relu()), tmp_path / "out", translations=table)
    assert list(tmp_path.iterdir()) == []


def test_size_that_depends_on_values_is_refused(tmp_path: Path) -> None:
    def translation(x: Any) -> Any:
        from onnxscript import opset18 as op

        places = op.NonZero(op.Greater(x, op.Constant(value_float=float("-inf"))))
        return op.Reshape(op.GatherND(x, op.Transpose(places, perm=[1, 0])), op.Shape(x))

    table = {torch.ops.vlmopt_test.twice.default: translation}
    with pytest.raises(LoweringError, match=r"uses NonZero .*depends on values"):
        export_program(toy(lambda x: twice(x).relu()), tmp_path / "out", translations=table)


def test_stage_without_weights_is_refused(tmp_path: Path) -> None:
    program = toy(torch.relu)
    program["model"].graph_module.to("meta")
    with pytest.raises(LoweringError, match="no weights") as caught:
        export_program(program, tmp_path / "out")
    assert "load weights first" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_cannot_be_checked(tmp_path: Path) -> None:
    model = nn.Linear(4, 4).bfloat16()
    program = capture(model, (torch.randn(2, 4, dtype=torch.bfloat16),))
    with pytest.raises(LoweringError, match=r"computes in bfloat16.*Could not find an impl"):
        export_program(program, tmp_path / "out")
    report = export_program(program, tmp_path / "out", check=False)
    assert "not checked" in report.text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"opset": 9}, "opset 9 cannot be exported\n.*from 18 to 25"),
        ({"stages": ["encoder"]}, "no stage encoder\n.*its stages are model"),
        ({"stages": []}, "no stage to export"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(LoweringError, match=message):
        export_program(toy(torch.relu), tmp_path / "out", **options)


def test_running_says_which_inputs_it_takes(tmp_path: Path) -> None:
    program = toy(torch.relu)
    path = export_program(program, tmp_path / "out", check=False).files[0]
    with pytest.raises(TypeError, match="takes x; not y"):
        OnnxStage(path)(y=torch.randn(2, 4))
    with pytest.raises(ArtifactError, match="no file"):
        OnnxStage(tmp_path / "other.onnx")


def test_outputs_that_share_a_value(tmp_path: Path) -> None:
    report = export_program(toy(lambda x: (x, x, torch.relu(x))), tmp_path / "out")
    assert len(report.stages[0].errors) == 3
