"""Trains the small vision-language model that is bundled with vlmopt.

The model is a ``LlavaForConditionalGeneration``: a CLIP vision tower, a two-layer projector and a
Llama decoder. It answers questions about scenes of handwritten digits (see ``vlmopt.digits``). The
digits are those of scikit-learn; one fifth of the images is held out, and the finished model is
measured on scenes made of these alone, by greedy generation from prompts the processor built.

Example:

    OMP_NUM_THREADS=2 python tools/train_digit_vlm.py --out build/digit_vlm --threads 2
"""

from __future__ import annotations

import argparse
import math
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt import digits
from vlmopt.digits import CELL_PIXELS, EMPTY, GRID, IMAGE_PIXELS, KINDS, Question, QuestionKind

if TYPE_CHECKING:
    from transformers import (
        LlavaForConditionalGeneration,
        LlavaProcessor,
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

QUESTIONS_PER_SCENE: dict[QuestionKind, int] = {"position": 4, "count": 5, "presence": 3}
# Stages of the curriculum: (share of training at which the stage ends, least and greatest number of
# filled cells). With all cells filled from the start the answers stay at the level of guessing.
CURRICULUM = ((0.03, (1, 1)), (0.08, (2, 4)), (0.20, (2, 8)), (1.0, (3, 14)))
IGNORE = -100


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
    from sklearn.datasets import load_digits

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
    words = "USER: ASSISTANT: which digit is at row column how many are there a ? yes no".split()
    vocabulary = special + [str(digit) for digit in range(10)] + words + [digits.NO_DIGIT]
    index = {word: number for number, word in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(index, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split("?", "isolated")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", index["<s>"])]
    )
    return PreTrainedTokenizerFast(
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


def build_processor() -> LlavaProcessor:
    """The processor: Pillow image processing, the word-level tokenizer, image token expansion."""
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = {"height": IMAGE_PIXELS, "width": IMAGE_PIXELS}
    image_processor = CLIPImageProcessorPil(
        size=side, crop_size=side, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    return LlavaProcessor(
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


def build_model(tokenizer: PreTrainedTokenizerFast) -> LlavaForConditionalGeneration:
    """A freshly initialised model; seed torch first for a repeatable one."""
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
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
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN,
        intermediate_size=DECODER_FFN,
        num_hidden_layers=DECODER_LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=256,
        initializer_range=0.05,
        tie_word_embeddings=False,
        **ids,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=cast(int, tokenizer.convert_tokens_to_ids("<image>")),
        image_seq_length=VISUAL_TOKENS,
        vision_feature_select_strategy="default",
        # The tower has no layer to spare, so its last one is used, not the one before it.
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    config._attn_implementation = "sdpa"
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=4, **ids)
    return model


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
        last = len(whole) - 1 - whole[::-1].index(self._tokenizer.convert_tokens_to_ids("<image>"))
        self.prefix = torch.tensor(whole[: last + 1])
        image_id = self._tokenizer.convert_tokens_to_ids("<image>")
        self.first_visual = int((self.prefix == image_id).nonzero()[0])
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
            ids: int64 ``[B, T]``; targets: int64 ``[B, 2 * len(self.kinds)]``, for each question the
            answer and the end of sequence, to be predicted at ``self.answer_slots``.
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
    """Linear heads that supervise the vision side while training; they are not part of the model.

    Every visual token has to name the digit of its cell, and the class token has to tell which
    digits occur. Questions alone give the tower so thin a signal that it takes far longer to read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.Linear(HIDDEN, 11)
        self.scene = nn.Linear(HIDDEN, 10)

    def forward(self, visual: Tensor, pooled: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Loss, scalar, and accuracy of the cell head, scalar.

        Args:
            visual: float ``[B, VISUAL_TOKENS, HIDDEN]``, projected visual tokens.
            pooled: float ``[B, HIDDEN]``, the tower's class token.
            labels: int64 ``[B, GRID, GRID]``.
        """
        scale = PATCHES_PER_SIDE // GRID
        target = labels.repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)
        target = torch.where(target == EMPTY, 10, target)
        logits = self.cell(visual).float()
        cell_loss = F.cross_entropy(logits.flatten(0, 1), target.flatten())
        present = F.one_hot(target, 11).amax(1)[:, :10].float()
        scene_loss = F.binary_cross_entropy_with_logits(self.scene(pooled).float(), present)
        accuracy = (logits.argmax(-1) == target).float().mean()
        return cell_loss + scene_loss, accuracy


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


def packed_logits(
    model: LlavaForConditionalGeneration, packed: PackedQuestions, pixels: Tensor, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Forward pass over packed questions.

    Args:
        model: the model.
        packed: the packing that made ``ids``.
        pixels: float32 ``[B, 3, IMAGE_PIXELS, IMAGE_PIXELS]``.
        ids: int64 ``[B, T]``.

    Returns:
        logits: float ``[B, len(packed.answer_slots), vocabulary]``; visual: float
        ``[B, VISUAL_TOKENS, HIDDEN]``, projected visual tokens; pooled: float ``[B, HIDDEN]``, the
        vision tower's class token.
    """
    core = cast(Any, model).model
    tower = core.vision_tower(pixel_values=pixels, output_hidden_states=True)
    visual = core.multi_modal_projector(tower.hidden_states[-1][:, 1:])
    embeds = core.get_input_embeddings()(ids)
    first, last = packed.first_visual, packed.first_visual + VISUAL_TOKENS
    embeds = torch.cat([embeds[:, :first], visual.to(embeds.dtype), embeds[:, last:]], dim=1)
    hidden = core.language_model(
        inputs_embeds=embeds,
        attention_mask=packed.mask,
        position_ids=packed.positions,
        use_cache=False,
    ).last_hidden_state
    return model.lm_head(hidden[:, packed.answer_slots]), visual, tower.pooler_output


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
        ours, _, _ = packed_logits(model, packed, normalise(scene.image[None]), ids)
        inputs = digits.batch(processor, [scene] * len(asked), asked)
        theirs = cast(Any, model)(**inputs).logits[:, -1]
    torch.testing.assert_close(ours[0, ::2], theirs, atol=1e-3, rtol=1e-3)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 2 % of training, then a cosine down to zero."""
    if progress < 0.02:
        return peak * (progress + 1e-4) / 0.02
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.02) / 0.98)))


