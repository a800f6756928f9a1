"""TokenSR: super-resolution of visual tokens by three convolutions, and how it is learnt."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.modality import modality_of_tokens, token_stage
from vlmopt.calibration import Sample, observing, without_labels
from vlmopt.errors import PreconditionError
from vlmopt.learning import LayerLearner
from vlmopt.passes.tokens import select
from vlmopt.passes.tokens.grids import bilinear
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Modality, Program
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.values import CutValues

NAMES = ("reduce.weight", "reduce.bias", "mix.weight", "mix.bias", "expand.weight", "expand.bias")
"""Tensors of a module, in the order in which functions here take them."""


def untrained(width: int, layer: int) -> list[Tensor]:
    """A module that adds nothing yet: its last convolution is 0.

    Args:
        width: of the residual stream; an eighth of it between the convolutions.
        layer: the two other convolutions are random, and differ from layer to layer.
    """
    inner = max(1, width // 8)
    generator = torch.Generator().manual_seed(layer)
    tensors: list[Tensor] = []
    for into, out in ((width, inner), (inner, inner)):
        bound = (9 * into) ** -0.5
        tensors += [
            torch.empty(shape).uniform_(-bound, bound, generator=generator)
            for shape in ((out, into, 3, 3), (out,))
        ]
    return [*tensors, torch.zeros(width, inner, 3, 3), torch.zeros(width)]


def super_resolved(finer: Tensor, *module: Tensor) -> Tensor:
    """A square grid of interpolated tokens, with what a module adds to it.

    Args:
        finer: float32 ``[batch, side * side, width]``, row by row.
        module: weights and biases, see :data:`NAMES`; the convolutions have their type.

    Returns:
        float32, as ``finer``.
    """
    side = math.isqrt(finer.shape[1])
    grid = finer.transpose(1, 2).unflatten(2, (side, side)).to(module[0].dtype)
    grid = functional.conv2d(grid, module[0], module[1], padding=1).relu()
    grid = functional.conv2d(grid, module[2], module[3], padding=1).relu()
    grid = functional.conv2d(grid, module[4], module[5], padding=1)
    return finer + grid.flatten(2).transpose(1, 2).float()


def divergence(tokens: Tensor, reference: Tensor) -> Tensor:
    """Kullback-Leibler divergence of ``tokens`` from ``reference``, in nats, mean over tokens.

    A token's distribution is the softmax of its features.

    Args:
        tokens, reference: float32 ``[batch, tokens, width]``.
    """
    given, wanted = tokens.log_softmax(-1), reference.log_softmax(-1)
    return (wanted.exp() * (wanted - given)).sum(-1).mean()


def crop(
    sample: Sample, patch: Tensor, images: int, grid: tuple[int, int], side: int
) -> dict[str, Any]:
    """A sample whose prompts show a patch of an image, in place of that image, at its size.

    Args:
        sample: as a processor returns it.
        patch: int64 ``[batch]``, patches of all images of a prompt numbered on.
        images: of each prompt.
        grid: rows and columns of an image's tokens.
        side: of a patch, in tokens.

    Raises:
        PreconditionError: it does not hold so many images.
    """
    pixels = sample.get("pixel_values")
    if pixels is None or pixels.ndim < 4 or pixels.shape[:-3].numel() != len(patch) * images:
        shape = "none" if pixels is None else f"of shape {list(pixels.shape)}"
        raise PreconditionError(
            f"TokenSR learns from crops of {len(patch) * images} images, and pixel_values are "
            f"{shape}",
            hint="calibrate a model whose processor returns pixels as whole images, one for each "
            "grid of tokens",
        )
    cropped = pixels.flatten(0, -4).clone()
    height, width = cropped.shape[-2:]
    for row, number in enumerate(patch.tolist()):
        image, top, left = _corner(number, *grid, side)
        lines = slice(top * height // grid[0], (top + side) * height // grid[0])
        across = slice(left * width // grid[1], (left + side) * width // grid[1])
        whole = cropped[row * images + image]
        whole[:] = _resized(whole[None, :, lines, across].float(), height, width)[0]
    return {**sample, "pixel_values": cropped.view(pixels.shape)}


class TokenSRLearner(LayerLearner):
    """Makes the copies of a patch what the model makes of that patch when it is the whole image.

    The frozen model runs on a sample, then on its image cut down to the patch that a layer attends
    to, once for each patch that some layer chooses. Each layer's module is learnt by itself.

    Args:
        program, sample: the captured model, and the sample that it was captured with.
        layers: those that get a module.
        grid: rows and columns of an image's tokens, by the number of a prompt's visual tokens.
        places: numbers of the tokens in each patch, int64 ``[patches, side * side]``, by the same.
        up: copies per token, along each side.
        rate: AdamW's learning rate.
    """

    def __init__(
        self,
        model: Any,
        program: Program,
        sample: Sample,
        layers: Sequence[int],
        grid: Callable[[int], tuple[int, int]],
        places: Callable[[int], Tensor],
        up: int,
        rate: float,
    ) -> None:
        self.layers, self.up, self._grid, self._places = tuple(layers), up, grid, places
        stage = token_stage(program)
        entry = find_layers(stage, after=modality_of_tokens(stage).anchor).entries[layers[0]]
        width = int(entry.meta["val"].shape[2])
        start = {
            layer: dict(zip(NAMES, untrained(width, layer), strict=True)) for layer in self.layers
        }
        super().__init__(start, rate)
        self._seen: dict[int, tuple[Tensor, Tensor]] = {}
        self._engine = observing(model, self._watch, program, sample)

    def __call__(self, sample: Sample) -> list[float]:
        """The loss of each layer before its step, then that of interpolation alone."""
        full = self._run(sample)
        tokens = full[self.layers[0]][0].shape[1]
        places = self._places(tokens)
        side = math.isqrt(places.shape[1])
        cropped: dict[tuple[int, ...], dict[int, tuple[Tensor, Tensor]]] = {}
        losses, before = [], []
        for layer in self.layers:
            hidden, attention = full[layer]
            region = attention[:, places].sum(-1).argmax(-1)
            key = tuple(region.tolist())
            if key not in cropped:
                grid = self._grid(tokens)
                inside = crop(sample, region, tokens // math.prod(grid), grid, side)
                cropped[key] = self._run(inside)
            reference = self._reference(cropped[key][layer][0], region, side)
            weights = bilinear(side, self.up).to(hidden.device)
            finer = weights @ select.take(hidden, places.to(region.device)[region]).float()
            with torch.enable_grad():
                module = [one.to(finer.device) for one in self.tensors[layer].values()]
                loss = divergence(super_resolved(finer, *module), reference)
                losses.append(self.step(layer, loss))
            before.append(float(divergence(finer, reference)))
        return losses + before

    def result(self) -> dict[str, Tensor]:
        """``LAYER.NAME`` of each tensor, see :data:`NAMES`."""
        return {
            f"{layer}.{name}": tensor.detach()
            for layer, named in self.tensors.items()
            for name, tensor in named.items()
        }

    def _run(self, sample: Sample) -> dict[int, tuple[Tensor, Tensor]]:
        """Visual tokens as they enter each layer, and the last token's attention to them."""
        with torch.no_grad():
            self._engine.twin(**without_labels(sample))
        return dict(self._seen)

    def _reference(self, hidden: Tensor, region: Tensor, side: int) -> Tensor:
        """Tokens of the image with the patch, at the resolution of the patch's copies."""
        rows, columns = self._grid(hidden.shape[1])
        found = []
        for row, number in enumerate(region.tolist()):
            first = _corner(number, rows, columns, side)[0] * rows * columns
            tokens = hidden[row, first : first + rows * columns].float()
            grid = tokens.T.unflatten(1, (rows, columns))[None]
            found.append(_resized(grid, side * self.up, side * self.up).flatten(2)[0].T)
        return torch.stack(found)

    def _watch(self, program: Program) -> None:
        """Have each layer tell what enters it."""
        stage = token_stage(program)
        modality = modality_of_tokens(stage)
        layers = find_layers(stage, after=modality.anchor)
        output, ctx = stage.graph.output_node(), PassContext("token-sr")
        emit = Emitter.of_pass(ctx, stage, output, "token-sr")
        with stage.graph.inserting_before(output):
            for layer in self.layers:
                values = CutValues(stage, layers, layer, modality.source, modality.visual, emit)
                given = (values.hidden, values["last_attention_ahead"], values.modality)
                stage.graph.call_function(self._see, (layer, *given))
        stage.graph_module.recompile()

    def _see(self, layer: int, hidden: Tensor, attention: Tensor, modality: Tensor) -> None:
        visual = modality == Modality.VISION
        counts = visual.sum(1)
        if (counts != counts[0]).any():
            raise PreconditionError(
                f"TokenSR: samples have {', '.join(map(str, counts.tolist()))} visual tokens",
                hint="batch prompts with equally many images",
            )
        slots, _ = select.visual_slots(visual, int(counts[0]))
        self._seen[layer] = select.take(hidden, slots), attention.gather(1, slots)


def _corner(patch: int, rows: int, columns: int, side: int) -> tuple[int, int, int]:
    """Image, row and column of a patch's first token; grids lie one below the other."""
    down, across = divmod(patch, columns // side)
    image, row = divmod(down * side, rows)
    return image, row, across * side


def _resized(grid: Tensor, rows: int, columns: int) -> Tensor:
    """``[batch, channels, ...]`` by bilinear interpolation."""
    return functional.interpolate(grid, (rows, columns), mode="bilinear", align_corners=False)
