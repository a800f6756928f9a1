"""Trains the small vision-language models that are bundled with vlmopt.

A model is a ``LlavaForConditionalGeneration``: a CLIP vision tower, a two-layer projector and a
Llama decoder. It answers questions about scenes of handwritten digits (see ``vlmopt.digits``). The
digits are those of scikit-learn; one fifth of the images is held out, and the finished model is
measured on scenes made of these alone, by greedy generation from prompts the processor built. With
``--experts`` the decoder is a Mixtral, and training begins with the weights of the bundled dense
model. The cards of the bundled models name the commands that made them.

Example:

    OMP_NUM_THREADS=2 python tools/train_digit_vlm.py --out build/digit_vlm --threads 2
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from digit_training import (
    CHECKPOINT,
    LICENCE,
    Meter,
    Pace,
    add_arguments,
    begin,
    command_line,
    descend,
    learning_rate,
    parameter_groups,
    read_arguments,
    repeatability,
    save_tensors,
    written_to,
)
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt import digits
from vlmopt.digits import CELL_PIXELS, EMPTY, GRID, IMAGE_PIXELS, KINDS, Question, QuestionKind

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedConfig,
        PreTrainedTokenizerFast,
    )

PATCH_PIXELS = 8
PATCHES_PER_SIDE = IMAGE_PIXELS // PATCH_PIXELS
VISUAL_TOKENS = PATCHES_PER_SIDE**2
HIDDEN = 128
HEADS = 4
VISION_LAYERS = 3
DECODER_LAYERS = 8
VISION_FFN = 384
DECODER_FFN = 320

# Of the weights of experts that begin as slices of a dense network, noise to deviation.
UPCYCLING_NOISE = 0.3
# Logits of routers then differ by about 1: they read normalised vectors of HIDDEN values.
ROUTER_STD = HIDDEN**-0.5

QUESTIONS_PER_SCENE: dict[QuestionKind, int] = {"position": 5, "count": 4, "presence": 3}
WARMUP = 0.02  # share of training
# Greatest share of the time limit that goes into the vision tower alone.
VISION_TIME_SHARE = 0.2
# Stages of the curriculum: (share of training at which the stage ends, least and greatest number of
# filled cells). Sparse scenes come first: there the right cell is easy to find, so the decoder soon
# learns to look at the image at all.
CURRICULUM = ((0.03, (1, 1)), (0.08, (2, 4)), (0.20, (2, 8)), (1.0, (3, 14)))


@dataclass(frozen=True)
class DigitSplit:
    """Digit images for training and held-out ones.

    Attributes:
        train_images: uint8 ``[M, 8, 8]``, intensity 0..16.
        train_labels: int64 ``[M]``.
        heldout_images: uint8 ``[N, 8, 8]``, intensity 0..16.
        heldout_labels: int64 ``[N]``.
    """

    train_images: Tensor
    train_labels: Tensor
    heldout_images: Tensor
    heldout_labels: Tensor


def split_digits(heldout_share: float = 0.2, seed: int = 0) -> DigitSplit:
    """Splits scikit-learn's handwritten digits by image, the same share of every digit held out.

    Args:
        heldout_share: share of the images of each digit that is held out, 0..1.
        seed: seed of the draw.

    Returns:
        The split; no held-out image is byte-equal to a training image.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8)
    labels = torch.from_numpy(data.target).long()
    rng = random.Random(seed)
    heldout: list[int] = []
    for digit in range(10):
        members = (labels == digit).nonzero().flatten().tolist()
        heldout.extend(rng.sample(members, round(len(members) * heldout_share)))
    heldout.sort()
    unseen = {images[index].numpy().tobytes() for index in heldout}
    train = [i for i in range(len(labels)) if images[i].numpy().tobytes() not in unseen]
    return DigitSplit(images[train], labels[train], images[heldout], labels[heldout])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer for the questions and answers of ``vlmopt.digits``."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<unk>", "<image>"]
    asking = ["which", "digit", "is", "at", "row", "column", "how", "many", "are", "there", "a"]
    words = ["USER:", "ASSISTANT:", *asking, "?", "yes", "no", digits.NO_DIGIT]
    vocabulary = special + [str(digit) for digit in range(10)] + words
    index = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(index, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", index["<s>"])]
    )
    wrap = cast(Any, PreTrainedTokenizerFast)  # transformers leaves it untyped
    wrapped = wrap(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=["<image>"],
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    return cast("PreTrainedTokenizerFast", wrapped)


def build_processor() -> LlavaProcessor:
    """The processor: Pillow image processing, the word-level tokenizer, image token expansion."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    build = cast(Any, LlavaProcessor)  # transformers leaves it untyped
    processor = build(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=PATCH_PIXELS,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" takes off again
        chat_template=(
            "{% for message in messages %}"
            "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
            "{% if message['content'] is string %}{{ message['content'] + ' ' }}{% else %}"
            "{% for part in message['content'] %}"
            "{{ '<image> ' if part['type'] == 'image' else part['text'] + ' ' }}"
            "{% endfor %}{% endif %}"
            "{% endfor %}"
            "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
        ),
    )
    return cast("LlavaProcessor", processor)


@dataclass(frozen=True)
class Mixture:
    """Size of the mixtures of experts of a decoder.

    Attributes:
        experts: of each layer.
        top: experts that each token takes.
        width: inner width of an expert; a divisor of ``DECODER_FFN``.
    """

    experts: int
    top: int
    width: int


def text_config(tokenizer: PreTrainedTokenizerFast, mixture: Mixture | None) -> PreTrainedConfig:
    """Of the decoder: Llama, or with experts Mixtral, whose attention is the same."""
    from transformers import LlamaConfig, MixtralConfig

    shape: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": HIDDEN,
        "num_hidden_layers": DECODER_LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS,
        "max_position_embeddings": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rms_norm_eps": 1e-6,
        "initializer_range": 0.05,
        "tie_word_embeddings": True,
        **special_ids(tokenizer),
    }
    if mixture is None:
        return LlamaConfig(intermediate_size=DECODER_FFN, **shape)
    return MixtralConfig(
        intermediate_size=mixture.width,
        num_local_experts=mixture.experts,
        num_experts_per_tok=mixture.top,
        **shape,
    )


def special_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Ids of the special tokens, as configurations name them."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    return {name: getattr(tokenizer, name) for name in names}


def build_model(
    tokenizer: PreTrainedTokenizerFast, mixture: Mixture | None = None
) -> LlavaForConditionalGeneration:
    """A freshly initialised model; seed torch first for a repeatable one."""
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=HIDDEN,
        intermediate_size=VISION_FFN,
        num_hidden_layers=VISION_LAYERS,
        num_attention_heads=HEADS,
        image_size=IMAGE_PIXELS,
        patch_size=PATCH_PIXELS,
        projection_dim=HIDDEN,
        hidden_act="gelu",
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text_config(tokenizer, mixture),
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_select_strategy="default",
        # The tower has no layer to spare, so its last one is used, not the one before it.
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config)
    greedy = cast(Any, GenerationConfig)(
        do_sample=False, max_new_tokens=4, **special_ids(tokenizer)
    )
    model.generation_config = greedy
    return model


@torch.no_grad()
def upcycle(
    model: LlavaForConditionalGeneration, dense: LlavaForConditionalGeneration, mixture: Mixture
) -> None:
    """Begins a mixture of experts with the weights of a dense model, in place.

    An expert begins as a slice of the feed-forward network and noise, so that experts that begin
    with the same slice differ; all else but the routers, which stay random, is copied (sparse
    upcycling, arXiv 2212.05055).

    Args:
        model: with experts, freshly initialised.
        dense: of the same shape without experts.
        mixture: size of the mixtures.
    """
    weights = dense.state_dict()
    own = model.state_dict()  # shares memory with the model
    for name in own.keys() & weights.keys():
        own[name].copy_(weights[name])

    def noisy(weight: Tensor) -> Tensor:
        return weight + UPCYCLING_NOISE * weight.std() * torch.randn_like(weight)

    slices = DECODER_FFN // mixture.width
    layers = zip(model.get_decoder().layers, dense.get_decoder().layers, strict=True)
    for layer, from_layer in layers:
        experts, network = layer.mlp.experts, from_layer.mlp
        for expert in range(mixture.experts):
            start = expert % slices * mixture.width
            part = slice(start, start + mixture.width)
            inward = torch.cat([network.gate_proj.weight[part], network.up_proj.weight[part]])
            experts.gate_up_proj[expert] = noisy(inward)
            # weights of experts sum to 1, slices to the whole
            experts.down_proj[expert] = noisy(network.down_proj.weight[:, part] * slices)
        layer.mlp.gate.weight.normal_(std=ROUTER_STD)


class PackedQuestions:
    """Packs many questions about one scene into one sequence.

    The sequence is the prompt up to and including the visual tokens, once, then one block per
    question. A block sees the shared part and itself only, and its positions go on where the shared
    part ends, so every question is computed just as if it had been asked alone, at a fraction of
    the cost. Blocks of one kind have one length, which makes the mask the same for all scenes.
    """

    def __init__(self, processor: LlavaProcessor) -> None:
        self._tokenizer = cast("PreTrainedTokenizerFast", cast(Any, processor).tokenizer)
        self._blocks: dict[Question, list[int]] = {}
        whole = self._encode(digits.prompt("?").replace("<image>", "<image>" * VISUAL_TOKENS))
        image_id = cast(int, self._tokenizer.convert_tokens_to_ids("<image>"))
        self.first_visual = whole.index(image_id)
        self.prefix = torch.tensor(whole[: self.first_visual + VISUAL_TOKENS])
        words = [*map(str, range(10)), digits.NO_DIGIT]
        self.digit_words = [self._encode(word)[1] for word in words]
        examples: dict[QuestionKind, Question] = {
            "position": Question("position", "which digit is at row 1 column 1?", "0"),
            "count": Question("count", "how many 0 are there?", "0"),
            "presence": Question("presence", "is there a 0?", "no"),
        }
        self.kinds = [kind for kind in KINDS for _ in range(QUESTIONS_PER_SCENE[kind])]
        self._lengths = [len(self._block(examples[kind])) for kind in self.kinds]
        shared = len(self.prefix)
        total = shared + sum(self._lengths)
        block = torch.zeros(total, dtype=torch.long)
        positions = torch.arange(total)
        self.answer_slots: list[int] = []
        start = shared
        for number, length in enumerate(self._lengths, start=1):
            block[start : start + length] = number
            positions[start : start + length] = torch.arange(shared, shared + length)
            # A block ends with the answer: the token before predicts it, it predicts the end.
            self.answer_slots += [start + length - 2, start + length - 1]
            start += length
        causal = torch.ones(total, total).tril().bool()
        same = block[:, None] == block[None, :]
        self.mask = (causal & (same | (block == 0)[None, :]))[None, None]
        self.positions = positions[None]

    def _encode(self, text: str) -> list[int]:
        return cast("list[int]", self._tokenizer(text)["input_ids"])

    def _block(self, question: Question) -> list[int]:
        if question not in self._blocks:
            text = f"{digits.prompt(question.text)} {question.answer}"
            ids = self._encode(text.replace("USER: <image> ", ""))[1:]
            if self._tokenizer.unk_token_id in ids:
                raise ValueError(f"the tokenizer lacks a word of {text!r}")
            self._blocks[question] = ids
        return self._blocks[question]

    def pack(self, questions: list[list[Question]]) -> tuple[Tensor, Tensor]:
        """Token ids and targets.

        Args:
            questions: per scene, one question for each entry of ``self.kinds``.

        Returns:
            ids: int64 ``[B, T]``; targets: int64 ``[B, 2 * len(self.kinds)]``, for each question
            the answer and the end of sequence, to be predicted at ``self.answer_slots``.
        """
        end = cast(int, self._tokenizer.eos_token_id)
        ids, targets = [], []
        for asked in questions:
            blocks = [self._block(question) for question in asked]
            if [len(block) for block in blocks] != self._lengths:
                raise ValueError("questions do not fit the block lengths")
            ids.append(self.prefix.tolist() + [token for block in blocks for token in block])
            targets.append([token for block in blocks for token in (block[-1], end)])
        return torch.tensor(ids), torch.tensor(targets)


class Probe(nn.Module):
    """Losses that supervise the vision side directly; used in training only.

    Every visual token has to name the digit of its cell, by likeness to the decoder's own word
    embeddings, and to tell the cell's row and column; the class token has to tell which digits
    occur. The decoder then starts from tokens that already say what stands where, and only has to
    learn to look them up.

    Args:
        words: token ids of the ten digits and of the word for an empty cell, in this order.
    """

    def __init__(self, words: list[int]) -> None:
        super().__init__()
        self.words = words
        self.scene = nn.Linear(HIDDEN, 10)
        self.place = nn.Linear(HIDDEN, 2 * GRID)

    def forward(
        self, visual: Tensor, pooled: Tensor, embedding: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss, scalar, and share of visual tokens that name their cell rightly, scalar.

        Args:
            visual: float ``[B, VISUAL_TOKENS, HIDDEN]``, projected visual tokens.
            pooled: float ``[B, HIDDEN]``, the tower's class token.
            embedding: float ``[vocabulary, HIDDEN]``, the decoder's word embeddings.
            labels: int64 ``[B, GRID, GRID]``.
        """
        scale = PATCHES_PER_SIDE // GRID
        target = labels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)
        target = torch.where(target == EMPTY, 10, target)
        side = torch.arange(PATCHES_PER_SIDE) // scale
        row = side.repeat_interleave(PATCHES_PER_SIDE).expand_as(target)
        column = side.repeat(PATCHES_PER_SIDE).expand_as(target)
        tokens = F.rms_norm(visual.float(), (HIDDEN,))
        place = self.place(tokens).flatten(0, 1).chunk(2, dim=-1)
        place_loss = F.cross_entropy(place[0], row.flatten())
        place_loss = place_loss + F.cross_entropy(place[1], column.flatten())
        logits = tokens @ embedding[self.words].T
        cell_loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        present = F.one_hot(target, 11).amax(1)[:, :10].float()
        scene_loss = F.binary_cross_entropy_with_logits(self.scene(pooled).float(), present)
        accuracy = (logits.argmax(-1) == target).float().mean()
        return cell_loss + place_loss + scene_loss, accuracy


