"""All that capture knows about Hugging Face families, as data.

Nothing outside this file names a model. A new family usually needs no entry: the names below are
conventions that most of transformers follows.
"""

from __future__ import annotations

from typing import Any

from vlmopt.program import Role

INPUT_ROLES: dict[str, Role] = {
    "input_ids": Role.INPUT_IDS,
    "inputs_embeds": Role.INPUTS_EMBEDS,
    "attention_mask": Role.ATTENTION_MASK,
    "position_ids": Role.POSITION_IDS,
    "visual_pos_masks": Role.VISUAL_MASK,
    "pixel_values": Role.PIXEL_VALUES,
    "pixel_values_videos": Role.PIXEL_VALUES,
    "hidden_states": Role.HIDDEN_STATES,
    "features": Role.FEATURES,
}
"""Keyword argument of a captured module -> role of the port it becomes."""

VISUAL_TOKEN_ATTRIBUTES: tuple[str, ...] = (
    "image_token_id",
    "image_token_index",
    "video_token_id",
    "video_token_index",
)
"""Names under which a config holds the placeholder token ids of images and videos."""

OUTPUT_FLAGS: tuple[str, ...] = (
    "use_cache",
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "logits_to_keep",
)
"""Arguments that steer Python code and are no inputs of a graph."""

GROUPED_PRODUCTS: tuple[str, ...] = ("transformers::grouped_mm_fallback",)
"""Operators of its own with which transformers multiplies rows sorted by expert, arguments as
those of ``vlmopt::grouped_mm``: in float types for which ATen has no grouped product."""

RUNNING_STATES: tuple[str, ...] = ("conv_states", "recurrent_states")
"""What a layer of a cache holds where it does not attend: convolutions, linear attention."""

STAGE_NAMES: dict[str, str] = {
    "image_encoder": "vision_encoder",
    "multi_modal_projector": "projector",
    "connector": "projector",
    "embed_vision": "projector",
    "language_model": "language_model",
    "prefill": "language_model",
    "lm_head": "lm_head",
    "decode": "decode",
}
"""Component name of ``transformers.exporters`` -> stage name, in execution order."""

PROJECTOR_NAMES: tuple[str, ...] = ("aligner", "vision_projection", "mm_projector")
"""Names of modules that project patches, beside those that ``transformers.exporters`` knows."""

IMAGE_AUTOENCODERS: tuple[str, ...] = ("vqmodel",)
"""Names of the module between pixels and the codes of a vector quantiser."""

IMAGE_VOCABULARIES: tuple[tuple[str, str, str], ...] = (
    ("generation_embeddings", "generation_aligner", "generation_head"),
)
"""Names of the embedding of codes, of what brings it to the decoder's width, and of the head over
codes, where these are no tokens of the text (Janus, arXiv 2410.13848)."""

CODE_TABLES: tuple[str, ...] = ("vocabulary_mapping",)
"""Names of the object that says which token of the text each code is (Chameleon, arXiv 2405.09818;
Emu3, arXiv 2409.18869)."""

IMAGE_ENDINGS: tuple[str, ...] = ("<|extra_201|>", "<|image end|>")
"""Behind the last row of an image whose rows end with a token, in this order, and then the end of
the sequence: the ends of the frame and of the image, in the words of Emu3's vocabulary."""


def visual_token_ids(config: object) -> tuple[int, ...]:
    """Token ids that stand for vision in a prompt, from a Hugging Face config (may be empty)."""
    values = (getattr(config, name, None) for name in VISUAL_TOKEN_ATTRIBUTES)
    return tuple(sorted({value for value in values if isinstance(value, int) and value >= 0}))


def attention_kinds(config: object) -> tuple[str, ...]:
    """How layers attend that do not attend to all tokens before, from a text model's config."""
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        return ("sliding_attention",) if window is not None else ()
    return tuple(dict.fromkeys(kind for kind in kinds if kind != "full_attention"))


def image_grid(autoencoder: Any) -> tuple[int, int] | None:
    """Rows and columns of codes that an autoencoder makes of an image, where it fixes them."""
    sizes = getattr(autoencoder.quantize, "quant_state_dims", None)
    if sizes is not None:
        return int(sizes[0]), int(sizes[1])
    config = getattr(autoencoder, "config", None)
    if (pixels := getattr(config, "resolution", None)) is None:
        return None
    side = int(pixels) // 2 ** (len(getattr(config, "channel_multiplier", [1])) - 1)
    return side, side


def reads_rows(autoencoder: Any) -> bool:
    """Whether an autoencoder decodes ``[batch, rows, columns]``, and not ``[batch, codes]``."""
    return not hasattr(autoencoder.quantize, "quant_state_dims")


def tokens_of_codes(table: Any) -> dict[int, int]:
    """Code -> token of the text, see :data:`CODE_TABLES`."""
    return dict(table.img2bpe)


def tokens_around_codes(table: Any, config: Any) -> tuple[int | None, dict[str, int | None]]:
    """The token behind each row of codes, if any, and those behind the last row, by name.

    Args:
        config: of the text model.
    """
    row_end = getattr(table, "eol_token_id", None)
    if row_end is None:
        return None, {}
    endings: dict[str, int | None] = {name: table.vocab_map.get(name) for name in IMAGE_ENDINGS}
    last = config.eos_token_id
    return row_end, {**endings, "eos_token_id": last[0] if isinstance(last, list) else last}
