"""Tiny models that generate images token by token, with random weights, and how each does it alone.

Codes are tokens of the text in an order of their own, among others, where they are tokens of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CODES, VOCAB, GRID = 24, 64, (3, 5)
BOS, BEGIN, EOS, PAD = 1, 2, 3, 0
PROMPT = torch.tensor([[BOS, 40, 41, 42, 43, BEGIN]])
_TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
_PIXELS: dict[str, Any] = {
    "base_channels": 32,
    "channel_multiplier": [1, 1],
    "num_res_blocks": 1,
    "latent_channels": 4,
}


@dataclass(frozen=True)
class ImageModel:
    """A family.

    Attributes:
        build: the model, before its weights are made random.
        without: the prompt of guidance that says nothing.
        write: ``(model, without, scale)`` to the codes, or tokens, of a greedy image behind
            :data:`PROMPT`, int64 ``[1, tokens]``, as the model itself generates it; ``without`` is
            ``None`` for no guidance.
        logits: ``(model, tokens)`` to logits ``[batch, tokens, vocabulary]`` of the tokens of an
            image, without a prompt, as the model itself computes them.
        options: of ``image_decoder``.
    """

    build: Callable[[], Any]
    without: Tensor
    write: Callable[[Any, Tensor | None, float], Tensor]
    logits: Callable[[Any, Tensor], Tensor]
    options: Callable[[], dict[str, Any]] = dict


def _order() -> list[int]:
    """The token that each code is: between 8 and 40, all but a few, shuffled."""
    generator = torch.Generator().manual_seed(5)
    return [int(one) + 8 for one in torch.randperm(32, generator=generator)[:CODES]]


def _janus() -> Any:
    from transformers import JanusConfig, JanusForConditionalGeneration

    config = JanusConfig(
        text_config={"model_type": "llama", **_TEXT},
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "num_image_tokens": 16,
            "projection_dim": 32,
        },
        vq_config={
            **_PIXELS,
            "embed_dim": 8,
            "num_embeddings": CODES,
            "projection_dim": 32,
            "image_token_embed_dim": 32,
        },
        image_token_id=50,
        tie_word_embeddings=False,
    )
    model = JanusForConditionalGeneration(config)
    generation: Any = model.generation_config
    generation.bos_token_id, generation.pad_token_id, generation.eos_token_id = BOS, PAD, EOS
    generation.generation_kwargs = {"boi_token_id": BEGIN}
    return model


def _janus_writes(model: Any, without: Tensor | None, scale: float) -> Tensor:
    if without is None:  # generate() always guides
        return _without_cache(model, _janus_next, PROMPT, None, 1.0, 16)
    found: Tensor = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        generation_mode="image",
        guidance_scale=scale,
        do_sample=False,
    )
    return found


def _janus_next(model: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    embeds = model.get_input_embeddings()(prompt)
    embeds = torch.cat([embeds, model.prepare_embeddings_for_image_generation(tokens)], 1)
    logits: Tensor = model.model.generation_head(
        model.model.language_model(inputs_embeds=embeds).last_hidden_state
    )
    return logits


def _emu3() -> Any:
    from transformers import Emu3Config, Emu3ForConditionalGeneration

    tokens = {f"<|visual token {code:06d}|>": token for code, token in enumerate(_order())}
    around = {"<image>": 50, "<|extra_200|>": 51, "<|extra_201|>": 52, "<|image end|>": 53}
    config = Emu3Config(
        vq_config={
            **_PIXELS,
            "codebook_size": CODES,
            "embed_dim": 4,
            "temporal_downsample_factor": 2,
            "hidden_size": 32,
            "attn_resolutions": [],
        },
        text_config={**_TEXT, "attention_dropout": 0.0},
        vocabulary_map={**tokens, **around},
    )
    return Emu3ForConditionalGeneration(config)


def _emu3_writes(model: Any, without: Tensor | None, scale: float) -> Tensor:
    rows, columns = GRID
    line = columns + 1

    def allowed(_: int, tokens: Tensor) -> list[int]:
        place = len(tokens) - PROMPT.shape[1]
        if place >= rows * line:
            return [[52, 53, EOS][place - rows * line]]
        return [51] if place % line == columns else model.vocabulary_mapping.image_tokens

    return _generated(model, without, scale, allowed, rows * line + 3)


def _generated(
    model: Any, without: Tensor | None, scale: float, allowed: Callable[..., list[int]], new: int
) -> Tensor:
    guidance: dict[str, Any] = {}
    if without is not None:
        mask = torch.ones_like(without)
        guidance = {
            "guidance_scale": scale,
            "negative_prompt_ids": without,
            "negative_prompt_attention_mask": mask,
        }
    found = model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        prefix_allowed_tokens_fn=allowed,
        max_new_tokens=new,
        do_sample=False,
        **guidance,
    )
    return found[:, PROMPT.shape[1] :]  # type: ignore[no-any-return]


def _chameleon() -> Any:
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration

    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    names = [f"IMGIMG{code}".translate(letters) for code in range(CODES)]
    tokens = {f"{name}Z": token for name, token in zip(names, _order(), strict=True)}
    config = ChameleonConfig(
        **_TEXT,
        vq_config={
            **_PIXELS,
            "embed_dim": 4,
            "num_embeddings": CODES,
            "resolution": 8,
        },
        vocabulary_map={**tokens, "<image>": 50},
    )
    return ChameleonForConditionalGeneration(config)


def _chameleon_next(model: Any, prompt: Tensor, tokens: Tensor) -> Tensor:
    """The model itself lets no token of an image through, so its last layer is asked here."""
    hidden = model.model(torch.cat([prompt, tokens], 1)).last_hidden_state
    logits: Tensor = model.lm_head(hidden)
    codes = torch.zeros(VOCAB, dtype=torch.bool)
    codes[model.model.vocabulary_mapping.image_tokens] = True
    return logits.masked_fill(~codes, -torch.inf)


def _chameleon_writes(model: Any, without: Tensor | None, scale: float) -> Tensor:
    return _without_cache(model, _chameleon_next, PROMPT, without, scale, 16)


def _without_cache(
    model: Any,
    following: Callable[[Any, Tensor, Tensor], Tensor],
    prompt: Tensor,
    without: Tensor | None,
    scale: float,
    count: int,
) -> Tensor:
    """The whole sequence is read again for each token."""
    tokens = torch.zeros(1, 0, dtype=torch.int64)
    for _ in range(count):
        scores = following(model, prompt, tokens)[:, -1].log_softmax(-1)
        if without is not None:
            other = following(model, without, tokens)[:, -1].log_softmax(-1)
            scores = torch.where(scores.isinf(), scores, other + scale * (scores - other))
        tokens = torch.cat([tokens, scores.argmax(-1)[:, None]], 1)
    return tokens


def _llama() -> Any:
    """Codes are the first tokens, and classes or text come behind them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**{**_TEXT, "eos_token_id": None}))