def augment(tiles: Tensor, generator: torch.Generator) -> Tensor:
    """Random affine distortion and contrast per cell, noise per scene.

    Args:
        tiles: float ``[B, GRID * GRID, CELL_PIXELS, CELL_PIXELS]``, grey level 0..255.
        generator: source of randomness.

    Returns:
        The same shape, grey level 0..255, rounded to whole levels as in a real image.
    """
    scenes, cells = tiles.shape[:2]
    number = scenes * cells

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(number, generator=generator) * (high - low) + low

    angle = uniform(-0.22, 0.22)
    shear = uniform(-0.18, 0.18)
    wide, tall = uniform(0.88, 1.15), uniform(0.88, 1.15)
    shift = 2 * 1.5 / CELL_PIXELS
    matrix = torch.stack(
        [
            wide * angle.cos(),
            wide * (shear - angle.sin()),
            uniform(-shift, shift),
            tall * angle.sin(),
            tall * angle.cos(),
            uniform(-shift, shift),
        ],
        dim=-1,
    ).view(number, 2, 3)
    size = [number, 1, CELL_PIXELS, CELL_PIXELS]
    grid = F.affine_grid(matrix, size, align_corners=False)
    flat = F.grid_sample(tiles.reshape(size), grid, mode="bilinear", align_corners=False)
    flat = flat * uniform(0.65, 1.15)[:, None, None, None]
    strength = 25.0 * torch.rand(scenes, 1, 1, 1, generator=generator).square()
    noise = torch.randn(tiles.shape, generator=generator) * strength
    return (flat.view(tiles.shape) + noise).clamp(0, 255).round()


