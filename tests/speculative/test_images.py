"""What generates images is taken out of models, and generates the images that they do."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor
from transformers import DynamicCache

from tests.drafts import (
    BRANCHING,
    CAPACITY,
    PLACES,
    TOLERANCE,
    ids,
    read,
    read_text,
)
from tests.image_models import CODES, GRID, IMAGE_MODELS, PAD, PROMPT, autoencoder, build
from vlmopt.errors import PreconditionError
from vlmopt.program import Role
from vlmopt.rewrite.drafted import verify_stage
from vlmopt.runtime.buffered import BufferedStage
from vlmopt.runtime.draft_cache import DraftCache
from vlmopt.speculative import tree
from vlmopt.speculative.block import block_of
from vlmopt.speculative.images import ImageDecoder, ImageLayout, image_decoder
from vlmopt.speculative.prompts import Prefilled, guidance_batch, prefill
from vlmopt.tracing import export_stage

every_model = pytest.mark.parametrize("name", IMAGE_MODELS)


def decoder_of(name: str) -> ImageDecoder:
    return image_decoder(build(name), **IMAGE_MODELS[name].options())


def tokens_of(decoder: ImageDecoder, found: Tensor) -> Tensor:
    """Ids as the whole model knows them."""
    return found if decoder.ids is None else decoder.ids[found]


def write(decoder: ImageDecoder, start: Prefilled, scale: float) -> Tensor:
    """A greedy image behind a prompt, token by token, int64 ``[1, tokens]``."""
    cache, mask = DynamicCache(), start.mask
    for layer, (keys, values) in enumerate(start.past):
        cache.update(keys, values, layer)
    logits, found = decoder.head(start.features[:, -1]), []
    for index in range(decoder.tokens):
        scores = logits[0] if len(logits) == 1 else logits[1] + scale * (logits[0] - logits[1])
        allowed = decoder.allowed(index)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        found.append(scores.argmax())
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        result = decoder(
            found[-1].expand(len(mask), 1),
            attention_mask=mask.long(),
            position_ids=(start.next_position + index)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = result.logits[:, -1]
    return torch.stack(found)[None]


@every_model
@pytest.mark.parametrize("scale", [None, 3.0])
def test_the_image_is_that_of_the_model(name: str, scale: float | None) -> None:
    model, family, decoder = build(name), IMAGE_MODELS[name], decoder_of(name)
    without = None if scale is None else family.without
    prompts = {"input_ids": PROMPT} if without is None else guidance_batch(PROMPT, without, PAD)
    with torch.no_grad():
        wanted = family.write(model, without, scale or 1.0)
        found = write(decoder, prefill(model, prompts), scale or 1.0)
    assert tokens_of(decoder, found).equal(wanted)
    assert found.shape[1] == decoder.tokens
    assert len(found[0].unique()) >= 4  # or any loop would find it


def test_guidance_changes_the_image() -> None:
    """So that the test above says something."""
    for name, family in IMAGE_MODELS.items():
        with torch.no_grad():
            images = [family.write(build(name), w, 3.0) for w in (None, family.without)]
        assert not images[0].equal(images[1]), name


def stage_of(decoder: ImageDecoder, batch: int, places: int) -> BufferedStage:
    given = torch.zeros(batch, places, dtype=torch.int64)
    positions = torch.arange(places).expand(batch, -1)
    stage, _ = export_stage(
        "language_model",
        decoder,
        {"input_ids": given, "position_ids": positions, "use_cache": True, "return_dict": True},
    )
    stage.facts.update(batch=batch, tokens=places)
    return BufferedStage(verify_stage(stage, CAPACITY), "eager")


@every_model
@pytest.mark.parametrize("batch", [1, 2])
def test_each_path_of_a_draft_is_its_own_image(name: str, batch: int) -> None:
    """Codes, and one of the other tokens that an image is written with."""
    decoder = decoder_of(name)
    stage, nodes = stage_of(decoder, batch, PLACES), torch.tensor(BRANCHING)
    image, draft = ids(11, 2, batch) % CODES, ids(len(nodes), 3, batch) % CODES
    image[:, 5] = decoder.layout.vocabulary - 1
    cache, block = DraftCache(stage.stage), block_of(nodes, PLACES)
    read_text(cache, stage, image)
    hidden = read(cache, stage, draft, block)
    for row in tree.paths(nodes):
        path = row[row >= 0]
        line = torch.cat([image, draft[:, path]], 1)
        with torch.no_grad():
            found = decoder.head(hidden[:, path])
            wanted = IMAGE_MODELS[name].logits(build(name), tokens_of(decoder, line))
        wanted = wanted[:, image.shape[1] :]
        wanted = wanted if decoder.ids is None else wanted[..., decoder.ids]
        torch.testing.assert_close(found, wanted, **TOLERANCE)


def test_the_stage_gives_logits_of_its_ids_and_hidden_states() -> None:
    stage = stage_of(decoder_of("emu3"), 1, PLACES).stage
    for role, width in ((Role.LOGITS, CODES + 4), (Role.HIDDEN_STATES, 32)):
        (port,) = stage.find_outputs(role)
        assert stage.output_node(port).meta["val"].shape == (1, PLACES, width)


def test_pixels_are_those_of_the_model() -> None:
    model, decoder = build("janus"), decoder_of("janus")
    codes = ids(16, 1, 2) % CODES
    found = decoder.decode(codes)
    with torch.no_grad():
        assert found.permute(0, 2, 3, 1).equal(model.decode_image_tokens(codes))
        assert found.equal(decoder_of("llama").decode(codes))
    assert found.shape == (2, 3, 8, 8) and not found[0].equal(found[1])


def test_pixels_of_rows_with_ends() -> None:
    model, decoder = build("emu3"), decoder_of("emu3")
    rows, columns = GRID
    lines = (ids(rows * columns, 1, 2) % CODES).view(2, rows, columns)
    ends = torch.full((2, rows, 1), CODES)
    found = torch.cat([lines, ends], 2).flatten(1)
    found = torch.cat([found, torch.tensor([[CODES + 1, CODES + 2, CODES + 3]] * 2)], 1)
    for index in range(decoder.tokens):
        allowed = decoder.allowed(index)
        assert allowed is not None and bool(allowed[found[:, index]].all())
    pixels = decoder.decode(found)
    wanted = model.decode_image_tokens(
        image_tokens=tokens_of(decoder, found), height=rows, width=columns
    )
    assert pixels.equal(wanted) and pixels.shape == (2, 3, 2 * rows, 2 * columns)


def test_weights_are_shared() -> None:
    """All but the rows of a head over more than an image is written with."""
    for name in IMAGE_MODELS:
        decoder, known = decoder_of(name), {id(p) for p in build(name).parameters()}
        known |= {id(p) for p in decoder.autoencoder.parameters()}
        copies = [key for key, p in decoder.named_parameters() if id(p) not in known]
        assert copies == ([] if name == "janus" else ["head.weight"])
        assert decoder.codebook.equal(decoder.autoencoder.quantize.embedding.weight)
        assert decoder.codes == CODES == len(decoder.codebook)


def test_a_head_over_codes_alone_is_shared() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    shape: dict[str, Any] = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**shape, intermediate_size=48, vocab_size=CODES))
    assert image_decoder(model, autoencoder=autoencoder()).head is model.lm_head


def test_places_of_an_image() -> None:
    layout = ImageLayout(10, 2, 3, 10, (11, 12))
    assert layout.tokens == 10 and layout.vocabulary == 13
    places = [layout.forced(index) for index in range(10)]
    assert places == [None, None, None, 10, None, None, None, 10, 11, 12]
    plain = ImageLayout(10, 2, 3)
    assert plain.tokens == 6 and plain.vocabulary == 10
    assert {plain.forced(index) for index in range(6)} == {None}
    found = layout.codes_of(torch.tensor([[0, 1, 2, 10, 3, 4, 5, 10, 11, 12]]))
    assert found.tolist() == [[[0, 1, 2], [3, 4, 5]]]
    for index in (-1, 10):
        with pytest.raises(PreconditionError, match=f"none at place {index}"):
            layout.forced(index)


def test_what_is_no_image() -> None:
    decoder = decoder_of("emu3")
    with pytest.raises(PreconditionError, match=re.escape("21 tokens, and these are [1, 20]")):
        decoder.decode(torch.zeros(1, 20, dtype=torch.int64))
    with pytest.raises(PreconditionError, match="another token stands where a code"):
        decoder.decode(torch.full((1, 21), CODES))


def test_a_model_that_only_encodes() -> None:
    """Its codes are decoded by another that has as many."""
    codes = torch.zeros(1, 16, dtype=torch.int64)
    with pytest.raises(PreconditionError, match="no pixels of codes"):
        decoder_of("chameleon").decode(codes)
    decoder = image_decoder(build("chameleon"), autoencoder=autoencoder())
    assert decoder.decode(codes).equal(decoder_of("janus").decode(codes))


def test_models_that_generate_no_images() -> None:
    with pytest.raises(PreconditionError, match="no vector-quantised autoencoder"):
        image_decoder(zoo.build("llava", layers=1))
    with pytest.raises(PreconditionError, match="has no codebook"):
        image_decoder(build("llama"), autoencoder=torch.nn.Linear(2, 2))
    lame = copy.copy(build("janus"))
    lame._modules = {**lame._modules, "model": copy.copy(lame.model)}
    inner = lame.model._modules
    lame.model._modules = {k: v for k, v in inner.items() if k != "generation_aligner"}
    with pytest.raises(PreconditionError, match="vocabulary of images, but no generation_aligner"):
        image_decoder(lame)
    lame.model._modules = {k: v for k, v in inner.items() if not k.startswith("generation")}
    with pytest.raises(PreconditionError, match="neither a head over them nor a table"):
        image_decoder(lame)


def test_sizes_of_images() -> None:
    with pytest.raises(PreconditionError, match="many sizes, and none was said"):
        image_decoder(build("emu3"))
    with pytest.raises(PreconditionError, match="at least 1 x 1"):
        image_decoder(build("emu3"), grid=(0, 3))
    with pytest.raises(PreconditionError, match="JanusVQVAE has 4 x 4"):
        image_decoder(build("janus"), grid=(4, 5))
    assert image_decoder(build("janus"), grid=(4, 4)).tokens == 16


def test_vocabularies_without_the_tokens() -> None:
    model, table = build("emu3"), build("emu3").vocabulary_mapping
    words = dict(table.vocab_map)
    for name, message in (
        ("<|image end|>", re.escape("no token for <|image end|>")),
        ("<|visual token 000007|>", "no token for code 7"),
    ):
        lame = copy.copy(model)
        lame._modules = {**lame._modules, "model": copy.copy(lame.model)}
        kept = {word: token for word, token in words.items() if word != name}
        lame.model.vocabulary_mapping = type(table)(kept)
        with pytest.raises(PreconditionError, match=message):
            image_decoder(lame, grid=GRID)
    more = copy.deepcopy(autoencoder())
    more.quantize.embedding = torch.nn.Embedding(CODES + 1, 8)
    with pytest.raises(PreconditionError, match="with 24 codes, and the autoencoder has 25"):
        image_decoder(build("janus"), autoencoder=more)
    small = zoo.build("llava", layers=1)
    small.lm_head = torch.nn.Linear(32, CODES - 1)
    with pytest.raises(PreconditionError, match=f"token {CODES - 1}, and the head of"):
        image_decoder(small, autoencoder=autoencoder())
    small.lm_head = torch.nn.Sequential(torch.nn.Linear(32, CODES))
    with pytest.raises(PreconditionError, match="is a Sequential, of which no rows"):
        image_decoder(small, autoencoder=autoencoder())
