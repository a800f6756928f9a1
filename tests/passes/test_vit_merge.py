"""Token merging inside vision transformers, against plain loops on the untouched models."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import encoders
import pytest
import torch
import zoo
from oracles import vit
from torch import Tensor

import vlmopt
from vlmopt import artifacts
from vlmopt.analysis.encoder import Encoder
from vlmopt.analysis.layers import find_layers
from vlmopt.calibration import calibrate
from vlmopt.errors import ArtifactError, OptionError, PreconditionError
from vlmopt.graph.text import stage_text
from vlmopt.lowering.onnx import export_program
from vlmopt.passes.tokens.merge import Match, merge_mean, places
from vlmopt.passes.tokens.sad_tm import SadTM
from vlmopt.passes.tokens.saliency import common_saliency, mean_correlation
from vlmopt.passes.tokens.vit import MergePoint, TokenMerge
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.spec import parse_pipeline
from vlmopt.program import Program, Stage

COUNTS = {"tome": dict.fromkeys(range(3), 3), "sad-tm": {1: 3, 2: 2}}
CHOOSE = {"tome": vit.tome, "sad-tm": vit.sad_tm(1.0)}


def text(method: str, restore: str = "auto", prop: bool = True) -> str:
    start = {"tome": "tome{r=3", "sad-tm": "sad-tm{mr=0.1 tau=1 alpha=1"}[method]
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
    pipeline = {"tome": "tome{r=3}", "sad-tm": "sad-tm{keep=0 alpha=1 tau=1 mr=MR}"}[method]
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


def test_the_prior_weighs_and_travels(tmp_path: Path) -> None:
    """Half class attention, half prior: the prior of a merged patch is a mean of priors."""
    model, images = encoders.build("deit"), encoders.images()
    prior = torch.rand(25, generator=torch.Generator().manual_seed(3)).tolist()
    path = tmp_path / "prior.json"
    artifacts.write(path, "sad-tm", captured("deit"), {"prior": prior})
    parts, counts = encoders.ENCODERS["deit"].parts, {0: 7, 1: 8, 2: 8}
    for alpha in (0.5, 0.0):
        pipeline = f"sad-tm{{mr=0.3 tau=0 alpha={alpha} prior={path}}}"
        oracle = vit.MergedEncoder(
            model, parts, vit.sad_tm(alpha), counts, prop_attn=False, restore=False, prior=prior
        )
        wanted = outputs(oracle(pixel_values=images))
        agree(run(rewritten("deit", pipeline), images), wanted)
        assert oracle.lengths == [2 + 18, 2 + 10, 2 + 2]


@pytest.mark.parametrize("method", ["tome", "sad-tm"])
@pytest.mark.parametrize("name", ["deit", "siglip"])
def test_a_batch_equals_its_images(name: str, method: str) -> None:
    images = encoders.images(2, seed=5)
    together = run(rewritten(name, text(method)), images)
    alone = rewritten(name, text(method), batch=1)
    for at in range(2):
        agree(run(alone, images[at : at + 1]), [value[at : at + 1] for value in together])


@pytest.mark.parametrize(
    "pipeline", ["tome{r=0}", "tome{keep=25}", "tome{keep=1.0}", "sad-tm{mr=0 alpha=1}"]
)
def test_nothing_merged_is_nothing_changed(pipeline: str) -> None:
    stage = rewritten("vit", pipeline)
    assert stage_text(stage) == stage_text(captured("vit")["model"])
    assert "merges" not in stage.facts


@pytest.mark.parametrize("method", ["tome", "sad-tm"])
def test_gradients_flow(method: str) -> None:
    """To the pixels; what is chosen, and in sad-tm its weight, carries none."""
    stage = rewritten("deit", text(method, prop=True))
    images = encoders.images().requires_grad_()
    (logits,) = stage.graph_module(images)
    (gradient,) = torch.autograd.grad(logits.square().sum(), images)
    step = 1e-3 * torch.randn(images.shape, generator=torch.Generator().manual_seed(2))
    up, down = (run(stage, images.detach() + sign * step)[0].square().sum() for sign in (1, -1))
    slope = float((gradient * step).sum())
    assert abs(slope) > 1e-3
    if method == "tome":
        assert float(up - down) / 2 == pytest.approx(slope, rel=0.05)


def test_inductor_merges_the_same() -> None:
    stage, images = rewritten("deit", "tome{r=3 layers=0,1}"), encoders.images(seed=1)
    with torch.no_grad():
        agree(torch.compile(stage.graph_module, dynamic=False)(images), run(stage, images))


@pytest.mark.parametrize(
    ("name", "pipeline"),
    [
        ("clip", "tome{r=3}"),
        ("deit", "sad-tm{mr=0.1 tau=1 alpha=1}"),
    ],
)
def test_onnx_runtime_merges_the_same(name: str, pipeline: str, tmp_path: Path) -> None:
    program = captured(name).clone()
    run_pipeline(program, pipeline)
    report = export_program(program, tmp_path / "out")
    assert report.examples == 4  # floats within 1e-4 on four random inputs: else it raises
    operators = report.operators["model"]
    assert not {"NonZero", "Compress", "Unique"} & set(operators)


# -- how many go where -------------------------------------------------------------------------


def counts(pipeline: str, patches: int = 196, depth: int = 12, special: int = 1) -> list[int]:
    """Patches left after each block."""
    (method,) = parse_pipeline(pipeline)
    assert isinstance(method, TokenMerge)
    known = captured("vit")["model"]
    layers = replace(find_layers(known), entries=find_layers(known).entries[:1] * depth)
    found = method.counts(Encoder(known, layers, special, patches, 1))
    gone = itertools.accumulate(found.get(block, 0) for block in range(depth))
    return [patches - count for count in gone]


def test_sad_tm_merges_linearly_after_the_first_blocks() -> None:
    """Oracle 3 of the card: of the original number each time, not of what is left."""
    left = counts("sad-tm{mr=0.05 tau=3 alpha=1}")
    assert left[:6] == [196, 196, 196, 186, 176, 167]
    assert counts("sad-tm{mr=0.05 alpha=1}") == left  # a quarter of twelve
    assert counts("sad-tm{mr=0.5 alpha=1}")[3:] == [98, *[1] * 8]  # one always stays


def test_tome_merges_as_many_in_each_block() -> None:
    assert counts("tome{r=8}") == [196 - 8 * done for done in range(1, 13)]
    assert counts("tome{r=40}")[:6] == [156, 116, 76, 38, 19, 10]  # at most half of them
    assert counts("tome{r=1,2,3}", depth=3) == [195, 193, 190]
    assert counts("tome{r=4 layers=1,3}", depth=5) == [196, 192, 192, 188, 188]
    falling = counts("tome{r=8 inflect=-1}")
    assert falling[0] == 180
    assert counts("tome{r=8 inflect=1}")[:2] == [196, 195]


@pytest.mark.parametrize("method", ["tome{keep=%s}", "sad-tm{alpha=1 tau=0 keep=%s}"])
def test_keep_says_how_many_are_left(method: str) -> None:
    assert counts(method % "0.5")[-1] == 98
    assert counts(method % "50")[-1] == 50
    assert counts(method % "0.5", depth=4) == [172, 147, 122, 98]


# -- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "error", "message"),
    [
        ("tome{layers=1,3}", PreconditionError, "cannot merge in block 3: stage model has blocks"),
        ("tome{r=1,2}", OptionError, "option r has 2 values for 3 blocks"),
        ("tome{keep=2}", OptionError, "3 blocks cannot leave 2 of 25 patches"),
        ("sad-tm{tau=3 alpha=1}", PreconditionError, "cannot merge in block 3"),
        ("sad-tm", OptionError, "alpha is 0.5, but there is no prior for the rest"),
        ("sad-tm{prior=nowhere.json}", ArtifactError, "cannot be read"),
        ("tome | sad-tm{alpha=1}", PreconditionError, "has already"),
    ],
)
def test_options_that_do_not_fit(pipeline: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        rewritten("vit", pipeline)


def test_a_prior_of_other_images_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "prior.json"
    artifacts.write(path, "sad-tm", captured("vit"), {"prior": [0.5] * 16})
    with pytest.raises(ArtifactError, match="images of 16 patches, these have 25"):
        rewritten("vit", f"sad-tm{{prior={path}}}")
    with pytest.raises(ArtifactError, match="made with another model"):
        rewritten("deit", f"sad-tm{{prior={path}}}")


@functools.cache
def vision_language(family: str) -> Program:
    return vlmopt.capture(zoo.build(family, layers=1), zoo.inputs(family))


def refused(program: Program, message: str, pipeline: str = "tome{r=2}") -> None:
    before = [stage_text(stage) for stage in program]
    with pytest.raises(PreconditionError, match=message):
        run_pipeline(program, pipeline)
    assert [stage_text(stage) for stage in program] == before


def test_patches_of_all_images_in_one_row_are_refused() -> None:
    refused(vision_language("qwen2_5_vl"), "the patches of all images in one row")


def test_patches_that_an_input_hides_are_refused() -> None:
    refused(
        vision_language("smolvlm"), "hides some patches from others, as patch_attention_mask says"
    )


def test_rows_that_the_language_model_needs_are_restored() -> None:
    program = vision_language("llava")
    refused(program, "the language model has a place for each patch", "tome{r=2 restore=false}")


class Masked(encoders.TimmLike):  # type: ignore[misc]
    """Attention with a mask that is made anew in each run, or a decoder's."""

    def __init__(self, mask: Callable[[], Tensor] | None, causal: bool = False) -> None:
        super().__init__()
        self.mask, self.causal = mask, causal

    def forward(self, pixel_values: Tensor) -> Tensor:
        mask = None if self.mask is None else self.mask()
        given = {"attn_mask": mask, "is_causal": self.causal}
        with mock.patch.object(encoders, "ATTENTION", given):
            logits: Tensor = super().forward(pixel_values)
            return logits


