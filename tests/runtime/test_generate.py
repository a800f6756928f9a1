"""Generation with dropped tokens, token by token against the masked eager model."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from oracles.masked import MaskOracle
from safetensors.torch import load_file
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import vlmopt
from vlmopt.errors import PreconditionError

TEXT = "v2drop{layers=1,3 keep=0.5}"
CUTS = {1: 0.5, 3: 0.5}

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def inputs() -> Tensors:
    return zoo.inputs("llava", batch=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return zoo.build("llava")


@pytest.fixture(scope="module")
def optimized(model: Any, inputs: Tensors) -> Any:
    return vlmopt.optimize(model, inputs, TEXT, backend="eager")


class Counting(LogitsProcessor):
    """Tells the oracle how many tokens there are, which a cache of the masked model also knows."""

    def __init__(self, oracle: MaskOracle) -> None:
        self.oracle = oracle

    def __call__(self, input_ids: Any, scores: torch.Tensor) -> torch.Tensor:
        self.oracle.seen = input_ids.shape[1] + 1
        return scores


def generate_masked(
    model: Any, inputs: Tensors, cuts: dict[int, float], *, rows: int = 1, **how: Any
) -> torch.Tensor:
    """What the untouched model generates when it cannot see the dropped tokens.

    Args:
        rows: rows that ``generate`` makes of each sample (beams, or sampled sequences).
    """
    visual = (inputs["input_ids"] == zoo.IMAGE).repeat_interleave(rows, 0)
    oracle = MaskOracle(model, visual, cuts)
    torch.manual_seed(0)
    with oracle.active():
        out: torch.Tensor = model.generate(**inputs, logits_processor=[Counting(oracle)], **how)
    return out


def generate(optimized: Any, inputs: Tensors, **how: Any) -> torch.Tensor:
    torch.manual_seed(0)
    out: torch.Tensor = optimized.generate(**inputs, **how)
    return out


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_greedy_generation_of_a_padded_batch(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, batch=2)
    how = {"max_new_tokens": 64, "min_new_tokens": 64, "do_sample": False}
    wanted = generate_masked(model, inputs, CUTS, **how)
    got = generate(vlmopt.optimize(model, inputs, TEXT, backend="eager"), inputs, **how)
    assert got.shape[1] == inputs["input_ids"].shape[1] + 64
    assert got.tolist() == wanted.tolist()


@pytest.mark.parametrize(
    ("rows", "how"),
    [
        (1, {"max_new_tokens": 1}),
        (1, {"max_new_tokens": 20, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2}),
        (1, {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7, "top_p": 0.9}),
        (1, {"max_new_tokens": 20, "do_sample": True, "top_k": 5}),
        (3, {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 3}),
        (3, {"max_new_tokens": 12, "num_beams": 3}),
        (3, {"max_new_tokens": 12, "num_beams": 3, "num_return_sequences": 2}),
        (1, {"max_new_tokens": 4, "use_cache": False}),
    ],
    ids=str,
)
def test_ways_to_generate(
    model: Any, optimized: Any, inputs: Tensors, rows: int, how: dict[str, Any]
) -> None:
    how = {"do_sample": False, **how}
    wanted = generate_masked(model, inputs, CUTS, rows=rows, **{**how, "use_cache": True})
    assert generate(optimized, inputs, **how).tolist() == wanted.tolist()


def test_samples_end_at_their_own_time(model: Any, optimized: Any, inputs: Tensors) -> None:
    prompt = inputs["input_ids"].shape[1]
    free = generate_masked(model, inputs, CUTS, max_new_tokens=30, do_sample=False)
    first, second = free[:, prompt:].tolist()
    end = next(token for token in first[3:] if token not in second[: first.index(token) + 3])
    how = {"max_new_tokens": 30, "do_sample": False, "eos_token_id": end, "pad_token_id": 0}
    wanted = generate_masked(model, inputs, CUTS, **how)
    assert (wanted[0] == end).any()
    assert wanted[0, -1] != wanted[1, -1]
    assert generate(optimized, inputs, **how).tolist() == wanted.tolist()


def test_streaming_and_what_else_generate_gives_back(optimized: Any, inputs: Tensors) -> None:
    class Collecting(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[int] = []
            self.ended = False

        def put(self, value: torch.Tensor) -> None:
            self.pieces += value.flatten().tolist()

        def end(self) -> None:
            self.ended = True

    one = {key: value[1:] for key, value in inputs.items()}  # the sample without padding
    streamer = Collecting()
    how = GenerationConfig(
        max_new_tokens=12,
        do_sample=False,
        return_dict_in_generate=True,
        output_scores=True,
        output_logits=True,
        pad_token_id=0,
    )
    out = optimized.generate(**one, generation_config=how, streamer=streamer)
    assert streamer.pieces == out.sequences[0].tolist()
    assert streamer.ended
    assert len(out.scores) == len(out.logits) == 12
    chosen = torch.stack(out.logits, 1).argmax(-1)
    assert torch.equal(chosen, out.sequences[:, -12:])
    lengths = [layer.keys.shape[2] for layer in out.past_key_values.layers]
    assert lengths[0] == lengths[1] + 8 == lengths[3] + 12


def test_stopping_criteria(optimized: Any, inputs: Tensors) -> None:
    class After(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> torch.Tensor:
            enough = input_ids.shape[1] >= inputs["input_ids"].shape[1] + 3
            return torch.full((input_ids.shape[0],), enough)

    out = generate(
        optimized, inputs, max_new_tokens=9, do_sample=False, stopping_criteria=[After()]
    )
    assert out.shape[1] == inputs["input_ids"].shape[1] + 3


@pytest.mark.parametrize(
    ("family", "images"),
    [("llava", (2, 1)), ("llava", (1, 0, 2)), ("internvl", (1, 2)), ("qwen3_vl", (2, 1))],
)
def test_samples_with_different_numbers_of_images(family: str, images: tuple[int, ...]) -> None:
    model = zoo.build(family)
    inputs = zoo.inputs(family, batch=len(images), images=images, text=(6, 9, 4)[: len(images)])
    _check_batch(model, inputs, TEXT, CUTS)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_images_of_different_sizes(family: str) -> None:
    model, inputs = zoo.build(family), _two_sizes()
    _check_batch(model, inputs, TEXT, CUTS)
    optimized = vlmopt.optimize(model, inputs, TEXT, backend="eager")
    patches = [64, 32]
    with torch.no_grad():
        both = optimized(**inputs)
    for sample, pixels in enumerate(inputs["pixel_values"].split(patches)):
        real = inputs["attention_mask"][sample].bool()
        single = {key: inputs[key][sample : sample + 1] for key in ("input_ids", "attention_mask")}
        single = {key: value[:, real] for key, value in single.items()}
        single["mm_token_type_ids"] = (single["input_ids"] == zoo.IMAGE).long()
        single |= {
            "pixel_values": pixels,
            "image_grid_thw": inputs["image_grid_thw"][sample : sample + 1],
        }
        with torch.no_grad():
            alone = vlmopt.optimize(model, single, TEXT, backend="eager")(**single)
        kept = both.past_key_values.kept["kept_2_slots"][sample]
        ours = both.logits[sample][(kept >= 0) & real[kept.clamp(min=0)]]
        assert (ours - alone.logits[0]).abs().max() <= 1e-5


def _two_sizes() -> Tensors:
    """Two prompts of Qwen's: an image of 16 tokens, and a shorter one of 8."""
    rows = [[1, 9, 6, *[zoo.IMAGE] * 16, 7, 11, 12, 13], [1, 9, 6, *[zoo.IMAGE] * 8, 7, 14, 15]]
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "mm_token_type_ids": (ids == zoo.IMAGE).long(),
        "pixel_values": torch.randn(64 + 32, 384, generator=generator),
        "image_grid_thw": torch.tensor([[1, 8, 8], [1, 4, 8]]),
    }


