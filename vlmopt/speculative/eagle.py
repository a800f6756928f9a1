"""A draft head: one decoder layer that guesses the target's next feature, and so its next token.

"EAGLE: Speculative Sampling Requires Rethinking Feature Uncertainty", arXiv 2401.15077. It reads
pairs of the feature of a token and the token behind it, shares the target's embedding and head, and
goes on from features that it guessed itself.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmopt import families
from vlmopt.speculative.decoders import TokenDecoder, with_logits


class EagleHead(nn.Module):
    """The weights of a draft head; :class:`EagleDecoder` runs it.

    Args:
        config: of the target's decoder, a Hugging Face text configuration.
        layers: how many layers of the target's kind.
        kind: the class of the target's decoder, where ``AutoModel`` knows none for ``config``; see
            :meth:`for_target`.
    """

    def __init__(
        self, config: Any, layers: int = 1, kind: Callable[[Any], nn.Module] | None = None
    ) -> None:
        super().__init__()
        config = copy.deepcopy(config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        self.fuse = nn.Linear(2 * config.hidden_size, config.hidden_size)
        decoder: Any = AutoModel.from_config(config) if kind is None else kind(config)
        decoder.set_input_embeddings(nn.Identity())  # that of the target is used
        for name in families.IMAGE_AUTOENCODERS:
            decoder._modules.pop(name, None)
        self.decoder = decoder

    @classmethod
    def for_target(cls, target: TokenDecoder, layers: int = 1) -> EagleHead:
        """A head whose layers are of the kind that a target has."""
        return cls(target.config, layers, type(target.decoder))

    def forward(self, embeds: Tensor, features: Tensor, **kwargs: Any) -> Any:
        """Guessed features of the tokens whose embeddings these are, ``[batch, tokens, width]``.

        Args:
            embeds: ``[batch, tokens, width]``.
            features: ``[batch, tokens, width]``, hidden states of the tokens before them.
        """
        fused = self.fuse(torch.cat([embeds, features.to(embeds.dtype)], -1))
        return self.decoder(inputs_embeds=fused, **kwargs)


class EagleDecoder(nn.Module):
    """A draft head with the embedding and the head of its target."""

    def __init__(self, target: TokenDecoder, head: EagleHead) -> None:
        super().__init__()
        self.embed = target.embed
        self.layers = head
        self.head = target.head
        self.config: Any = head.decoder.config

    def forward(self, input_ids: Tensor, features: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        """As :meth:`TokenDecoder.forward`, of tokens and the features of those before them."""
        return with_logits(self.layers(self.embed(input_ids), features, **kwargs), self.head)
