"""What a model makes of a prompt, before the first token that it generates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError
from vlmopt.speculative.decoders import TokenDecoder
from vlmopt.speculative.loop import Prefilled

_ONE_FORWARD: dict[str, Any] = {
    "max_new_tokens": 1,
    "use_cache": True,
    "cache_implementation": "dynamic",
    "do_sample": False,
    "num_beams": 1,
    "num_return_sequences": 1,
    "guidance_scale": None,
}
"""Arguments of ``generate()`` with which the decoder reads the prompt, and nothing else."""

_AXES = 3
"""Rows of positions in time, height and width; plain positions of text may stand before them."""


def guidance_batch(condition: Tensor, without: Tensor, pad: int) -> dict[str, Tensor]:
    """Inputs of a model for classifier-free guidance, padded on the left to one length.

    Args:
        condition: int64 ``[1, tokens]``, the prompt.
        without: int64 ``[1, tokens]``, an empty or negative one.
        pad: id of padding.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``[2, tokens]``, the condition first.
    """
    length = max(condition.shape[1], without.shape[1])
    ids, masks = [], []
    for prompt in (condition, without):
        width = (length - prompt.shape[1], 0)
        ids.append(torch.nn.functional.pad(prompt, width, value=pad))
        masks.append(torch.nn.functional.pad(torch.ones_like(prompt), width))
    return {"input_ids": torch.cat(ids), "attention_mask": torch.cat(masks)}


def prefill(model: Any, decoder: TokenDecoder, inputs: Mapping[str, Any]) -> Prefilled:
    """Let a Hugging Face model read prompts, text with or without images, in one forward.

    Args:
        model: one that generates.
        decoder: the part of it that goes on, whose head says what its first token may be.
        inputs: as for ``model.generate``: ``input_ids`` or ``inputs_embeds``, image tensors, and
            the ``attention_mask``; without that, nothing is padding. Padding stands on the left.

    Raises:
        PreconditionError: there is no prompt, or padding on its right, the decoder does not read
            each token of it once, or a layer does not keep keys and values of each.
    """
    present = _present(inputs)
    calls: list[tuple[Tensor | None, Any]] = []

    def record(_: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        calls.append((kwargs.get("position_ids"), output))

    handle = model.get_decoder().register_forward_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            model.generate(**{**inputs, "attention_mask": present.long()}, **_ONE_FORWARD)
    finally:
        handle.remove()
    if len(calls) != 1 or calls[0][1].last_hidden_state.shape[:2] != present.shape:
        read = [list(output.last_hidden_state.shape[:2]) for _, output in calls]
        raise PreconditionError(
            f"the decoder of {type(model).__name__} was to read {list(present.shape)} tokens at "
            f"once, and read {read}",
            hint="pass prompts with one token for each that the decoder reads, and do not let "
            "generate() read them in chunks",
        )
    ((positions, output),) = calls
    features = output.last_hidden_state
    with torch.no_grad():
        logits = decoder.head(features[:, -1])
    past = [
        _keys_and_values(index, layer, present.shape[1])
        for index, layer in enumerate(output.past_key_values.layers)
    ]
    own = decoder.embed is model.get_input_embeddings()
    ids = inputs.get("input_ids") if own else None
    return Prefilled(past, present, features, logits, _next_position(positions, present), ids)


def _present(inputs: Mapping[str, Any]) -> Tensor:
    given = inputs.get("input_ids")
    if given is None and (embeds := inputs.get("inputs_embeds")) is not None:
        given = embeds[..., 0]
    if given is None:
        raise PreconditionError(
            f"there is no prompt among the inputs ({', '.join(inputs) or 'none'})",
            hint="pass input_ids, or inputs_embeds",
        )
    mask = inputs.get("attention_mask")
    mask = torch.ones_like(given, dtype=torch.bool) if mask is None else mask.bool()
    if mask.shape != given.shape or not bool(mask[:, -1].all()):
        raise PreconditionError(
            f"an attention mask of {list(mask.shape)} for prompts of {list(given.shape)} must end "
            "with a token of each, since generation goes on behind it",
            hint="pad on the left: processor.tokenizer.padding_side = 'left'",
        )
    return mask


def _keys_and_values(index: int, layer: Any, tokens: int) -> tuple[Tensor, Tensor]:
    keys: Tensor | None = getattr(layer, "keys", None)
    values: Tensor | None = getattr(layer, "values", None)
    held = 0 if keys is None else keys.shape[2]
    if keys is None or values is None or held != tokens:
        raise PreconditionError(
            f"layer {index} keeps keys of {held} tokens of a prompt of {tokens}",
            hint="choose a model whose layers all attend to everything before, or a shorter prompt",
        )
    return keys, values


def _next_position(positions: Tensor | None, present: Tensor) -> Tensor:
    """One more than the largest position of each prompt, whatever the axis."""
    if positions is None:  # the decoder counted all tokens
        return torch.full((len(present),), present.shape[1], device=present.device)
    if positions.ndim == 3:
        positions = positions[-_AXES:].amax(0)
    return positions.expand(present.shape).masked_fill(~present, -1).amax(1) + 1
