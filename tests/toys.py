"""Small programs for tests of the compiler itself: seconds to build, readable when printed."""

from __future__ import annotations

import torch
from torch import nn

from vlmopt.program import Program
from vlmopt.tracing import capture


class Block(nn.Module):
    """One decoder layer: self-attention and an MLP, each with a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm(x)).view(batch, tokens, 3, 2, width // 2)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        x = x + mixed.transpose(1, 2).reshape(batch, tokens, width)
        mlp: torch.Tensor = self.down(nn.functional.gelu(self.up(x)))
        return x + mlp


class Decoder(nn.Module):
    """Blocks in a row and a head: the smallest thing with layers."""

    def __init__(self, layers: int = 2, width: int = 16) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(width) for _ in range(layers))
        self.head = nn.Linear(width, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        logits: torch.Tensor = self.head(x)
        return logits


def decoder(layers: int = 2, *, tokens: int = 6, width: int = 16) -> Program:
    """A captured :class:`Decoder`: stage ``model``, input ``x`` of ``[1, tokens, width]``."""
    torch.manual_seed(0)
    return capture(Decoder(layers, width), (torch.randn(1, tokens, width),))
