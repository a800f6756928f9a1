"""Encoders that reuse rows of a reference frame, against the user's own blocks row by row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import encoders
import pytest
import torch
import zoo
from oracles.streams import StreamedEncoder
from oracles.vit import Parts
from torch import Tensor
from transformers.exporters.utils import precompute_export_inputs

import vlmopt
from vlmopt import tracing
from vlmopt.analysis.encoder import encoder_stage
from vlmopt.encoding import named_tensors
from vlmopt.errors import BlockMismatchError, PreconditionError
from vlmopt.passes.frames.reuse import rows_to_update
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program, Role, Stage

DINO = Parts(
    "encoder.layer",
    1,
    ("norm1", "norm2"),
    "attention",
    out="o_proj",
    scales=("layer_scale1", "layer_scale2"),
)
QWEN = Parts("blocks", 0, ("norm1", "norm2"), "attn", ("qkv",), "proj")
INTERN = Parts(
    "encoder.layer",
    1,
    ("layernorm_before", "layernorm_after"),
    "attention",
    out="projection_layer",
    scales=("lambda_1", "lambda_2"),
)


def dinov2() -> Any:
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    model = Dinov2Model(Dinov2Config(**encoders._CONFIG, mlp_ratio=2, layerscale_value=0.7))
    return model.eval()


def encoder(name: str) -> tuple[Any, Parts]:
    if name == "dinov2":
        return dinov2(), DINO
    return encoders.build(name), encoders.ENCODERS[name].parts


@functools.cache
def captured(name: str, frames: int) -> Program:
    return vlmopt.capture(encoder(name)[0], (encoders.images(frames),))


def stages(program: Program, text: str) -> tuple[Stage, Stage]:
    """The stage of reference frames and the other one."""
    program = program.clone()
    run_pipeline(program, text, verify="full")
    first = encoder_stage(program)
    return first, program[f"{first.name}_selective"]


State = dict[str, Tensor]


def reference(stage: Stage, given: Sequence[Tensor]) -> tuple[dict[str, Tensor], State]:
    """Outputs of the encoder, and what it remembers."""
    with torch.no_grad():
        values = stage.graph_module(*given)
    named = dict(zip((port.name for port in stage.outputs), values, strict=True))
    state = {name: value for name, value in named.items() if name.startswith("reference_")}
    return {name: value for name, value in named.items() if name not in state}, state


def selective(stage: Stage, given: Sequence[Tensor], state: State) -> dict[str, Tensor]:
    rest = [state[port.name] for port in stage.inputs[len(given) :]]
    with torch.no_grad():
        values = stage.graph_module(*given, *rest)
    return dict(zip((port.name for port in stage.outputs), values, strict=True))


def moving(first: Tensor, chunks: int, patches: int) -> list[Tensor]:
    """Frames in which every patch changes, some more than others, so that none are alike.

    Args:
        patches: by which the rows, or blocks of pixels, of the frames change.
    """
    generator = torch.Generator().manual_seed(7)
    found = [first]
    for _ in range(chunks - 1):
        amount = torch.rand(*first.shape[:-3], patches, generator=generator) ** 2
        noise = torch.randn(first.shape, generator=generator)
        if first.ndim == 2:  # patches as rows
            amount = torch.rand(len(first), 1, generator=generator) ** 2
        else:
            side = round(patches**0.5)
            amount = amount.reshape(len(first), 1, side, side)
            amount = amount.repeat_interleave(first.shape[-1] // side, -1)
            amount = amount.repeat_interleave(first.shape[-2] // side, -2)
        found.append(first + 2 * amount * noise)
    return found


def agree(found: Tensor, wanted: Tensor) -> None:
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= 1e-5 * max(1.0, float(wanted.abs().max()))


def tensors(result: Any) -> dict[str, Tensor]:
    """Tensors that a model returns, by name."""
    if isinstance(result, Tensor):
        return {"output": result}
    return dict(named_tensors(result))


def compare_with_oracle(
    both: tuple[Stage, Stage],
    oracle: StreamedEncoder,
    chunks: Sequence[Tensor],
    given: Callable[[Tensor], tuple[Mapping[str, Any], Sequence[Tensor]]],
    interval: int,
) -> None:
    """Run chunks through the stages and through the oracle.

    Args:
        given: inputs of the model, and of the stage, for a chunk.
    """
    state: State = {}
    for number, chunk in enumerate(chunks):
        inputs, placed = given(chunk)
        full = number % interval == 0
        wanted = tensors(oracle(full, **inputs))
        if full:
            found, state = reference(both[0], placed)
            kept = [layer.state for layer in oracle.layers]
            assert len(state) == 4 * len(kept)
            for index, tensor in enumerate(state.values()):
                agree(tensor, kept[index // 4][index % 4])
        else:
            found = selective(both[1], placed, state)
            likeness = [torch.tensor(layer.similarity) for layer in oracle.layers]
            agree(found.pop("frame_similarity"), torch.stack(likeness).mean(0))
        assert found.keys() <= wanted.keys()
        for name, value in found.items():
            agree(value, wanted[name])


@pytest.mark.parametrize("name", ["clip", "siglip", "dinov2", "timm", "timm-avg", "deit"])
def test_rows_are_reused_as_in_the_eager_reference(name: str) -> None:
    """Two frames at once; state of one chunk serves the next two."""
    model, parts = encoder(name)
    both = stages(captured(name, 2), "stc-cacher{interval=3 ratio=0.3}")
    oracle = StreamedEncoder(model, parts, rows_to_update(25 + parts.special, 0.3))
    chunks = moving(encoders.images(), 5, 25)
    compare_with_oracle(
        both, oracle, chunks, lambda chunk: ({"pixel_values": chunk}, [chunk]), interval=3
    )


@pytest.mark.parametrize(
    ("family", "frames"), [("internvl", 2), ("qwen2_vl", 1), ("qwen2_vl", 2), ("qwen3_vl", 2)]
)
def test_encoders_of_vision_language_models(family: str, frames: int) -> None:
    """Also rows of all frames behind each other, rotary positions, and a fused projection."""
    tower, parts = tower_of(family)
    inputs = zoo.inputs(family, batch=frames)
    program = captured_tower(tower, tower_inputs(inputs, inputs["pixel_values"]))
    both = stages(program, "stc-cacher")
    tokens = tokens_of(both[1])
    oracle = StreamedEncoder(tower, parts, rows_to_update(tokens, 0.25))

    def given(chunk: Tensor) -> tuple[Mapping[str, Any], Sequence[Tensor]]:
        whole = tower_inputs(inputs, chunk)
        placed = dict(whole)
        precompute_export_inputs(tower, placed)
        values = dict(named_tensors(placed))
        return whole, [values[port.name] for port in both[0].inputs]

    chunks = moving(inputs["pixel_values"], 3, tokens - parts.special)
    compare_with_oracle(both, oracle, chunks, given, interval=2)


def tower_of(family: str) -> tuple[Any, Parts]:
    """The vision encoder of a tiny model, weights so large that rows differ."""
    model = zoo.build(family, layers=1).model
    tower, parts = (model.visual, QWEN) if "qwen" in family else (model.vision_tower, INTERN)
    for weight in tower.get_submodule(parts.blocks).parameters():
        weight.data *= 10 if weight.ndim > 1 else 1
    return tower, parts


def tower_inputs(inputs: Mapping[str, Tensor], pixels: Tensor) -> dict[str, Tensor]:
    """Of the vision encoder of a model with these inputs."""
    grid = inputs.get("image_grid_thw")
    return {"pixel_values": pixels} if grid is None else {"hidden_states": pixels, "grid_thw": grid}


def captured_tower(tower: Any, inputs: dict[str, Tensor]) -> Program:
    """The vision encoder of a model alone, captured as within the model."""
    stage, _ = tracing._export_stage("vision_encoder", tower, inputs)
    return Program({"vision_encoder": stage}, model_type="tower")


def tokens_of(stage: Stage) -> int:
    return int(stage.placeholder("reference_key_0").meta["val"].shape[0])
