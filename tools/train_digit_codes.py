"""Trains the small models that are bundled with vlmopt to draw digits code by code.

First an autoencoder whose codes stand for patches of an image, then a ``LlamaForCausalLM`` that
predicts the next code of a digit, at last a draft head that guesses the features of this model (see
``vlmopt.digit_codes``). The digits are those of scikit-learn without the images that are held out
beside the bundled vision-language model; the judge is the bundled one of
``vlmopt.digit_diffusion``. All weights are stored in float16. The model card names
the command that made it.

Example:

    OMP_NUM_THREADS=1 python tools/train_digit_codes.py --out build/digit_codes --bfloat16
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from digit_training import (
    CHECKPOINT,
    LICENCE,
    Meter,
    Pace,
    Row,
    add_arguments,
    begin,
    command_line,
    descend,
    learning_rate,
    moved,
    parameter_groups,
    read_arguments,
    repeatability,
    save_tensors,
    training_digits,
    written_to,
)
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt import digit_codes, digit_diffusion, digits
from vlmopt.digit_codes import (
    CODE_WIDTH,
    CODES,
    DRAFT_LAYERS,
    NO_CLASS,
    SAMPLING,
    SIDE,
    TOKENS,
    VOCABULARY,
    Autoencoder,
)
from vlmopt.digit_diffusion import labels_in_turn, pixels_of
from vlmopt.digits import CELL_PIXELS
from vlmopt.speculative.distribution import Sampling, guided

LAYERS = 8
HIDDEN = 160
HEADS = 5
INNER = 448
DROPPED_LABELS = 0.1  # share of training samples without a class, for guidance

# Shares of the time limit; what is left goes into sampling, and measuring comes on top.
AUTOENCODER_SHARE, MODEL_SHARE, DRAFT_SHARE = 0.1, 0.5, 0.32

COMMITMENT = 0.25  # weight of the loss that keeps features near their codes
CODE_DECAY = 0.95  # of the moving averages that the codebook is made of
UNCODED_UNTIL = 0.1  # share of training up to which images are drawn from features, not from codes
REVIVED_UNTIL = 0.7  # share of training up to which codes that are out of use move elsewhere
OUT_OF_USE = 0.05  # of the mean number of features to a code

FEATURE_NOISE = 0.1  # of the draft head's inputs, to their deviation
OWN_SHARE = 0.5  # of steps in which the draft head reads features that it guessed itself
LOGIT_WEIGHT = 0.1  # of cross entropy, to the loss of features
GUIDED_WEIGHT = 0.3  # of cross entropy under guidance
GUIDANCE = (1.0, 4.0)  # range of scales under which the draft head is trained
DRAFT_TOP_K = 100  # of sequences that it learns from: wider than of images, so that it sees more

MEASURED_GUIDANCE = (1.0, 2.0, 3.0, 4.0)
MEASURED_TOP = (1, 5, 10)
MEASURED_SEQUENCES = 100  # along which agreement is measured, or as many as there are samples
MEASURED_DEPTHS = 4


@dataclass
class Outcome:
    """What a stage of training took.

    Attributes:
        steps: optimiser steps.
        minutes: wall-clock time.
        losses: in words, over the last steps.
    """

    steps: int
    minutes: float
    losses: str


class Log:
    """Prints means of named values every so many steps of a stage.

    Args:
        name: of the stage.
        pace: its steps.
        every: steps between two lines.
    """

    def __init__(self, name: str, pace: Pace, every: int) -> None:
        self._name, self._pace, self._every = name, pace, every
        self._meter, self._means = Meter(), ""

    def add(self, **values: float) -> None:
        """Takes the values of a step."""
        self._meter.add(**values)
        if self._pace.steps % self._every == 0:
            self._means, minutes = self._meter.report(), self._pace.minutes
            print(
                f"{self._name} {self._pace.steps:5d}  {minutes:5.1f} min  {self._means}", flush=True
            )

    def outcome(self) -> Outcome:
        """Of the stage as it stands."""
        means = self._means or self._meter.report()
        return Outcome(self._pace.steps, self._pace.minutes, means)


class Book:
    """Moving averages of the features of each code, whose directions are the codebook."""

    def __init__(self, codebook: Tensor, batch: int, generator: torch.Generator) -> None:
        self.codebook = codebook
        self.generator = generator
        self.mean = batch * TOKENS / CODES
        self.sizes = torch.full((CODES,), self.mean)
        self.sums = codebook * self.mean

    @torch.no_grad()
    def learn(self, features: Tensor, codes: Tensor, revive: bool) -> None:
        """Moves codes towards what they stand for, and those that are out of use elsewhere.

        They move to features that are drawn with odds that grow with the square of the distance
        from their codes (as centres begin in k-means++): most patches are alike, and black.

        Args:
            features: ``[N, CODE_WIDTH]``.
            codes: int64 ``[N]``.
            revive: whether codes move that are out of use.
        """
        self.sizes.lerp_(codes.bincount(minlength=CODES).float(), 1 - CODE_DECAY)
        sums = torch.zeros_like(self.sums).index_add_(0, codes, features)
        self.sums.lerp_(sums, 1 - CODE_DECAY)
        unused = (self.sizes < OUT_OF_USE * self.mean).nonzero()[: len(features), 0]
        if revive and len(unused):
            apart = (features - self.codebook[codes]).square().sum(-1)
            chosen = torch.multinomial(apart + 1e-9, len(unused), generator=self.generator)
            self.sums[unused] = features[chosen] * self.mean
            self.sizes[unused] = self.mean
        self.codebook.copy_(F.normalize(self.sums, dim=-1))


def train_autoencoder(images: Tensor, options: argparse.Namespace) -> tuple[Autoencoder, Outcome]:
    """An autoencoder of the training images.

    Args:
        images: ``[N, 1, CELL_PIXELS, CELL_PIXELS]``, -1 to 1.
    """
    generator = torch.Generator().manual_seed(options.seed)
    vq = Autoencoder()
    vq.codebook.requires_grad_(False)  # it follows the features
    book = Book(vq.codebook.data, options.batch, generator)
    optimizer = torch.optim.AdamW(parameter_groups(vq, 0.01), lr=options.lr, betas=(0.9, 0.99))
    pace = Pace(options.autoencoder_steps, AUTOENCODER_SHARE * options.minutes)
    log = Log("autoencoder", pace, options.log_every)
    for progress in pace:
        chosen = torch.randint(len(images), (options.batch,), generator=generator)
        clean = moved(images[chosen], generator)
        features = vq.features(clean)
        codes = vq.nearest(features.detach())
        coded = progress >= UNCODED_UNTIL
        codewords = vq.codebook[codes]
        drawn = vq.draw(features + (codewords - features).detach() if coded else features)
        error = F.mse_loss(drawn, clean)
        apart = (features - codewords).square().sum(-1).mean()
        rate = learning_rate(progress, 2 * options.lr)
        descend(error + COMMITMENT * coded * apart, optimizer, vq, rate)
        book.learn(features.detach().flatten(0, 1), codes.flatten(), progress < REVIVED_UNTIL)
        used = len(codes.unique()) / CODES
        log.add(error=error.item(), apart=apart.item(), used=used)
    return vq.eval(), log.outcome()


def build_model() -> Any:
    """A freshly initialised next-code model; seed torch first for a repeatable one."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    special = {"pad_token_id": None, "bos_token_id": None, "eos_token_id": None}
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        max_position_embeddings=2 * TOKENS,
        initializer_range=0.04,
        **special,
    )
    # the fused kernel's backward pass is several times slower on a CPU
    config._attn_implementation = "eager"
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        top_k=SAMPLING.top_k,
        max_new_tokens=TOKENS,
        suppress_tokens=[*range(CODES, VOCABULARY)],
        **special,
    )
    return model


