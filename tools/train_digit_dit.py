"""Trains the small diffusion transformer that is bundled with vlmopt, and its judge.

The model is a ``diffusers.DiTTransformer2DModel`` that draws handwritten digits of a given class
(see ``vlmopt.digit_diffusion``). The digits are those of scikit-learn without the images that are
held out beside the bundled vision-language model. Weights are a moving average over training, in
float16. The model card names the command that made it.

Example:

    OMP_NUM_THREADS=1 python tools/train_digit_dit.py --out build/digit_dit --bfloat16
"""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt import digit_diffusion, digits
from vlmopt.digit_diffusion import CLASSES, NO_CLASS, DigitPipeline, Judge, Moments, pixels_of
from vlmopt.digits import CELL_PIXELS

HEADS = 4
HEAD_WIDTH = 32
LAYERS = 8
PATCH_PIXELS = 2
TIMESTEPS = 1000
DROPPED_LABELS = 0.1  # share of training samples without a class, for guidance
MOVED = 0.5  # share of training samples that are moved a little
DECAY = 0.999  # of the moving average of the weights


def training_digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's digits but for the held-out ones.

    Returns:
        images: uint8 ``[N, 8, 8]``, intensity 0..16.
        labels: int64 ``[N]``.
    """
    from sklearn.datasets import load_digits  # type: ignore[import-untyped]

    data = load_digits()
    images = torch.from_numpy(data.images).to(torch.uint8)
    unseen = {image.numpy().tobytes() for image in digits.heldout_digits()[0]}
    chosen = [i for i, image in enumerate(images) if image.numpy().tobytes() not in unseen]
    return images[chosen], torch.from_numpy(data.target).long()[chosen]


def build_model() -> nn.Module:
    """A freshly initialised model whose blocks add nothing at first (adaLN-zero)."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=1,
        num_layers=LAYERS,
        sample_size=CELL_PIXELS,
        patch_size=PATCH_PIXELS,
        num_embeds_ada_norm=CLASSES,
    )
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
        nn.init.zeros_(block.norm1.linear.bias)
        nn.init.normal_(block.norm1.emb.class_embedder.embedding_table.weight, std=0.5)
    nn.init.zeros_(model.proj_out_2.weight)
    nn.init.zeros_(model.proj_out_2.bias)
    return model


def build_scheduler() -> Any:
    """The noise schedule, as the sampler that the card names.

    Estimates of the clean image are not clipped: pixels that are black are estimated to both sides
    of it, and cut off at one side they brighten the background a little at each step.
    """
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        clip_sample=False,
        num_train_timesteps=TIMESTEPS,
        beta_schedule="squaredcos_cap_v2",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )


