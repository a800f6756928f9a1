"""The untouched model over all that a stream has shown, with what it forgot hidden from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache


class Watched:
    """Keys and values of everything are kept, and a mask says what may still be seen.

    Args:
        prune: which of the embeddings ``[1, tokens, width]`` of a chunk stay, if not all do.
        renumber: those that stay take up positions without gaps.
    """

    def __init__(
        self,
        model: Any,
        prune: Callable[[Tensor], Tensor] | None = None,
        *,
        renumber: bool = True,
    ) -> None:
        self.model = model
        self.prune = prune
        self.renumber = renumber
        self.cache = DynamicCache()
        self.visible = torch.zeros(0, dtype=torch.bool)

    def feed(self, inputs: dict[str, Tensor], start: int, *, chunk: bool = False) -> Tensor:
        """Logits of the tokens that are left of ``inputs``, whose first position is ``start``."""

        def see(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
            embeds, places = kwargs["inputs_embeds"], kwargs.get("position_ids")
            if places is None:
                places = torch.arange(embeds.shape[1])[None]
            if chunk and self.prune is not None:
                stay = self.prune(embeds)
                places = places[..., : len(stay)] if self.renumber else places[..., stay]
                embeds = embeds[:, stay]
            tokens = embeds.shape[1]
            past = self.visible.expand(tokens, -1)
            mask = torch.cat([past, torch.ones(tokens, tokens).tril().bool()], 1)
            self.visible = torch.cat([self.visible, torch.ones(tokens).bool()])
            return args, kwargs | {
                "inputs_embeds": embeds,
                "position_ids": places + start,
                "attention_mask": mask[None, None],
                "past_key_values": self.cache,
                "use_cache": True,
            }

        hook = self.model.get_decoder().register_forward_pre_hook(see, with_kwargs=True)
        try:
            with torch.no_grad():
                logits: Tensor = self.model(**inputs, use_cache=False).logits
        finally:
            hook.remove()
        return logits

    def forget(self, first: int, last: int) -> None:
        """Tokens number ``first`` to ``last - 1``, of all that were fed."""
        self.visible[first:last] = False
