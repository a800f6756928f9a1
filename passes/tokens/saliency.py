"""Saliency prior: how far the loss gradient of each patch follows the pattern common to all.

Measured beforehand, by backpropagation to the images; kept as a safetensors file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

from vlmopt.artifacts import fingerprint
from vlmopt.errors import ArtifactError, PreconditionError
from vlmopt.program import Program

NAME = "o"
"""The prior in its file: float32 ``[patches]``."""


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


def predicted_label_loss(output: Any) -> Tensor:
    """Cross-entropy to the predicted label of each image, summed over images.

    Args:
        output: logits ``[batch, labels]``, or an object that holds them as ``logits``.

    Raises:
        PreconditionError: there are no logits.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, Tensor) or logits.ndim != 2:
        raise PreconditionError(
            f"a {type(output).__name__} holds no logits [images, labels] to take a loss of",
            hint="calibrate on the model with its classifier, or give a loss",
        )
    return functional.cross_entropy(logits, logits.argmax(-1), reduction="sum")


def saliency_prior(
    model: nn.Module,
    images: Iterable[Tensor],
    patch: int,
    *,
    loss: Callable[[Any], Tensor] = predicted_label_loss,
) -> Tensor:
    """The mean over images of each patch's mean correlation with the other patches' saliency.

    Low values mark patches whose gradient deviates from the common pattern.

    Args:
        model: takes a batch of images; run in eval mode, left as it was.
        images: batches ``[batch, colours, height, width]``, all of one size.
        patch: side of a patch, in pixels.
        loss: of what the model returns, summed over images: a scalar.

    Returns:
        float32 ``[patches]``.

    Raises:
        PreconditionError: no images; or the loss does not depend on them.

    Reference: "Saliency-Driven Token Merging for Vision Transformers", CVPR 2026.
    """
    training = model.training
    model.eval()
    total: Tensor | None = None
    count = 0
    try:
        for batch in images:
            given = batch.detach().clone().requires_grad_()
            with torch.enable_grad():
                value = loss(model(given))
            if not value.requires_grad:
                raise PreconditionError("the loss does not depend on the images")
            (gradient,) = torch.autograd.grad(value, given)
            found = mean_correlation(saliency_maps(gradient, patch)).sum(0)
            total = found if total is None else total + found
            count += batch.shape[0]
    finally:
        model.train(training)
    if total is None:
        raise PreconditionError("there are no images to calibrate on", hint="give at least one")
    return (total / count).float()


def write_prior(path: str | Path, prior: Tensor, program: Program, *, images: int) -> None:
    """Write a prior for the model of ``program``, measured on so many images.

    Raises:
        ArtifactError: the file exists.
    """
    if Path(path).exists():
        raise ArtifactError(f"{path} exists already", hint="choose another name")
    metadata = {
        "pass": "sad-tm",
        "model": fingerprint(program),
        "model_type": program.model_type,
        "images": str(images),
    }
    save_file({NAME: prior.float().contiguous()}, path, metadata=metadata)


def read_prior(path: str | Path, program: Program | None = None) -> Tensor:
    """The prior in a file: float32 ``[patches]``.

    Args:
        program: the program it is to be used on; ``None``, or one without weights, checks nothing.

    Raises:
        ArtifactError: no such file, not a prior, or one made with another model.
    """
    hint = "make one: vlmopt.passes.tokens.saliency.saliency_prior, then write_prior"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"{path} cannot be read: {error}", hint=hint) from error
    prior = tensors.get(NAME)
    if prior is None or prior.ndim != 1 or prior.dtype != torch.float32:
        raise ArtifactError(f"{path} holds no float32 tensor {NAME} [patches]", hint=hint)
    if not bool(prior.isfinite().all()):
        raise ArtifactError(f"{path} holds values that are not finite", hint=hint)
    if program is not None and program.named_weights() and "model" in metadata:
        own = fingerprint(program)
        if metadata["model"] != own:
            raise ArtifactError(
                f"{path} was made with another model ({metadata.get('model_type')}, fingerprint "
                f"{metadata['model']}; this is {program.model_type}, {own})",
                hint=hint,
            )
    return prior
