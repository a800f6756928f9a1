"""Running a vision encoder on some of its patches: they are chosen before the first block."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from vlmopt.analysis.blocks import find_blocks
from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.token_axes import B, Dims, T, follow_tokens
from vlmopt.graph.attention import attention_mask, replace_mask
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Port, Role
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.encoded import KEPT
from vlmopt.rewrite.exits import mark_exits, remove_exit, restore_rows
from vlmopt.rewrite.patches import Patches
from vlmopt.rewrite.region import gather_tokens, shorten_region
from vlmopt.rewrite.tokens import is_mask, later_of, mask_fillers, remove_unused
from vlmopt.rewrite.windows import widen_windows

aten = torch.ops.aten

Choose = Callable[..., tuple[Tensor, Tensor]]


def prune_patches(
    patches: Patches,
    count: int,
    choose: Choose,
    values: Sequence[fx.Node],
    ctx: PassContext,
    *,
    prefix: str,
) -> None:
    """Run the blocks on the patches of ``count`` tokens of each image.

    Attention within windows stays there, among the patches of a window that are left. Behind the
    blocks each row is there again; those of patches that were left out hold anything.
    Which these are leaves the stage as a further output, :data:`~vlmopt.rewrite.encoded.KEPT`.

    Args:
        choose: ``values -> (tokens, valid)``: int64 ``[images, count]`` ascending, numbers among
            the tokens of an image; bool ``[images, count]``, False for fillers, whose patches no
            one may attend to.

    Raises:
        UnsupportedOperatorError: the blocks cannot run on fewer patches.
        BlockMismatchError: they attend within windows, and are built otherwise than is known.
    """
    stage, graph = patches.stage, patches.stage.graph
    if patches.windows == "parts":
        widen_windows(stage, find_blocks(stage), ctx)
        patches = replace(patches, layers=find_layers(stage))
    entry = patches.entry
    emitter = partial(Emitter.of_pass, ctx, stage, prefix=prefix)
    exits = mark_exits(graph, patches.layers, entry, emitter)
    batch = patches.images if patches.images != 1 else None
    width = (int(entry.meta["val"].shape[-1]),)
    lead = (B,) if batch else (1,)
    flat: Dims = (((B, T) if batch else (T,)), width)
    dims: Dims = (lead, (T,), width) if entry.meta["val"].ndim == 3 else flat
    axes = follow_tokens(
        graph,
        {entry: dims},
        tokens=patches.rows,
        batch=batch,
        stops=exits,
        special=patches.special,
    )
    length = patches.special + count * patches.members
    anchor = max([entry, *values]).next
    emit = emitter(entry)
    with graph.inserting_before(anchor):
        slots, valid, places, kept = emit.trace(
            partial(_rows, patches, choose), *values, names=("slots", "valid", "places", "kept")
        )
        shorter = gather_tokens(emit, entry, dims, lambda _: slots, name="patches")
    frontier: dict[fx.Node, fx.Node] = {}
    for value, found in axes.frontier.items():
        with graph.inserting_before(later_of(graph, value, anchor)):
            fewer = gather_tokens(emit, value, found, lambda _: slots, name=value.name)
            if is_mask(axes, value):
                hide = _in_window if patches.windows else mask_fillers
                fewer = emit.trace(hide, fewer, valid, names=("mask",))
        frontier[value] = fewer
    with graph.inserting_before(anchor):
        visible = emit.call(aten.view.default, valid, [patches.images, 1, 1, length], name="mask")
    for node in patches.layers.of:
        attends = node.target is aten.scaled_dot_product_attention.default
        if attends and attention_mask(node) is None:
            replace_mask(node, visible)
    shorten_region(axes, emit, starts={entry: shorter}, length=length, frontier=frontier)
    for alias in exits:
        if alias in axes.dims:
            remove_exit(alias, restore_rows(alias, places, axes.dims[alias], emitter(alias)))
    remove_unused(stage, but={kept})
    stage.add_output(Port(f"encoded_{KEPT}", Role.ENCODED), kept)


def _in_window(mask: Tensor, valid: Tensor) -> Tensor:
    """A mask ``[..., queries, keys]`` that hides fillers, too; from themselves it does not.

    All patches of a window may be gone but for fillers, and no row may see nothing.
    """
    own = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    return mask_fillers(mask, valid) | own


def _rows(
    patches: Patches, choose: Choose, *values: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows that stay of each image, which of them are no fillers, where each went, and the flags.

    Returns:
        int64 ``[images, length]``; bool ``[images, length]``; int64 ``[images, rows]``, 0 for what
        is gone; float32 ``[images * rows]``: 1 for what stays, -1 for patches that do not.
    """
    tokens, real = choose(*values)
    device = tokens.device
    groups = torch.tensor(patches.groups, device=device)
    index = tokens[..., None].expand(-1, -1, patches.members)
    own = groups.gather(1, index).flatten(1)
    own, order = own.sort(dim=-1)
    valid = real[..., None].expand_as(index).flatten(1).gather(1, order)
    images = patches.images
    special = torch.arange(patches.special, device=device).expand(images, -1)
    slots = torch.cat([special, own], 1)
    valid = torch.cat([torch.ones_like(special, dtype=torch.bool), valid], 1)
    place = torch.arange(slots.shape[1], device=device).expand_as(slots)
    none = torch.zeros(images, patches.rows, dtype=torch.int64, device=device)
    flags = torch.where(valid, 1.0, -1.0)
    kept = torch.full((images, patches.rows), -1.0, device=device).scatter(1, slots, flags)
    return slots, valid, none.scatter(1, slots, place), kept.flatten()