def train_model(
    model: Any, vq: Autoencoder, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> Outcome:
    """Trains ``model`` in place."""
    generator = torch.Generator().manual_seed(options.seed + 1)
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.05), lr=options.lr, betas=(0.9, 0.98))
    saved = time.monotonic()
    pace = Pace(options.steps, MODEL_SHARE * options.minutes)
    log = Log("model", pace, options.log_every)
    for progress in pace:
        chosen = torch.randint(len(images), (options.batch,), generator=generator)
        codes = vq.encode(moved(images[chosen], generator))
        dropped = torch.rand(options.batch, generator=generator) < DROPPED_LABELS
        told = torch.where(dropped, NO_CLASS, CODES + labels[chosen])
        given = torch.cat([told[:, None], codes[:, :-1]], 1)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            logits = model(input_ids=given, use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), codes.flatten())
        descend(loss, optimizer, model, learning_rate(progress, options.lr))
        right = (logits.argmax(-1) == codes).float().mean()
        log.add(loss=loss.item(), right=right.item())
        if time.monotonic() - saved > 60 * options.checkpoint_minutes:
            saved = time.monotonic()
            save_tensors(model.state_dict(), options.out / CHECKPOINT)
    return log.outcome()


@torch.no_grad()
def heldout_loss(model: Any, vq: Autoencoder) -> float:
    """Mean cross entropy of the codes of held-out digits, in nats."""
    images, labels = digits.heldout_digits()
    codes = vq.encode(pixels_of(images))
    given = torch.cat([CODES + labels[:, None], codes[:, :-1]], 1)
    losses = [
        F.cross_entropy(model(input_ids=some).logits.flatten(0, 1), to.flatten(), reduction="sum")
        for some, to in zip(given.split(64), codes.split(64), strict=True)
    ]
    return float(torch.stack(losses).sum()) / codes.numel()


