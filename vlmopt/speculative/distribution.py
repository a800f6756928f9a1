"""What a target's logits say of the next token: guidance, temperature, and what is left out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import OptionError


def guided(logits: Tensor, scale: float | Tensor) -> Tensor:
    """Logits of both branches as one, by classifier-free guidance.

    Args:
        logits: ``[2, ..., vocabulary]``, the condition first.

    Returns:
        float32 ``[1, ..., vocabulary]``.
    """
    condition, without = logits.float().chunk(2)
    return without + scale * (condition - without)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: 0 for greedy decoding.
        top_k: most probable tokens that may be drawn, and those equal to the last; ``None`` for
            all.
        top_p: as many of the most probable tokens as reach this sum may be drawn.
        guidance: scale of classifier-free guidance; ``None`` without.

    Raises:
        OptionError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    guidance: float | None = None

    def __post_init__(self) -> None:
        for name, wrong in (
            ("temperature", self.temperature < 0),
            ("top_k", self.top_k is not None and self.top_k < 1),
            ("top_p", not 0 < self.top_p <= 1),
        ):
            if wrong:
                raise OptionError(
                    f"{name} is {getattr(self, name)}",
                    hint="temperature is at least 0, top_k at least 1, top_p in (0, 1]",
                )

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return self.temperature == 0

    def distribution(self, logits: Tensor) -> Tensor:
        """The distributions that tokens are drawn from, float32 ``[..., vocabulary]``.

        Args:
            logits: ``[..., vocabulary]``.
        """
        logits = logits.float()
        if self.greedy:
            return logits.softmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[..., -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        chances = logits.softmax(-1)
        if self.top_p < 1:
            ordered, places = chances.sort(dim=-1, descending=True, stable=True)
            reached = ordered.cumsum(-1) - ordered >= self.top_p
            chances = chances.masked_fill(reached.gather(-1, places.argsort(-1)), 0.0)
            chances = chances / chances.sum(-1, keepdim=True)
        return chances
