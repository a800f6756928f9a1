"""What generates tokens one by one, whatever model it is taken from: embedding, decoder, head."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from vlmopt.errors import PreconditionError


class TokenDecoder(nn.Module):
    """A decoder with the embedding and the head of one vocabulary; weights are shared.

    Args:
        embed: int64 ``[batch, tokens]`` to ``[batch, tokens, width]``.
        decoder: a Hugging Face text model: takes ``inputs_embeds``, and gives hidden states after
            its last norm.
        head: hidden states to logits.

    Attributes:
        config: of the decoder.
    """

    def __init__(self, embed: nn.Module, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.decoder = decoder
        self.head = head
        self.config: Any = cast("Any", decoder).config

    def forward(self, input_ids: Tensor, **kwargs: Any) -> CausalLMOutputWithPast:
        """Logits, the hidden states that they come from, and keys and values, of every token."""
        return with_logits(self.decoder(inputs_embeds=self.embed(input_ids), **kwargs), self.head)


def with_logits(result: Any, head: nn.Module) -> CausalLMOutputWithPast:
    """What a decoder gives, and what a head makes of its hidden states."""
    hidden = result.last_hidden_state
    return CausalLMOutputWithPast(
        logits=head(hidden), past_key_values=result.past_key_values, hidden_states=hidden
    )


def text_decoder(model: Any) -> TokenDecoder:
    """The part of a Hugging Face model that writes text, one with or without vision.

    Raises:
        PreconditionError: the model has no head over its vocabulary.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise PreconditionError(
            f"{type(model).__name__} has no head that gives logits of text",
            hint="load the class that generates, such as ...ForConditionalGeneration",
        )
    return TokenDecoder(model.get_input_embeddings(), model.get_decoder(), head).eval()
