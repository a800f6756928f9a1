"""Tiny vision transformers with random weights, and what the oracle must know to run them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from oracles.vit import Parts
from torch import Tensor, nn
from torch.nn import functional

IMAGE, PATCH, DEPTH = 40, 8, 3
PATCHES = (IMAGE // PATCH) ** 2

_CONFIG: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": PATCH,
    "initializer_range": 0.4,  # the usual 0.02 leaves rows that hardly differ
}


ATTENTION: dict[str, Any] = {"attn_mask": None, "is_causal": False}
"""What :class:`Attention` hides."""


_LABELS: dict[str, Any] = {"num_labels": 5}


class Attention(nn.Module):
    """As timm writes it: one projection of query, key and value."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.num_heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, width // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        x = functional.scaled_dot_product_attention(query, key, value, **ATTENTION)
        out: Tensor = self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
        return out


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = Attention(width, heads)
        self.gamma1, self.gamma2 = (nn.Parameter(0.5 + torch.rand(width)) for _ in range(2))
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.gamma1 * self.attn(self.norm1(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


class TimmLike(nn.Module):
    """A plain module with a class token and layer scale.

    Args:
        pool: ``token`` classifies by the class token, ``avg`` by the mean of the patches.
        registers: learned tokens behind the class token.
    """

    def __init__(self, pool: str = "token", width: int = 32, registers: int = 0) -> None:
        super().__init__()
        self.special = 1 + registers
        self.registers = nn.Parameter(torch.randn(1, registers, width)) if registers else None
        self.pool = pool
        self.patch_embed = nn.Conv2d(3, width, PATCH, stride=PATCH)
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.pos_embed = nn.Parameter(torch.randn(1, 1 + PATCHES, width))
        self.blocks = nn.Sequential(*(Block(width, 4) for _ in range(DEPTH)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 5)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.patch_embed(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1) + self.pos_embed
        if self.registers is not None:
            learned = self.registers.expand(x.shape[0], -1, -1)
            x = torch.cat((x[:, :1], learned, x[:, 1:]), dim=1)
        x = self.norm(self.blocks(x))
        pooled = x[:, 0] if self.pool == "token" else x[:, self.special :].mean(1)
        logits: Tensor = self.head(pooled)
        return logits


def _vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    return ViTForImageClassification(ViTConfig(**_CONFIG, **_LABELS))


def _deit() -> Any:
    from transformers import DeiTConfig, DeiTForImageClassification

    return DeiTForImageClassification(DeiTConfig(**_CONFIG, **_LABELS))


def _siglip() -> Any:
    from transformers import SiglipVisionConfig, SiglipVisionModel

    return SiglipVisionModel(SiglipVisionConfig(**_CONFIG))


def _clip() -> Any:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    return CLIPVisionModel(CLIPVisionConfig(**_CONFIG))


@dataclass(frozen=True)
class Kind:
    """One architecture.

    Attributes:
        dense: whether more than the class token is read behind the blocks.
    """

    build: Callable[[], Any]
    parts: Parts
    dense: bool


_HF = {
    "norms": ("layernorm_before", "layernorm_after"),
    "attention": "attention",
    "out": "o_proj",
}
_TIMM = Parts(
    "blocks",
    1,
    ("norm1", "norm2"),
    "attn",
    ("qkv",),
    "proj",
    ("gamma1", "gamma2"),
)
ENCODERS = {
    "vit": Kind(_vit, Parts("vit.layers", 1, **_HF), dense=False),  # type: ignore[arg-type]
    "deit": Kind(_deit, Parts("deit.layers", 2, **_HF), dense=False),  # type: ignore[arg-type]
    "siglip": Kind(_siglip, Parts("encoder.layers", 0), dense=True),
    "clip": Kind(_clip, Parts("encoder.layers", 1), dense=True),
    "timm": Kind(TimmLike, _TIMM, dense=False),
    "timm-avg": Kind(lambda: TimmLike("avg", registers=3), replace(_TIMM, special=4), dense=True),
}

TOWERS = {
    "llava": Parts("model.vision_tower.encoder.layers", 1),
    "vipllava": Parts("model.vision_tower.encoder.layers", 1),
    "llava_onevision": Parts("model.vision_tower.encoder.layers", 0),
    "gemma3": Parts("model.vision_tower.encoder.layers", 0),
    "smolvlm": Parts("model.vision_model.encoder.layers", 0),
    "internvl": Parts(
        "model.vision_tower.encoder.layer",
        1,
        ("layernorm_before", "layernorm_after"),
        "attention",
        out="projection_layer",
        scales=("lambda_1", "lambda_2"),
    ),
}
"""Vision encoders inside the models of the zoo."""


def build(name: str) -> Any:
    """The tiny encoder: float32, eval mode."""
    torch.manual_seed(0)
    return ENCODERS[name].build().eval()


def images(batch: int = 2, seed: int = 0) -> Tensor:
    return torch.randn(batch, 3, IMAGE, IMAGE, generator=torch.Generator().manual_seed(seed))
