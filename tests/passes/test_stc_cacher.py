"""Encoders that reuse rows of a reference frame, against the user's own blocks row by row."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import encoders
import onnxruntime
import pytest
import torch
import zoo
from oracles.streams import Layer, StreamedEncoder, StreamedLayer
from oracles.vit import Parts
from torch import Tensor, nn
from torch.nn import functional
from transformers.exporters.utils import precompute_export_inputs

import vlmopt
from vlmopt import tracing
from vlmopt.analysis.encoder import encoder_stage
from vlmopt.analysis.layers import find_layers
from vlmopt.encoding import named_tensors
from vlmopt.errors import BlockMismatchError, PreconditionError
from vlmopt.graph.text import stage_text
from vlmopt.lowering.onnx import export_program
from vlmopt.passes.frames.reuse import rows_to_update
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program, Stage
from vlmopt.rewrite.reuse import STATE

aten = torch.ops.aten

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
    ("family", "frames"),
    [
        ("internvl", 2),
        ("qwen2_vl", 1),
        ("qwen2_vl", 2),
        ("qwen2_5_vl", 1),
        ("qwen2_5_vl", 2),
        ("qwen3_vl", 2),
    ],
)
def test_encoders_of_vision_language_models(family: str, frames: int) -> None:
    """Also rows of all frames behind each other, rotary positions, a fused projection, windows."""
    tower, parts = tower_of(family)
    inputs = zoo.inputs(family, batch=frames)
    program = captured_tower(tower, tower_inputs(inputs, inputs["pixel_values"]))
    both = stages(program, "stc-cacher")
    tokens = tokens_of(both[1])
    oracle = StreamedEncoder(tower, parts, rows_to_update(tokens, 0.25), frames)

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
    stage, _ = tracing.export_stage("vision_encoder", tower, inputs)
    return Program({"vision_encoder": stage}, model_type="tower")


def tokens_of(stage: Stage) -> int:
    return int(stage.placeholder("reference_key_0").meta["val"].shape[0])


# -- what must be exact ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["clip", "dinov2", "timm"])
def test_all_rows_are_the_full_pass(name: str) -> None:
    """With a ratio of 1, whatever the state holds."""
    both = stages(captured(name, 2), "stc-cacher{ratio=1}")
    chunk = encoders.images(seed=3)
    wanted, state = reference(both[0], [chunk])
    noise = {key: torch.randn_like(value) for key, value in state.items()}
    found = selective(both[1], [chunk], noise)
    for key, value in wanted.items():
        if name == "timm":  # three projections in one product there
            torch.testing.assert_close(found[key], value, atol=1e-6, rtol=1e-6)
        else:
            assert found[key].equal(value)


@pytest.mark.parametrize("metric", ["cosine", "l1", "l2", "dot"])
def test_the_same_frame_again_is_the_full_pass(metric: str) -> None:
    both = stages(captured("clip", 1), f"stc-cacher{{ratio=0.1 metric={metric}}}")
    chunk = encoders.images(1)
    wanted, state = reference(both[0], [chunk])
    found = selective(both[1], [chunk], state)
    for key, value in wanted.items():
        agree(found[key], value)


def test_bfloat16() -> None:
    """The state has the type of the model; scores are float32."""
    model = encoders.build("clip").bfloat16()
    first, later = (chunk.bfloat16() for chunk in moving(encoders.images(1), 2, 25))
    both = stages(vlmopt.capture(model, (first,)), "stc-cacher")
    wanted, state = reference(both[0], [first])
    assert {value.dtype for value in state.values()} == {torch.bfloat16}
    found = selective(both[1], [first], state)
    assert found["frame_similarity"].dtype == torch.float32
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, atol=0.1, rtol=0.05)
    # which rows are computed is another matter: states of others are far from right
    rows = selective(both[1], [later], state)["last_hidden_state"]
    full = reference(both[0], [later])[0]["last_hidden_state"]
    assert (rows - full).abs().max() > 0.5


def test_a_small_ratio_computes_one_row() -> None:
    both = stages(captured("siglip", 1), "stc-cacher{ratio=0.01}")
    assert row_counts(both[1], "q_proj") == {1}


def test_tensors_are_smaller() -> None:
    """Keys of all rows, once; all else of 6 of 26 rows of each of two frames."""
    first, second = stages(captured("clip", 2), "stc-cacher")
    for name in ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"):
        assert row_counts(first, name) == {26}
        assert row_counts(second, name) == ({26} if name == "k_proj" else {6})
        assert linears(second, name) == linears(first, name) == 3
    fused = stages(captured("timm", 2), "stc-cacher")[1]
    assert [row_counts(fused, name) for name in ("proj", "mlp_0", "mlp_2")] == [{6}] * 3
    assert linears(fused, "qkv") == 0  # no product with the whole of that weight
    assert sorted(row_counts(fused, None)) == [6, 26]


def products(stage: Stage, name: str | None) -> list[torch.fx.Node]:
    """Linear operators inside the blocks whose weight has this name."""
    layers = find_layers(stage).of
    return [
        node
        for node in stage.graph.find_nodes(op="call_function", target=aten.linear.default)
        if node in layers and (name is None or str(node.args[1]).endswith(f"{name}_weight"))
    ]


def linears(stage: Stage, name: str) -> int:
    return len(products(stage, name))


def row_counts(stage: Stage, name: str | None) -> set[int]:
    return {int(node.meta["val"].shape[-2]) for node in products(stage, name)}


def test_both_stages_share_their_weights(tmp_path: Path) -> None:
    program = captured("timm", 1).clone()
    before = program.named_weights()
    run_pipeline(program, "stc-cacher | fold-constants", verify="full")
    after = program.named_weights()
    assert {id(weight) for weight in after.values()} == {id(weight) for weight in before.values()}
    program.save(tmp_path / "program")
    loaded = vlmopt.load(tmp_path / "program")
    assert list(loaded.stages) == ["model", "model_selective"]
    chunks = moving(encoders.images(1), 2, 25)
    found = []
    for one in (program, loaded):
        _, state = reference(one["model"], chunks[:1])
        found.append(selective(one["model_selective"], chunks[1:], state))
    assert all(found[0][name].equal(found[1][name]) for name in found[0])
    roles = [(port.role, port.layer) for port in loaded["model_selective"].inputs]
    assert roles[1:] == [(role, layer) for layer in range(3) for role in STATE]


# -- what is refused ---------------------------------------------------------------------------


def test_windows_of_another_order_are_refused() -> None:
    model = Grid().eval()
    program = vlmopt.capture(model, (torch.randn(16, 16),))
    with pytest.raises(BlockMismatchError, match="not runs of consecutive patches"):
        run_pipeline(program, "stc-cacher")


class Columns(encoders.Attention):  # type: ignore[misc]
    """Of 16 rows, a grid of so many columns, each attends within its column."""

    columns = 4

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(x).view(-1, self.columns, 3, 2, 8).permute(2, 1, 3, 0, 4)
        mixed = functional.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2])
        out: Tensor = self.proj(mixed.permute(2, 0, 1, 3).reshape(16, 16))
        return out


class Whole(Columns):
    columns = 1


class Grid(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(encoders.Block(16, 2), encoders.Block(16, 2))
        self.blocks[0].attn, self.blocks[1].attn = Columns(16, 2), Whole(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


class Odd(nn.Module):
    """A block that is built in some unusual way."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.norm1, self.norm2 = nn.LayerNorm(16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out, self.fc1, self.fc2, self.other = (
            nn.Linear(16, 16) for _ in range(7)
        )

    def forward(self, x: Tensor) -> Tensor:
        kind = self.kind
        u = x if kind == "post-norm" else self.norm1(x)
        source = self.other(u) if kind == "keys of other rows" else u
        query, key, value = (
            one.unflatten(-1, (2, 8)).transpose(1, 2)
            for one in (self.q(u), self.k(source), self.v(u))
        )
        if kind == "no operator":
            mixed = (query @ key.transpose(-1, -2) / 8**0.5).softmax(-1) @ value
        else:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        added = self.out(mixed.transpose(1, 2).flatten(2))
        if kind == "pooled attention":
            added = added + added.mean(1, keepdim=True)
        if kind == "parallel":
            return x + added + self.fc2(functional.gelu(self.fc1(u)))
        if kind == "post-norm":
            y = self.norm1(x + added)
            return self.norm2(y + self.fc2(functional.gelu(self.fc1(y))))
        if kind == "norm of what is added":
            y = x + self.norm1(added)
            return y + self.norm2(self.fc2(functional.gelu(self.fc1(y))))
        y = x + added
        hidden = functional.gelu(self.fc1(self.norm2(y)))
        if kind == "pooled network":
            hidden = hidden * hidden.mean(1, keepdim=True).sigmoid()
        return y + self.fc2(hidden)