@dataclass(frozen=True)
class Sequences:
    """Codes of images, and what the model makes of them with the class and without.

    Attributes:
        codes: int64 ``[N, TOKENS]``.
        features: float16 ``[2, N, TOKENS, HIDDEN]``, from which the codes are predicted: the first
            is that of the prompt. With the class first, then without.
    """

    codes: Tensor
    features: Tensor

    @staticmethod
    @torch.no_grad()
    def of(model: Any, codes: Tensor, labels: Tensor, size: int = 100) -> Sequences:
        """Of ``[N, TOKENS]`` and ``[N]``, ``size`` at a time."""
        found = []
        for some, told in zip(codes.split(size), labels.split(size), strict=True):
            given = torch.cat([digit_codes.prompts(told), some[:, :-1].repeat(2, 1)], 1)
            hidden = model.model(input_ids=given, use_cache=False).last_hidden_state
            found.append(hidden.half().view(2, -1, TOKENS, HIDDEN))
        return Sequences(codes, torch.cat(found, 1))

    def join(self, other: Sequences) -> Sequences:
        """These and the others."""
        return Sequences(
            torch.cat([self.codes, other.codes]), torch.cat([self.features, other.features], 1)
        )


def draw_sequences(
    model: Any, number: int, sampling: Sampling, seed: int, size: int = 250
) -> Iterator[tuple[Tensor, Tensor]]:
    """Codes and labels that the model draws, all digits in turn, ``size`` at a time."""
    for at, labels in enumerate(labels_in_turn(number).split(size)):
        yield digit_codes.sample(model, labels, sampling, seed=seed + at), labels