def _check_batch(model: Any, inputs: Tensors, text: str, cuts: dict[int, float]) -> None:
    """Same tokens, logits and 16 generated tokens as the masked model."""
    oracle = MaskOracle(model, inputs["input_ids"] == zoo.IMAGE, cuts)
    with torch.no_grad(), oracle.active():
        reference = model(**inputs).logits
    optimized = vlmopt.optimize(model, inputs, text, backend="eager")
    with torch.no_grad():
        out = optimized(**inputs)
    kept = out.past_key_values.kept[f"kept_{len(cuts)}_slots"]
    slots = kept.clamp(min=0)
    real = (kept >= 0) & inputs["attention_mask"].gather(1, slots).bool()
    for sample, wanted in enumerate(oracle.present & inputs["attention_mask"].bool()):
        assert kept[sample][real[sample]].tolist() == torch.nonzero(wanted)[:, 0].tolist()
    at = slots[..., None].expand(-1, -1, reference.shape[-1])
    assert (out.logits - reference.gather(1, at))[real].abs().max() <= 1e-5
    how = {"max_new_tokens": 16, "min_new_tokens": 16, "do_sample": False}
    wanted = generate_masked(model, inputs, cuts, **how)
    assert generate(optimized, inputs, **how).tolist() == wanted.tolist()