class Blocks(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.Sequential(Odd(kind), Odd(kind))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.blocks(x)
        return out


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("parallel", "read the same rows"),
        ("no operator", "no attention operator"),
        ("keys of other rows", "not projections of the same rows"),
        ("pooled attention", "combines rows of an image outside of attention"),
        ("pooled network", "combines rows with each other"),
    ],
)
def test_blocks_that_are_built_otherwise(kind: str, why: str) -> None:
    program = vlmopt.capture(Blocks(kind).eval(), (torch.randn(2, 9, 16),))
    before = stage_text(program["model"])
    with pytest.raises(BlockMismatchError, match=why) as caught:
        run_pipeline(program, "stc-cacher")
    assert caught.value.node is not None
    assert list(program.stages) == ["model"] and stage_text(program["model"]) == before


@pytest.mark.parametrize("kind", ["post-norm", "norm of what is added", "pre-norm"])
def test_norms_elsewhere(kind: str) -> None:
    """Behind each half, or as a part of it."""
    model, frames = Blocks(kind).eval(), torch.randn(2, 9, 16)
    both = stages(vlmopt.capture(model, (frames,)), "stc-cacher{ratio=0.35}")
    layers = [StreamedLayer(odd_layer(block)) for block in model.blocks]
    later = frames + torch.rand(2, 9, 1) * torch.randn(2, 9, 16)
    with torch.no_grad():
        x, y = frames, later
        for layer in layers:
            x = layer.reference(x)
        for layer in layers:
            y = layer.selective(y, 3)
        agree(x, model(frames))
    _, state = reference(both[0], [frames])
    found = selective(both[1], [later], state)
    agree(next(iter(found.values())), y)