def moved(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images turned, scaled and shifted a little, some of them.

    Args:
        images: ``[B, 1, CELL_PIXELS, CELL_PIXELS]``, -1 to 1.
    """
    number = len(images)

    def uniform(limit: float) -> Tensor:
        return (2 * torch.rand(number, generator=generator) - 1) * limit

    angle, scale = uniform(0.12), 1 + uniform(0.06)
    shift = 1.0 / CELL_PIXELS
    rows = [scale * angle.cos(), -angle.sin(), uniform(shift)]
    rows += [angle.sin(), scale * angle.cos(), uniform(shift)]
    grid = F.affine_grid(torch.stack(rows, -1).view(number, 2, 3), list(images.shape), False)
    turned = F.grid_sample(images + 1, grid, mode="bilinear", align_corners=False) - 1
    chosen = torch.rand(number, 1, 1, 1, generator=generator) < MOVED
    return torch.where(chosen, turned, images)


def learning_rate(progress: float, peak: float) -> float:
    """Linear warm-up over the first 3 % of training, then a cosine down to zero."""
    if progress < 0.03:
        return peak * (progress + 1e-4) / 0.03
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - 0.03) / 0.97)))


@torch.no_grad()
def average(kept: nn.Module, model: nn.Module, step: int) -> None:
    """One step of the moving average, over fewer steps in the beginning."""
    decay = min(DECAY, (1 + step) / (10 + step))
    for old, new in zip(kept.parameters(), model.parameters(), strict=True):
        old.lerp_(new, 1 - decay)


@dataclass
class Outcome:
    """What training took.

    Attributes:
        steps: optimiser steps.
        minutes: wall-clock time.
        loss: mean squared error of the velocity over the last steps.
    """

    steps: int
    minutes: float
    loss: float


def train(
    model: nn.Module, images: Tensor, labels: Tensor, options: argparse.Namespace
) -> tuple[nn.Module, Outcome]:
    """Trains ``model`` in place; returns the moving average of its weights."""
    from diffusers.models.attention_processor import AttnProcessor

    scheduler = build_scheduler()
    generator = torch.Generator().manual_seed(options.seed)
    # labels are dropped here, for all blocks at once: in training mode each block would on its own
    model.eval()
    kept = deepcopy(model).requires_grad_(False)
    for block in model.transformer_blocks:
        # the fused kernel's backward pass is several times slower on a CPU
        block.attn1.set_processor(AttnProcessor())
    matrices = [weight for weight in model.parameters() if weight.ndim >= 2]
    vectors = [weight for weight in model.parameters() if weight.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}],
        lr=options.lr,
        betas=(0.9, 0.99),
    )
    started = saved = time.monotonic()
    step, seen = 0, 0.0
    while True:
        elapsed = (time.monotonic() - started) / 60
        # whichever limit comes first sets the pace, so the schedule always runs to its end
        progress = max(step / options.steps, elapsed / options.minutes)
        if progress >= 1:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(progress, options.lr)
        chosen = torch.randint(len(images), (options.batch,), generator=generator)
        clean = moved(images[chosen], generator)
        noise = torch.randn(clean.shape, generator=generator)
        # spread evenly within the batch: less noise in the loss
        spread = (torch.arange(options.batch) + torch.rand(1, generator=generator)) / options.batch
        times = (spread * TIMESTEPS).long().clamp(max=TIMESTEPS - 1)
        dropped = torch.rand(options.batch, generator=generator) < DROPPED_LABELS
        told = torch.where(dropped, NO_CLASS, labels[chosen])
        noisy = scheduler.add_noise(clean, noise, times)
        target = scheduler.get_velocity(clean, noise, times)
        with torch.autocast("cpu", torch.bfloat16, enabled=options.bfloat16):
            (found,) = model(noisy, timestep=times, class_labels=told, return_dict=False)
        loss = F.mse_loss(found.float(), target)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        average(kept, model, step)
        seen = loss.item() if step == 1 else 0.98 * seen + 0.02 * loss.item()
        if step % options.log_every == 0:
            print(
                f"step {step:5d}  {elapsed:5.1f} min  {progress:6.1%}  loss {seen:.4f}", flush=True
            )
        if time.monotonic() - saved > 60 * options.checkpoint_minutes:
            saved = time.monotonic()
            save_weights(kept, options.out / "checkpoint.safetensors")
    return kept, Outcome(step, (time.monotonic() - started) / 60, seen)


def save_weights(module: nn.Module, path: Path) -> None:
    """Writes a safetensors file in one step, so that a reader never meets half of it."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, part)
    part.replace(path)


def train_judge(images: Tensor, labels: Tensor, options: argparse.Namespace) -> Judge:
    """A classifier of the training images, with the moments of their features."""
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3, weight_decay=0.01)
    rounds = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=4e-3, total_steps=options.judge_steps
    )
    for _ in range(options.judge_steps):
        chosen = torch.randint(len(images), (128,), generator=generator)
        loss = F.cross_entropy(judge(moved(images[chosen], generator)), labels[chosen])
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        rounds.step()
    with torch.no_grad():
        moments = Moments.of(judge.features(images))
    judge.mean.copy_(moments.mean)
    judge.covariance.copy_(moments.covariance)
    return judge.eval()


@dataclass(frozen=True)
class Row:
    """What the judge says of samples.

    Attributes:
        name: of the sampler.
        accuracy: share of samples in which it sees the digit asked for.
        distance: squared Frechet distance of features from training images.
    """

    name: str
    accuracy: float
    distance: float


def measure(folder: Path, options: argparse.Namespace) -> list[Row]:
    """What the judge says of held-out digits, and of samples of what was written to ``folder``."""
    judge = digit_diffusion.load_judge(folder)
    pipe = DigitPipeline(digit_diffusion.load_model(folder=folder), build_scheduler())
    images, labels = digits.heldout_digits()
    real = pixels_of(images)
    rows = [Row("held-out images", judge.accuracy(real, labels), judge.distance(real))]
    asked = digit_diffusion.labels_in_turn(options.samples)
    for steps, guidance in ((20, 1.0), (20, 1.5), (50, 1.5)):
        drawn = digit_diffusion.drawings(pipe, options.samples, steps=steps, guidance=guidance)
        name = f"DDIM, {steps} steps, guidance {guidance:g}"
        rows.append(Row(name, judge.accuracy(drawn, asked), judge.distance(drawn)))
        print(rows[-1], flush=True)
    return rows


