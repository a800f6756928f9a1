"""What a model holds of prompts is what its own generation goes on from."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache

from tests.drafts import TOLERANCE, ids, model
from vlmopt.errors import PreconditionError
from vlmopt.speculative.capture import DraftTree, capture_draft, capture_target
from vlmopt.speculative.decoders import text_decoder
from vlmopt.speculative.distribution import Sampling
from vlmopt.speculative.drafters import PromptLookup
from vlmopt.speculative.eagle import EagleDecoder, EagleHead
from vlmopt.speculative.loop import Prefilled
from vlmopt.speculative.prompts import guidance_batch, prefill
from vlmopt.speculative.session import SpeculativeSession


def read(language_model: Any, inputs: dict[str, Tensor]) -> Prefilled:
    return prefill(language_model, text_decoder(language_model), inputs)


def go_on(language_model: Any, start: Prefilled, count: int) -> Tensor:
    """What is said behind the prompts, int64 ``[branches, count]``, token by token."""
    decoder, cache, mask = text_decoder(language_model), DynamicCache(), start.present
    for layer, (keys, values) in enumerate(start.past):
        cache.update(keys, values, layer)
    said = [start.logits.argmax(-1)]
    while len(said) < count:
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        result = decoder(
            said[-1][:, None],
            attention_mask=mask.long(),
            position_ids=(start.position + len(said) - 1)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        said.append(result.logits[:, -1].argmax(-1))
    return torch.stack(said, 1)


def generated(language_model: Any, inputs: dict[str, Tensor], count: int) -> Tensor:
    found = language_model.generate(
        **inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return found[:, -count:]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "qwen3_vl", "internvl", "smolvlm"])
def test_prompts_with_images(name: str) -> None:
    """Of unequal length, so that one is padded."""
    whole, inputs = zoo.build(name, layers=2), zoo.inputs(name, batch=2)
    whole.generation_config.eos_token_id = None
    with torch.no_grad():
        start = read(whole, inputs)
        assert go_on(whole, start, 6).equal(generated(whole, inputs, 6))
        for sample in range(2):
            one = read(whole, zoo.alone(inputs, sample))
            real = start.present[sample]
            torch.testing.assert_close(start.features[sample, real], one.features[0], **TOLERANCE)
            assert start.position[sample] == one.position[0]
            for found, wanted in zip(start.past, one.past, strict=True):
                for kept, alone in zip(found, wanted, strict=True):
                    torch.testing.assert_close(kept[sample][:, real], alone[0], **TOLERANCE)


def test_positions_behind_images() -> None:
    """16 tokens of an image take 4 positions, those of its longer side."""
    inputs = zoo.inputs("qwen2_5_vl", batch=2)
    start = read(zoo.build("qwen2_5_vl", layers=1), inputs)
    assert start.position.equal(inputs["attention_mask"].sum(1) - 16 + 4)


def test_guidance_of_two_lengths() -> None:
    prompts = guidance_batch(ids(7, 1), ids(3, 2), 0)
    assert prompts["attention_mask"].tolist() == [[1] * 7, [0] * 4 + [1] * 3]
    assert prompts["input_ids"][1].tolist() == [0] * 4 + ids(3, 2)[0].tolist()
    start = read(model(), prompts)
    assert start.present.equal(prompts["attention_mask"].bool())
    assert start.position.tolist() == [7, 3]
    other = guidance_batch(ids(3, 2), ids(7, 1), 0)
    assert other["input_ids"].equal(prompts["input_ids"].flip(0))


def test_prompts_that_are_embeddings() -> None:
    text = ids(6, 1, 2)
    embeds = model().get_input_embeddings()(text).detach()
    start, wanted = (
        read(model(), {"inputs_embeds": embeds}),
        read(model(), {"input_ids": text}),
    )
    assert start.features.equal(wanted.features) and start.present.equal(wanted.present)
    assert start.present.all() and start.position.tolist() == [6, 6]


def test_the_models_own_settings_change_nothing() -> None:
    language_model, text = model(), {"input_ids": ids(6, 1)}
    wanted = read(language_model, text)
    config = language_model.generation_config
    before = config.to_dict()
    try:
        config.update(num_beams=3, cache_implementation="static", guidance_scale=2.0)
        found = read(language_model, text)
    finally:
        config.update(**before)
    assert found.features.equal(wanted.features)
    assert [keys.shape for keys, _ in found.past] == [keys.shape for keys, _ in wanted.past]


def test_padding_on_the_right() -> None:
    prompts = guidance_batch(ids(7, 1), ids(3, 2), 0)
    with pytest.raises(PreconditionError, match="must end with a token of each"):
        read(model(), {name: value.flip(1) for name, value in prompts.items()})


def test_no_prompt() -> None:
    with pytest.raises(PreconditionError, match=r"among the inputs \(attention_mask\)"):
        read(model(), {"attention_mask": torch.ones(1, 3)})


def test_layers_that_do_not_keep_all() -> None:
    windows = model("mistral", sliding_window=4)
    with pytest.raises(PreconditionError, match="layer 0 keeps keys of 3 tokens of a prompt of 9"):
        read(windows, {"input_ids": ids(9, 1)})
    with pytest.raises(PreconditionError, match="layer 0 keeps keys of 0 tokens"):
        read(zoo.build("lfm2_vl", layers=2), zoo.inputs("lfm2_vl"))


def test_prompts_read_in_chunks() -> None:
    language_model = model()
    config = language_model.generation_config
    config.prefill_chunk_size = 4
    try:
        with pytest.raises(PreconditionError, match=r"to read \[1, 9\] tokens at once, and read"):
            read(language_model, {"input_ids": ids(9, 1)})
    finally:
        config.prefill_chunk_size = None


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "internvl"])
def test_text_about_images_is_that_of_the_model(name: str) -> None:
    """Drafted by a head that knows nothing, and by looking the text up: nothing is lost."""
    whole, inputs = zoo.build(name, layers=2), zoo.inputs(name)
    decoder, trees = text_decoder(whole), DraftTree(depth=3, width=3, nodes=8)
    config = whole.generation_config
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    wanted = whole.generate(**inputs, max_new_tokens=24, do_sample=False)
    wanted = wanted[0, inputs["input_ids"].shape[1] :]
    start = prefill(whole, decoder, inputs)
    capacity = start.present.shape[1] + 24 + trees.room
    target = capture_target(decoder, trees, capacity=capacity)
    torch.manual_seed(0)
    drafter = EagleDecoder(decoder, EagleHead.for_target(decoder)).eval()
    head = capture_draft(drafter, trees, capacity=capacity)
    for draft in (head, PromptLookup(trees.depth)):
        session = SpeculativeSession(target, draft, backend="eager")
        found = session.generate(
            start,
            max_new_tokens=24,
            sampling=Sampling(temperature=0.0),
            stop=[end for end in ends if end is not None],
        )
        assert found.tokens.equal(wanted)
    assert found.statistics.tokens_per_forward > 1