def halves() -> Tensor:
    first = torch.arange(26) < 13
    return first[:, None] == first


def test_causal_and_masked_blocks_are_refused() -> None:
    images = (encoders.images(1),)
    refused(vlmopt.capture(Masked(None, causal=True), images), "no token sees a later one")
    refused(vlmopt.capture(Masked(halves), images), "hides some patches from others, such as those")
    nothing = vlmopt.capture(Masked(lambda: torch.ones(26, 26, dtype=torch.bool)), images)
    run_pipeline(nothing, "tome{r=2}")
    assert nothing["model"].facts["merges"][-1]["tokens"] == [22, 20]


def test_a_program_without_an_encoder_is_refused() -> None:
    program = vision_language("llava").clone()
    del program.stages["vision_encoder"]
    refused(program, "has no vision encoder: its stages are")


# -- the card ----------------------------------------------------------------------------------


def point(tokens: Tensor, *, count: int, special: int = 0, **known: Any) -> MergePoint:
    size = torch.ones(tokens.shape[:2])
    heads = tokens[:, None]
    given = {"bias": None, "carried": None, "scale": None} | known
    return MergePoint(tokens, heads, heads, size=size, count=count, special=special, **given)


def test_saliency_outliers_correlate_least() -> None:
    """Oracle 1 of the card; a constant patch correlates with none."""
    maps = torch.tensor([[1.0, 2, 3], [2, 4, 6], [3, 2, 1]])
    torch.testing.assert_close(
        mean_correlation(maps), torch.tensor([0.0, 0, -1], dtype=torch.float64)
    )
    flat = mean_correlation(torch.tensor([[1.0, 2, 3], [7, 7, 7], [2, 4, 6]]))
    torch.testing.assert_close(flat, torch.tensor([0.5, 0, 0.5], dtype=torch.float64))
    prior = mean_correlation(maps).float()
    (method,) = parse_pipeline("sad-tm{alpha=0 prior=unread.json}")
    assert isinstance(method, SadTM)
    match, _ = method.match(point(torch.eye(3)[None], count=1, carried=prior[None]))
    assert match.sources.tolist() == [[2]]


