"""What the tools that train the bundled models of digits share: data, schedule, options, files."""

from __future__ import annotations

import argparse
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt import digits
from vlmopt.digit_diffusion import Judge
from vlmopt.digits import CELL_PIXELS

CHECKPOINT = "checkpoint.safetensors"
MOVED = 0.5  # share of training samples that are moved a little

LICENCE = """\
## Licence

The code and weights are under the licence of vlmopt. The digit images are a part of *Optical
Recognition of Handwritten Digits* by E. Alpaydin and C. Kaynak (1998), UCI Machine Learning
Repository, <https://doi.org/10.24432/C50P49>, as distributed with scikit-learn, under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/).
"""


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


class Pace:
    """Steps of training: as many as were asked for, or as many as there is time for.

    Whichever limit comes first sets the pace, so that a schedule always runs to its end.

    Args:
        steps: greatest number of steps.
        minutes: time limit.

    Attributes:
        steps: begun so far.
        minutes: that they took.
    """

    def __init__(self, steps: int, minutes: float) -> None:
        self._limits = steps, minutes
        self.steps = 0
        self.minutes = 0.0

    def __iter__(self) -> Iterator[float]:
        """Progress at the beginning of each step, 0 to 1."""
        steps, minutes = self._limits
        started = time.monotonic()
        while steps > 0 and minutes > 0:
            self.minutes = (time.monotonic() - started) / 60
            progress = max(self.steps / steps, self.minutes / minutes)
            if progress >= 1:
                return
            self.steps += 1
            yield progress


def learning_rate(progress: float, peak: float, warmup: float = 0.03) -> float:
    """Linear warm-up over a share of training, then a cosine down to zero."""
    if progress < warmup:
        return peak * (progress + 1e-4) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))


def parameter_groups(module: nn.Module, weight_decay: float) -> Iterator[dict[str, Any]]:
    """Optimiser groups: weight decay for matrices, none for biases and normalisation scales."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    yield {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay}
    yield {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}


def descend(
    loss: Tensor, optimizer: torch.optim.Optimizer, clipped: nn.Module, rate: float
) -> None:
    """One step of an optimiser.

    Args:
        clipped: whose gradients are held to a norm of 1.
        rate: the learning rate.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(clipped.parameters(), 1.0)
    optimizer.step()


class Meter:
    """Means of named values since the last report."""

    def __init__(self) -> None:
        self._sums: dict[str, float] = {}
        self._numbers: dict[str, int] = {}

    def add(self, **values: float) -> None:
        """Takes one value for each name."""
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value
            self._numbers[name] = self._numbers.get(name, 0) + 1

    def report(self) -> str:
        """The means in words; starts afresh."""
        means = [f"{name} {total / self._numbers[name]:.3f}" for name, total in self._sums.items()]
        self._sums.clear()
        self._numbers.clear()
        return "  ".join(means)


@dataclass(frozen=True)
class Row:
    """What the judge says of samples.

    Attributes:
        name: of how they were made.
        accuracy: share of samples in which it sees the digit asked for.
        distance: squared Frechet distance of features from training images.
    """

    name: str
    accuracy: float
    distance: float

    @staticmethod
    def of(name: str, judge: Judge, images: Tensor, labels: Tensor) -> Row:
        """Of ``[N, 1, CELL_PIXELS, CELL_PIXELS]`` and the digits asked for, ``[N]``."""
        row = Row(name, judge.accuracy(images, labels), judge.distance(images))
        print(f"{name:40s} {row.accuracy:6.1%}  {row.distance:.3f}", flush=True)
        return row

    @staticmethod
    def table(first: str, rows: list[Row]) -> str:
        """In Markdown; ``first`` heads the column of names."""
        head = f"| {first} | class accuracy | Frechet distance |\n| --- | ---: | ---: |\n"
        return head + "\n".join(
            f"| {row.name} | {row.accuracy:.1%} | {row.distance:.2f} |" for row in rows
        )


def add_arguments(
    parser: argparse.ArgumentParser,
    *,
    steps: int,
    minutes: float,
    batch: int,
    samples: str,
    lr: float = 1e-3,
    threads: int = 1,
    log_every: int = 50,
    checkpoint_minutes: float = 3.0,
) -> None:
    """Adds what all tools take, with these defaults.

    Args:
        samples: what a batch is made of, in the plural.
    """
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--force", action="store_true", help="write into a folder that has files")
    parser.add_argument("--steps", type=int, default=steps, help="greatest number of steps")
    parser.add_argument("--minutes", type=float, default=minutes, help="time limit of training")
    parser.add_argument("--threads", type=int, default=threads, help="CPU threads")
    parser.add_argument("--batch", type=int, default=batch, help=f"{samples} per step")
    parser.add_argument("--lr", type=float, default=lr, help="peak learning rate")
    parser.add_argument(
        "--bfloat16", action="store_true", help="bfloat16 autocast, for CPUs that have it"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of everything in training")
    parser.add_argument(
        "--log-every", type=int, default=log_every, help="steps between progress lines"
    )
    parser.add_argument(
        "--checkpoint-minutes",
        type=float,
        default=checkpoint_minutes,
        help="minutes between checkpoints",
    )


def read_arguments(
    parser: argparse.ArgumentParser, arguments: list[str] | None
) -> argparse.Namespace:
    """Reads the command line; exits with status 2 if it is wrong."""
    options = parser.parse_args(arguments)
    if min(options.steps, options.minutes, options.threads, options.batch) <= 0:
        parser.error("--steps, --minutes, --threads and --batch must be positive")
    return options


def begin(options: argparse.Namespace) -> bool:
    """Makes the folder, sets threads and seed; false, and says why, if the folder has files."""
    out: Path = options.out
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not options.force:
        print(f"error: {out} exists and is not empty; pass --force to overwrite", file=sys.stderr)
        return False
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    return True


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Writes a safetensors file in one step, so that a reader never meets half of it."""
    from safetensors.torch import save_file

    part = path.with_name(path.name + ".part")
    save_file({name: t.detach().contiguous() for name, t in tensors.items()}, part)
    part.replace(path)


@contextmanager
def written_to(out: Path) -> Iterator[Path]:
    """A folder next to ``out``, whose files are moved there one by one in the end."""
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as name:
        folder = Path(name)
        yield folder
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)  # safetensors makes its files readable to their owner only
            shutil.move(path, out / path.name)
    (out / CHECKPOINT).unlink(missing_ok=True)


def command_line(tool: str, options: argparse.Namespace, names: tuple[str, ...]) -> str:
    """The command that repeats a run.

    Args:
        tool: file name.
        names: options that take part, in order; of flags, those that are set.
    """
    words = [f"OMP_NUM_THREADS={options.threads} python tools/{tool}"]
    for name in names:
        value, flag = getattr(options, name), f"--{name.replace('_', '-')}"
        if value is True:
            words.append(flag)
        elif value is not False:
            words.append(f"{flag} {value:g}")
    return " ".join([*words, "--out DIR"])


def repeatability(limited: bool) -> str:
    """What a card says of a repetition of the run; ``limited`` by time, or not."""
    if limited:
        return (
            "The time limit ended this run and set the pace of its schedule, so a repetition ends\n"
            "after a different number of steps, with other weights. A run that reaches its last\n"
            "step first is repeatable."
        )
    return (
        "The run is repeatable with the same threads, processor type and library versions, as\n"
        "long as the time limit does not cut it short."
    )
