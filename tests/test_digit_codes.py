"""The bundled models that draw digits code by code."""

from __future__ import annotations

from functools import cache
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from train_digit_codes import agreement

from vlmopt import digit_codes, digits
from vlmopt.digit_codes import CODE_WIDTH, CODES, NO_CLASS, TOKENS, VOCABULARY
from vlmopt.digit_diffusion import labels_in_turn, load_judge, pixels_of
from vlmopt.errors import OptionError
from vlmopt.speculative.distribution import Sampling, guided
from vlmopt.speculative.eagle import EagleDecoder

GREEDY = Sampling(temperature=0, guidance=2.0)


@cache
def model() -> Any:
    return digit_codes.load_model()


@cache
def samples(number: int = 40) -> tuple[Tensor, Tensor]:
    labels = labels_in_turn(number)
    return digit_codes.sample(model(), labels), labels


def test_bundled_models_are_the_documented_ones() -> None:
    folder = digit_codes.asset_dir()
    vq, head = digit_codes.load_vq(), digit_codes.load_draft_head()
    card = (folder / "README.md").read_text(encoding="utf-8")
    for part in (vq, model(), head):
        assert not part.training
        assert all(weight.dtype == torch.float32 for weight in part.parameters())
        assert f"{sum(weight.numel() for weight in part.parameters()):,} parameters" in card
    assert f"{CODES} codes, width {CODE_WIDTH}" in card
    assert model().config.vocab_size == VOCABULARY == NO_CLASS + 1
    assert model().config._attn_implementation == "sdpa"
    files = [path for path in folder.iterdir() if path.suffix == ".safetensors"]
    assert len(files) == 3
    assert sum(path.stat().st_size for path in files) < 12_000_000


def test_weights_are_stored_in_half_precision() -> None:
    for load in (digit_codes.load_vq, digit_codes.load_model, digit_codes.load_draft_head):
        half, full = load(torch.float16).state_dict(), load().state_dict()
        assert half.keys() == full.keys()
        assert all(half[name].float().equal(full[name]) for name in full)


def test_images_survive_their_codes() -> None:
    drawn, labels = digits.heldout_digits()
    images, vq = pixels_of(drawn), digit_codes.load_vq()
    codes = vq.encode(images)
    assert codes.shape == (len(images), TOKENS)
    assert len(codes.unique()) > 0.5 * CODES
    again = digit_codes.decode(codes)
    assert again.shape == images.shape
    assert again.min() >= -1 and again.max() <= 1
    assert (again - images).square().mean() < 0.1 * images.var()
    assert load_judge().accuracy(again, labels) >= 0.95
    assert digit_codes.decode(codes[:5], vq).equal(again[:5])


def test_codes_stand_for_themselves() -> None:
    vq = digit_codes.load_vq()
    assert vq.nearest(vq.codebook).equal(torch.arange(CODES))
    torch.testing.assert_close(vq.codebook.norm(dim=-1), torch.ones(CODES), atol=1e-3, rtol=0)
    twice = torch.cat([vq.codebook[7:8], vq.codebook[3:4]])
    assert vq.nearest(twice.view(1, 2, CODE_WIDTH)).tolist() == [[7, 3]]


def test_samples_show_the_digits_asked_for() -> None:
    codes, labels = samples()
    assert codes.shape == (len(labels), TOKENS)
    assert codes.max() < CODES
    assert load_judge().accuracy(digit_codes.decode(codes), labels) >= 0.8


def test_prompts_of_both_halves() -> None:
    assert digit_codes.prompts([3, 0]).tolist() == [[CODES + 3], [CODES], [NO_CLASS], [NO_CLASS]]
    assert digit_codes.prompts(torch.tensor([9])).tolist() == [[CODES + 9], [NO_CLASS]]
    with pytest.raises(OptionError) as caught:
        digit_codes.prompts([4, 10])
    assert str(caught.value) == (
        "labels from 4 to 10 are not all digits\n"
        "  try: labels are 0 to 9; the half without a class is added here"
    )