def test_prompts_without_images_are_untouched(optimized: Any, model: Any) -> None:
    prompt = torch.tensor([[1, 9, 10, 11]])
    with torch.no_grad():
        assert torch.equal(optimized(input_ids=prompt).logits, model(input_ids=prompt).logits)
        labelled = optimized(input_ids=prompt, labels=prompt).loss
        assert torch.equal(labelled, model(input_ids=prompt, labels=prompt).loss)
    how = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(optimized.generate(prompt, **how), model.generate(prompt, **how))


def test_a_new_shape_of_prompt_is_captured_once(model: Any) -> None:
    inputs, longer = zoo.inputs("llava"), zoo.inputs("llava", text=(12,), seed=1)
    optimized = vlmopt.optimize(model, inputs, TEXT, backend="eager")
    engine = optimized.vlmopt
    assert len(engine.specialisations) == 1
    how = {"max_new_tokens": 8, "do_sample": False}
    for _ in range(2):
        wanted = generate_masked(model, longer, CUTS, **how)
        assert generate(optimized, longer, **how).tolist() == wanted.tolist()
        assert len(engine.specialisations) == 2
    assert engine.program["language_model"].facts["tokens"] == longer["input_ids"].shape[1]


def test_the_users_model_is_left_alone(model: Any, inputs: Tensors) -> None:
    with torch.no_grad():
        before = model(**inputs).logits
        modules, attributes = dict(model.named_modules()), set(vars(model))
        vlmopt.optimize(model, inputs, TEXT, backend="eager")(**inputs)
        assert dict(model.named_modules()) == modules
        assert set(vars(model)) == attributes
        assert torch.equal(model(**inputs).logits, before)


def test_the_twin_has_the_weights_of_the_model(model: Any, optimized: Any, tmp_path: Path) -> None:
    mine, theirs = optimized.state_dict(), model.state_dict()
    assert list(mine) == list(theirs)
    assert all(mine[key].data_ptr() == theirs[key].data_ptr() for key in theirs)
    optimized.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[key], theirs[key]) for key in theirs)
    assert load_file(tmp_path / "model.safetensors")


def test_threads_do_not_meet(optimized: Any, inputs: Tensors) -> None:
    how = {"max_new_tokens": 6, "do_sample": False}
    swapped = {key: value.flip(0) for key, value in inputs.items()}
    wanted = [optimized.generate(**batch, **how).tolist() for batch in (inputs, swapped)]
    got: dict[int, Any] = {}

    def work(number: int) -> None:
        got[number] = optimized.generate(**(inputs, swapped)[number % 2], **how).tolist()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [got[number] for number in range(4)] == wanted * 2


