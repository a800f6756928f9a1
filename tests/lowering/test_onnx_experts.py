"""Mixtures of experts go out as standard ONNX operators with static shapes, skipped or not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import zoo
from torch import Tensor, nn

import vlmopt
from tests import mixtures
from vlmopt.lowering.onnx import OnnxStage, export_program
from vlmopt.ops.experts import best_tile
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Modality, Program, Role
from vlmopt.tracing import capture

LAYERS: tuple[dict[str, Any], ...] = (
    {},
    {"dispatch": "batched"},
    {"score": "sigmoid", "scale": 2.5, "bias": torch.arange(32.0).view(4, 8) / 10},
    {
        "score": "sigmoid",
        "correction": torch.tensor([0.5, -0.5, 0.2, 0.0]),
        "bias": torch.arange(32.0).view(4, 8) / 10,
        "dispatch": "batched",
    },
)


class Residual(mixtures.Mixtures):
    """Layers of a model: none sees large values."""

    def forward(self, x: Tensor, modality: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(nn.functional.layer_norm(x, (8,))) / 50
        return x


def given(seed: int = 1, tokens: int = 12) -> tuple[Tensor, Tensor]:
    x = torch.randn(2, tokens, 8, generator=torch.Generator().manual_seed(seed))
    modality = torch.full((2, tokens), Modality.TEXT)
    modality[:, 1:-2] = Modality.VISION
    modality[0, 0] = Modality.PADDING
    return x, modality


def all_forms() -> Program:
    """Softmax and sigmoid, rows sorted and weights copied, in four layers."""
    model = Residual(*(mixtures.mixture(**options) for options in LAYERS))
    return capture(model, given(), roles={"modality": Role.MODALITY})


def exported(program: Program, folder: Path, stages: list[str] | None = None) -> Any:
    """The report of an export that agrees with eager on random inputs, and is static."""
    report = export_program(program, folder, stages=stages)
    for stage, path in zip(report.stages, report.files, strict=True):
        assert max(stage.errors.values()) <= 1e-5
        graph = onnx.load(path).graph
        for value in (*graph.input, *graph.output, *graph.value_info):
            for dim in value.type.tensor_type.shape.dim:
                assert dim.WhichOneof("value") == "dim_value"
    return report


PIPELINES = (
    "",
    "modes{text=0.45 vision=0.55}",
    "modes{text=0.45 vision=0.2 capacity=0.3}",
    "expert-topk{k=1 static}",
)


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_form_in_onnx_runtime(pipeline: str, tmp_path: Path) -> None:
    program = all_forms()
    if pipeline:
        run_pipeline(program, pipeline)
    report = exported(program, tmp_path / "out")
    x, modality = given(2)
    (found,) = OnnxStage(report.files[0])(x=x, modality=modality).values()
    (wanted,) = program["model"].graph_module(x, modality)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


class Grouped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 16, 8).bfloat16())

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        product: Tensor = torch._grouped_mm(rows, self.weight, offs=ends)
        return product


def test_the_kernel_of_torch_for_grouped_products(tmp_path: Path) -> None:
    """Models in bfloat16 are captured with it; ONNX Runtime's CPU runs no such file."""
    inputs = torch.randn(24, 16).bfloat16(), torch.tensor([6, 6, 20, 24], dtype=torch.int32)
    report = export_program(capture(Grouped(), inputs), tmp_path / "out", check=False)
    assert report.operators["model"]["MatMul"] == 1
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    (product,) = manifest["stages"]["model"]["grouped_products"]
    size, tiles = product["tile"], product["tiles"]
    assert (product["rows"], product["experts"], size) == (24, 4, best_tile(24, 4))
    assert report.stages[0].copies == product["copies"] == tiles * 16 * 8 * 2
    graph = onnx.load(report.files[0]).graph
    assert [tiles, size, 8] in [
        [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in graph.value_info
    ]
    assert "MB of experts copied" in report.text()


def test_no_number_of_an_expert_left_out_spreads(tmp_path: Path) -> None:
    """Rows that fill up tiles, and tiles that no expert needs, are computed and never read."""
    never = torch.tensor([0.0] * 5 + [-9.0] * 3)  # the last stands in where there is none
    layer = mixtures.mixture(experts=8, score="sigmoid", correction=never)
    x, modality = given()
    weights, ids = layer.route(x.reshape(-1, 8))
    best = weights[1:].flatten().topk(24).indices + 2  # not of padding
    stays = torch.zeros(48, dtype=torch.bool)
    stays[best] = True
    wanted = layer.reference(x, stays.view(24, 2))
    others = sorted(set(range(8)) - set(ids.flatten()[best].tolist()))
    assert {5, 6, 7} <= set(others)
    assert best_tile(24, 8) > 1
    layer.gate_up[others] = layer.down[others] = float("nan")
    program = mixtures.mixtures(layer, x, modality)
    run_pipeline(program, "modes{capacity=0.5}")
    report = export_program(program, tmp_path / "out", check=False)
    (found,) = OnnxStage(report.files[0])(x=x, modality=modality).values()
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_the_same_pairs_of_equal_score(tmp_path: Path) -> None:
    """Tokens that are all alike: the first of them are computed, in eager, Inductor and ONNX."""
    x = given()[0][:, :1].repeat(1, 12, 1)
    modality = torch.full((2, 12), Modality.VISION)
    layer = mixtures.mixture(experts=8, k=2)
    program = mixtures.mixtures(layer, x, modality)
    run_pipeline(program, "modes{capacity=0.2}")
    stage = program["model"]
    (eager,) = stage.graph_module(x, modality)
    (compiled,) = torch.compile(stage.graph_module, dynamic=False)(x, modality)
    report = export_program(program, tmp_path / "out", check=False)
    (found,) = OnnxStage(report.files[0])(x=x, modality=modality).values()
    weights = layer.route(x.reshape(-1, 8))[0].flatten().tolist()
    stays = torch.zeros(48, dtype=torch.bool)
    stays[sorted(range(48), key=lambda pair: (-weights[pair], pair))[:10]] = True
    wanted = layer.reference(x, stays.view(24, 2))
    for out in (eager, compiled, found):
        torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert [bool(row.any()) for row in wanted.view(24, 8)].count(True) == 10


@pytest.mark.parametrize(
    ("family", "pipeline"),
    [
        ("qwen3_vl_moe", ""),
        ("qwen3_vl_moe", "modes{text=0.3 vision=0.3 capacity=0.4 count}"),
        ("kimi_k25", ""),
    ],
)
def test_prefill_and_decoding_in_onnx_runtime(family: str, pipeline: str, tmp_path: Path) -> None:
    program = vlmopt.capture(zoo.build(family, layers=2), zoo.inputs(family))
    if pipeline:
        run_pipeline(program, pipeline)
    report = exported(program, tmp_path / "out", ["language_model", "decode"])
    if pipeline:
        assert report.errors["language_model"]["expert_pairs"] == 0  # as many of every class