def model_card(
    model: nn.Module, rows: list[Row], outcome: Outcome, options: argparse.Namespace, seen: int
) -> str:
    """The README of the model."""
    import diffusers

    parameters = sum(weight.numel() for weight in model.parameters())
    table = "\n".join(f"| {row.name} | {row.accuracy:.1%} | {row.distance:.2f} |" for row in rows)
    command = (
        f"OMP_NUM_THREADS={options.threads} python tools/train_digit_dit.py "
        f"--steps {options.steps} --minutes {options.minutes:g} --batch {options.batch} "
        f"--lr {options.lr:g} --seed {options.seed} "
        f"{'--bfloat16 ' if options.bfloat16 else ''}--out DIR"
    )
    limited = outcome.steps < options.steps
    ended = (
        "The time limit ended this run and set the pace of its schedule: a repetition gives other "
        "weights."
        if limited
        else "The run reached its last step, and is repeatable on the same kind of machine."
    )
    return f"""---
license: other
library_name: diffusers
tags: [dit, tiny, handwritten-digits]
---

# Digit DiT

A class-conditional diffusion transformer of {parameters:,} parameters that draws handwritten
digits, small enough to ship with vlmopt and to run on any CPU, yet a genuine
`DiTTransformer2DModel` with learnt weights: what skipping work costs it can be seen in its samples.
It is a test subject and no use for anything else.

## Architecture

| part | shape |
| --- | --- |
| input | 1 channel, {CELL_PIXELS} x {CELL_PIXELS} pixels, -1 to 1, patches of {PATCH_PIXELS} x \
{PATCH_PIXELS}: {(CELL_PIXELS // PATCH_PIXELS) ** 2} tokens |
| blocks | {LAYERS}, width {HEADS * HEAD_WIDTH}, {HEADS} heads, adaLN-zero |
| classes | {CLASSES} digits, and label {NO_CLASS} for none (classifier-free guidance) |
| prediction | velocity, cosine schedule of {TIMESTEPS} steps |
| weights | float16, moving average over training |

## Quality

By the bundled judge (`vlmopt.digit_diffusion.Judge`), on {options.samples} samples, the ten digits
in turn: the share in which it sees the digit asked for, and the squared Frechet distance of its
features from those of the training images.

| sampler | class accuracy | Frechet distance |
| --- | ---: | ---: |
{table}

## Training

- Data: {seen} digit images of scikit-learn's `load_digits`, enlarged to {CELL_PIXELS} x \
{CELL_PIXELS};
  half of the samples turned, scaled and shifted a little; one label in ten left out.
- AdamW, peak learning rate {options.lr:g}, cosine decay, {outcome.steps} steps of {options.batch}
  images{", bfloat16 autocast" if options.bfloat16 else ""}; last loss {outcome.loss:.4f}.
- Cost: {outcome.minutes:.0f} minutes on {options.threads} CPU thread(s); seed {options.seed}; \
torch {torch.__version__},
  diffusers {diffusers.__version__}.

```
{command}
```

{ended}

## Licence

The code and weights are under the licence of vlmopt. The digit images are a part of *Optical
Recognition of Handwritten Digits* by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning
Repository, <https://doi.org/10.24432/C50P49>, as distributed with scikit-learn, under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/).
"""


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; exits with status 2 if it is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--force", action="store_true", help="write into a folder that has files")
    parser.add_argument("--steps", type=int, default=8000, help="greatest number of steps")
    parser.add_argument("--minutes", type=float, default=35.0, help="time limit of training")
    parser.add_argument("--batch", type=int, default=64, help="images per step")
    parser.add_argument("--lr", type=float, default=1e-3, help="peak learning rate")
    parser.add_argument("--judge-steps", type=int, default=1500, help="steps of the judge")
    parser.add_argument("--samples", type=int, default=200, help="samples to measure")
    parser.add_argument(
        "--bfloat16", action="store_true", help="bfloat16 autocast, for CPUs that have it"
    )
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything in training")
    parser.add_argument("--log-every", type=int, default=50, help="steps between progress lines")
    parser.add_argument(
        "--checkpoint-minutes", type=float, default=3.0, help="minutes between checkpoints"
    )
    options = parser.parse_args(arguments)
    if min(options.steps, options.minutes, options.threads, options.batch) <= 0:
        parser.error("--steps, --minutes, --threads and --batch must be positive")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Trains, measures and writes the model; returns the exit status."""
    options = parse_arguments(arguments)
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.force:
        print(f"error: {out} exists and is not empty; pass --force to overwrite", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)

    drawn, labels = training_digits()
    images = pixels_of(drawn)
    model = build_model()
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters, {len(images)} training digits", flush=True)
    kept, outcome = train(model, images, labels, options)
    print(f"trained {outcome.steps} steps in {outcome.minutes:.1f} minutes", flush=True)
    judge = train_judge(images, labels, options)

    # everything is written next to the target first and moved in file by file at the end
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name)
        kept.to(torch.float16).save_pretrained(folder)  # type: ignore[operator]
        build_scheduler().save_pretrained(folder)
        save_weights(judge, folder / digit_diffusion.JUDGE_FILE)
        # measured on what was written, not on what is in memory
        rows = measure(folder, options)
        card = model_card(kept, rows, outcome, options, len(images))
        (folder / "README.md").write_text(card, encoding="utf-8")
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)  # safetensors makes its files readable to their owner only
            shutil.move(path, out / path.name)
    (out / "checkpoint.safetensors").unlink(missing_ok=True)
    for row in rows:
        print(f"{row.name:30s} {row.accuracy:6.1%}  {row.distance:.3f}")
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