def test_gradients_are_those_of_the_masked_model(
    model: Any, optimized: Any, inputs: Tensors
) -> None:
    weight = model.get_input_embeddings().weight

    def gradient(loss: torch.Tensor) -> torch.Tensor:
        (result,) = torch.autograd.grad(loss, weight)
        return result

    out = optimized(**inputs)
    kept = out.past_key_values.kept["kept_2_slots"]
    oracle = MaskOracle(model, inputs["input_ids"] == zoo.IMAGE, CUTS)
    with oracle.active():
        reference = model(**inputs).logits
    reference = reference.gather(1, kept[..., None].expand(-1, -1, reference.shape[-1]))
    real = inputs["attention_mask"].gather(1, kept).bool()
    ours, wanted = gradient(out.logits[real].sin().sum()), gradient(reference[real].sin().sum())
    assert wanted.abs().max() > 0.1
    assert (ours - wanted).abs().max() <= 1e-4


def test_forward_takes_what_the_models_does(optimized: Any, inputs: Tensors) -> None:
    with torch.no_grad():
        whole = optimized(**inputs)
        assert optimized(**inputs, use_cache=False).past_key_values is None
        last = optimized(**inputs, logits_to_keep=1).logits
        positional = optimized(
            inputs["input_ids"], inputs["pixel_values"], inputs["attention_mask"]
        ).logits
        assert optimized(**inputs, return_dict=False)[0].shape == whole.logits.shape
    assert torch.equal(positional, whole.logits)
    assert (last - whole.logits[:, -1:]).abs().max() <= 1e-6
    with torch.inference_mode():
        assert torch.equal(optimized(**inputs).logits, whole.logits)


def refusals() -> Iterator[Any]:
    yield pytest.param(
        lambda model, inputs: model.generate(**inputs, cache_implementation="static"),
        "a StaticCache holds equally many tokens in each layer",
        id="static cache",
    )
    yield pytest.param(
        lambda model, inputs: model.generate(
            **{key: value[1:] for key, value in inputs.items()}, prompt_lookup_num_tokens=2
        ),
        "the cache of a model with dropped tokens cannot be cropped",
        id="assisted",
    )
    for flag in ("output_attentions", "output_hidden_states"):
        yield pytest.param(
            lambda model, inputs, flag=flag: model(**inputs, **{flag: True}),
            f"an optimized model does not return what {flag} asks for",
            id=flag,
        )
    yield pytest.param(
        lambda model, inputs: model(**inputs, labels=inputs["input_ids"]),
        "returns logits for the tokens left, which labels do not match",
        id="labels",
    )
    yield pytest.param(
        lambda model, inputs: model(**inputs, logits_to_keep=torch.tensor([3, 4])),
        "logits_to_keep lists tokens by position",
        id="logits_to_keep",
    )
    yield pytest.param(_second_turn, "only one token at a time can be decoded", id="second turn")
    for name, change in (
        ("deepcopy", copy.deepcopy),
        ("half", lambda model: model.half()),
        ("to", lambda model: model.to(torch.bfloat16)),
    ):
        yield pytest.param(
            lambda model, inputs, change=change: change(model),
            "shares its weights with the original",
            id=name,
        )
    yield pytest.param(lambda model, inputs: model.train(), "is captured in eval mode", id="train")


def _second_turn(model: Any, inputs: Tensors) -> Any:
    first = model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True)
    more = torch.cat([first.sequences, torch.full((2, 3), 9)], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 6, dtype=torch.int64)], 1)
    return model.generate(
        input_ids=more, attention_mask=mask, past_key_values=first.past_key_values
    )


@pytest.mark.parametrize(("action", "text"), list(refusals()))
def test_what_would_be_wrong_is_refused(
    optimized: Any, model: Any, inputs: Tensors, action: Any, text: str
) -> None:
    before = next(model.parameters()).dtype
    with pytest.raises(PreconditionError, match=text) as raised:
        action(optimized, inputs)
    assert raised.value.hint
    assert next(model.parameters()).dtype == before
    assert not model.training


def test_a_prompt_of_embeddings_runs_untouched_and_says_so(
    optimized: Any, model: Any, inputs: Tensors
) -> None:
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    prompt = {"inputs_embeds": embeddings, "attention_mask": inputs["attention_mask"]}
    with pytest.warns(UserWarning, match="does not show which tokens come from vision"):
        out = optimized(**prompt).logits
    assert torch.equal(out, model(**prompt).logits)