def normalise(images: Tensor) -> Tensor:
    """Model input for scene images, equal to what the processor gives.

    Args:
        images: ``[B, IMAGE_PIXELS, IMAGE_PIXELS]``, grey level 0..255.

    Returns:
        float32 ``[B, 3, IMAGE_PIXELS, IMAGE_PIXELS]``, -1..1.
    """
    return (images.float() / 127.5 - 1.0)[:, None].expand(-1, 3, -1, -1)


def encode(model: LlavaForConditionalGeneration, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Visual tokens as the decoder gets them.

    Args:
        model: the model.
        pixels: float32 ``[B, 3, IMAGE_PIXELS, IMAGE_PIXELS]``.

    Returns:
        visual: float ``[B, VISUAL_TOKENS, HIDDEN]``, after the projector; pooled: float
        ``[B, HIDDEN]``, the vision tower's class token.
    """
    core = cast(Any, model).model
    tower = core.vision_tower(pixel_values=pixels, output_hidden_states=True)
    return core.multi_modal_projector(tower.hidden_states[-1][:, 1:]), tower.pooler_output


def decode(
    model: LlavaForConditionalGeneration, packed: PackedQuestions, visual: Tensor, ids: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Logits for packed questions, and those of routers.

    Args:
        model: the model.
        packed: the packing that made ``ids``.
        visual: float ``[B, VISUAL_TOKENS, HIDDEN]``, projected visual tokens.
        ids: int64 ``[B, T]``.

    Returns:
        Float ``[B, len(packed.answer_slots), vocabulary]``; of each layer that has experts, float
        ``[B * T, experts]``.
    """
    core = cast(Any, model).model
    embeds = core.get_input_embeddings()(ids)
    first, last = packed.first_visual, packed.first_visual + VISUAL_TOKENS
    embeds = torch.cat([embeds[:, :first], visual.to(embeds.dtype), embeds[:, last:]], dim=1)
    routed = hasattr(core.language_model.config, "num_local_experts")
    result = core.language_model(
        inputs_embeds=embeds,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
        **({"output_router_logits": True} if routed else {}),
    )
    logits = model.lm_head(result.last_hidden_state[:, packed.answer_slots])
    return logits, tuple(result.router_logits) if routed else ()


def balance_loss(routed: tuple[Tensor, ...], top: int) -> Tensor:
    """Load-balancing loss, scalar: the number of chosen experts where their load is even.

    Args:
        routed: logits of routers, float ``[tokens, experts]`` each.
        top: experts that each token takes.
    """
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    return cast(Tensor, load_balancing_loss_func(routed, routed[0].shape[-1], top))


def check_packing(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    packed: PackedQuestions,
    split: DigitSplit,
) -> None:
    """Raises unless packed questions and the model's own forward pass give the same logits."""
    rng = random.Random(0)
    scene = digits.make_scene(rng, split.train_images, split.train_labels)
    asked = [digits.make_question(rng, scene, kind) for kind in packed.kinds]
    ids, _ = packed.pack([asked])
    with torch.no_grad():
        visual, _ = encode(model, normalise(scene.image[None]))
        ours, _ = decode(model, packed, visual, ids)
        inputs = digits.batch(processor, [scene] * len(asked), asked)
        theirs = cast(Any, model)(**inputs).logits[:, -1]
    torch.testing.assert_close(ours[0, ::2], theirs, atol=1e-3, rtol=1e-3)


def filled_cells(progress: float) -> tuple[int, int]:
    """Least and greatest number of filled cells at a point of the curriculum."""
    return next(filled for end, filled in CURRICULUM if progress <= end or end == 1.0)


class SceneSource:
    """Endless augmented training scenes.

    Args:
        split: digit images; only the training part is used.
        batch: scenes per batch.
        seed: seed of scenes, questions and augmentation.
    """

    def __init__(self, split: DigitSplit, batch: int, seed: int) -> None:
        self.split = split
        self.batch = batch
        self.rng = random.Random(seed)
        self._generator = torch.Generator().manual_seed(seed)
        tiles = digits.make_tiles(split.train_images).float()
        # The blank tile comes last, where EMPTY, as an index, points.
        self._tiles = torch.cat([tiles, torch.zeros(1, CELL_PIXELS, CELL_PIXELS)])

    def draw(self, filled: tuple[int, int]) -> tuple[list[digits.Scene], Tensor, Tensor]:
        """Scenes, their augmented pixels and their labels.

        Args:
            filled: least and greatest number of filled cells.

        Returns:
            The scenes; float32 ``[batch, 3, IMAGE_PIXELS, IMAGE_PIXELS]``; int64
            ``[batch, GRID, GRID]``.
        """
        images, labels = self.split.train_images, self.split.train_labels
        scenes = [
            digits.make_scene(self.rng, images, labels, filled=filled, palette=(2, 10))
            for _ in range(self.batch)
        ]
        sources = torch.stack([scene.sources.flatten() for scene in scenes])
        pixels = normalise(digits.compose(augment(self._tiles[sources], self._generator)))
        return scenes, pixels, torch.stack([scene.labels for scene in scenes])


@dataclass
class Outcome:
    """What training took.

    Attributes:
        steps: optimiser steps taken, those of the vision tower alone not counted.
        minutes: wall-clock time in minutes.
    """

    steps: int
    minutes: float


def train_vision(
    model: LlavaForConditionalGeneration,
    probe: Probe,
    source: SceneSource,
    options: argparse.Namespace,
) -> None:
    """Teaches the vision tower and the projector to read, in place, without the decoder.

    Args:
        model: the model.
        probe: the losses.
        source: training scenes.
        options: the command line's options.
    """
    core = cast(Any, model).model
    embedding = core.get_input_embeddings().weight
    trained = nn.ModuleList([core.vision_tower, core.multi_modal_projector, probe])
    groups = [*parameter_groups(trained, options.weight_decay)]
    groups.append({"params": [embedding], "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    meter = Meter()
    pace = Pace(options.vision_steps, options.minutes * VISION_TIME_SHARE)
    for progress in pace:
        rate = learning_rate(progress, options.lr, WARMUP)
        _, pixels, labels = source.draw(CURRICULUM[-1][1])
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            visual, pooled = encode(model, pixels)
        loss, accuracy = probe(visual, pooled, embedding, labels)
        descend(loss, optimizer, trained, rate)
        meter.add(loss=loss.item(), tokens=accuracy.item())
        if pace.steps % options.log_every == 0:
            print(f"vision {pace.steps:5d}  lr {rate:.1e}  {meter.report()}", flush=True)


def train(
    model: LlavaForConditionalGeneration,
    packed: PackedQuestions,
    split: DigitSplit,
    options: argparse.Namespace,
) -> Outcome:
    """Trains ``model`` in place on the training digits.

    Args:
        model: the model.
        packed: packing of the questions.
        split: digit images; only the training part is used.
        options: the command line's options.
    """
    started = saved = time.monotonic()
    source = SceneSource(split, options.batch, options.seed)
    probe = Probe(packed.digit_words)
    embedding = cast(Any, model).get_input_embeddings().weight
    model.train()
    train_vision(model, probe, source, options)

    groups = [*parameter_groups(model, options.weight_decay), *parameter_groups(probe, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    columns = {kind: [i for i, k in enumerate(packed.kinds) if k == kind] for kind in KINDS}
    meter = Meter()
    pace = Pace(options.steps, options.minutes - (time.monotonic() - started) / 60)
    for progress in pace:
        rate = learning_rate(progress, options.lr, WARMUP)
        # What has been upcycled knows how to look.
        filled = CURRICULUM[-1][1] if options.experts else filled_cells(progress)
        scenes, pixels, labels = source.draw(filled)
        ids, targets = packed.pack(
            [[digits.make_question(source.rng, s, kind) for kind in packed.kinds] for s in scenes]
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            visual, pooled = encode(model, pixels)
            logits, routed = decode(model, packed, visual, ids)
        logits = logits.float()
        probe_loss, tokens = probe(visual, pooled, embedding, labels)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        whole = loss + options.probe_weight * probe_loss
        if routed:
            balance = balance_loss(routed, options.top)
            whole = whole + options.balance_weight * balance
            meter.add(balance=balance.item())
        descend(whole, optimizer, model, rate)
        right = (logits[:, ::2].argmax(-1) == targets[:, ::2]).float()
        shares = {kind: right[:, columns[kind]].mean().item() for kind in KINDS}
        meter.add(loss=loss.item(), tokens=tokens.item(), **shares)
        if pace.steps % options.log_every == 0:
            minutes = (time.monotonic() - started) / 60
            print(
                f"step {pace.steps:5d}  {minutes:5.1f} min  {100 * progress:5.1f} %  "
                f"filled {filled[0]}-{filled[1]}  lr {rate:.1e}  {meter.report()}",
                flush=True,
            )
        if time.monotonic() - saved > 60 * options.checkpoint_minutes:
            weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
            save_tensors(weights, options.out / CHECKPOINT)
            saved = time.monotonic()
    model.train(False)
    return Outcome(pace.steps, (time.monotonic() - started) / 60)


def model_card(
    model: LlavaForConditionalGeneration,
    tallies: dict[QuestionKind, digits.Tally],
    outcome: Outcome,
    split: DigitSplit,
    options: argparse.Namespace,
) -> str:
    """The model card, in Markdown, with the measured accuracies."""
    import transformers

    rows = "\n".join(
        f"| {kind} | {tally.correct} / {tally.total} | {100 * tally.accuracy:.1f} % |"
        for kind, tally in tallies.items()
    )
    overall = total_tally(tallies)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    precision = "bfloat16 autocast" if options.bfloat16 else "float32"
    attention = f"{DECODER_LAYERS} layers, width {HIDDEN}, {HEADS} heads"
    if options.experts:
        title, purpose = "Digit VLM with experts", "skipping experts"
        decoder = (
            f"Mixtral, {attention}, {options.experts} experts of inner width "
            f"{options.expert_width}, {options.top} for each token"
        )
        start = (
            "begins with the bundled dense model, experts with slices of its feed-forward network\n"
            f"  and noise (sparse upcycling); load-balancing loss times {options.balance_weight:g}"
        )
        files = "The held-out digits are those beside the dense model."
    else:
        title, purpose = "Digit VLM", "token pruning"
        decoder = f"Llama, {attention}, feed-forward {DECODER_FFN}"
        start = "cells fill up in stages (a curriculum)"
        files = (
            f"`{digits.HELDOUT_FILE}` holds the held-out images (`images`, uint8 [N, 8, 8], "
            "intensity 0..16)\nand their digits (`labels`, uint8 [N])."
        )
    alone = (
        " The vision tower and projector\n"
        f"  are first trained on these alone for {options.vision_steps} steps."
        if options.vision_steps
        else ""
    )
    threads = f"{options.threads} CPU thread{'' if options.threads == 1 else 's'}"
    names = ("experts", "top", "expert_width", "balance_weight") if options.experts else ()
    names += (
        *("vision_steps", "steps", "minutes", "batch", "lr", "weight_decay", "probe_weight"),
        *("seed", "threads", "bfloat16", "store_bfloat16"),
    )
    stored = "bfloat16" if options.store_bfloat16 else "float32"
    return f"""---
license: other
pipeline_tag: image-text-to-text
library_name: transformers
tags: [llava, tiny, handwritten-digits]
---

# {title}

A vision-language model of {parameters:,} parameters, small enough to ship with vlmopt and to run
on any CPU, yet a genuine `LlavaForConditionalGeneration` with learnt weights: what {purpose}
costs it can be read off its answers. It is a test subject and no use for anything else.

## Architecture

| part | shape |
| --- | --- |
| input | RGB image of {IMAGE_PIXELS} x {IMAGE_PIXELS} pixels, patches of {PATCH_PIXELS} x \
{PATCH_PIXELS} |
| vision tower | CLIP, {VISION_LAYERS} layers, width {HIDDEN}, {HEADS} heads, class token |
| visual tokens | {VISUAL_TOKENS} (last layer, class token dropped) |
| projector | two linear layers with GELU |
| decoder | {decoder} |
| tokenizer | word level, {model.get_input_embeddings().num_embeddings} tokens, left padding |
| weights | {stored} |

## Task

An image is a {GRID} x {GRID} grid of cells, {CELL_PIXELS} pixels wide, 4 to 12 of which hold a
handwritten digit. A prompt is `USER: <image> QUESTION ASSISTANT:`, and QUESTION one of

- `which digit is at row 2 column 3?` - a digit, or `{digits.NO_DIGIT}` if the cell is empty
  (one question in ten);
- `how many 7 are there?` - `0` to `{digits.MAX_COUNT}`;
- `is there a 7?` - `yes` or `no`.

## Held-out accuracy

Greedy `generate` from prompts built by the processor; the answer must match exactly. Every question
is about a scene of its own, made only of digit images that training never saw
({len(split.heldout_labels)} images; the split is by image, so writers may occur on both sides).
The draw is `vlmopt.digits.heldout_samples({overall.total}, seed={options.eval_seed})`.

| question | right | accuracy |
| --- | --- | --- |
{rows}
| all | {overall.correct} / {overall.total} | {100 * overall.accuracy:.1f} % |

## Training

- Data: {len(split.train_labels)} digit images of scikit-learn's `load_digits`, placed in random
  scenes, with small random rotation, shear, scaling, shift, contrast and noise.
- Schedule: {start}, AdamW, peak learning rate
  {options.lr:g}, cosine decay, {outcome.steps} steps of {options.batch} scenes with
  {sum(QUESTIONS_PER_SCENE.values())} questions each, {precision}.
- Auxiliary losses, training only: each projected visual token names the digit, the row and the
  column of its cell, and the class token tells which digits occur.{alone}
- Cost: {outcome.minutes:.0f} minutes on {threads}; seed {options.seed}; \
torch {torch.__version__}, transformers {transformers.__version__}.

```
{command_line("train_digit_vlm.py", options, names)}
```

{repeatability(outcome.steps < options.steps)}

## Files

{files}

{LICENCE.rstrip()} Changes: one fifth of the images was
selected and stored as uint8.
"""


def total_tally(tallies: dict[QuestionKind, digits.Tally]) -> digits.Tally:
    """Sum over the question kinds."""
    right = sum(tally.correct for tally in tallies.values())
    return digits.Tally(right, sum(tally.total for tally in tallies.values()))


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description="Train the digit vision-language model bundled with vlmopt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_arguments(
        parser,
        steps=5000,
        minutes=40.0,
        batch=24,
        samples="scenes",
        threads=2,
        log_every=20,
        checkpoint_minutes=5.0,
    )
    parser.add_argument("--vision-steps", type=int, default=1500, help="steps without the decoder")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="AdamW weight decay")
    parser.add_argument(
        "--experts", type=int, default=0, help="experts of each layer; begins with the dense model"
    )
    parser.add_argument("--top", type=int, default=4, help="experts that each token takes")
    parser.add_argument("--expert-width", type=int, default=64, help="inner width of an expert")
    parser.add_argument(
        "--balance-weight", type=float, default=0.01, help="load-balancing loss weight"
    )
    parser.add_argument("--probe-weight", type=float, default=0.5, help="auxiliary loss weight")
    parser.add_argument(
        "--store-bfloat16", action="store_true", help="write weights in bfloat16, half the size"
    )
    parser.add_argument("--eval-questions", type=int, default=3000, help="held-out questions")
    parser.add_argument("--eval-seed", type=int, default=1, help="seed of the held-out scenes")
    return read_arguments(parser, arguments)


def mixture_of(options: argparse.Namespace) -> Mixture | None:
    """The mixture that the command line asks for."""
    if not options.experts:
        return None
    return Mixture(options.experts, options.top, options.expert_width)


def main(arguments: list[str] | None = None) -> int:
    """Trains, measures and writes the model; returns the exit status."""
    options = parse_arguments(arguments)
    if not begin(options):
        return 2
    split = split_digits()
    processor = build_processor()
    mixture = mixture_of(options)
    model = build_model(cast(Any, processor).tokenizer, mixture)
    model.train(False)
    if mixture is not None:
        upcycle(model, digits.load_model()[0], mixture)
    packed = PackedQuestions(processor)
    check_packing(model, processor, packed, split)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(
        f"{parameters:,} parameters, {VISUAL_TOKENS} visual tokens, "
        f"{len(split.train_labels)} training and {len(split.heldout_labels)} held-out digits",
        flush=True,
    )
    outcome = train(model, packed, split, options)
    print(f"trained {outcome.steps} steps in {outcome.minutes:.1f} minutes", flush=True)

    with written_to(options.out) as folder:
        if options.store_bfloat16:
            model.to(torch.bfloat16)
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if mixture is None:
            heldout = {
                "images": split.heldout_images,
                "labels": split.heldout_labels.to(torch.uint8),
            }
            save_tensors(heldout, folder / digits.HELDOUT_FILE)
        # Measured on what was written, not on what is in memory.
        saved_model, saved_processor = digits.load_model(folder=folder)
        samples = digits.draw_samples(
            random.Random(options.eval_seed),
            split.heldout_images,
            split.heldout_labels,
            options.eval_questions,
        )
        tallies = digits.evaluate(saved_model, saved_processor, samples)
        card = model_card(saved_model, tallies, outcome, split, options)
        (folder / "README.md").write_text(card, encoding="utf-8")

    for kind, tally in [*tallies.items(), ("all", total_tally(tallies))]:
        print(f"{kind:10s} {tally.correct:5d} / {tally.total:5d}  {100 * tally.accuracy:.2f} %")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
