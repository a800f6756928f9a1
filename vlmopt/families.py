"""All that capture knows about Hugging Face families, as data.

Nothing outside this file names a model. A new family usually needs no entry: the names below are
conventions that most of transformers follows.
"""

from __future__ import annotations

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
