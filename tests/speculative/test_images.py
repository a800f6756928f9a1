"""What generates images is taken out of models, and generates the images that they do."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace
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
from vlmopt import families
from vlmopt.errors import PreconditionError
from vlmopt.program import Role
from vlmopt.runtime.buffered import BufferedStage
from vlmopt.runtime.draft_cache import DraftCache
from vlmopt.speculative import tree
from vlmopt.speculative.block import block_of
from vlmopt.speculative.capture import VERIFY, DraftTree, capture_draft, capture_target
from vlmopt.speculative.distribution import Sampling
from vlmopt.speculative.drafters import Allowed, Context, Drafter
from vlmopt.speculative.eagle import EagleDecoder, EagleHead
from vlmopt.speculative.images import ImageDecoder, ImageLayout, image_decoder
from vlmopt.speculative.loop import Prefilled
from vlmopt.speculative.prompts import guidance_batch, prefill
from vlmopt.speculative.session import SpeculativeSession

every_model = pytest.mark.parametrize("name", IMAGE_MODELS)


def decoder_of(name: str) -> ImageDecoder:
    return image_decoder(build(name), **IMAGE_MODELS[name].options())


def tokens_of(decoder: ImageDecoder, found: Tensor) -> Tensor:
    """Ids as the whole model knows them."""
    return found if decoder.ids is None else decoder.ids[found]


def start_of(name: str, decoder: ImageDecoder, scale: float | None) -> Prefilled:
    inputs = {"input_ids": PROMPT}
    if scale is not None:
        inputs = guidance_batch(PROMPT, IMAGE_MODELS[name].without, PAD)
    return prefill(build(name), decoder, inputs)


def image_of(name: str, scale: float | None) -> Tensor:
    """As the model itself generates it: codes or tokens, int64 ``[tokens]``."""
    without = None if scale is None else IMAGE_MODELS[name].without
    with torch.no_grad():
        return IMAGE_MODELS[name].write(build(name), without, scale or 1.0)[0]


def write(decoder: ImageDecoder, start: Prefilled, scale: float | None) -> Tensor:
    """A greedy image behind a prompt, token by token, int64 ``[tokens]``."""
    cache, mask = DynamicCache(), start.present
    for layer, (keys, values) in enumerate(start.past):
        cache.update(keys, values, layer)
    logits, found = start.logits, []
    for index in range(decoder.tokens):
        scores = logits[0]
        if scale is not None:
            scores = logits[1] + scale * (logits[0] - logits[1])
        allowed = decoder.allowed(index)
        if allowed is not None:
            scores = scores.masked_fill(~allowed, -torch.inf)
        found.append(scores.argmax())
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        result = decoder(
            found[-1].expand(len(mask), 1),
            attention_mask=mask.long(),
            position_ids=(start.position + index)[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = result.logits[:, -1]
    return torch.stack(found)


with_and_without_guidance = pytest.mark.parametrize("scale", [None, 3.0])


@every_model
@with_and_without_guidance
def test_the_image_is_that_of_the_model(name: str, scale: float | None) -> None:
    decoder, wanted = decoder_of(name), image_of(name, scale)
    with torch.no_grad():
        found = write(decoder, start_of(name, decoder, scale), scale)
    assert tokens_of(decoder, found).equal(wanted)
    assert len(found) == decoder.tokens
    assert len(found.unique()) >= 4  # or any loop would find it


class Guesses(Drafter):
    """Two paths of two tokens behind the root, of an image that is known; every third is wrong."""

    def __init__(self, image: Tensor) -> None:
        self.image = torch.nn.functional.pad(image, (0, 2))
        self.wrong = 0

    def draft(
        self, context: Context, sampling: Sampling, allowed: Allowed | None
    ) -> tuple[Tensor, Tensor]:
        self.wrong += 1
        one, two = self.image[len(context.said) : len(context.said) + 2]
        one = (one + 1) % CODES if self.wrong % 3 == 0 else one
        other = torch.tensor(self.wrong * 5 % CODES)
        tokens = torch.stack([context.said[-1], other, one, two, two])
        return tokens, torch.tensor([-1, 0, 0, 1, 2])


@every_model
@with_and_without_guidance
def test_the_image_is_the_same_with_drafts(name: str, scale: float | None) -> None:
    decoder, wanted = decoder_of(name), image_of(name, scale)
    branches = 1 if scale is None else 2
    program = capture_target(
        decoder, DraftTree(depth=2, width=2, nodes=5), capacity=50, branches=branches
    )
    known = torch.arange(decoder.layout.vocabulary)
    known = (tokens_of(decoder, known) == wanted[:, None]).int().argmax(1)
    session = SpeculativeSession(
        program, Guesses(known), codebook=decoder.codebook, backend="eager"
    )
    found = session.generate(
        start_of(name, decoder, scale),
        max_new_tokens=decoder.tokens,
        sampling=Sampling(temperature=0.0, guidance=scale),
        allowed=decoder.allowed,
    )
    assert tokens_of(decoder, found.tokens).equal(wanted)
    accepted = set(found.statistics.accepted)
    assert 2 in accepted and accepted != {2}  # drafts, of which some were refused


@every_model
def test_the_image_is_the_same_with_a_draft_head(name: str) -> None:
    """An untrained one, of the target's kind."""
    decoder, wanted, trees = decoder_of(name), image_of(name, 3.0), DraftTree(2, 3, 6)
    torch.manual_seed(1)
    head = EagleHead.for_target(decoder)
    assert type(head.decoder) is type(decoder.decoder)
    inner: Any = decoder.decoder
    layer = sum(p.numel() for p in inner.layers[0].parameters())
    assert sum(p.numel() for p in head.parameters()) < 2 * layer  # one, and what joins two inputs
    program = capture_target(decoder, trees, capacity=50, branches=2)
    drafter = EagleDecoder(decoder, head).eval()
    draft = capture_draft(drafter, trees, capacity=50, branches=2)
    found = SpeculativeSession(program, draft, backend="eager").generate(
        start_of(name, decoder, 3.0),
        max_new_tokens=decoder.tokens,
        sampling=Sampling(temperature=0.0, guidance=3.0),
        allowed=decoder.allowed,
    )
    assert tokens_of(decoder, found.tokens).equal(wanted)