def test_importance_weighs_what_is_merged() -> None:
    """Oracle 2 of the card, and 5: the class token stays as it is, bit by bit."""
    tokens = torch.tensor([[[0.3, 0.7], [0, 0], [4, 8]]])
    match = Match(torch.tensor([[1]]), torch.tensor([[2]]), torch.tensor([[0, 2]]))
    merged = merge_mean(tokens, torch.tensor([[1.0, 1, 3]]), match, places(match))
    assert merged[0, 1].tolist() == [3, 6]
    assert merged[0, 0].equal(tokens[0, 0])


def test_the_prior_alone_chooses_the_same_in_every_block() -> None:
    """Oracle 4 of the card: whatever the tokens are, those of the lowest prior leave."""
    prior = torch.tensor([[0.0, 0.5, -0.2, 0.9, 0.1, 0.4]])
    (method,) = parse_pipeline("sad-tm{alpha=0 prior=unread.json}")
    assert isinstance(method, SadTM)
    for seed in range(3):
        tokens = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(seed))
        match, weights = method.match(point(tokens, count=2, special=1, carried=prior))
        assert match.sources.tolist() == [[2, 4]]
        assert match.kept.tolist() == [[0, 1, 3, 5]]
        assert float(weights.min()) > 0


# -- calibration -------------------------------------------------------------------------------


