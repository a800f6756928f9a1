"""The key-value cache of a rewritten model: layers of different lengths."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers import DynamicCache

from vlmopt.errors import PreconditionError

if TYPE_CHECKING:
    from vlmopt.runtime.model import Specialisation


class RaggedCache(DynamicCache):
    """A cache in which later layers hold fewer tokens.

    Attributes:
        kept: for each cut, int64 ``[batch, kept]``: slots of the prompt that its layers hold.
        seen: tokens seen so far, dropped ones included.
        made_by: the specialisation that made this cache and continues from it.
        reported: further values that a pass made the prefill give, by name of the port.
    """

    def __init__(self, kept: dict[str, torch.Tensor], seen: int, made_by: Specialisation) -> None:
        super().__init__()
        self.kept = kept
        self.seen = seen
        self.made_by = made_by
        self.reported: dict[str, torch.Tensor] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen so far: positions and masks count the dropped ones too."""
        return self.seen

    def reorder_cache(self, beam_idx: Any) -> None:
        super().reorder_cache(beam_idx)
        self.kept = {k: v.index_select(0, beam_idx.to(v.device)) for k, v in self.kept.items()}

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)
        self.kept = {k: v.repeat_interleave(repeats, dim=0) for k, v in self.kept.items()}

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self.kept = {k: v[indices] for k, v in self.kept.items()}

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise PreconditionError(
            "the cache of a model with dropped tokens cannot be cropped",
            hint="generate without assisted decoding",
        )
