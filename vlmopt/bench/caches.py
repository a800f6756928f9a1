"""First-block caches of other libraries, compiled as far as they can be, to compare with.

Their decisions are made in Python between blocks, so that no graph holds a step: each block is
compiled on its own, once for all, and what decides, the patch embedding and the head run as they
are. Compiling the whole model around the decisions was no faster.
"""

from __future__ import annotations

import copy
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmopt.errors import OptionError


class Cached(ABC):
    """A copy of a ``DiTTransformer2DModel`` that skips all blocks but the first at some steps.

    Args:
        model: left as it is.
        threshold: change of what the first block adds up to which the others are skipped.
        steps: of the loop.
    """

    def __init__(self, model: Any, threshold: float, steps: int) -> None:
        self.model = copy.deepcopy(model)
        for block in self.model.transformer_blocks:
            block.forward = torch.compile(block.forward, dynamic=False)
        self._install(threshold, steps)

    @abstractmethod
    def _install(self, threshold: float, steps: int) -> None:
        """Let the library take over the model."""

    @abstractmethod
    def begin(self) -> None:
        """A generation begins."""

    @abstractmethod
    def skipped(self) -> bool:
        """Whether the last step skipped blocks."""

    def __call__(self, sample: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        """A step: ``[B, channels, height, width]``, int64 ``[B]`` and ``[B]``."""
        found: Tensor = self.model(
            sample, timestep=timestep, class_labels=labels, return_dict=False
        )[0]
        return found


class FirstBlockCacheOfDiffusers(Cached):
    """``diffusers.hooks.apply_first_block_cache``."""

    def _install(self, threshold: float, steps: int) -> None:
        from diffusers.hooks.first_block_cache import (
            FirstBlockCacheConfig,
            apply_first_block_cache,
        )
        from diffusers.hooks.hooks import HookRegistry

        apply_first_block_cache(self.model, FirstBlockCacheConfig(threshold=threshold))
        self._registry = HookRegistry.check_if_exists_or_initialize(self.model)
        self._hooks = next(iter(self.model.transformer_blocks))._diffusers_hook.hooks

    def begin(self) -> None:
        from diffusers.hooks.hooks import CacheContext, _set_cache_context

        self._registry.reset_stateful_hooks()
        _set_cache_context(self.model, CacheContext("loop"))

    def skipped(self) -> bool:
        (hook,) = self._hooks.values()
        return not hook.state_manager.get_state().should_compute


class DBCacheOfCacheDit(Cached):
    """``cache_dit.enable_cache`` with one block computed always, which is the same method."""

    def _install(self, threshold: float, steps: int) -> None:
        import cache_dit
        from cache_dit.caching.patch_functors import DiTPatchFunctor

        config = cache_dit.DBCacheConfig(
            Fn_compute_blocks=1,
            Bn_compute_blocks=0,
            residual_diff_threshold=threshold,
            max_warmup_steps=0,
            num_inference_steps=steps,
            enable_separate_cfg=False,
        )
        adapter = cache_dit.BlockAdapter(
            transformer=self.model,
            blocks=self.model.transformer_blocks,
            forward_pattern=cache_dit.ForwardPattern.Pattern_3,
            patch_functor=DiTPatchFunctor(),
        )
        cache_dit.enable_cache(adapter, cache_config=config)
        self._steps = steps
        self._manager = self.model._context_manager

    def begin(self) -> None:
        import cache_dit

        # what counts the steps begins anew a step late
        cache_dit.refresh_context(self.model, num_inference_steps=self._steps, verbose=False)

    def skipped(self) -> bool:
        step: int = self._manager.get_current_step()
        return step in self._manager.get_cached_steps()


CACHES: dict[str, Callable[[Any, float, int], Cached]] = {
    "diffusers": FirstBlockCacheOfDiffusers,
    "cache-dit": DBCacheOfCacheDit,
}


def why_missing(library: str) -> str | None:
    """Why a library of :data:`CACHES` cannot be compared with; ``None``: it can be.

    Raises:
        OptionError: it is none of them.
    """
    if library not in CACHES:
        raise OptionError(f"there is no cache of {library}", hint=f"choose of {', '.join(CACHES)}")
    os.environ.setdefault("CACHE_DIT_LOG_LEVEL", "ERROR")  # read by cache-dit when imported
    try:
        importlib.import_module(library.replace("-", "_"))
    except ImportError as error:
        return f"it cannot be imported: {error}"
    return None