def draft_data(
    model: Any, vq: Autoencoder, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> Sequences:
    """What the draft head learns from: codes of the data, and more that the model drew itself."""
    generator = torch.Generator().manual_seed(options.seed + 2)
    chosen = torch.randint(len(images), (options.sequences // 4,), generator=generator)
    codes = vq.encode(moved(images[chosen], generator))
    found = Sequences.of(model, codes, labels[chosen])
    for number, guidance in enumerate(MEASURED_GUIDANCE):
        sampling = Sampling(top_k=DRAFT_TOP_K, guidance=guidance)
        # far from the seeds of what is measured
        seed = 1_000_000 * (number + 1) + options.seed
        for codes, told in draw_sequences(model, options.sequences // 4, sampling, seed):
            found = found.join(Sequences.of(model, codes, told))
    return found


def guess(head: nn.Module, model: Any, codes: Tensor, features: Tensor) -> Tensor:
    """What the draft head takes the features of codes to be, from those of the tokens before.

    Args:
        codes: int64 ``[B, T]``.
        features: ``[2, B, T, HIDDEN]``.

    Returns:
        ``[2, B, T, HIDDEN]``.
    """
    embeds = model.get_input_embeddings()(codes).repeat(2, 1, 1)
    found = head(embeds, features.flatten(0, 1), use_cache=False).last_hidden_state
    return found.view(features.shape)


def train_draft_head(
    model: Any, data: Sequences, options: argparse.Namespace
) -> tuple[nn.Module, Outcome]:
    """A draft head of ``model``, which stays as it is."""
    from vlmopt.speculative.eagle import EagleHead

    generator = torch.Generator().manual_seed(options.seed + 3)
    head = EagleHead(model.config, DRAFT_LAYERS)
    head.decoder.norm.load_state_dict(model.model.norm.state_dict())  # features come out of it
    optimizer = torch.optim.AdamW(parameter_groups(head, 0.01), lr=options.lr, betas=(0.9, 0.95))
    deviation = float(data.features[:, :64].float().std())
    pace = Pace(options.draft_steps, DRAFT_SHARE * options.minutes)
    log = Log("draft head", pace, options.log_every)
    for progress in pace:
        chosen = torch.randint(len(data.codes), (options.batch // 2,), generator=generator)
        codes, features = data.codes[chosen, :-1], data.features[:, chosen].float()
        wanted, given = features[:, :, 1:], features[:, :, :-1]
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            if torch.rand((), generator=generator) < OWN_SHARE:
                with torch.no_grad():
                    own = guess(head, model, codes, given).float()
                own = torch.cat([given[:, :, :1], own[:, :, :-1]], 2)
                mixed = torch.rand(own.shape[1:3], generator=generator)[None, ..., None] < 0.5
                given = torch.where(mixed, own, given)
            noise = torch.rand(given.shape, generator=generator) - 0.5
            guesses = guess(head, model, codes, given + FEATURE_NOISE * deviation * noise).float()
        # guidance magnifies differences that bfloat16 does not hold
        logits, meant = model.lm_head(guesses), model.lm_head(wanted)
        scale = GUIDANCE[0] + (GUIDANCE[1] - GUIDANCE[0]) * float(
            torch.rand((), generator=generator)
        )
        distance = F.smooth_l1_loss(guesses, wanted)
        plain = F.cross_entropy(logits.flatten(0, 2), meant.softmax(-1).flatten(0, 2))
        ours, theirs = guided(logits, scale)[0], guided(meant, scale)[0]
        cross = F.cross_entropy(ours.flatten(0, 1), theirs.softmax(-1).flatten(0, 1))
        loss = distance + LOGIT_WEIGHT * plain + GUIDED_WEIGHT * cross
        descend(loss, optimizer, head, learning_rate(progress, options.lr))
        agreed = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
        losses = {"distance": distance.item(), "plain": plain.item(), "guided": cross.item()}
        log.add(**losses, agreed=agreed.item())
    return head.eval(), log.outcome()


@dataclass(frozen=True)
class Agreement:
    """How well the draft head knows the model's next code, along what the model drew itself.

    Attributes:
        guidance: scale of it.
        top: share of places where the model's most probable code is among the first 1, 5 and 10 of
            the head.
        mass: mean probability that the model gives to these codes, after top-k.
        depths: the first of ``top`` again where the head goes on from 0, 1, 2, 3 features of its
            own.
    """

    guidance: float
    top: tuple[float, ...]
    mass: tuple[float, ...]
    depths: tuple[float, ...]


@torch.no_grad()
def agreement(
    model: Any, head: nn.Module, codes: Tensor, labels: Tensor, scale: float
) -> Agreement:
    """Measures it on codes ``[N, TOKENS]`` that the model drew under guidance of this scale."""
    features = Sequences.of(model, codes, labels).features.float()
    logits_of = digit_codes.code_decoder(model).head
    meant = guided(logits_of(features[:, :, 1:]), scale)[0]
    chances = Sampling(top_k=SAMPLING.top_k).distribution(meant)
    best = chances.argmax(-1)
    places = TOKENS - 1
    found = guess(head, model, codes[:, :-1], features[:, :, :-1])
    ranked = guided(logits_of(found), scale)[0].topk(max(MEASURED_TOP), dim=-1).indices
    top = tuple(
        float((ranked[..., :k] == best[..., None]).any(-1).float().mean()) for k in MEASURED_TOP
    )
    mass = tuple(float(chances.gather(-1, ranked[..., :k]).sum(-1).mean()) for k in MEASURED_TOP)
    hits = torch.zeros(MEASURED_DEPTHS - 1)
    last = places - MEASURED_DEPTHS + 1  # place from which all depths fit into the image
    for start in range(1, last + 1):
        # start codes are known with the features before them
        seen = torch.cat([features[:, :, :start], found[:, :, start - 1 : start]], 2)
        for depth in range(1, MEASURED_DEPTHS):
            more = guess(head, model, codes[:, : start + depth], seen)[:, :, -1:]
            first = guided(logits_of(more), scale)[0, :, 0].argmax(-1)
            hits[depth - 1] += (first == best[:, start + depth - 1]).float().mean()
            seen = torch.cat([seen, more], 2)
    return Agreement(scale, top, mass, (top[0], *(hits / last).tolist()))


@dataclass(frozen=True)
class Measured:
    """Of what was written: images by the judge, the draft head, and how many codes are in use.

    Attributes:
        rows: of images.
        agreements: at each guidance.
        used: share of codes that occur in training and held-out images.
        drawn: share of codes that occur in what the model drew at its usual guidance.
        heldout: cross entropy of held-out images, nats for a code.
    """

    rows: list[Row]
    agreements: list[Agreement]
    used: float
    drawn: float
    heldout: float


def measure(folder: Path, images: Tensor, options: argparse.Namespace) -> Measured:
    """Measures what was written to ``folder``."""
    judge = digit_diffusion.load_judge()
    vq, model = digit_codes.load_vq(folder=folder), digit_codes.load_model(folder=folder)
    head = digit_codes.load_draft_head(folder=folder)
    drawn, labels = digits.heldout_digits()
    real = pixels_of(drawn)
    rows = [Row.of("held-out images", judge, real, labels)]
    codes = vq.encode(real)
    rows.append(Row.of("held-out images, coded and drawn again", judge, vq.decode(codes), labels))
    used = len(torch.cat([codes, vq.encode(images)]).unique()) / CODES
    agreements, share = [], 0.0
    for scale in MEASURED_GUIDANCE:
        sampling = Sampling(top_k=SAMPLING.top_k, guidance=scale)
        parts = [*draw_sequences(model, options.samples, sampling, 0)]
        sampled, asked = (torch.cat(column) for column in zip(*parts, strict=True))
        rows.append(Row.of(f"sampled, guidance {scale:g}", judge, vq.decode(sampled), asked))
        some = slice(MEASURED_SEQUENCES)
        agreements.append(agreement(model, head, sampled[some], asked[some], scale))
        print(agreements[-1], flush=True)
        if scale == SAMPLING.guidance:
            share = len(sampled.unique()) / CODES
    return Measured(rows, agreements, used, share, heldout_loss(model, vq))


@dataclass(frozen=True)
class Run:
    """What training took.

    Attributes:
        stages: by name.
        minutes: of all of it, from the first step to the last.
        data: training images.
    """

    stages: dict[str, Outcome]
    minutes: float
    data: int


def model_card(measured: Measured, run: Run, parts: dict[str, nn.Module], options: Any) -> str:
    """The README of the models."""
    import transformers

    numbers = {
        name: f"{sum(weight.numel() for weight in part.parameters()):,}"
        for name, part in parts.items()
    }
    agreements = "\n".join(
        f"| {one.guidance:g} | "
        + " | ".join(f"{value:.1%}" for value in (*one.top, *one.mass, *one.depths[1:]))
        + " |"
        for one in measured.agreements
    )
    stages = "\n".join(
        f"| {name} | {one.steps} | {one.minutes:.1f} | {one.losses} |"
        for name, one in run.stages.items()
    )
    limits = (options.autoencoder_steps, options.steps, options.draft_steps)
    limited = any(one.steps < limit for one, limit in zip(run.stages.values(), limits, strict=True))
    names = ("autoencoder_steps", "steps", "draft_steps", "sequences", "minutes", "batch", "lr")
    command = command_line("train_digit_codes.py", options, (*names, "seed", "threads", "bfloat16"))
    return f"""---
license: other
library_name: transformers
tags: [llama, vq, eagle, tiny, handwritten-digits]
---

# Digit codes

Models that draw handwritten digits code by code, small enough to ship with vlmopt and to run on any
CPU, yet genuine: an autoencoder with a learnt codebook, a class-conditional `LlamaForCausalLM` of
{numbers["model"]} parameters over its codes (the shape of LlamaGen, arXiv 2406.06525), and a draft
head for speculative decoding (EAGLE, arXiv 2401.15077). What relaxed acceptance costs can be seen
in what they draw. They are a test subject and no use for anything else.

## Architecture

| part | shape |
| --- | --- |
| images | 1 channel, {CELL_PIXELS} x {CELL_PIXELS} pixels, -1 to 1: {SIDE} x {SIDE} codes |
| codebook | {CODES} codes, width {CODE_WIDTH}, unit length |
| autoencoder | convolutions, {numbers["autoencoder"]} parameters |
| next-code model | Llama, {LAYERS} layers, width {HIDDEN}, {HEADS} heads, feed-forward {INNER} |
| tokens | {CODES} codes, {VOCABULARY - CODES - 1} digits, token {NO_CLASS} for none \
(classifier-free guidance) |
| prompt | the digit's token; {TOKENS} codes follow, row by row |
| draft head | {DRAFT_LAYERS} layer{"s" if DRAFT_LAYERS > 1 else ""} of the same kind, \
{numbers["draft head"]} parameters |
| weights | float16 |

## Quality

By the judge of the bundled diffusion transformer (`vlmopt.digit_diffusion.Judge`): the share of
images in which it sees the digit asked for, and the squared Frechet distance of its features from
those of the training images. {options.samples} samples, the ten digits in turn, temperature 1,
top-k {SAMPLING.top_k}.

{Row.table("images", measured.rows)}

{measured.used:.1%} of the codes occur in images of the data, {measured.drawn:.1%} in the samples at
guidance {SAMPLING.guidance:g}. Codes of held-out images cost {measured.heldout:.2f} nats each.

## Draft head

Along {min(options.samples, MEASURED_SEQUENCES)} sequences that the model drew, both under the \
same guidance: how often its most probable
code is among the head's first 1, 5 and 10; the probability that it gives to those; and how often it
is the head's first where the head goes on from 1, 2 and 3 features that it guessed itself.

| guidance | top 1 | top 5 | top 10 | p(top 1) | p(top 5) | p(top 10) | own 1 | own 2 | own 3 |
| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |
{agreements}

## Training

- Data: {run.data} digit images of scikit-learn's `load_digits`, enlarged to {CELL_PIXELS} x \
{CELL_PIXELS};
  half of the samples turned, scaled and shifted a little; one label in ten left out.
- AdamW, peak learning rate {options.lr:g}, twice that for the autoencoder, cosine decay, batches
  of {options.batch}{", bfloat16 autocast" if options.bfloat16 else ""}. Codes follow moving \
averages of their features.
- The draft head learns from {options.sequences} sequences that the model drew with top-k \
{DRAFT_TOP_K}
  under guidance {", ".join(f"{scale:g}" for scale in MEASURED_GUIDANCE)}, and from a quarter as \
many of the data: smooth L1 of features,
  {LOGIT_WEIGHT:g} x cross entropy, {GUIDED_WEIGHT:g} x cross entropy under guidance; in half of \
the steps it reads
  some features that it guessed itself.
- Cost: {run.minutes:.0f} minutes on {options.threads} CPU thread(s); seed {options.seed}; \
torch {torch.__version__},
  transformers {transformers.__version__}.

| stage | steps | minutes | means of the last steps |
| --- | ---: | ---: | --- |
{stages}

```
{command}
```

{repeatability(limited)}

{LICENCE}"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with status 2 if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser, steps=3000, minutes=36.0, batch=64, samples="images")
    parser.add_argument(
        "--autoencoder-steps", type=int, default=700, help="greatest number, of the autoencoder"
    )
    parser.add_argument(
        "--draft-steps", type=int, default=8000, help="greatest number, of the draft head"
    )
    parser.add_argument(
        "--sequences", type=int, default=4000, help="that are drawn for the draft head"
    )
    parser.add_argument("--samples", type=int, default=500, help="samples to measure")
    return read_arguments(parser, arguments)


def main(arguments: list[str] | None = None) -> int:
    """Trains, measures and writes the models; returns the exit status."""
    options = parse_arguments(arguments)
    if not begin(options):
        return 2
    drawn, labels = training_digits()
    images = pixels_of(drawn)
    started = time.monotonic()
    stages: dict[str, Outcome] = {}
    vq, stages["autoencoder"] = train_autoencoder(images, options)
    vq = vq.half().float()  # what comes next learns from what is stored
    model = build_model()
    stages["model"] = train_model(model, vq, images, labels, options)
    model = model.half().float().eval().requires_grad_(False)
    data = draft_data(model, vq, images, labels, options)
    print(f"{len(data.codes)} sequences for the draft head", flush=True)
    head, stages["draft head"] = train_draft_head(model, data, options)
    run = Run(stages, (time.monotonic() - started) / 60, len(images))
    print(f"trained in {run.minutes:.1f} minutes", flush=True)

    parts = {"autoencoder": vq, "model": model, "draft head": head}
    with written_to(options.out) as folder:
        model.half().save_pretrained(folder)
        save_tensors(vq.half().state_dict(), folder / digit_codes.AUTOENCODER_FILE)
        save_tensors(head.half().state_dict(), folder / digit_codes.DRAFT_FILE)
        # measured on what was written, not on what is in memory
        card = model_card(measure(folder, images, options), run, parts, options)
        (folder / "README.md").write_text(card, encoding="utf-8")
    print(f"written to {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