def filled_cells(progress: float) -> tuple[int, int]:
    """Least and greatest number of filled cells at a point of the curriculum."""
    return next(filled for end, filled in CURRICULUM if progress <= end or end == 1.0)


def parameter_groups(module: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Optimiser groups: weight decay for matrices, none for biases and normalisation scales."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    yield {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    yield {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file in one step, so that a reader never meets half of it."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, part)
    os.replace(part, path)


@dataclass
class Outcome:
    """What training took.

    Attributes:
        steps: optimiser steps taken.
        minutes: wall-clock time in minutes.
    """

    steps: int
    minutes: float


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
    rng = random.Random(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    probe = Probe()
    groups = [*parameter_groups(model, options.weight_decay), *parameter_groups(probe, 0.0)]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
    tiles = torch.cat([digits.make_tiles(split.train_images).float(), torch.zeros(1, 16, 16)])
    half = len(packed.answer_slots) // 2
    kind_of = torch.tensor([KINDS.index(kind) for kind in packed.kinds])
    right, asked_total = torch.zeros(len(KINDS)), torch.zeros(len(KINDS))
    loss_sum, probe_sum, since = 0.0, 0.0, 0
    started = saved = time.monotonic()
    step = 0
    model.train()
    while True:
        minutes = (time.monotonic() - started) / 60
        # Whichever limit comes first sets the pace, so the schedule always runs to its end.
        progress = max(step / options.steps, minutes / options.minutes)
        if progress >= 1:
            break
        filled = filled_cells(progress)
        palette = (1, 10) if filled[1] <= 4 else (2, 10)
        scenes = [
            digits.make_scene(
                rng, split.train_images, split.train_labels, filled=filled, palette=palette
            )
            for _ in range(options.batch)
        ]
        questions = [
            [digits.make_question(rng, scene, kind) for kind in packed.kinds] for scene in scenes
        ]
        ids, targets = packed.pack(questions)
        sources = torch.stack([scene.sources.flatten() for scene in scenes])  # EMPTY: last tile
        pixels = normalise(digits.compose(augment(tiles[sources], generator)))
        labels = torch.stack([scene.labels for scene in scenes])

        rate = learning_rate(progress, options.lr)
        for group in optimizer.param_groups:
            group["lr"] = rate
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            logits, visual, pooled = packed_logits(model, packed, pixels, ids)
            probe_loss, probe_accuracy = probe(visual, pooled, labels)
        logits = logits.float()
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad(set_to_none=True)
        (loss + options.probe_weight * probe_loss).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1

        with torch.no_grad():
            hit = (logits[:, ::2].argmax(-1) == targets[:, ::2]).float().sum(0)
            right.index_add_(0, kind_of, hit)
            asked_total.index_add_(0, kind_of, torch.full((half,), float(options.batch)))
            loss_sum += loss.item()
            probe_sum += probe_accuracy.item()
            since += 1
        if step % options.log_every == 0:
            shares = (right / asked_total).tolist()
            print(
                f"step {step:5d}  {minutes:5.1f} min  {100 * progress:5.1f} %  filled "
                f"{filled[0]}-{filled[1]}  lr {rate:.1e}  loss {loss_sum / since:.3f}  "
                f"tokens {probe_sum / since:.3f}  "
                + "  ".join(f"{kind} {share:.3f}" for kind, share in zip(KINDS, shares)),
                flush=True,
            )
            right.zero_()
            asked_total.zero_()
            loss_sum, probe_sum, since = 0.0, 0.0, 0
        if time.monotonic() - saved > 60 * options.checkpoint_minutes:
            save_tensors(dict(model.state_dict()), options.out / "checkpoint.safetensors")
            saved = time.monotonic()
    model.train(False)
    return Outcome(step, (time.monotonic() - started) / 60)
