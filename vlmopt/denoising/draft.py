"""A cheap draft of a diffusion transformer: some of its blocks, fed what enters those of the base.

Module surgery, before any capture, after "PS-SR: Pseudo-Single-Step Video Super-Resolution via
Speculative Diffusion" (CVPR 2026). A draft must be trained: the surgery is only where that begins.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from vlmopt.errors import OptionError, PreconditionError


def kept_blocks(count: int, every: int) -> tuple[int, ...]:
    """Which of ``count`` blocks a draft keeps: the last of each ``every``.

    Raises:
        OptionError: that is none.
    """
    if not 1 <= every <= count:
        raise OptionError(
            f"of {count} blocks, one in {every} cannot be kept", hint=f"choose 1 to {count}"
        )
    return tuple(at for at in range(count) if at % every == every - 1)


def blocks_of(transformer: nn.Module) -> tuple[str, nn.ModuleList]:
    """Name and list of the blocks of a transformer: its longest list of modules of one class.

    Raises:
        PreconditionError: there is none.
    """
    lists = [
        (name, child)
        for name, child in transformer.named_children()
        if isinstance(child, nn.ModuleList) and len({type(block) for block in child}) == 1
    ]
    if not lists:
        raise PreconditionError(
            f"{type(transformer).__name__} has no list of blocks of one class",
            hint="drafts are made of transformers whose blocks are in one ModuleList",
        )
    return max(lists, key=lambda found: len(found[1]))


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """What enters a block: its first argument, or the one named ``hidden_states``."""
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


class Tapped(nn.Module):
    """A transformer that also gives what enters some of its blocks.

    Args:
        transformer: shared, not copied.
        taps: places of blocks.
    """

    def __init__(self, transformer: nn.Module, taps: Sequence[int]) -> None:
        super().__init__()
        self.transformer = transformer
        self.taps = tuple(taps)

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The transformer's first result, and ``[B, tokens, width]`` of each tap.

        Args:
            args, kwargs: of the transformer.
        """
        seen: dict[int, Tensor] = {}
        _, blocks = blocks_of(self.transformer)

        def watch(at: int) -> Any:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                seen[at] = _hidden(args, kwargs)

            return blocks[at].register_forward_pre_hook(hook, with_kwargs=True)

        handles = [watch(at) for at in self.taps]
        try:
            result = self.transformer(*args, **kwargs, return_dict=False)[0]
        finally:
            for handle in handles:
                handle.remove()
        return result, tuple(seen[at] for at in self.taps)


class Draft(nn.Module):
    """Some blocks of a transformer, each fed what enters that block of the base.

    What a block gets is a linear map of the base's feature and the draft's own state, side by side.
    At first it passes on the base's feature alone, exactly.

    Attributes:
        transformer: with fewer blocks; its embeddings and head are copies of the base's.
        fusions: one map for each block, ``2 * width -> width``.
        kept: places in the base of the blocks that are kept.
    """

    def __init__(self, transformer: nn.Module, kept: Sequence[int], width: int) -> None:
        super().__init__()
        self.transformer = transformer
        self.kept = tuple(kept)
        like = next(transformer.parameters())
        self.fusions = nn.ModuleList(_passing_first(width, like) for _ in kept)
        self._features: Sequence[Tensor] | None = None
        for at, block in enumerate(blocks_of(transformer)[1]):
            block.register_forward_pre_hook(self._feed(at), with_kwargs=True)

    def _feed(self, at: int) -> Any:
        def hook(
            _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            if self._features is None:
                raise PreconditionError(
                    "the transformer of a draft was called on its own: its blocks need features of "
                    "the base",
                    hint="call the draft with features=",
                )
            both = torch.cat([self._features[at], _hidden(args, kwargs)], -1)
            fed = self.fusions[at](both)
            return ((fed, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": fed})

        return hook

    def forward(self, *args: Any, features: Sequence[Tensor], **kwargs: Any) -> Tensor:
        """The transformer's first result.

        Args:
            args, kwargs: of the transformer.
            features: of the base at the blocks that are kept, ``[B, tokens, width]`` each; see
                :class:`Tapped`.

        Raises:
            OptionError: there are not as many features as blocks.
        """
        if len(features) != len(self.kept):
            raise OptionError(
                f"a draft of {len(self.kept)} blocks got {len(features)} features",
                hint=f"tap the base at blocks {', '.join(map(str, self.kept))}",
            )
        self._features = features
        try:
            result: Tensor = self.transformer(*args, **kwargs, return_dict=False)[0]
        finally:
            self._features = None
        return result

    def recipe(self) -> dict[str, Any]:
        """How it was made, as JSON values."""
        return {
            "base": type(self.transformer).__name__,
            "blocks": blocks_of(self.transformer)[0],
            "kept": list(self.kept),
            "fusion": "linear([feature of the base, state of the draft])",
        }


def _passing_first(width: int, like: Tensor) -> nn.Linear:
    """A linear map of two vectors side by side that gives the first."""
    fusion = nn.Linear(2 * width, width, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        fusion.weight.copy_(torch.eye(width, 2 * width))
        fusion.bias.zero_()
    return fusion


def make_draft(base: Any, every: int) -> Draft:
    """A draft that keeps the last of each ``every`` blocks; the base stays as it is.

    Args:
        base: a transformer of diffusers whose configuration has ``num_layers``.
        every: see :func:`kept_blocks`.

    Raises:
        OptionError: no block would be kept.
        PreconditionError: the blocks cannot be found; or no linear layer behind them tells their
            width.
    """
    name, blocks = blocks_of(base)
    kept = kept_blocks(len(blocks), every)
    small = deepcopy(base)
    chosen = nn.ModuleList([getattr(small, name)[at] for at in kept])
    setattr(small, name, chosen)
    if hasattr(small, "register_to_config"):
        small.register_to_config(num_layers=len(kept))
    return Draft(small, kept, _width(blocks[0]))


def _width(block: nn.Module) -> int:
    """Width of the residual stream: that of the first linear layer's input in a block's attention.

    Raises:
        PreconditionError: there is no attention.
    """
    for module in block.modules():
        query = getattr(module, "to_q", None)
        if isinstance(query, nn.Linear):
            return query.in_features
    raise PreconditionError(
        f"{type(block).__name__} has no attention with a projection to_q, which tells its width"
    )


def widen_input(transformer: Any, factor: int = 2) -> None:
    """Let a transformer take ``factor`` times as many channels, in place; new ones count nothing.

    Args:
        transformer: whose patch embedding is a convolution of ``config.in_channels`` channels.

    Raises:
        PreconditionError: there is no such convolution, or more than one.
    """
    channels: int = transformer.config.in_channels
    found = [
        module
        for module in transformer.modules()
        if isinstance(module, nn.Conv2d | nn.Conv3d) and module.in_channels == channels
    ]
    if len(found) != 1:
        raise PreconditionError(
            f"{type(transformer).__name__} has {len(found)} convolutions of {channels} channels, "
            "not one patch embedding"
        )
    (embedding,) = found
    old = embedding.weight
    new = [old, *[torch.zeros_like(old) for _ in range(factor - 1)]]
    embedding.weight = nn.Parameter(torch.cat(new, 1).detach())
    embedding.in_channels = channels * factor
    transformer.register_to_config(in_channels=channels * factor)