def test_logits_of_codes_alone() -> None:
    given = torch.cat([digit_codes.prompts([8]), torch.tensor([[3, 5], [3, 5]])], 1)
    with torch.no_grad():
        found = digit_codes.code_decoder(model())(given).logits
        assert found.equal(model()(given).logits[..., :CODES])
    weight = digit_codes.code_decoder(model()).head.weight
    assert cast(Tensor, weight).data_ptr() == model().lm_head.weight.data_ptr()


def test_generate_gives_codes_alone() -> None:
    """Even where the logits of all digits are the largest."""
    given = digit_codes.prompts([2])[:1]
    kept = model().lm_head.weight.data[CODES:].clone()
    try:
        model().lm_head.weight.data[CODES:] = model().lm_head.weight.data[:CODES].mean(0) * 30
        written = model().generate(given)
    finally:
        model().lm_head.weight.data[CODES:] = kept
    assert written.shape == (1, 1 + TOKENS)
    assert written[:, 1:].max() < CODES


def test_seeds_and_guidance_matter() -> None:
    codes = digit_codes.sample(model(), [3])
    assert digit_codes.sample(model(), torch.tensor([3])).equal(codes)
    assert not digit_codes.sample(model(), [3], seed=1).equal(codes)
    assert not digit_codes.sample(model(), [3], Sampling(top_k=20)).equal(codes)


def test_greedy_samples_are_those_of_generate() -> None:
    labels = torch.arange(4)
    given, free = digit_codes.prompts(labels).chunk(2)
    written = model().generate(
        given, do_sample=False, guidance_scale=GREEDY.guidance, negative_prompt_ids=free
    )
    assert written.shape == (4, 1 + TOKENS)  # of itself: nothing was said of length
    assert digit_codes.sample(model(), labels, GREEDY).equal(written[:, 1:])


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(OptionError) as caught:
        digit_codes.decode(torch.zeros(1, TOKENS + 1, dtype=torch.int64))
    assert str(caught.value) == (
        "codes have the shape [1, 65]\n  try: an image has 64 codes: [images, 64], prompts cut off"
    )
    with pytest.raises(OptionError) as caught:
        digit_codes.decode(torch.arange(CODES - TOKENS + 1, CODES + 1)[None])
    assert str(caught.value) == (
        "tokens from 193 to 256 are not all codes\n"
        "  try: codes are 0 to 255; behind them come the digits of prompts"
    )


def test_the_draft_head_knows_the_next_code() -> None:
    """Far better than the most frequent code, which is what a head that knows nothing can give."""
    codes, labels = samples()
    head = digit_codes.load_draft_head()
    found = agreement(model(), head, codes, labels, 2.0)
    with torch.no_grad():
        logits = digit_codes.code_decoder(model())(
            torch.cat([digit_codes.prompts(labels), codes[:, :-1].repeat(2, 1)], 1)
        ).logits
    chances = guided(logits[:, 1:], 2.0).softmax(-1)
    commonest = chances.argmax(-1).flatten().bincount().max() / chances[..., 0].numel()
    assert found.top[0] > commonest + 0.25
    assert found.top[0] < found.top[1] < found.top[2] <= 1
    assert found.mass[0] < found.mass[1] < found.mass[2] <= 1
    assert found.depths[0] == found.top[0] > found.depths[-1] > commonest


def test_the_draft_head_runs_with_its_target() -> None:
    target = digit_codes.code_decoder(model())
    tokens = torch.cat([digit_codes.prompts([5]), samples()[0][5:6, :20].repeat(2, 1)], 1)
    with torch.no_grad():
        read = target(tokens)
        guessed = EagleDecoder(target, digit_codes.load_draft_head())(
            tokens[:, 1:], read.hidden_states[:, :-1]
        )
    assert guessed.logits.shape == (2, 20, CODES)
    near = (guessed.hidden_states - read.hidden_states[:, 1:]).square().mean()
    assert near < 0.5 * read.hidden_states[:, 1:].var()
