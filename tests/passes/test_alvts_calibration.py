"""Calibration of ALVTS: selectors learn the scores of the model's own attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles.reduced import ReducedOracle

import vlmopt
from vlmopt import artifacts, partial
from vlmopt.calibration import calibrate
from vlmopt.errors import ArtifactError
from vlmopt.passes.tokens.alvts import Alvts
from vlmopt.passes.tokens.hawk import Hawk
from vlmopt.passes.tokens.selectors import Selector, selector_mass
from vlmopt.pipeline.manager import run_pipeline

METHOD = Alvts(layers=(0, 2), rank=4, rate=0.01)


@pytest.fixture(scope="module")
def model() -> Any:
    made = zoo.build("llava")
    for layer in made.get_decoder().layers:  # attention that is far from even
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj):
            projection.weight.data.mul_(30)
    return made


def samples(count: int) -> list[dict[str, Any]]:
    return [zoo.inputs("llava", batch=2, seed=seed) for seed in range(count)]


def attention_scores(model: Any, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """The card's S* from the whole attention of the untouched model: ``[batch, tokens]``."""
    visual = inputs["input_ids"] == zoo.IMAGE
    text = inputs["attention_mask"].bool() & ~visual
    shares = ReducedOracle(model, inputs, visual, []).recorded.attention(layer).mean(1)
    of_visual, of_text = (
        (shares * rows[..., None]).sum(1) / rows.sum(1, keepdim=True) for rows in (visual, text)
    )
    return of_visual * of_text


def attention_input(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """What the projections of layer 0 see: ``[batch, tokens, width]``."""
    seen: list[torch.Tensor] = []
    hook = (
        model.get_decoder()
        .layers[0]
        .self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
    )
    with torch.no_grad():
        model(**inputs)
    hook.remove()
    return seen[0]


def scores_of(logits: torch.Tensor, inputs: dict[str, Any]) -> torch.Tensor:
    """The card's S of a map over all heads before its softmax: ``[batch, tokens]``."""
    visual, real = inputs["input_ids"] == zoo.IMAGE, inputs["attention_mask"].bool()
    seen = torch.ones_like(logits[0]).tril().bool() & real[:, None]
    shares = logits.masked_fill(~seen, -1e9).softmax(-1)
    of_visual, of_text = (
        (shares * rows[..., None]).sum(1) / rows.sum(1, keepdim=True)
        for rows in (visual, real & ~visual)
    )
    return of_visual * of_text


def test_the_first_loss_is_that_of_whole_projections(model: Any, tmp_path: Path) -> None:
    (sample,) = samples(1)
    whole = Alvts(layers=(0,), rank=256, rate=0.01)
    values = calibrate(model, [sample], whole, tmp_path / "a.safetensors")
    rows, block = attention_input(model, sample), model.get_decoder().layers[0].self_attn
    heads = model.config.text_config.num_attention_heads
    query, key = block.q_proj(rows), block.k_proj(rows)
    size = query.shape[-1] // heads
    query, key = (value.unflatten(-1, (-1, size)).transpose(1, 2) for value in (query, key))
    key = key.repeat_interleave(heads // key.shape[1], 1)
    logits = (query @ key.transpose(-1, -2)).sum(1) / (heads * size**0.5)
    visual = sample["input_ids"] == zoo.IMAGE
    difference = (scores_of(logits, sample) - attention_scores(model, sample, 0))[visual]
    wanted = (difference * visual.shape[1] ** 2).square().mean()
    assert values["losses"] == pytest.approx([float(wanted.detach())], rel=1e-3)


def test_losses_fall(model: Any) -> None:
    first = samples(1)[0]
    learner = METHOD.measure(model, vlmopt.capture(model, first), first)
    losses = torch.tensor([learner(sample) for sample in samples(4) * 10])
    assert (losses[-4:].mean(0) < 0.7 * losses[:4].mean(0)).all()


def test_the_artifact_chooses(model: Any, tmp_path: Path) -> None:
    path = tmp_path / "alvts.safetensors"
    calibrate(model, samples(4) * 4, METHOD, path)
    (sample,) = samples(1)
    twin = vlmopt.optimize(model, sample, f"alvts{{layers=0 artifact={path}}}", backend="eager")
    with torch.no_grad():
        ((_, slots),) = twin(**sample).past_key_values.kept.items()
    rows = attention_input(model, sample)
    left, right = (artifacts.tensor(path, f"0.{side}") for side in ("left", "right"))
    config = model.config.text_config
    scale = 1 / (config.num_attention_heads * config.head_dim**0.5)
    scores = scores_of(rows @ left @ (rows @ right).transpose(-1, -2) * scale, sample)
    visual = sample["input_ids"] == zoo.IMAGE
    scores = scores.masked_fill(~visual, -1)
    for row in range(2):
        kept = {slot for slot in slots[row].tolist() if visual[row, slot]}
        wanted = scores[row].sort(descending=True, stable=True).indices[: len(kept)]
        assert kept == set(wanted.tolist())


def test_a_map_for_each_head_of_whole_projections() -> None:
    query, key = torch.randn(8, 6), torch.randn(4, 6)  # 4 heads and 2 key heads of size 2
    left, right = Selector.of(query, key, 4, 6).sides(4)
    rows, modality = torch.randn(1, 5, 6), torch.tensor([[2, 2, 2, 1, 1]])
    mass = selector_mass(rows, modality, None, True, left, right, 2**-0.5)
    queries = (rows @ query.T).unflatten(-1, (4, 2)).transpose(1, 2)
    keys = (rows @ key.T).unflatten(-1, (2, 2)).transpose(1, 2).repeat_interleave(2, 1)
    logits = queries @ keys.transpose(-1, -2) * 2**-0.5
    shares = logits.masked_fill(~torch.ones(5, 5).tril().bool(), float("-inf")).softmax(-1).mean(1)
    wanted = torch.stack([shares[:, :3].mean(1), shares[:, 3:].mean(1)], -1)
    torch.testing.assert_close(mass, wanted, atol=1e-5, rtol=1e-5)


def test_it_goes_on_where_it_was_interrupted(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "SAVE_EVERY", 2)
    whole, path = tmp_path / "whole.safetensors", tmp_path / "alvts.safetensors"
    values = calibrate(model, samples(5), METHOD, whole)

    def stop(done: int, total: int | None) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples(5), METHOD, path, progress=stop)
    assert calibrate(model, samples(5), METHOD, path) == values
    assert sorted(file.name for file in tmp_path.iterdir()) == [path.name, whole.name]
    for name in ("0.left", "0.right", "2.left", "2.right"):
        assert torch.equal(artifacts.tensor(path, name), artifacts.tensor(whole, name))


def test_what_does_not_fit_is_refused(model: Any, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"x\.json is no name for(.|\n)*\.safetensors"):
        calibrate(model, samples(1), METHOD, tmp_path / "x.json")
    with pytest.raises(ArtifactError, match="makes no tensors"):
        calibrate(model, samples(1), Hawk(), tmp_path / "x.safetensors")
    path = tmp_path / "alvts.safetensors"
    calibrate(model, samples(1), METHOD, path)
    program = vlmopt.capture(model, samples(1)[0])
    with pytest.raises(ArtifactError, match=r"holds no 1\.left"):
        run_pipeline(program, f"alvts{{layers=1 artifact={path}}}")
    with pytest.raises(ArtifactError, match="is for alvts, not for hawk"):
        artifacts.read(path, "hawk")
    path.write_bytes(b"no such thing")
    with pytest.raises(ArtifactError, match="is no safetensors file"):
        run_pipeline(program, f"alvts{{layers=0 artifact={path}}}")
