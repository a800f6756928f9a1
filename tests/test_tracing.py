"""Capture: stages, roles and facts of real architectures, with weights and without."""

from __future__ import annotations

import gc
import re
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from transformers.exporters.utils import precompute_export_inputs

import vlmopt
from tests.toys import Block
from vlmopt.encoding import Encoding, named_tensors
from vlmopt.errors import CaptureError
from vlmopt.graph.text import stage_text
from vlmopt.graph.verify import verify_program
from vlmopt.program import Modality, Program, Role
from vlmopt.tracing import _keep_read_outputs, modality_of

LAYERS = 4


@pytest.fixture(scope="module")
def captured() -> dict[str, Program]:
    return {}


def _capture(captured: dict[str, Program], family: str) -> Program:
    if family not in captured:
        captured[family] = vlmopt.capture(zoo.build(family), zoo.inputs(family, batch=2))
    return captured[family]


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_stages_roles_and_facts(captured: dict[str, Program], family: str) -> None:
    program = _capture(captured, family)
    verify_program(program, "full")
    assert next(iter(program.stages)) == "vision_encoder"
    assert list(program.stages)[-3:] == ["language_model", "lm_head", "decode"]
    prefill, decode = program["language_model"], program["decode"]
    assert [port.name for port in prefill.find_inputs(Role.INPUTS_EMBEDS)] == ["inputs_embeds"]
    assert len(prefill.find_inputs(Role.MODALITY)) == 1
    assert len(prefill.find_outputs(Role.HIDDEN_STATES)) == 1
    for stage in (prefill, decode):
        for role in (Role.KEY, Role.VALUE):
            assert [port.layer for port in stage.find_outputs(role)] == list(range(LAYERS))
    assert [port.layer for port in decode.find_inputs(Role.KEY)] == list(range(LAYERS))
    assert len(decode.find_outputs(Role.LOGITS)) == 1
    visual = zoo.FAMILIES[family].image_tokens
    assert prefill.facts["visual_tokens"] == [visual] * 2
    assert prefill.facts["padding_tokens"] == [2, 0]
    assert prefill.facts["tokens"] == prefill.facts["text_tokens"][1] + visual


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_stages_compute_what_the_model_computes(captured: dict[str, Program], family: str) -> None:
    """The prefill graph, fed as the model feeds its decoder, gives the decoder's hidden states."""
    model, inputs = zoo.build(family), zoo.inputs(family, batch=2)
    stage = _capture(captured, family)["language_model"]
    seen: dict[str, Any] = {}

    def record(_: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        seen.update(kwargs, output=output)

    handle = model.get_decoder().register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    values = {key: value for key, value in seen.items() if isinstance(value, torch.Tensor)}
    for index, features in enumerate(seen.get("deepstack_visual_embeds") or ()):
        values[f"deepstack_visual_embeds_{index}"] = features
    values["modality"] = modality_of(inputs["input_ids"], inputs["attention_mask"], [zoo.IMAGE])
    length = inputs["input_ids"].shape[1]
    given = []
    for port in stage.inputs:
        value = values.get(port.name)
        if port.role is Role.POSITION_IDS:
            value = _positions(stage.placeholder(port).meta["val"], value, values["modality"])
        if isinstance(seen.get("attention_mask"), dict) and value is None:  # one per kind of layer
            value = next(
                mask for kind, mask in seen["attention_mask"].items() if port.name.endswith(kind)
            )
        assert value is not None, port
        given.append(value)
    with torch.no_grad():
        results = dict(
            zip([port.role for port in stage.outputs], stage.graph_module(*given), strict=True)
        )
    hidden = results[Role.HIDDEN_STATES]
    assert hidden.shape[1] == length
    real = inputs["attention_mask"].bool()
    assert (hidden - seen["output"].last_hidden_state)[real].abs().max() <= 1e-6


def _positions(
    like: torch.Tensor, positions: torch.Tensor | None, modality: torch.Tensor
) -> torch.Tensor:
    text = ((modality != Modality.PADDING).long().cumsum(-1) - 1).clamp(min=0)
    if positions is None:
        return torch.arange(modality.shape[1]).expand(like.shape)
    if positions.ndim == 3 and like.shape[0] == positions.shape[0] + 1:
        return torch.cat([text[None], positions])
    return positions


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_graphs_without_weights_are_the_graphs_with_weights(
    captured: dict[str, Program], family: str
) -> None:
    with torch.device("meta"):
        model = zoo.build(family)
    weightless = vlmopt.capture(model, zoo.inputs(family, batch=2))
    assert all(parameter.is_meta for parameter in model.parameters())
    assert weightless.metadata["weights"] is False
    wanted = _capture(captured, family)
    assert list(weightless.stages) == list(wanted.stages)
    for one, two in zip(weightless, wanted, strict=True):
        if one.name == "vision_encoder":  # what is read of it takes weights to find out
            read = tuple(port.name for port in two.outputs)
            _keep_read_outputs(one, Encoding(read, {}, None))
        assert stage_text(one) == stage_text(two), one.name
    del weightless
    gc.collect()  # copies of fake modes once crashed the collector


def test_a_plain_module_is_one_stage_with_the_roles_that_are_given() -> None:
    program = vlmopt.capture(
        nn.Linear(4, 2), {"input": torch.ones(3, 4)}, roles={"input": Role.INPUTS_EMBEDS}
    )
    assert list(program.stages) == ["model"]
    assert [port.role for port in program["model"].inputs] == [Role.INPUTS_EMBEDS]
    value = torch.randn(3, 4)
    assert program["model"].graph_module(value)[0].shape == (3, 2)


def test_a_plain_module_that_is_told_its_modality() -> None:
    class Told(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(Block(16) for _ in range(3))

        def forward(self, x: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model, x = Told().eval(), torch.randn(2, 6, 16)
    modality = torch.tensor([[1, 2, 2, 2, 2, 1]] * 2)
    program = vlmopt.capture(model, (x, modality), roles={"modality": Role.MODALITY})
    assert program["model"].facts["visual_tokens"] == [4, 4]
    vlmopt.run_pipeline(program, "v2drop{layers=1 keep=0.5}")
    with torch.no_grad():
        out, kept = program["model"].graph_module(x, modality)
        before = model.layers[0](x)
        score = (before - x).norm(dim=-1)
        best = score[:, 1:5].topk(2).indices.sort().values + 1
        slots = torch.cat([torch.zeros(2, 1), best, torch.full((2, 1), 5)], 1).long()
        wanted = before.gather(1, slots[..., None].expand(-1, -1, 16))
        for layer in model.layers[1:]:
            wanted = layer(wanted)
    assert torch.equal(kept, slots)
    assert (out - wanted).abs().max() <= 1e-6


def test_a_plain_module_without_weights() -> None:
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8))
    program = vlmopt.capture(module, (torch.ones(3, 4),))
    assert program.metadata["weights"] is False
    assert module[0].weight.is_meta
    (output,) = program["model"].outputs
    assert program["model"].output_node(output).meta["val"].shape == (3, 8)


def test_training_mode_and_modules_are_left_as_they_were() -> None:
    model = zoo.build("llava").train()
    before = dict(model.named_modules())
    vlmopt.capture(model, zoo.inputs("llava"))
    assert model.training
    assert dict(model.named_modules()) == before


def test_what_cannot_be_traced_names_the_cause() -> None:
    class Looping(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            while x.sum() > 0:
                x = x - 1
            return x

    with pytest.raises(CaptureError, match=r"Looping cannot be traced by torch.export: \w+: "):
        vlmopt.capture(Looping(), (torch.ones(2),))
    with pytest.raises(CaptureError, match="no input is called y"):
        vlmopt.capture(nn.ReLU(), (torch.ones(2),), roles={"y": Role.OTHER})


def test_inputs_that_the_model_refuses_name_its_reason() -> None:
    inputs = zoo.inputs("llava")
    inputs["pixel_values"] = inputs["pixel_values"][:0]
    wanted = re.compile(r"LlavaForConditionalGeneration could not generate from these inputs: \w+")
    with pytest.raises(CaptureError, match=wanted):
        vlmopt.capture(zoo.build("llava"), inputs)


class Parts(torch.nn.Module):
    """Writes its result part by part, the second one in another type and spread over rows."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = x.new_empty(*x.shape[:-1], 7)
        out[..., 3:] = x[:1].double()
        out[..., :3] = x[..., :3] + 1
        return out


def test_parts_written_into_an_empty_tensor_are_joined() -> None:
    x = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    program = vlmopt.capture(Parts(), (x,))
    targets = {node.target for node in program["model"].graph.nodes}
    assert torch.ops.aten.cat.default in targets
    assert not targets & {torch.ops.aten.new_empty.default, torch.ops.aten.slice_scatter.default}
    assert torch.equal(program["model"].graph_module(x)[0], Parts()(x))


def test_a_model_that_encodes_its_prompt_apart_is_refused() -> None:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(d_model=16, encoder_layers=1, decoder_layers=1, vocab_size=16)
    model = BartForConditionalGeneration(config)
    with pytest.raises(CaptureError, match="its decoder holds no visual tokens"):
        vlmopt.capture(model, {"input_ids": torch.ones(1, 3, dtype=torch.int64)})


@pytest.mark.parametrize(
    ("family", "grids"),
    [
        ("qwen2_5_vl", [(6, 6)]),  # windows of 16, 8, 8 and 4 patches
        ("qwen2_5_vl", [(6, 8), (6, 8)]),
        ("qwen2_vl", [(8, 8), (4, 8)]),
        ("qwen3_vl", [(8, 8), (4, 8)]),
    ],
)
def test_parts_of_unequal_length_stay_apart(family: str, grids: list[tuple[int, int]]) -> None:
    """The exporter takes windows, and images of one row, to be equally long."""
    model = zoo.build(family, layers=1)
    for name, parameter in model.get_encoder("image").named_parameters():
        if "qkv" in name:  # attention that tells patches apart
            parameter.data *= 20
    inputs = zoo.of_grid(zoo.inputs(family, images=(len(grids),)), grids)
    stage = vlmopt.capture(model, inputs)["vision_encoder"]
    given = {"hidden_states": inputs["pixel_values"], "grid_thw": inputs["image_grid_thw"]}
    precompute_export_inputs(model.get_encoder("image"), given)
    values = dict(named_tensors(given))
    with torch.no_grad():
        found = stage.graph_module(*(values[port.name] for port in stage.inputs))[0]
        encoded = model.get_encoder("image")(inputs["pixel_values"], inputs["image_grid_thw"])
    torch.testing.assert_close(found, encoded.pooler_output, atol=1e-5, rtol=1e-5)
