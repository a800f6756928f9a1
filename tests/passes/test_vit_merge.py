"""Token merging inside vision transformers, against plain loops on the untouched models."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import encoders
import pytest
import torch
import zoo
from oracles import vit
from torch import Tensor

import vlmopt
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program, Stage

COUNTS = {"tome": dict.fromkeys(range(3), 3), "sad-tm": {1: 3, 2: 2}}
CHOOSE = {"tome": vit.tome, "sad-tm": vit.sad_tm(1.0)}


def text(method: str, restore: str = "auto", prop: bool = True) -> str:
    start = {"tome": "tome{r=3", "sad-tm": "sad-tm{mr=0.1 tau=1 alpha=1 beta=0"}[method]
    return f"{start} restore={restore} prop_attn={str(prop).lower()}}}"


@functools.cache
def captured(name: str, batch: int = 2) -> Program:
    return vlmopt.capture(encoders.build(name), (encoders.images(batch),))


def rewritten(name: str, pipeline: str, batch: int = 2) -> Stage:
    program = captured(name, batch).clone()
    run_pipeline(program, pipeline, verify="full")
    return program["model"]


def run(stage: Stage, *images: Tensor) -> tuple[Tensor, ...]:
    with torch.no_grad():
        found: tuple[Tensor, ...] = stage.graph_module(*images)
    return found


def outputs(result: Any) -> list[Tensor]:
    """Tensors of whatever a model returns."""
    return [result] if isinstance(result, Tensor) else list(result.to_tuple())


def agree(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


def sharpened(family: str) -> Any:
    """A model whose images attend to some patches more than to others, so that none are alike."""
    model = zoo.build(family)
    for block in model.get_submodule(encoders.TOWERS[family].blocks):
        attention = getattr(block, encoders.TOWERS[family].attention)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.data *= 20
    return model


# -- against the oracle ------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["tome", "sad-tm"])
@pytest.mark.parametrize("name", encoders.ENCODERS)
def test_merging_equals_its_eager_reference(name: str, method: str) -> None:
    kind, model, images = encoders.ENCODERS[name], encoders.build(name), encoders.images()
    with torch.no_grad():
        original = outputs(model(images))[0]
    for restore, prop in (("auto", True), ("true", False), ("false", True)):
        back = restore == "true" or (restore == "auto" and kind.dense)
        oracle = vit.MergedEncoder(model, kind.parts, CHOOSE[method], COUNTS[method], prop, back)
        wanted = outputs(oracle(pixel_values=images))
        agree(run(rewritten(name, text(method, restore, prop)), images), wanted)
        assert oracle.lengths[-1] == kind.parts.special + 25 - sum(COUNTS[method].values())
        if back:  # dense outputs have all of their rows
            assert wanted[0].shape == original.shape
        if wanted[0].shape == original.shape:
            assert (wanted[0] - original).abs().max() > 1e-3  # merging makes a difference


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llava", "tome"),
        ("vipllava", "sad-tm"),
        ("internvl", "tome"),
        ("llava_onevision", "sad-tm"),
    ],
)
def test_merging_in_a_vision_language_model(family: str, method: str) -> None:
    """Every patch has its row again where the projector reads it."""
    model, inputs = sharpened(family), zoo.inputs(family, batch=2)
    counts = {"tome": {0: 3, 1: 3}, "sad-tm": {1: 3}}[method]
    pipeline = {"tome": "tome{r=3}", "sad-tm": "sad-tm{keep=0 alpha=1 beta=0 tau=1 mr=MR}"}[method]
    patches = {"internvl": 64}.get(family, 16)
    pipeline = pipeline.replace("MR", str(round(3 / patches, 4)))
    oracle = vit.MergedEncoder(
        model, encoders.TOWERS[family], CHOOSE[method], counts, method == "tome", restore=True
    )
    optimized = vlmopt.optimize(model, inputs, pipeline, backend="eager")
    with torch.no_grad():
        original, found = model(**inputs).logits, optimized(**inputs).logits
    wanted = oracle(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (found - wanted)[real].abs().max() <= 1e-5
    assert (wanted - original)[real].abs().max() > 1e-4
    how = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    tokens = optimized.generate(**inputs, **how)
    with oracle.active():
        assert tokens.tolist() == model.generate(**inputs, **how).tolist()


def test_images_of_a_new_shape() -> None:
    """More images are captured when they first appear, in ``generate`` and in ``forward``."""
    model = zoo.build("llava", layers=2)
    optimized = vlmopt.optimize(model, zoo.inputs("llava"), "tome{r=3}", backend="eager")
    parts = encoders.TOWERS["llava"]
    oracle = vit.MergedEncoder(model, parts, vit.tome, {0: 3, 1: 3}, prop_attn=True, restore=True)
    inputs = zoo.inputs("llava", batch=2)
    how = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    found = optimized.generate(**inputs, **how)
    with oracle.active():
        assert found.equal(model.generate(**inputs, **how))
    inputs = zoo.inputs("llava", batch=3)
    with torch.no_grad():
        found = optimized(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (found - oracle(**inputs).logits)[real].abs().max() <= 1e-5
    assert len(optimized.vlmopt.specialisations) == 3
