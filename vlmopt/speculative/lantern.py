"""Acceptance of drafted image tokens whose neighbours in the codebook the target likes.

"LANTERN: Accelerating Visual Autoregressive Models with Relaxed Speculative Decoding",
arXiv 2410.03355: codes that look alike share their probability, up to a bound.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.errors import OptionError


def nearest_codes(codebook: Tensor, k: int) -> Tensor:
    """The ``k + 1`` nearest other codes of each code, by Euclidean distance.

    Args:
        codebook: ``[codes, width]``.

    Returns:
        int64 ``[codes, k + 1]``, nearest first; of equal ones, the lower index.

    Raises:
        OptionError: there are fewer other codes.
    """
    if not 1 <= k < len(codebook) - 1:
        raise OptionError(
            f"{k + 1} neighbours were asked for, and a code has {len(codebook) - 1}",
            hint=f"choose k from 1 to {len(codebook) - 2}",
        )
    found = []
    for rows in torch.arange(len(codebook), device=codebook.device).split(1024):
        far = torch.cdist(
            codebook[rows].float(), codebook.float(), compute_mode="donot_use_mm_for_euclid_dist"
        )
        far[torch.arange(len(rows), device=far.device), rows] = torch.inf
        found.append(far.sort(dim=-1, stable=True).indices[:, : k + 1])
    return torch.cat(found)


@dataclass(frozen=True)
class Neighbourhood:
    """Which codes stand in for one another, and how far.

    Attributes:
        nearest: int64 ``[codes, k + 1]``, see :func:`nearest_codes`.
        delta: most probability that neighbours add; beyond 1, ``delta - 1`` times that of the token
            itself.
        ids: int64 ``[codes]``, the token that each code is, in a vocabulary that holds others too;
            these have no neighbours. ``None``: tokens and codes have the same numbers.
    """

    nearest: Tensor
    delta: float
    ids: Tensor | None = None

    def relaxed(self, probabilities: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens get with the help of their neighbours, as many as stay within the bound.

        Args:
            probabilities: float32 ``[tokens, vocabulary]``.
            tokens: int64 ``[tokens]``.

        Returns:
            float32 ``[tokens]``, and bool ``[tokens]``: any neighbour helped.
        """
        own = probabilities.gather(1, tokens[:, None])
        near, known = self._near(tokens)
        sums = probabilities.gather(1, near[:, :-1]).cumsum(-1)
        bound = (self.delta - 1) * own if self.delta > 1 else self.delta
        count = (sums <= bound).sum(-1, keepdim=True)  # sums do not fall
        most = sums.gather(1, (count - 1).clamp(min=0))
        helped = (count > 0) & known[:, None]
        return torch.where(helped, own + most, own)[:, 0], helped[:, 0]

    def without(self, probabilities: Tensor, token: int) -> Tensor:
        """The distribution with nothing left for a token's neighbours, not scaled again.

        Args:
            probabilities: float32 ``[vocabulary]``.
            token: one that has neighbours.
        """
        near, _ = self._near(torch.tensor([token]).to(probabilities.device))
        return probabilities.index_fill(0, near[0], 0.0)

    def _near(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Neighbours as tokens ``[tokens, k + 1]``, and which tokens have any."""
        if self.ids is None:
            return self.nearest[tokens], torch.ones_like(tokens, dtype=torch.bool)
        same = tokens[:, None] == self.ids
        return self.ids[self.nearest[same.int().argmax(-1)]], same.any(-1)
