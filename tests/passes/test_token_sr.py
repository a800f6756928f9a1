"""Blink's learned modules: how they are learnt, and what they add to the copies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles.blinked import BlinkOracle
from oracles.token_sr import TokenSRTraining, token_sr
from safetensors.torch import load_file

import vlmopt
from vlmopt import artifacts, digits, partial
from vlmopt.calibration import calibrate
from vlmopt.errors import ArtifactError, OptionError, PreconditionError
from vlmopt.lowering.onnx import export_program
from vlmopt.passes.tokens.blink import Blink
from vlmopt.passes.tokens.token_sr import NAMES, TokenSRLearner, crop, super_resolved, untrained
from vlmopt.pipeline.manager import run_pipeline

LAYERS = (1, 2)
METHOD = Blink(layers=LAYERS, rate=0.01)
APPLIED = "blink{{layers=1,2 expand=0.25 drop=0.2 mode=tokensr artifact={}}}"


def sharp(dtype: torch.dtype = torch.float32) -> Any:
    """A model with visual tokens that differ, and attention that is not spread evenly."""
    model = zoo.build("llava")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.mul_(40)
        for layer in model.get_decoder().layers:
            layer.self_attn.q_proj.weight.mul_(12)
            layer.self_attn.k_proj.weight.mul_(12)
    return model.to(dtype)


@pytest.fixture(scope="module")
def model() -> Any:
    return sharp()


def samples(count: int) -> list[dict[str, Any]]:
    return [zoo.inputs("llava", seed=seed) for seed in range(count)]


def written(path: Path, program: Any, **values: Any) -> Path:
    """An artifact whose modules, not learnt from anything, add a lot."""
    generator = torch.Generator().manual_seed(3)
    tensors = {}
    for layer in LAYERS:
        for name, tensor in zip(NAMES, untrained(32, layer), strict=True):
            random = torch.randn(tensor.shape, generator=generator) * 0.3
            tensors[f"{layer}.{name}"] = tensor if name[0] != "e" else random
    content = {"layers": list(LAYERS), "side": 2, "up": 2, **values}
    artifacts.write(path, "blink", program, content, tensors)
    return path


def test_losses_as_in_the_eager_reference(model: Any) -> None:
    first, second = samples(2)
    learner = METHOD.measure(model, vlmopt.capture(model, first), first)
    start = {key: value.clone() for key, value in learner.result().items()}
    reference = TokenSRTraining(model, {layer: token_sr(start, layer) for layer in LAYERS}, 0.01)
    for sample in (first, second, first):
        wanted = reference.step(sample, sample["input_ids"] == zoo.IMAGE)
        assert learner(sample) == pytest.approx(wanted, rel=1e-3)
    assert wanted[:2] != pytest.approx(wanted[2:], rel=0.05)  # it has learnt something


def test_losses_of_the_digit_model_fall_below_interpolation() -> None:
    model, processor = digits.load_model()
    given = digits.calibration_samples(processor, 16, size=8)
    method = Blink(layers=(2, 3))
    learner = method.measure(model, vlmopt.capture(model, given[0]), given[0])
    for _ in range(8):
        losses = torch.tensor([learner(sample) for sample in given]).mean(0)
    assert (losses[:2] < 0.8 * losses[2:]).all()


def test_it_goes_on_where_it_was_interrupted(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SAVE_EVERY", 2)
    whole, path = tmp_path / "whole.safetensors", tmp_path / "blink.safetensors"
    values = calibrate(model, samples(5), METHOD, whole)
    assert (values["side"], values["up"], len(values["losses"])) == (2, 2, 2)

    def stop(done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples(5), METHOD, path, progress=stop)
    assert calibrate(model, samples(5), METHOD, path) == values
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, whole.name]
    one, other = load_file(path), load_file(whole)
    assert sorted(one) == sorted(f"{layer}.{name}" for layer in LAYERS for name in NAMES)
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    program = vlmopt.capture(model, samples(1)[0])
    run_pipeline(program, APPLIED.format(path))  # it is of use as it is
    assert len(program["language_model"].cuts) == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_as_in_the_eager_reference(dtype: torch.dtype, tmp_path: Path) -> None:
    model = sharp(dtype)
    inputs = zoo.inputs("llava", batch=2, text=(6, 6))
    inputs["pixel_values"] = inputs["pixel_values"].to(dtype)
    path = written(tmp_path / "b.safetensors", vlmopt.capture(model, inputs))
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    modules = {layer: token_sr(tensors, layer).to(dtype) for layer in LAYERS}
    optimized = vlmopt.optimize(model, inputs, APPLIED.format(path), backend="eager")
    with torch.no_grad():
        logits = optimized(**inputs).logits
    limit = 1e-5 if dtype == torch.float32 else 0.05
    for row in range(2):
        single = {name: value[row : row + 1] for name, value in inputs.items()}
        visual = single["input_ids"] == zoo.IMAGE
        oracle, plain = (
            BlinkOracle(model, single, visual, LAYERS, expand=0.25, drop=0.2, modules=one)
            for one in (modules, None)
        )
        assert any(there for _, there in oracle.history)
        error, difference = (
            (logits[row] - one.logits[0]).abs().max() / one.logits.abs().max()
            for one in (oracle, plain)
        )
        assert error <= limit
        assert difference > 4 * limit  # the modules matter


def test_an_untrained_module_adds_nothing() -> None:
    finer = torch.randn(2, 16, 24)
    assert torch.equal(super_resolved(finer, *untrained(24, 0)), finer)
    one, other = untrained(24, 0), untrained(24, 1)
    assert one[0].shape == (3, 24, 3, 3)
    assert not torch.equal(one[0], other[0])


def test_in_onnx_runtime(tmp_path: Path) -> None:
    inputs = zoo.inputs("llava", batch=2, text=(6, 6))
    program = vlmopt.capture(zoo.build("llava"), inputs)
    path = written(tmp_path / "b.safetensors", program)
    run_pipeline(program, APPLIED.format(path))
    report = export_program(program, tmp_path / "out", stages=["language_model", "decode"])
    assert report.examples == 4  # floats within 1e-4: else it raises


def test_crops_of_several_images_on_grids_that_are_not_square() -> None:
    lines = torch.arange(8.0)[:, None].expand(8, 16)
    images = torch.stack([lines, 100 + lines, 200 + lines, 300 + lines])[:, None]
    # two prompts of two images, grids of 2 by 4, patches of 2 by 2: two in each image
    found = crop({"pixel_values": images}, torch.tensor([1, 2]), 2, (2, 4), 2)["pixel_values"]
    assert torch.equal(found[[0, 1, 2, 3], 0, :, 0], images[:, 0, :, 0])  # whole height
    across = torch.arange(16.0).expand(4, 1, 8, 16).clone()
    found = crop({"pixel_values": across}, torch.tensor([1, 2]), 2, (2, 4), 2)["pixel_values"]
    assert torch.equal(found[[1, 2]], across[[1, 2]])  # those that no patch is of
    assert (found[0, 0, 0, 0], found[0, 0, 0, -1]) == (8, 15)  # right half of the first
    assert (found[3, 0, 0, 0], found[3, 0, 0, -1]) == (0, 7)  # left half of the last
    tall = crop({"pixel_values": images}, torch.tensor([1, 3]), 2, (4, 2), 2)["pixel_values"]
    assert (tall[0, 0, 0, 0], tall[0, 0, -1, 0]) == (4, 7)  # lower half
    assert (tall[3, 0, 0, 0], tall[3, 0, -1, 0]) == (304, 307)


def test_what_does_not_fit_is_refused(model: Any, tmp_path: Path) -> None:
    program = vlmopt.capture(model, samples(1)[0])
    with pytest.raises(OptionError, match="mode=tokensr needs an artifact"):
        run_pipeline(program.clone(), "blink{layers=1 mode=tokensr}")
    path = written(tmp_path / "b.safetensors", program)
    with pytest.raises(OptionError, match="mode=interp takes no artifact"):
        run_pipeline(program.clone(), f"blink{{layers=1 artifact={path}}}")
    with pytest.raises(ArtifactError, match=r"holds no 3\.reduce\.weight"):
        run_pipeline(program.clone(), f"blink{{layers=3 mode=tokensr artifact={path}}}")
    with pytest.raises(ArtifactError, match="learnt patches of 2 by 2 tokens at up=2, and these"):
        run_pipeline(program.clone(), f"blink{{layers=1 patch=1 mode=tokensr artifact={path}}}")
    other = vlmopt.capture(zoo.build("gemma3"), zoo.inputs("gemma3"))
    with pytest.raises(ArtifactError, match="was made with another model"):
        run_pipeline(other, f"blink{{layers=1 mode=tokensr artifact={path}}}")
    artifacts.write(path, "alvts", program, {}, {"a": torch.zeros(1)}, overwrite=True)
    with pytest.raises(ArtifactError, match="is for alvts, not for blink"):
        run_pipeline(program.clone(), f"blink{{layers=1 mode=tokensr artifact={path}}}")


def test_pixels_that_are_no_whole_images_are_refused() -> None:
    model, inputs = zoo.build("qwen2_5_vl"), zoo.inputs("qwen2_5_vl")
    learner = METHOD.measure(model, vlmopt.capture(model, inputs), inputs)
    assert isinstance(learner, TokenSRLearner)
    with pytest.raises(PreconditionError, match="crops of 1 images, and pixel_values are of shape"):
        learner(inputs)
