"""Patches of a vision encoder: which of its rows become one token, image by image."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.encoder import special_tokens
from vlmopt.analysis.layers import Layers, find_layers
from vlmopt.analysis.modality import token_stage
from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import attention_mask, is_causal
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.graph.reach import reached, sources
from vlmopt.program import Program, Stage
from vlmopt.rewrite.encoded import encoding_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Patches:
    """Patches of an encoder in which each image has rows of its own, equally many.

    Attributes:
        images: of the batch, as the encoder takes them: tiles count one by one.
        rows: of an image, the special ones included.
        special: rows in front that are no patches (class token, registers).
        groups: for each image, rows of each token that it becomes part of, in order of the tokens:
            ``[images][tokens][patches of a token]``.
        tokens: number of each of these tokens among the visual tokens of the batch.
        samples: for each image the sample that its tokens belong to.
        pixels: name of the input that holds the images; ``None`` where patches are no rectangles
            side by side.
        first, offsets: as in :func:`vlmopt.encoding._pixels_of_rows`.
        windows: some blocks attend within windows of an image, runs of its rows: in so many
            ``parts``, or ``masked``; empty where none does.
    """

    stage: Stage
    layers: Layers
    images: int
    rows: int
    special: int
    groups: tuple[tuple[tuple[int, ...], ...], ...]
    tokens: tuple[tuple[int, ...], ...]
    samples: tuple[int, ...]
    pixels: str | None
    first: tuple[int, ...]
    offsets: tuple[int, ...]
    windows: str

    @property
    def entry(self) -> fx.Node:
        """What enters the first block: ``[images, rows, width]`` or ``[images * rows, width]``."""
        return self.layers.entries[0]

    @property
    def members(self) -> int:
        """Patches of a token."""
        return len(self.groups[0][0])

    @property
    def side(self) -> int:
        """Patches of a token in each direction.

        Raises:
            PreconditionError: they are no square.
        """
        side = math.isqrt(self.members)
        if side * side != self.members:
            raise PreconditionError(f"{self.members} patches of a token are no square")
        return side

    def grid(self, given: Sequence[int] = ()) -> tuple[int, int]:
        """Rows and columns of the patches of an image, which become tokens row by row.

        Args:
            given: where they are known; else what the shape of the images tells, or a square.

        Raises:
            PreconditionError: there are not so many patches.
        """
        count, side = len(self.tokens[0]) * self.members, self.side
        rows = given[0] * side if given else math.isqrt(count)
        if not given and self.pixels is not None:
            shape = self.stage.placeholder(self.pixels).meta["val"].shape
            if len(shape) >= 4 and shape[0] == self.images:
                height, width = shape[-2:]
                tops = {place % (height * width) // width for place in self.first if place >= 0}
                rows = len(tops)
        columns = given[1] * side if given else count // max(1, rows)
        if rows * columns != count or rows % side or columns % side:
            raise PreconditionError(
                f"{count // self.members} tokens of an image, of {side} by {side} patches each, "
                f"form no grid of {rows} by {columns} patches",
                hint="give rows and columns of its tokens, such as size=12,16",
            )
        return rows, columns

    def images_input(self) -> fx.Node:
        """The input that holds the images.

        Raises:
            PreconditionError: patches are not cut out of it side by side.
        """
        if self.pixels is None:
            raise PreconditionError(
                f"stage {self.stage.name} does not cut images into patches that lie side by side",
                hint="use a pass that needs no pixels",
            )
        return self.stage.placeholder(self.pixels)

    def values(self, images: Tensor) -> Tensor:
        """Values of each patch: ``[images, tokens of an image, patches of a token, values]``.

        Args:
            images: as the encoder takes them; their colours come one behind the other.
        """
        device = images.device
        first = torch.tensor(self.first, device=device).view(self.images, self.rows)
        groups = torch.tensor(self.groups, device=device)
        first = first.gather(1, groups.flatten(1)).view(groups.shape)
        return images.flatten()[first[..., None] + torch.tensor(self.offsets, device=device)]


def find_patches(program: Program) -> Patches:
    """The patches of a program's vision encoder, as capture followed them to the prompt.

    Raises:
        PreconditionError: it is not known which token a patch becomes; or images have no rows of
            their own, or become different numbers of tokens; or windows differ in size.
    """
    facts = encoding_of(program)
    stage = program["vision_encoder"]
    layers = find_layers(stage)
    masked = _masked(stage, layers)
    images, rows, parted = _images_and_rows(stage, layers)
    if masked and parted:
        raise PreconditionError(
            f"blocks of stage {stage.name} attend within windows, in one row of several images, "
            "and images or windows differ in size",
            node=layers.entries[0],
            hint="capture with one image, or with images that windows divide evenly",
        )
    tokens = facts["rows"]["tokens"]
    if len(tokens) != images * rows:
        raise PreconditionError(
            f"{images * rows} rows enter the blocks of stage {stage.name}, and {len(tokens)} leave "
            "them",
            node=layers.entries[0],
        )
    groups, numbers = [], []
    for image in range(images):
        of_token: dict[int, list[int]] = defaultdict(list)
        for row, token in enumerate(tokens[image * rows : (image + 1) * rows]):
            of_token[token].append(row)
        of_token.pop(-1, None)
        numbers.append(tuple(sorted(of_token)))
        groups.append(tuple(tuple(of_token[token]) for token in sorted(of_token)))
    shapes = {tuple(map(len, groups_of)) for groups_of in groups}
    if len(shapes) != 1 or len(set(*shapes)) != 1:
        raise PreconditionError(
            f"images of stage {stage.name} become different numbers of tokens, or tokens are made "
            "of different numbers of patches",
            hint="batch prompts with images of one size that need no padding",
        )
    pixels: dict[str, Any] = facts["pixels"] or {}
    ends = list(accumulate(token_stage(program).facts["visual_tokens"]))
    return Patches(
        stage,
        layers,
        images,
        rows,
        special_tokens(stage, layers),
        tuple(groups),
        tuple(numbers),
        tuple(bisect_right(ends, of_image[0]) for of_image in numbers),
        pixels.get("input"),
        tuple(pixels.get("first", ())),
        tuple(pixels.get("offsets", ())),
        "masked" if masked else "parts" if parted else "",
    )


def _masked(stage: Stage, layers: Layers) -> bool:
    """Whether attention of some blocks has a mask that is the same for all inputs: windows.

    Raises:
        PreconditionError: that of all blocks has one, which tells images apart.
    """
    twin = stage.clone()
    drop_constant_masks(twin.graph)  # those that hide nothing
    masked = [
        node
        for node in twin.graph.find_nodes(
            op="call_function", target=aten.scaled_dot_product_attention.default
        )
        if (mask := attention_mask(node)) is not None
        and not any(one.op == "placeholder" for one in reached([mask], sources))
    ]
    if len(masked) >= len(layers):
        raise PreconditionError(
            f"the blocks of stage {stage.name} take the patches of all images in one row, and a "
            "mask keeps them apart",
            node=masked[0],
            hint="prune in the language model instead, for example with comprehension-prune; or "
            "capture with one image",
        )
    return bool(masked)


def _images_and_rows(stage: Stage, layers: Layers) -> tuple[int, int, bool]:
    """Images, rows of each, and whether some blocks attend in more parts, within windows."""
    attentions = [
        node for node in layers.of if node.target is aten.scaled_dot_product_attention.default
    ]
    if len(attentions) > len(layers):
        raise PreconditionError(
            f"blocks of stage {stage.name} attend several times each",
            node=attentions[0],
            hint="prune in the language model instead, for example with comprehension-prune",
        )
    shapes = {tuple(node.args[0].meta["val"].shape) for node in attentions}  # type: ignore[union-attr]
    sizes = sorted((shape[0], shape[-2]) for shape in shapes if len(shape) == 4)
    entering = math.prod(layers.entries[0].meta["val"].shape[:-1])
    if not sizes or len(attentions) != len(layers) or any(map(is_causal, attentions)):
        raise PreconditionError(
            f"the blocks of stage {stage.name} do not attend among all patches of an image",
            node=layers.entries[0],
            hint="prune in the language model instead, for example with comprehension-prune",
        )
    # as many parts as there are images where all patches see each other, more where windows do
    images, rows = sizes[0]
    for parts, length in sizes:
        if parts * length != entering or parts % images:
            raise PreconditionError(
                f"{entering} rows enter the blocks of stage {stage.name}, which attend among "
                f"{parts} times {length}",
                node=attentions[0],
            )
    return images, rows, len(sizes) > 1