def odd_layer(block: Any) -> Layer:
    def fed(rows: Tensor) -> Tensor:
        given = block.norm2(rows) if block.kind == "pre-norm" else rows
        out = block.fc2(functional.gelu(block.fc1(given)))
        return block.norm2(out) if block.kind == "norm of what is added" else out

    def attended(rows: Tensor) -> Tensor:
        out = block.out(rows)
        return block.norm1(out) if block.kind == "norm of what is added" else out

    layer = Layer(block.norm1, block.q, block.k, block.v, attended, fed, heads=2)
    if block.kind == "post-norm":
        layer.normed = lambda rows: rows
        layer.between, layer.after = block.norm1, block.norm2
    return layer


def test_other_passes_on_the_same_encoder() -> None:
    for text, why in (
        ("tome{r=3} | stc-cacher", "tome.* has already"),
        ("stc-cacher | stc-cacher{ratio=0.5}", "stc-cacher does so already"),
    ):
        with pytest.raises(PreconditionError, match=why):
            run_pipeline(captured("clip", 1).clone(), text)


def test_a_models_forward_knows_no_streams() -> None:
    with pytest.raises(PreconditionError, match="makes an encoder for streams of frames"):
        vlmopt.optimize(
            encoders.build("clip"), (encoders.images(1),), "stc-cacher", backend="eager"
        )


def test_onnx(tmp_path: Path) -> None:
    """The state is an output of one model and an input of the other; still rows, the same rows."""
    program = captured("timm", 2).clone()
    run_pipeline(program, "stc-cacher")
    export_program(program, tmp_path / "onnx")
    first, second = program["model"], program["model_selective"]
    chunk = encoders.images()
    later = chunk.clone()
    later[..., 8:16, :] += 1.5
    wanted, state = reference(first, [chunk])
    changed = selective(second, [later], state)
    given = dict(zip((port.name for port in first.inputs), [chunk.numpy()], strict=True))
    found = run_onnx(tmp_path / "onnx" / "model.onnx", given)
    assert list(found) == [port.name for port in first.outputs]
    again = {key: found[key] for key in state} | dict.fromkeys(given, later.numpy())
    found |= run_onnx(tmp_path / "onnx" / "model_selective.onnx", again)
    for name, value in (wanted | changed).items():
        agree(torch.from_numpy(found[name]), value)


def run_onnx(path: Path, given: dict[str, Any]) -> dict[str, Any]:
    session = onnxruntime.InferenceSession(path)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, given), strict=True))


def test_within_a_vision_language_model() -> None:
    """Beside its other stages, and before a pass that drops tokens."""
    program = vlmopt.capture(zoo.build("llava", layers=2), zoo.inputs("llava"))
    plain = program.clone()
    run_pipeline(program, "stc-cacher | v2drop{layers=1 keep=0.5}", verify="full")
    assert list(program.stages)[:2] == ["vision_encoder", "vision_encoder_selective"]
    assert set(program.stages) - set(plain.stages) == {"vision_encoder_selective"}
    chunk = zoo.inputs("llava")["pixel_values"]
    given = [chunk for _ in program["vision_encoder"].inputs]
    wanted, state = reference(program["vision_encoder"], given)
    (before,) = plain["vision_encoder"].graph_module(*given)
    assert next(iter(wanted.values())).equal(before)
    agree(selective(program["vision_encoder_selective"], given, state)[next(iter(wanted))], before)
