"""LLaVA-shaped models with random weights: what a method costs does not depend on their values."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch

from vlmopt.errors import OptionError

_IMAGE = 3  # token id of the image placeholder
_FIRST_WORD = 8  # ids below it have a meaning
_PATCH = 14


@dataclass(frozen=True)
class Shape:
    """Size of a model and of its prompt.

    Attributes:
        layers, width, heads: of the decoder; heads are 64 or 128 wide, all with keys of their own.
        visual, text: tokens of the prompt; ``visual`` is a square number, one image.
        vision_layers, vision_width: of the CLIP tower.
        vocabulary: tokens that the tokenizer would know.
    """

    layers: int
    width: int
    heads: int
    visual: int = 576
    text: int = 64
    vision_layers: int = 1
    vision_width: int = 64
    vocabulary: int = 1024

    @property
    def name(self) -> str:
        return f"{self.layers}x{self.width}"

    @property
    def tokens(self) -> int:
        return self.visual + self.text

    @property
    def intermediate(self) -> int:
        """Width of the feed-forward block, in LLaMA's proportion of 11008 to 4096."""
        return self.width * 43 // 16

    @property
    def image_size(self) -> int:
        """Pixels along each side."""
        return round(self.visual**0.5) * _PATCH


def layers_and_width(text: str, of: str) -> tuple[int, int]:
    """``12x512`` as two numbers, for a transformer with heads 64 wide.

    Raises:
        OptionError: the text is none of these.
    """
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    layers, width = (int(part) for part in found.groups()) if found else (0, 0)
    if layers < 1 or width < 64 or width % 64:
        raise OptionError(
            f"{text!r} is no size of {of}",
            hint="LAYERSxWIDTH, such as 12x512; the width is a multiple of 64",
        )
    return layers, width


def parse_shape(text: str) -> Shape:
    """``12x512``: layers and width of a decoder with heads 64 wide, behind a tiny vision tower.

    Raises:
        OptionError: the text is none of these.
    """
    layers, width = layers_and_width(text, "a decoder")
    return Shape(layers, width, heads=width // 64)


def llava_7b(layers: int = 32) -> Shape:
    """LLaVA-1.5-7B: the LLaMA-7B decoder and CLIP ViT-L/14 at 336 pixels."""
    return Shape(layers, 4096, heads=32, vision_layers=24, vision_width=1024, vocabulary=32064)


def build_llava(shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """A ``LlavaForConditionalGeneration`` in eval mode.

    Args:
        device: ``meta`` makes a model without weights.
    """
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config={
            "model_type": "clip_vision_model",
            "hidden_size": shape.vision_width,
            "intermediate_size": 4 * shape.vision_width,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": shape.vision_width // 64,
            "image_size": shape.image_size,
            "patch_size": _PATCH,
        },
        text_config={
            "model_type": "llama",
            "hidden_size": shape.width,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.heads,
            "vocab_size": shape.vocabulary,
            "max_position_embeddings": 4096,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        image_token_index=_IMAGE,
        image_seq_length=shape.visual,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config)
    return model.eval().to(dtype)


def prompt(
    shape: Shape, *, device: str = "cpu", dtype: torch.dtype = torch.float32
) -> dict[str, torch.Tensor]:
    """One prompt as a processor returns it: words, an image, words; nothing is padded.

    Returns:
        ``input_ids`` and ``attention_mask``, int64 ``[1, tokens]``, and ``pixel_values``
        ``[1, 3, image_size, image_size]`` of ``dtype``.
    """
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(_FIRST_WORD, shape.vocabulary, (shape.text,), generator=generator)
    before = shape.text // 2
    image = torch.full((shape.visual,), _IMAGE)
    ids = torch.cat([words[:before], image, words[before:]])[None]
    pixels = torch.randn(1, 3, shape.image_size, shape.image_size, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids, device=device),
        "pixel_values": pixels.to(device, dtype),
    }