@every_model
def test_guidance_changes_the_image(name: str) -> None:
    """So that the tests above say something."""
    assert not image_of(name, None).equal(image_of(name, 3.0))


@every_model
def test_each_path_of_a_draft_is_its_own_image(name: str) -> None:
    """Codes, and one of the other tokens that an image is written with."""
    decoder, nodes = decoder_of(name), torch.tensor(BRANCHING)
    tree_of_places = DraftTree(depth=2, width=3, nodes=PLACES)
    program = capture_target(decoder, tree_of_places, capacity=CAPACITY)
    stage = BufferedStage(program[VERIFY], "eager")
    image, draft = ids(11, 2) % CODES, ids(len(nodes), 3) % CODES
    image[:, 5] = decoder.layout.vocabulary - 1
    cache = DraftCache(stage.stage)
    read_text(cache, stage, image)
    hidden = read(cache, stage, draft, block_of(nodes, PLACES))
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
    tree_of_places = DraftTree(depth=2, width=3, nodes=PLACES)
    stage = capture_target(decoder_of("emu3"), tree_of_places, capacity=CAPACITY)[VERIFY]
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
    assert decoder.allowed(decoder.tokens) is None  # a draft may reach there
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


def test_several_ends_of_a_sequence() -> None:
    """An image is written with the first."""
    table = build("emu3").vocabulary_mapping
    found = families.tokens_around_codes(table, SimpleNamespace(eos_token_id=[9, 3]))
    assert found == (51, {"<|extra_201|>": 52, "<|image end|>": 53, "eos_token_id": 9})


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
