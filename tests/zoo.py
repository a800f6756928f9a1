"""Tiny random-weight members of the model families that vlmopt must capture and rewrite.

Every entry builds a real Hugging Face architecture with a small config, and a batch of real inputs
for it: prompts of unequal length (left padding), one image per sample, images all different.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

IMAGE = 3  # token id of the image placeholder in every tiny vocabulary
VIDEO = 5  # of the video placeholder, where a family has one
VOCAB = 64


@dataclass(frozen=True)
class Family:
    """One model family: how to build it, and how to make its inputs.

    Attributes:
        build: ``(layers) -> model``, float32, eval mode.
        image_tokens: visual tokens that one image becomes in the prompt.
        pixels: ``(images, seed) -> dict`` with the family's image tensors.
        video: what one short video becomes in the prompt.
        frames: ``(videos, seed) -> dict`` with the family's video tensors, or the number of frames
            of a video that goes in as so many images.
        per_sample: image tensors are ``[batch, images of a sample, ...]``, padded with zeros.
    """

    name: str
    build: Callable[[int], Any]
    image_tokens: int
    pixels: Callable[[int, int], dict[str, torch.Tensor]]
    video: tuple[int, ...] = ()
    frames: Callable[[int, int], dict[str, torch.Tensor]] | int = 0
    per_sample: bool = False


def _text(layers: int, **extra: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **extra,
    }


def _clip_vision(**extra: Any) -> dict[str, Any]:
    return {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": 32,
        "patch_size": 8,
        **extra,
    }


def _images(size: int) -> Callable[[int, int], dict[str, torch.Tensor]]:
    def pixels(batch: int, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator)}

    return pixels


def _llava(layers: int) -> Any:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_clip_vision()},
        text_config={"model_type": "llama", **_text(layers)},
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config)


def _llava_onevision(layers: int) -> Any:
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    config = LlavaOnevisionConfig(
        vision_config={"model_type": "siglip_vision_model", **_clip_vision()},
        text_config={"model_type": "qwen2", **_text(layers)},
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[32, 32]],
        vision_feature_layer=-1,
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _llava_onevision_pixels(batch: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # a base view and one tile per image, as the processor makes them
    return {
        "pixel_values": torch.randn(batch, 2, 3, 32, 32, generator=generator),
        "image_sizes": torch.tensor([[32, 32]] * batch),
    }


def _llava_onevision_frames(videos: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values_videos": torch.randn(videos, 4, 3, 32, 32, generator=generator)}


def _internvl(layers: int, **text: Any) -> Any:
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        vision_config={
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": [64, 64],
            "patch_size": [8, 8],
        },
        text_config={"model_type": "qwen2", **_text(layers), **text},
        image_token_id=IMAGE,
        image_seq_length=16,
        downsample_ratio=0.5,
    )
    return InternVLForConditionalGeneration(config)


def _internvl_moe(layers: int) -> Any:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return _internvl(layers, model_type="qwen3_moe", norm_topk_prob=True, **experts)


def _smolvlm(layers: int) -> Any:
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    config = SmolVLMConfig(
        vision_config={**_clip_vision(image_size=64), "model_type": "smolvlm_vision"},
        text_config={"model_type": "llama", **_text(layers)},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return SmolVLMForConditionalGeneration(config)


def _gemma3(layers: int) -> Any:
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={
            "model_type": "gemma3_text",
            **_text(layers, head_dim=8, sliding_window=8, query_pre_attn_scalar=8),
            "layer_types": [
                "full_attention" if i % 2 else "sliding_attention" for i in range(layers)
            ],
        },
        vision_config={
            "model_type": "siglip_vision_model",
            **_clip_vision(),
            "vision_use_head": False,
        },
        image_token_index=IMAGE,
        mm_tokens_per_image=16,
    )
    return Gemma3ForConditionalGeneration(config)


_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}


def _qwen2_vl(layers: int) -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config={**_text(layers), "rope_parameters": dict(_MROPE)},
        vision_config={
            "depth": 2,
            "embed_dim": 32,
            "hidden_size": 32,
            "num_heads": 4,
            "mlp_ratio": 2,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    return Qwen2VLForConditionalGeneration(config)


def _qwen2_5_vl(layers: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={**_text(layers), "rope_parameters": dict(_MROPE)},
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_heads": 4,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [1],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def _qwen3_vl(layers: int) -> Any:
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    config = Qwen3VLConfig(
        text_config={
            **_text(layers, head_dim=8),
            "rope_parameters": {**_MROPE, "mrope_interleaved": True},
        },
        vision_config={
            "depth": 3,
            "hidden_size": 32,
            "intermediate_size": 48,
            "out_hidden_size": 32,
            "num_heads": 4,
            "patch_size": 8,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    return Qwen3VLForConditionalGeneration(config)


def _qwen_pixels(batch: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor([[1, 8, 8]] * batch)  # 64 patches, merged 2x2 to 16 tokens
    return {
        "pixel_values": torch.randn(64 * batch, 3 * 2 * 8 * 8, generator=generator),
        "image_grid_thw": grid,
    }


def _qwen_frames(videos: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    grid = torch.tensor([[2, 4, 8]] * videos)  # four frames in pairs, each pair 8 tokens
    return {
        "pixel_values_videos": torch.randn(64 * videos, 3 * 2 * 8 * 8, generator=generator),
        "video_grid_thw": grid,
    }


def _qwen2_5_frames(videos: int, seed: int) -> dict[str, torch.Tensor]:
    return {**_qwen_frames(videos, seed), "second_per_grid_ts": torch.tensor([0.5] * videos)}


def _qwen3_vl_moe(layers: int) -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    dense = _qwen3_vl(layers).config
    experts = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2}
    config = Qwen3VLMoeConfig(
        text_config={
            **_text(layers, head_dim=8),
            **experts,
            "rope_parameters": {**_MROPE, "mrope_interleaved": True},
        },
        vision_config={**dense.vision_config.to_dict(), "model_type": "qwen3_vl_moe_vision"},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    return Qwen3VLMoeForConditionalGeneration(config)


def _vipllava(layers: int) -> Any:
    from transformers import VipLlavaConfig, VipLlavaForConditionalGeneration

    config = VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_clip_vision()},
        text_config={"model_type": "llama", **_text(layers)},
        image_token_index=IMAGE,
        image_seq_length=16,
        vision_feature_layer=[-1, -2],
    )
    return VipLlavaForConditionalGeneration(config)


def _siglip(**extra: Any) -> dict[str, Any]:
    vision = _clip_vision(**extra)
    return {"model_type": "siglip_vision_model", **vision, "vision_use_head": False}


def _aya_vision(layers: int) -> Any:
    from transformers import AyaVisionConfig, AyaVisionForConditionalGeneration

    config = AyaVisionConfig(
        vision_config=_siglip(image_size=64),
        text_config={"model_type": "cohere2", **_text(layers), "sliding_window": 8},
        image_token_index=IMAGE,
    )
    return AyaVisionForConditionalGeneration(config)


def _cohere2_vision(layers: int) -> Any:
    from transformers import Cohere2VisionConfig, Cohere2VisionForConditionalGeneration

    config = Cohere2VisionConfig(
        vision_config=_siglip(image_size=64),
        text_config={"model_type": "cohere2", **_text(layers)},
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )
    return Cohere2VisionForConditionalGeneration(config)


def _idefics3(layers: int) -> Any:
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    config = Idefics3Config(
        vision_config=_clip_vision(image_size=64),
        text_config={"model_type": "llama", **_text(layers)},
        image_token_id=IMAGE,
        scale_factor=2,
    )
    return Idefics3ForConditionalGeneration(config)


def _paligemma(layers: int) -> Any:
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        vision_config={**_siglip(), "projection_dim": 32},
        text_config={"model_type": "gemma", **_text(layers, head_dim=8)},
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    return PaliGemmaForConditionalGeneration(config)


def _mistral3(layers: int) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        vision_config={"model_type": "pixtral", **_clip_vision(image_size=64), "head_dim": 8},
        text_config={"model_type": "mistral", **_text(layers, head_dim=8)},
        image_token_index=IMAGE,
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    return Mistral3ForConditionalGeneration(config)


def _mistral3_pixels(batch: int, seed: int) -> dict[str, torch.Tensor]:
    return {**_images(64)(batch, seed), "image_sizes": torch.tensor([[64, 64]] * batch)}


def _llava_next(layers: int) -> Any:
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    config = LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **_clip_vision()},
        text_config={"model_type": "llama", **_text(layers)},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 32]],
        vision_feature_layer=-1,
    )
    return LlavaNextForConditionalGeneration(config)


_GLM_TOKENS: dict[str, Any] = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "image_start_token_id": 6,
    "image_end_token_id": 7,
    "video_start_token_id": 9,
    "video_end_token_id": 10,
}
_GLM_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "num_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "intermediate_size": 48,
}
_GLM_ROPE = {**_MROPE, "partial_rotary_factor": 1.0}
_DEEPSEEK_EXPERTS = {
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}


def _glm4v(layers: int) -> Any:
    from transformers import Glm4vConfig, Glm4vForConditionalGeneration

    config = Glm4vConfig(
        text_config={**_text(layers), "rope_parameters": dict(_GLM_ROPE)},
        vision_config=dict(_GLM_VISION),
        **_GLM_TOKENS,
    )
    return Glm4vForConditionalGeneration(config)


def _glm4v_moe(layers: int) -> Any:
    from transformers import Glm4vMoeConfig, Glm4vMoeForConditionalGeneration

    config = Glm4vMoeConfig(
        text_config={**_text(layers), **_DEEPSEEK_EXPERTS, "rope_parameters": dict(_GLM_ROPE)},
        vision_config=dict(_GLM_VISION),
        **_GLM_TOKENS,
    )
    return Glm4vMoeForConditionalGeneration(config)


def _llama4(layers: int) -> Any:
    from transformers import Llama4Config, Llama4ForConditionalGeneration

    config = Llama4Config(
        text_config={
            **_text(layers, head_dim=8),
            "intermediate_size_mlp": 48,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
            "attention_chunk_size": 8,
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vision_output_dim": 64,
            "image_size": 64,
            "patch_size": 8,
            "projector_input_dim": 64,
            "projector_output_dim": 64,
        },
        image_token_index=IMAGE,
        boi_token_index=6,
        eoi_token_index=7,
    )
    return Llama4ForConditionalGeneration(config)


def _aria(layers: int) -> Any:
    from transformers import AriaConfig, AriaForConditionalGeneration

    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1}
    config = AriaConfig(
        text_config={"model_type": "aria_text", **_text(layers), **experts},
        vision_config={"model_type": "idefics3_vision", **_clip_vision()},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 16},
    )
    return AriaForConditionalGeneration(config)


def _aria_pixels(images: int, seed: int) -> dict[str, torch.Tensor]:
    mask = torch.ones(images, 32, 32, dtype=torch.bool)
    return {**_images(32)(images, seed), "pixel_mask": mask}


def _ovis2(layers: int) -> Any:
    from transformers import Ovis2Config, Ovis2ForConditionalGeneration

    config = Ovis2Config(
        text_config={"model_type": "qwen2", **_text(layers)},
        vision_config={**_clip_vision(image_size=64), "hidden_stride": 2, "vocab_size": 32},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[11, 12, 13, 14, 15],
        vocab_size=VOCAB,
        hidden_size=32,
    )
    return Ovis2ForConditionalGeneration(config)


def _perception_lm(layers: int) -> Any:
    from transformers import (
        CLIPVisionConfig,
        PerceptionLMConfig,
        PerceptionLMForConditionalGeneration,
    )

    # its own encoder comes from another library; the width is asked for in the terms of that
    vision: dict[str, Any] = {**_clip_vision(), "model_args": {"embed_dim": 32}}
    config = PerceptionLMConfig(
        text_config={"model_type": "llama", **_text(layers)},
        vision_config=CLIPVisionConfig(**vision),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
    )
    return PerceptionLMForConditionalGeneration(config)


def _ernie4_5_vl_moe(layers: int) -> Any:
    from transformers import Ernie4_5_VLMoeConfig, Ernie4_5_VLMoeForConditionalGeneration

    config = Ernie4_5_VLMoeConfig(
        text_config={
            **_text(layers),
            "moe_intermediate_size": [24, 24],
            "moe_k": 2,
            "moe_num_experts": 4,
            "moe_num_shared_experts": 1,
            "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 2]},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 32,
            "num_heads": 4,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "intermediate_size": 48,
            "temporal_merge_size": 2,
        },
        **_GLM_TOKENS,
    )
    return Ernie4_5_VLMoeForConditionalGeneration(config)


def _kimi_k25(layers: int) -> Any:
    from transformers import Kimi_K25Config, Kimi_K25ForConditionalGeneration

    config = Kimi_K25Config(
        text_config={
            "model_type": "deepseek_v3",
            **_text(layers, num_key_value_heads=4),
            **_DEEPSEEK_EXPERTS,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        vision_config={
            "patch_size": 8,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "pos_emb_height": 8,
            "pos_emb_width": 8,
        },
        projection_hidden_size=32,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=6,
        vision_end_token_id=7,
    )
    return Kimi_K25ForConditionalGeneration(config)


def _patches(*size: int) -> Callable[[int, int], dict[str, torch.Tensor]]:
    """64 patches of an image, each of ``size``; merged 2x2 to 16 tokens."""

    def pixels(images: int, seed: int) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return {
            "pixel_values": torch.randn(64 * images, *size, generator=generator),
            "image_grid_thw": torch.tensor([[1, 8, 8]] * images),
        }

    return pixels


def _one_tile(images: int, seed: int) -> dict[str, torch.Tensor]:
    return {"pixel_values": _images(32)(images, seed)["pixel_values"][:, None]}


def _lighton_ocr(layers: int) -> Any:
    from transformers import LightOnOcrConfig, LightOnOcrForConditionalGeneration

    config = LightOnOcrConfig(
        vision_config={"model_type": "pixtral", **_clip_vision(image_size=64), "head_dim": 8},
        text_config={"model_type": "qwen3", **_text(layers, head_dim=8)},
        image_token_id=IMAGE,
        spatial_merge_size=2,
    )
    return LightOnOcrForConditionalGeneration(config)


def _deepseek_vl(layers: int) -> Any:
    from transformers import DeepseekVLConfig, DeepseekVLForConditionalGeneration

    config = DeepseekVLConfig(
        vision_config=_siglip(),
        text_config={"model_type": "llama", **_text(layers)},
        image_token_id=IMAGE,
    )
    return DeepseekVLForConditionalGeneration(config)


def _florence2(layers: int) -> Any:
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    config = Florence2Config(
        text_config={
            "model_type": "bart",
            "d_model": 32,
            "encoder_layers": layers,
            "decoder_layers": layers,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "vocab_size": VOCAB,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        vision_config={
            "embed_dim": [8, 16],
            "num_heads": [2, 2],
            "num_groups": [2, 2],
            "depths": [1, 1],
            "patch_size": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [3, 1],
            "patch_prenorm": [False, True],
            "window_size": 4,
            "projection_dim": 32,
        },
        image_token_id=IMAGE,
    )
    return Florence2ForConditionalGeneration(config)


def _mllama(layers: int) -> Any:
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    config = MllamaConfig(
        text_config={
            **_text(layers),
            "cross_attention_layers": [1],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        vision_config={
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_global_layers": 1,
            "attention_heads": 4,
            "intermediate_size": 48,
            "vision_output_dim": 64,
            "image_size": 32,
            "patch_size": 8,
            "max_num_tiles": 1,
            "intermediate_layers_indices": [0],
            "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=IMAGE,
    )
    return MllamaForConditionalGeneration(config)


def _mllama_pixels(images: int, seed: int) -> dict[str, torch.Tensor]:
    return {
        "pixel_values": _images(32)(images, seed)["pixel_values"][:, None, None],
        "aspect_ratio_ids": torch.ones(images, 1, dtype=torch.int64),
        "aspect_ratio_mask": torch.ones(images, 1, 1, dtype=torch.int64),
    }


def _lfm2_vl(layers: int) -> Any:
    from transformers import Lfm2VlConfig, Lfm2VlForConditionalGeneration

    vision = _clip_vision(num_patches=64, vision_use_head=False)
    del vision["image_size"]
    kinds = ["full_attention" if i % 2 else "conv" for i in range(layers)]
    config = Lfm2VlConfig(
        text_config={"model_type": "lfm2", **_text(layers), "layer_types": kinds},
        vision_config={"model_type": "siglip2_vision_model", **vision},
        image_token_id=IMAGE,
        projector_hidden_size=32,
    )
    return Lfm2VlForConditionalGeneration(config)


def _lfm2_pixels(images: int, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(images, 64, 3 * 8 * 8, generator=generator),
        "pixel_attention_mask": torch.ones(images, 64, dtype=torch.int64),
        "spatial_shapes": torch.tensor([[8, 8]] * images),
    }


# 6 and 7 stand before and after what comes from vision; 9 and 10 for the time of a frame
_TWO_FRAMES = (9, 6, *([IMAGE] * 16), 7, 10, 6, *([IMAGE] * 16), 7)
_QWEN_VIDEO = (6, *([VIDEO] * 16), 7)
_QWEN3_VIDEO = (9, 6, *([VIDEO] * 8), 7, 10, 6, *([VIDEO] * 8), 7)


FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("llava", _llava, 16, _images(32)),
        Family(
            "llava_onevision",
            _llava_onevision,
            16 + 16 + 4,
            _llava_onevision_pixels,
            (VIDEO,) * (4 * 4 + 1),
            _llava_onevision_frames,
        ),
        Family("internvl", _internvl, 16, _images(64), _TWO_FRAMES, 2),
        Family("smolvlm", _smolvlm, 16, _images(64), _TWO_FRAMES, 2, per_sample=True),
        Family("gemma3", _gemma3, 16, _images(32)),
        Family("qwen2_vl", _qwen2_vl, 16, _qwen_pixels, _QWEN_VIDEO, _qwen_frames),
        Family("qwen2_5_vl", _qwen2_5_vl, 16, _qwen_pixels, _QWEN_VIDEO, _qwen2_5_frames),
        Family("qwen3_vl", _qwen3_vl, 16, _qwen_pixels, _QWEN3_VIDEO, _qwen_frames),
    )
}


MORE_FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("qwen3_vl_moe", _qwen3_vl_moe, 16, _qwen_pixels, _QWEN3_VIDEO, _qwen_frames),
        Family("internvl_moe", _internvl_moe, 16, _images(64), _TWO_FRAMES, 2),
        Family("vipllava", _vipllava, 16, _images(32)),
        Family("llava_next", _llava_next, 16 + 16 + 4, _llava_onevision_pixels),
        Family("idefics3", _idefics3, 16, _images(64), per_sample=True),
        Family("paligemma", _paligemma, 16, _images(32)),
        Family("mistral3", _mistral3, 16, _mistral3_pixels),
        Family("aya_vision", _aya_vision, 16, _images(64)),
        Family("cohere2_vision", _cohere2_vision, 16, _images(64)),
        Family("glm4v", _glm4v, 16, _qwen_pixels),
        Family("glm4v_moe", _glm4v_moe, 16, _qwen_pixels),
        Family("ernie4_5_vl_moe", _ernie4_5_vl_moe, 16, _patches(3 * 8 * 8)),
        Family("aria", _aria, 16, _aria_pixels),
        Family("llama4", _llama4, 16, _images(64)),
        Family("kimi_k25", _kimi_k25, 16, _patches(3, 8, 8)),
        Family("ovis2", _ovis2, 16, _images(64)),
        Family("perception_lm", _perception_lm, 16, _one_tile),
        Family("lighton_ocr", _lighton_ocr, 16, _mistral3_pixels),
        Family("deepseek_vl", _deepseek_vl, 16, _images(32)),
    )
}
"""Not in every test of the eight above."""

REFUSED_FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("florence2", _florence2, 17, _images(32)),
        Family("mllama", _mllama, 1, _mllama_pixels),
        Family("lfm2_vl", _lfm2_vl, 16, _lfm2_pixels),
    )
}
"""Capture refuses them, for what they are."""

EVERY_FAMILY = {**FAMILIES, **MORE_FAMILIES, **REFUSED_FAMILIES}


def build(name: str, *, layers: int = 4, seed: int = 0) -> Any:
    """The tiny model of family ``name``: float32, eval mode, random weights from ``seed``."""
    torch.manual_seed(seed)
    model = EVERY_FAMILY[name].build(layers).eval()
    for weight in model.parameters():
        if (
            weight.ndim > 1 and not weight.is_meta and not weight.any()
        ):  # a projector of zeros would hide all images
            torch.nn.init.normal_(weight, std=0.02)
    return model


def inputs(
    name: str,
    *,
    batch: int = 1,
    text: tuple[int, ...] = (),
    images: tuple[int, ...] = (),
    videos: tuple[int, ...] = (),
    seed: int = 0,
    padding: str = "left",
) -> dict[str, torch.Tensor]:
    """Generate-style inputs of ``batch`` samples.

    Sample ``b`` has ``images[b]`` images (default one), then ``videos[b]`` videos (default none),
    then ``text[b]`` text tokens (default ``6 + 2 * b``), so batches are padded: on the ``left``, as
    generation wants it, or on the ``right``. Returns ``input_ids``, ``attention_mask`` (int64
    ``[batch, length]``) and the family's image and video tensors, as its processor would.
    """
    family = EVERY_FAMILY[name]
    generator = torch.Generator().manual_seed(seed + 1)
    text = text or tuple(6 + 2 * b for b in range(batch))
    rows = []
    images = images or (1,) * len(text)
    videos = videos or (0,) * len(text)
    for count, shown, played in zip(text, images, videos, strict=True):
        before = torch.randint(8, VOCAB, (2,), generator=generator).tolist()
        after = torch.randint(8, VOCAB, (count,), generator=generator).tolist()
        # Qwen models find images by the vision-start token before them
        image = [6, *([IMAGE] * family.image_tokens), 7]
        rows.append([1, *before, *(image * shown), *(family.video * played), *after])
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.int64)
    for sample, row in enumerate(rows):
        start = longest - len(row) if padding == "left" else 0
        ids[sample, start : start + len(row)] = torch.tensor(row)
        mask[sample, start : start + len(row)] = 1
    batch_inputs = {"input_ids": ids, "attention_mask": mask}
    if isinstance(family.frames, int):
        extra = family.frames
        images = tuple(n + extra * v for n, v in zip(images, videos, strict=True))
    elif any(videos):
        batch_inputs |= family.frames(sum(videos), seed + 2)
    if any(images):
        pixels = family.pixels(sum(images), seed)
        if family.per_sample:
            pixels = {key: _by_sample(value, images) for key, value in pixels.items()}
        batch_inputs |= pixels
    if name.startswith(("qwen", "glm4v", "ernie")):
        batch_inputs["mm_token_type_ids"] = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
    if name == "gemma3":
        batch_inputs["token_type_ids"] = (ids == IMAGE).long()
    if name == "mllama":
        batch_inputs["cross_attention_mask"] = torch.ones(*ids.shape, 1, 1, dtype=torch.int64)
    if name == "paligemma":  # all of a prompt is prefix, as the processor says
        batch_inputs["token_type_ids"] = torch.zeros_like(ids)
    return batch_inputs


def of_grid(
    inputs: dict[str, torch.Tensor], grids: list[tuple[int, int]], seed: int = 0
) -> dict[str, torch.Tensor]:
    """Inputs of one sample of a Qwen model, with images of so many rows and columns of patches."""
    ids = inputs["input_ids"]
    images = torch.nonzero(ids[0] == IMAGE)[:, 0].view(len(grids), -1)
    stays = torch.ones_like(ids[0]).bool()
    for places, (rows, columns) in zip(images, grids, strict=True):
        stays[places[rows * columns // 4 :]] = False
    found = {
        name: value[:, stays] if value.shape == ids.shape else value
        for name, value in inputs.items()
    }
    count = sum(rows * columns for rows, columns in grids)
    generator = torch.Generator().manual_seed(seed)
    shape = count, inputs["pixel_values"].shape[1]
    found["pixel_values"] = torch.randn(shape, generator=generator)
    found["image_grid_thw"] = torch.tensor([[1, *grid] for grid in grids])
    return found


def alone(
    batch_inputs: dict[str, torch.Tensor], sample: int, images: tuple[int, ...] = ()
) -> dict[str, torch.Tensor]:
    """One sample of a batch, without padding.

    Args:
        images: of each sample, default one; all of the same size.
    """
    mask = batch_inputs["attention_mask"].bool()
    images = images or (1,) * len(mask)
    first, last = sum(images[:sample]), sum(images[: sample + 1])
    single = {}
    for name, value in batch_inputs.items():
        if value.shape[:2] == mask.shape:  # tokens
            single[name] = value[sample : sample + 1, mask[sample]]
        elif value.shape[0] == len(mask) != sum(images):  # images by sample, padded
            single[name] = value[sample : sample + 1, : images[sample]]
        else:  # images, or patches of images, one after the other
            per = value.shape[0] // sum(images)
            single[name] = value[first * per : last * per]
    return single


def visual(batch_inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Which tokens of a prompt come from vision, bool ``[batch, length]``."""
    ids = batch_inputs["input_ids"]
    return (ids == IMAGE) | (ids == VIDEO)


def video_tokens(name: str) -> int:
    """Visual tokens that one video becomes in the prompt."""
    return sum(token in (IMAGE, VIDEO) for token in EVERY_FAMILY[name].video)


def _by_sample(tensor: torch.Tensor, counts: tuple[int, ...]) -> torch.Tensor:
    rows = torch.zeros(len(counts), max(counts), *tensor.shape[1:])
    for row, images in zip(rows, tensor.split(counts), strict=True):
        row[: len(images)] = images
    return rows
