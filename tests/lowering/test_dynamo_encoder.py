"""Passes for vision encoders through ``torch.compile(backend="vlmopt")``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import encoders
import pytest
import torch
import zoo
from oracles import vit
from oracles.masked import MaskOracle
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import vlmopt
from vlmopt.lowering.dynamo import vlmopt_backend

TOME = "tome{r=3}"
PIPELINES = {"tome": TOME, "sad-tm": "sad-tm{mr=0.1 tau=1 alpha=1}"}
COUNTS = {"tome": dict.fromkeys(range(3), 3), "sad-tm": {1: 3, 2: 2}}
CHOOSE = {"tome": vit.tome, "sad-tm": vit.sad_tm(1.0)}


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(model: Any, passes: str, **options: Any) -> Any:
    dynamic = options.pop("dynamic", None)
    return torch.compile(
        model,
        backend=vlmopt_backend,
        dynamic=dynamic,
        options={"passes": passes, "lowering": "eager", **options},
    )


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def outputs(result: Any) -> list[Tensor]:
    """Tensors of whatever a model returns."""
    if isinstance(result, Tensor):
        return [result]
    return list(result if isinstance(result, tuple) else result.to_tuple())


def agree(found: Any, wanted: Any) -> None:
    pairs = zip(outputs(found), outputs(wanted), strict=True)
    for one, other in pairs:
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.detach().abs().max()))


def merged(name: str, method: str, restore: bool | None = None) -> tuple[Any, vit.MergedEncoder]:
    kind, model = encoders.ENCODERS[name], encoders.build(name)
    back = kind.dense if restore is None else restore
    prop = method == "tome"
    return model, vit.MergedEncoder(
        model, kind.parts, CHOOSE[method], COUNTS[method], prop, restore=back
    )


@pytest.mark.parametrize("method", PIPELINES)
@pytest.mark.parametrize("name", encoders.ENCODERS)
@torch.no_grad()
def test_an_encoder_merges_as_its_eager_reference(name: str, method: str) -> None:
    model, oracle = merged(name, method)
    images = encoders.images(3)
    wanted = oracle(pixel_values=images)
    assert (outputs(wanted)[0] - outputs(model(images))[0]).abs().max() > 1e-3
    with no_warnings():
        found = compiled(model, PIPELINES[method])(images)
    agree(found, wanted)
    optimized = vlmopt.optimize(model, {"pixel_values": images}, PIPELINES[method], backend="eager")
    agree(found, optimized(pixel_values=images))


@pytest.mark.parametrize("restore", [True, False])
@torch.no_grad()
def test_rows_are_given_back_or_not(restore: bool) -> None:
    model, oracle = merged("clip", "tome", restore)
    images = encoders.images()
    found = compiled(model, f"tome{{r=3 restore={str(restore).lower()}}}")(images)
    agree(found, oracle(pixel_values=images))
    assert found.last_hidden_state.shape[1] == (26 if restore else 26 - 9)


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
@pytest.mark.parametrize("name", ["deit", "timm-avg"])
def test_gradients_are_those_of_the_eager_reference(name: str, lowering: str) -> None:
    """To pixels and to weights, class token included."""
    model, oracle = merged(name, "tome")
    images = encoders.images().requires_grad_()
    leaves = [images, *model.parameters()]
    with oracle.active():
        wanted = outputs(model(images))[0]
    reference = torch.autograd.grad(wanted.sin().sum(), leaves, allow_unused=True)
    assert float(reference[0].abs().max()) > 1e-3
    found = outputs(compiled(model, TOME, lowering=lowering)(images))[0]
    agree(found, wanted)
    gradients = torch.autograd.grad(found.sin().sum(), leaves, allow_unused=True)
    for one, other in zip(gradients, reference, strict=True):
        assert (one is None) == (other is None)
        if other is not None:
            assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))


def test_an_encoder_learns_through_merging() -> None:
    model, _ = merged("vit", "tome")
    images, labels = encoders.images(8, seed=3), torch.arange(8) % 5
    run = compiled(model.train(), TOME)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _step in range(12):
        loss = torch.nn.functional.cross_entropy(run(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dynamic", [None, True])
@torch.no_grad()
def test_new_numbers_of_images(dynamic: bool | None) -> None:
    model, oracle = merged("deit", "tome")
    run = compiled(model, TOME, dynamic=dynamic)
    for batch in (2, 3, 1, 4):
        images = encoders.images(batch, seed=batch)
        agree(run(images), oracle(pixel_values=images))


# -- vision-language models ----------------------------------------------------------------------


def sharpened(family: str) -> Any:
    """A model whose images attend to some patches more than to others, so that none are alike."""
    model = zoo.build(family)
    for block in model.get_submodule(encoders.TOWERS[family].blocks):
        attention = getattr(block, encoders.TOWERS[family].attention)
        for projection in (attention.q_proj, attention.k_proj):
            projection.weight.data *= 20
    return model


def tower(model: Any, family: str, method: str) -> vit.MergedEncoder:
    counts = {"tome": {0: 3, 1: 3}, "sad-tm": {1: 3}}[method]
    parts, prop = encoders.TOWERS[family], method == "tome"
    return vit.MergedEncoder(model, parts, CHOOSE[method], counts, prop, restore=True)


def text_of(family: str, method: str) -> str:
    patches = 64 if family == "internvl" else 16
    return {"tome": TOME, "sad-tm": f"sad-tm{{alpha=1 tau=1 mr={round(3 / patches, 4)}}}"}[method]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("llava", "tome"),
        ("vipllava", "sad-tm"),
        ("internvl", "tome"),
        ("llava_onevision", "sad-tm"),
        ("gemma3", "tome"),
    ],
)
@torch.no_grad()
def test_the_encoder_inside_a_model(family: str, method: str, batch: int) -> None:
    model, inputs = sharpened(family), zoo.inputs(family, batch=batch)
    pipeline, real = text_of(family, method), inputs["attention_mask"].bool()
    original, wanted = model(**inputs).logits, tower(model, family, method)(**inputs).logits
    assert (wanted - original)[real].abs().max() > 1e-4
    with no_warnings():
        found = compiled(model, pipeline)(**inputs).logits
    assert (found - wanted)[real].abs().max() <= 1e-5
    optimized = vlmopt.optimize(model, inputs, pipeline, backend="eager")
    assert (found - optimized(**inputs).logits)[real].abs().max() <= 1e-5


@pytest.mark.parametrize("family", ["llava", "internvl"])
@torch.no_grad()
def test_encoder_and_language_model_in_one_pipeline(family: str) -> None:
    model, inputs = sharpened(family), zoo.inputs(family, batch=2)
    masked = MaskOracle(model, inputs["input_ids"] == zoo.IMAGE, {1: 0.5})
    with masked.active(), tower(model, family, "tome").active():
        logits = model(**inputs).logits
    kept = torch.stack([torch.nonzero(row)[:, 0] for row in masked.present])
    wanted = logits.gather(1, kept[..., None].expand(-1, -1, logits.shape[-1]))
    real = inputs["attention_mask"].gather(1, kept).bool()
    found = compiled(model, f"{TOME} | v2drop{{layers=1 keep=0.5}}")(**inputs).logits
    assert found.shape == wanted.shape
    assert (found - wanted)[real].abs().max() <= 1e-5


@pytest.mark.parametrize("lowering", ["eager", "inductor"])
def test_gradients_reach_the_encoder_inside_a_model(lowering: str) -> None:
    model, inputs = sharpened("llava"), zoo.inputs("llava")
    weights = list(model.get_submodule(encoders.TOWERS["llava"].blocks).parameters())
    with tower(model, "llava", "tome").active():
        wanted = model(**inputs).logits
    reference = torch.autograd.grad(wanted.sin().sum(), weights)
    found = compiled(model, TOME, lowering=lowering)(**inputs).logits
    gradients = torch.autograd.grad(found.sin().sum(), weights)
    assert max(float(one.abs().max()) for one in reference) > 1e-2
    for one, other in zip(gradients, reference, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))


@torch.no_grad()
def test_prompts_without_images_are_untouched() -> None:
    model, prompt = zoo.build("llava"), torch.tensor([[1, 9, 10, 11]])
    with no_warnings():
        got = compiled(model, TOME)(input_ids=prompt).logits
    assert (got - model(input_ids=prompt).logits).abs().max() <= 1e-6


# -- what is refused, or told --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "why"),
    [
        ("qwen2_vl", "take the patches of all images in one row"),
        ("qwen2_5_vl", "take the patches of all images in one row"),
        ("smolvlm", "hides some patches from others"),
    ],
)
@torch.no_grad()
def test_encoders_that_cannot_merge_say_why(family: str, why: str) -> None:
    """As ``vlmopt.optimize`` does."""
    model, inputs = zoo.build(family), zoo.inputs(family)
    with pytest.raises(BackendCompilerFailed, match=why):
        compiled(model, TOME)(**inputs)


@torch.no_grad()
def test_rows_that_the_language_model_needs_are_not_left_out() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    with pytest.raises(BackendCompilerFailed, match="the language model has a place for each"):
        compiled(model, "tome{r=2 restore=false}")(**inputs)


@pytest.mark.parametrize(
    ("passes", "why"),
    [
        ("docprune{ask=false}", "docprune cannot work under torch.compile: it has to know which"),
        ("visionzip{keep=0.5}", "visionzip cannot work under torch.compile: it has to know which"),
        ("stc-cacher", "stc-cacher cannot work under torch.compile: it makes two stages"),
    ],
)
def test_passes_that_need_more_than_a_graph(passes: str, why: str) -> None:
    with pytest.raises(BackendCompilerFailed, match=why):
        compiled(encoders.build("vit"), passes)(encoders.images())


class Broken(torch.nn.Module):
    """A graph break between the patch embedding and the blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = encoders.TimmLike()

    def forward(self, images: Tensor) -> Tensor:
        embed = self.inner.patch_embed(images).flatten(2).transpose(1, 2)
        torch._dynamo.graph_break()
        rows: Tensor = self.inner.blocks(embed)
        return rows


@torch.no_grad()
def test_a_break_before_the_blocks_is_told_once() -> None:
    torch.manual_seed(0)
    model, images = Broken().eval(), encoders.images()
    run = compiled(model, TOME)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = run(images)
        run(images)
    ours = [str(one.message) for one in caught if "vlmopt" in str(one.message)]
    assert len(ours) == 1
    assert "holds no list of blocks that attend to their patches" in ours[0]
    agree(found, model(images))