def _llama_writes(model: Any, without: Tensor | None, scale: float) -> Tensor:
    return _generated(model, without, scale, lambda *_: [*range(CODES)], 16)


def _no_prompt(
    following: Callable[[Any, Tensor, Tensor], Tensor],
) -> Callable[[Any, Tensor], Tensor]:
    return lambda model, tokens: following(model, PROMPT[:, :0].expand(len(tokens), -1), tokens)


def _of_text(model: Any, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens).logits
    return logits


_SHORT = torch.tensor([[BOS, 44, BEGIN]])

IMAGE_MODELS: dict[str, ImageModel] = {
    "janus": ImageModel(
        _janus,
        PROMPT.where((PROMPT == BOS) | (PROMPT == BEGIN), PAD),
        _janus_writes,
        _no_prompt(_janus_next),
    ),
    "emu3": ImageModel(_emu3, _SHORT, _emu3_writes, _of_text, lambda: {"grid": GRID}),
    "chameleon": ImageModel(_chameleon, _SHORT, _chameleon_writes, _no_prompt(_chameleon_next)),
    "llama": ImageModel(
        _llama, _SHORT, _llama_writes, _of_text, lambda: {"autoencoder": autoencoder()}
    ),
}


def autoencoder() -> Any:
    """One with four rows and columns of codes."""
    return build("janus").model.vqmodel


@functools.cache
def build(name: str) -> Any:
    """The tiny model: float32, eval mode; no token is much likelier than the others."""
    torch.manual_seed(0)
    model = IMAGE_MODELS[name].build().eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            torch.nn.init.normal_(weight, std=0.3)
    return model
