"""Saliency of patches: how far the loss gradient of each follows the pattern common to all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from vlmopt import families
from vlmopt.errors import PreconditionError
from vlmopt.program import Role


def mean_correlation(maps: Tensor) -> Tensor:
    """Mean Pearson correlation of each row with every other.

    A constant row correlates with none.

    Args:
        maps: ``[..., rows, values]``, at least two rows.

    Returns:
        float64 ``[..., rows]``, from -1 to 1.
    """
    rows = maps.double()
    rows = rows - rows.mean(-1, keepdim=True)
    length = rows.norm(dim=-1, keepdim=True)
    # what rounding leaves of a constant row is no pattern
    flat = length <= 1e-12 * maps.double().norm(dim=-1, keepdim=True)
    unit = torch.where(flat, 0.0, rows / length.clamp(min=torch.finfo(torch.float64).tiny))
    with_all = (unit @ unit.sum(-2)[..., None])[..., 0]
    return (with_all - unit.square().sum(-1)) / (rows.shape[-2] - 1)


def saliency_maps(gradient: Tensor, patch: int) -> Tensor:
    """Largest magnitude over colours of the gradient at each pixel, by patch.

    Args:
        gradient: with respect to the images, ``[batch, colours, height, width]``.
        patch: side of a patch, in pixels.

    Returns:
        ``[batch, patches, patch * patch]``, patches by rows of the image.
    """
    largest = gradient.abs().amax(1, keepdim=True)
    return functional.unfold(largest, patch, stride=patch).transpose(1, 2)


def common_saliency(model: nn.Module, sample: Mapping[str, Any], patches: int) -> Tensor:
    """How much each patch's saliency correlates with that of the others, by backpropagation.

    The loss is the cross-entropy to what the model predicts: the label, or the next token.

    Args:
        sample: inputs of the model, images ``[..., colours, height, width]`` among them.
        patches: of an image.

    Returns:
        float64 ``[patches]``, mean over the images of the sample.

    Raises:
        PreconditionError: there are no images or no logits, or images of another number of patches.
    """
    names = [name for name in sample if families.INPUT_ROLES.get(name) is Role.PIXEL_VALUES]
    if not names:
        raise PreconditionError(
            f"there are no images among {', '.join(sample)}",
            hint="give samples as the processor returns them, with pixel_values",
        )
    images = sample[names[0]].detach().clone().requires_grad_()
    height, width = images.shape[-2:]
    patch = _patch(height, width, patches)
    with torch.enable_grad():
        output = model(**{**sample, names[0]: images})
        (gradient,) = torch.autograd.grad(_predicted_loss(output), images)
    return mean_correlation(saliency_maps(gradient.flatten(0, -4), patch)).mean(0)


def _predicted_loss(output: Any) -> Tensor:
    logits = getattr(output, "logits", None)
    if logits is None:
        raise PreconditionError(
            f"a {type(output).__name__} holds no logits to take a loss of",
            hint="calibrate on the model with its classifier or language model",
        )
    last = logits if logits.ndim == 2 else logits[:, -1]
    return functional.cross_entropy(last.float(), last.argmax(-1), reduction="sum")


def _patch(height: int, width: int, patches: int) -> int:
    """Side of a patch; what is left at the right and at the bottom is in no patch."""
    for side in range(min(height, width), 0, -1):
        if (height // side) * (width // side) == patches:
            return side
    raise PreconditionError(
        f"images of {height} by {width} pixels are not made of {patches} square patches",
        hint="calibrate with images of the size that the encoder takes",
    )