def test_a_prior_is_measured_and_used(tmp_path: Path) -> None:
    model, path = encoders.build("vit"), tmp_path / "prior.json"
    samples = [{"pixel_values": encoders.images(1, seed)} for seed in range(3)]
    (method,) = parse_pipeline("sad-tm")

    def stop(done: int, total: int | None) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, samples, method, path, progress=stop)
    values = calibrate(model, samples, method, path)  # goes on from there
    rows = []
    for sample in samples:
        images = sample["pixel_values"].clone().requires_grad_()
        logits = model(images).logits
        torch.nn.functional.cross_entropy(logits, logits.argmax(-1)).backward()
        assert images.grad is not None
        largest = images.grad[0].abs().max(0).values
        patches = [
            largest[y : y + 8, x : x + 8].flatten()
            for y in range(0, 40, 8)
            for x in range(0, 40, 8)
        ]
        related = torch.corrcoef(torch.stack(patches).double())
        rows.append((related.sum(1) - 1) / 24)
    wanted = torch.stack(rows).mean(0)
    assert (torch.tensor(values["prior"]) - wanted).abs().max() <= 1e-5
    assert wanted.max() - wanted.min() > 1e-2
    stage = rewritten("vit", f"sad-tm{{mr=0.1 tau=1 prior={path}}}")
    oracle = vit.MergedEncoder(
        model,
        encoders.ENCODERS["vit"].parts,
        vit.sad_tm(0.5),
        COUNTS["sad-tm"],
        prop_attn=False,
        restore=False,
        prior=values["prior"],
    )
    images = encoders.images()
    agree(run(stage, images), outputs(oracle(pixel_values=images)))


def test_a_prior_of_a_vision_language_model(tmp_path: Path) -> None:
    model = zoo.build("llava", layers=1)
    samples = [zoo.inputs("llava", batch=2)]
    (method,) = parse_pipeline("sad-tm")
    values = calibrate(model, samples, method, tmp_path / "prior.json")
    assert len(values["prior"]) == 16
    with pytest.raises(PreconditionError, match="there are no images among input_ids"):
        common_saliency(model, {"input_ids": samples[0]["input_ids"]}, 16)
    with pytest.raises(PreconditionError, match="are not made of 17 square patches"):
        common_saliency(model, samples[0], 17)
    with pytest.raises(PreconditionError, match="holds no logits"):
        common_saliency(encoders.build("clip"), {"pixel_values": encoders.images()}, 25)
