"""Passes for vision encoders through ``torch.compile(backend="vlmopt")``."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import encoders
import pytest
import torch
import zoo
from oracles import vit
from oracles.masked import MaskOracle
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed

import vlmopt
from tests.toys import Decoder
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
    patches = 64 if family in ("internvl", "smolvlm") else 16
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


def test_gradients_reach_the_encoder_inside_a_model() -> None:
    model, inputs = sharpened("llava"), zoo.inputs("llava")
    weights = list(model.get_submodule(encoders.TOWERS["llava"].blocks).parameters())
    with tower(model, "llava", "tome").active():
        wanted = model(**inputs).logits
    reference = torch.autograd.grad(wanted.sin().sum(), weights)
    found = compiled(model, TOME)(**inputs).logits
    gradients = torch.autograd.grad(found.sin().sum(), weights)
    assert max(float(one.abs().max()) for one in reference) > 1e-2
    for one, other in zip(gradients, reference, strict=True):
        assert (one - other).abs().max() <= 1e-4 * max(1.0, float(other.abs().max()))


@torch.no_grad()
def test_images_that_need_no_padding() -> None:
    """SmolVLM hides patches of padding: where there are none, as ``capture`` cannot know."""
    model, inputs = sharpened("smolvlm"), zoo.inputs("smolvlm", batch=2)
    wanted = tower(model, "smolvlm", "tome")(**inputs).logits
    real = inputs["attention_mask"].bool()
    assert (wanted - model(**inputs).logits)[real].abs().max() > 1e-4
    found = compiled(model, TOME)(**inputs).logits
    assert (found - wanted)[real].abs().max() <= 1e-5


@torch.no_grad()
def test_prompts_without_images_are_untouched() -> None:
    model, prompt = zoo.build("llava"), torch.tensor([[1, 9, 10, 11]])
    with no_warnings():
        got = compiled(model, TOME)(input_ids=prompt).logits
    assert (got - model(input_ids=prompt).logits).abs().max() <= 1e-6


class Whole(torch.nn.Module):
    """Encoder and language model without a break between them."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = encoders.TimmLike()
        self.text = torch.nn.Embedding(8, 32)
        self.decoder = Decoder(width=32)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        tower = self.tower
        rows = tower.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        rows = torch.cat((tower.cls_token.expand(len(rows), -1, -1), rows), dim=1)
        return self.read(input_ids, tower.norm(tower.blocks(rows + tower.pos_embed))[:, 1:])

    def read(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        embeds = self.text(input_ids)
        where = (input_ids == zoo.IMAGE)[..., None].expand_as(embeds)
        logits: Tensor = self.decoder(embeds.masked_scatter(where, rows))
        return logits


@torch.no_grad()
def test_encoder_and_language_model_in_one_graph() -> None:
    torch.manual_seed(0)
    model, images = Whole().eval(), encoders.images()
    ids = torch.tensor([[1, *[zoo.IMAGE] * 25, 4, 5], [2, *[zoo.IMAGE] * 25, 6, 7]])
    parts = replace(encoders.ENCODERS["timm"].parts, blocks="tower.blocks")
    oracle = vit.MergedEncoder(model, parts, vit.tome, COUNTS["tome"], True, restore=True)
    wanted = oracle(input_ids=ids, pixel_values=images)
    assert (wanted - model(ids, images)).abs().max() > 1e-3
    agree(compiled(model, TOME)(ids, images), wanted)

    rows: list[Tensor] = []
    with mock.patch.object(model, "read", lambda _, given: rows.append(given)):
        oracle(input_ids=ids, pixel_values=images)
    torch._dynamo.reset()
    drop = "v2drop{layers=1 keep=0.48}"
    alone = compiled(model.read, drop)(ids, rows[0])
    assert alone.shape[1] == 28 - 13
    torch._dynamo.reset()
    agree(compiled(model, f"{TOME} | {drop}")(ids, images), alone)
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="the language model has a place for each"):
        compiled(model, "tome{r=2 restore=false}")(ids, images)


# -- what is refused, or told --------------------------------------------------------------------


@torch.no_grad()
def test_an_encoder_that_cannot_merge_says_why() -> None:
    """As ``vlmopt.optimize`` does."""
    first = torch.arange(26) < 13
    hidden = {"attn_mask": first[:, None] == first}
    with (
        mock.patch.dict(encoders.ATTENTION, hidden),
        pytest.raises(BackendCompilerFailed, match="hides some patches from others"),
    ):
        compiled(encoders.build("timm"), TOME)(encoders.images())


@torch.no_grad()
def test_an_encoder_that_breaks_is_told_once_and_untouched() -> None:
    model, inputs = zoo.build("qwen2_vl", layers=1), zoo.inputs("qwen2_vl")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = compiled(model, TOME)(**inputs).logits
    ours = [str(one.message) for one in caught if "vlmopt" in str(one.message)]
    assert len(ours) == 1
    assert "holds no list of blocks that attend to their patches" in ours[0]
    assert "vlmopt.optimize(model, inputs, passes)" in ours[0]
    assert (found - model(**inputs).logits).abs().max() <= 1e-5


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
