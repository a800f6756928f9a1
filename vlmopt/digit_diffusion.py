"""A bundled diffusion transformer that draws handwritten digits, and a judge of what it draws.

The model is a small ``diffusers.DiTTransformer2DModel`` trained by ``tools/train_digit_dit.py``. It
works on pixels, is told the digit, and predicts the velocity (v-prediction) of a cosine schedule of
1000 steps. The judge is a small convolutional classifier: the share of samples in which it sees the
digit asked for, and the Frechet distance of its features between samples and training images.

diffusers is imported only by the functions that need it.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vlmopt import digits
from vlmopt.digits import CELL_PIXELS
from vlmopt.errors import OptionError

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

CLASSES = 10
NO_CLASS = CLASSES
"""Label of the unconditional half of classifier-free guidance."""
FEATURES = 64
"""Width of the judge's features."""
JUDGE_FILE = "judge.safetensors"

_CALIBRATION_SEED = 1_000_000


def asset_dir() -> Path:
    """Folder of the bundled model: weights, configuration, scheduler, judge."""
    return Path(str(resources.files("vlmopt") / "assets" / "digit_dit"))


def load_model(
    dtype: torch.dtype = torch.float32, folder: Path | None = None
) -> DiTTransformer2DModel:
    """The bundled model in evaluation mode on the CPU, without network access.

    Args:
        dtype: of the weights; they are stored in float16.
        folder: to load from; that of the bundled model by default.
    """
    from diffusers import DiTTransformer2DModel

    folder = asset_dir() if folder is None else folder
    model = DiTTransformer2DModel.from_pretrained(
        folder, torch_dtype=dtype, local_files_only=True, low_cpu_mem_usage=False
    )
    return cast("DiTTransformer2DModel", model.eval())


def load_scheduler(kind: str = "DDIMScheduler", **changes: Any) -> Any:
    """A scheduler of diffusers for the bundled model.

    Args:
        kind: name of its class, such as ``"DPMSolverMultistepScheduler"``.
        changes: of its configuration, such as ``timestep_spacing="leading"``.

    Raises:
        OptionError: diffusers has no such class.
    """
    import diffusers

    found = getattr(diffusers, kind, None)
    if found is None:
        raise OptionError(
            f"diffusers has no scheduler {kind!r}", hint="such as DDIMScheduler, with its case"
        )
    return found.from_pretrained(asset_dir(), **changes)


class DigitPipeline:
    """Draws digits with the bundled model, as a pipeline of diffusers would.

    Attributes:
        transformer: the model, or what is called like it.
        scheduler: see :func:`load_scheduler`.
        guidance_scale, num_timesteps: of the last call.
    """

    def __init__(self, transformer: Any = None, scheduler: Any = None) -> None:
        self.transformer: Any = load_model() if transformer is None else transformer
        self.scheduler = load_scheduler() if scheduler is None else scheduler
        self.guidance_scale = 1.0
        self.num_timesteps = 0

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Tensor,
        *,
        num_inference_steps: int = 20,
        guidance_scale: float = 1.5,
        seed: int = 0,
    ) -> Tensor:
        """Draw one image for each label.

        Args:
            class_labels: int64 ``[B]``, digits.
            num_inference_steps: calls of the model.
            guidance_scale: weight of classifier-free guidance, at which both halves go through the
                model as one batch of ``2 * B``, the conditional one first; 1 for none.
            seed: of the initial noise.

        Returns:
            float32 ``[B, 1, CELL_PIXELS, CELL_PIXELS]``, -1 (black) to 1.
        """
        labels, scheduler = class_labels, self.scheduler
        generator = torch.Generator().manual_seed(seed)
        noisy = torch.randn(len(labels), 1, CELL_PIXELS, CELL_PIXELS, generator=generator)
        scheduler.set_timesteps(num_inference_steps)
        self.guidance_scale, self.num_timesteps = guidance_scale, len(scheduler.timesteps)
        noisy = noisy * scheduler.init_noise_sigma
        guided = guidance_scale != 1
        told = torch.cat([labels, torch.full_like(labels, NO_CLASS)]) if guided else labels
        for timestep in scheduler.timesteps:
            given = scheduler.scale_model_input(noisy, timestep)
            given = torch.cat([given, given]) if guided else given
            (found,) = self.transformer(
                given, timestep=timestep.repeat(len(given)), class_labels=told, return_dict=False
            )
            if guided:
                conditional, free = found.chunk(2)
                found = free + guidance_scale * (conditional - free)
            noisy = scheduler.step(found, timestep, noisy, return_dict=False)[0]
        return noisy.float().clamp(-1, 1)


def labels_in_turn(number: int) -> Tensor:
    """Digits 0 to 9 again and again: int64 ``[number]``."""
    return torch.arange(number) % CLASSES


