"""What a loop of drafts and verification knows between its steps.

"VVS: Accelerating Speculative Decoding for Visual Autoregressive Generation via Partial
Verification Skipping", arXiv 2511.13587: after a skip a draft is made from stale features, and
after the forward that recovers from it, from those of the tokens accepted last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.speculative.features import stale_features


@dataclass(frozen=True)
class Progress:
    """One sequence, the root of the next draft apart.

    Attributes:
        tokens: int64 ``[tokens]``, committed.
        waiting: so many of the last of them the target has not seen; nothing can be skipped then.
        features: ``[branches, seen, width]`` of tokens that were drafted and that the target has
            seen since, the last ones only.
        drafting: ``[branches, tokens, width]``: features that the next draft starts from, one for
            each token committed last.
        memory: most ``features`` that are remembered: as many as one skip may commit.
        new_tokens: how many tokens the loop has added.
    """

    tokens: Tensor
    waiting: int
    features: Tensor
    drafting: Tensor
    memory: int
    new_tokens: int = 0

    @classmethod
    def start(cls, prompt: Tensor, features: Tensor, memory: int) -> Progress:
        """Behind a prompt.

        Args:
            prompt: int64 ``[tokens]``.
            features: ``[branches, tokens, width]`` of the prompt.
            memory: see above; at least 1.
        """
        return cls(prompt, 0, features[:, :0], features, memory)

    def verified(self, tokens: Tensor, features: Tensor) -> Progress:
        """The target has seen what waited, and the root and the drafts that it accepted.

        Args:
            tokens: int64 ``[kept]``, the root and what is accepted behind it.
            features: ``[branches, waiting + kept, width]``.

        Raises:
            PreconditionError: there is another number of features.
        """
        if features.shape[1] != self.waiting + len(tokens):
            raise PreconditionError(
                f"there are {features.shape[1]} features, for {self.waiting} tokens that waited "
                f"and {len(tokens)} that are accepted",
                hint="give those of the waiting tokens too, in front",
            )
        return replace(
            self._with(tokens),
            waiting=0,
            features=torch.cat([self.features, features], 1)[:, -self.memory :],
            drafting=features[:, self.waiting :],
        )

    def skipped(self, tokens: Tensor) -> Progress:
        """Tokens are committed that the target has not seen.

        Args:
            tokens: int64 ``[taken]``; see :func:`vlmopt.speculative.truncation.take_path`.

        Raises:
            PreconditionError: others wait already, there are more than ``memory``, or no drafted
                token was verified before.
        """
        if self.waiting or len(tokens) > self.memory:
            raise PreconditionError(
                f"{len(tokens)} tokens cannot go unverified where {self.waiting} wait already, and "
                f"at most {self.memory} may at once",
                hint="verify in between",
            )
        drafting = stale_features(self.features, len(tokens))
        return replace(self._with(tokens), waiting=len(tokens), drafting=drafting)

    def _with(self, tokens: Tensor) -> Progress:
        return replace(
            self,
            tokens=torch.cat([self.tokens, tokens]),
            new_tokens=self.new_tokens + len(tokens),
        )