def pixels_of(images: Tensor) -> Tensor:
    """Digit images as the model draws them.

    Args:
        images: uint8 ``[N, 8, 8]``, intensity 0..16.

    Returns:
        float32 ``[N, 1, CELL_PIXELS, CELL_PIXELS]``, -1 to 1.
    """
    return digits.make_tiles(images)[:, None].float() / 127.5 - 1


def grid_of(samples: Tensor, columns: int = CLASSES) -> Tensor:
    """Samples side by side, as one picture.

    Args:
        samples: ``[N, 1, CELL_PIXELS, CELL_PIXELS]``, -1 to 1; ``N`` a multiple of ``columns``.

    Returns:
        uint8 ``[rows * CELL_PIXELS, columns * CELL_PIXELS]``.
    """
    grey = ((samples[:, 0] + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    cells = grey.view(-1, columns, CELL_PIXELS, CELL_PIXELS).transpose(1, 2)
    return cells.reshape(-1, columns * CELL_PIXELS)


@dataclass(frozen=True)
class Moments:
    """Mean and covariance of features.

    Attributes:
        mean: float64 ``[FEATURES]``.
        covariance: float64 ``[FEATURES, FEATURES]``.
    """

    mean: Tensor
    covariance: Tensor

    @staticmethod
    def of(features: Tensor) -> Moments:
        """Of ``[N, FEATURES]``."""
        return Moments(features.double().mean(0), features.double().T.cov())

    def distance(self, other: Moments) -> float:
        """Squared Frechet distance of the two normal distributions (arXiv 1706.08500, FID)."""
        root = _root(self.covariance)
        between = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp(min=0).sqrt().sum()
        spread = self.covariance.trace() + other.covariance.trace() - 2 * between
        return float((self.mean - other.mean).square().sum() + spread)


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


class Judge(nn.Module):
    """A convolutional classifier of digits, and the moments of its features on training images."""

    mean: Tensor
    covariance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 3, padding=1)
        self.second = nn.Conv2d(16, 32, 3, padding=1)
        self.third = nn.Linear(32 * (CELL_PIXELS // 4) ** 2, FEATURES)
        self.last = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.zeros(FEATURES, dtype=torch.float64))
        self.register_buffer("covariance", torch.zeros(FEATURES, FEATURES, dtype=torch.float64))

    def features(self, images: Tensor) -> Tensor:
        """``[N, 1, CELL_PIXELS, CELL_PIXELS]``, -1 to 1, to float32 ``[N, FEATURES]``."""
        wide = F.max_pool2d(F.relu(self.first(images)), 2)
        wide = F.max_pool2d(F.relu(self.second(wide)), 2)
        return F.relu(self.third(wide.flatten(1)))

    def forward(self, images: Tensor) -> Tensor:
        """Logits, float32 ``[N, CLASSES]``."""
        return cast(Tensor, self.last(self.features(images)))

    @torch.no_grad()
    def accuracy(self, images: Tensor, labels: Tensor) -> float:
        """Share of images in which it sees their label, 0..1."""
        return float((self(images).argmax(-1) == labels).float().mean())

    @torch.no_grad()
    def distance(self, images: Tensor) -> float:
        """Squared Frechet distance of features from those of training images."""
        return Moments.of(self.features(images)).distance(Moments(self.mean, self.covariance))


def load_judge(folder: Path | None = None) -> Judge:
    """The bundled judge in evaluation mode."""
    from safetensors.torch import load_file

    judge = Judge()
    judge.load_state_dict(load_file((asset_dir() if folder is None else folder) / JUDGE_FILE))
    return judge.eval()


def drawings(
    pipe: DigitPipeline,
    number: int,
    *,
    steps: int = 20,
    guidance: float = 1.5,
    seed: int = 0,
    size: int = 100,
) -> Tensor:
    """Samples of all digits in turn, ``size`` at a time, each batch with a seed of its own.

    Args:
        number: a multiple of ``size``.

    Returns:
        float32 ``[number, 1, CELL_PIXELS, CELL_PIXELS]``.
    """
    parts = labels_in_turn(number).split(size)
    return torch.cat(
        [
            pipe(part, num_inference_steps=steps, guidance_scale=guidance, seed=seed + at)
            for at, part in enumerate(parts)
        ]
    )


def calibration_calls(
    number: int = 10, *, steps: int = 20, guidance: float = 1.5, size: int = 10
) -> list[dict[str, Any]]:
    """Calls of :class:`DigitPipeline` for calibrations, with seeds that evaluations do not use.

    Args:
        number: of calls.
        size: images of each.
    """
    return [
        {
            "class_labels": labels_in_turn(size),
            "num_inference_steps": steps,
            "guidance_scale": guidance,
            "seed": _CALIBRATION_SEED + at,
        }
        for at in range(number)
    ]
