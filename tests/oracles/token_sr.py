"""The oracle for TokenSR: the card's module, and its training, with the eager model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from oracles.reduced import ReducedOracle


def token_sr(tensors: Mapping[str, torch.Tensor], layer: int) -> nn.Sequential:
    """The three convolutions of a layer, with the tensors of an artifact."""
    inner, width = tensors[f"{layer}.reduce.weight"].shape[:2]
    module = nn.Sequential(
        nn.Conv2d(width, inner, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(inner, inner, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(inner, width, 3, padding=1),
    )
    names = {"0": "reduce", "2": "mix", "4": "expand"}
    module.load_state_dict(
        {key: tensors[f"{layer}.{names[key[0]]}.{key[2:]}"].clone() for key in module.state_dict()}
    )
    return module


class TokenSRTraining:
    """Trains modules on one prompt with one square image, four patches, twice as fine.

    Args:
        modules: of each layer; they learn.
    """

    def __init__(self, model: Any, modules: Mapping[int, nn.Module], rate: float) -> None:
        self.model, self.modules = model, modules
        self.optimizers = {
            layer: torch.optim.AdamW(module.parameters(), lr=rate)
            for layer, module in modules.items()
        }

    def step(self, inputs: Mapping[str, Any], visual: torch.Tensor) -> list[float]:
        """Losses of all layers before a step of each, then those without modules."""
        slots = torch.nonzero(visual[0])[:, 0]
        size = int(len(slots) ** 0.5)
        side = size // 2
        recorded = ReducedOracle(self.model, dict(inputs), visual, []).recorded
        hidden = self._hidden(inputs)
        losses, plain = [], []
        for layer, module in self.modules.items():
            shares = recorded.attention(layer).mean(1)[0, -1, slots].view(size, size)
            sums = [
                (float(shares[top : top + side, left : left + side].sum()), -top, -left)
                for top in (0, side)
                for left in (0, side)
            ]
            _, top, left = max(sums)
            top, left = -top, -left
            pixels = inputs["pixel_values"]
            scale = pixels.shape[-1] // size
            part = pixels[..., top * scale : (top + side) * scale, :]
            part = part[..., left * scale : (left + side) * scale]
            whole = functional.interpolate(part, pixels.shape[-2:], mode="bilinear")
            wanted = self._hidden({**inputs, "pixel_values": whole})[layer][0, slots]
            grid = hidden[layer][0, slots].view(size, size, -1)
            patch = grid[top : top + side, left : left + side].permute(2, 0, 1)[None]
            finer = functional.interpolate(patch, scale_factor=2, mode="bilinear")
            plain.append(float(self._loss(finer, wanted)))
            loss = self._loss(finer + module(finer), wanted)
            self.optimizers[layer].zero_grad()
            loss.backward()
            self.optimizers[layer].step()
            losses.append(float(loss.detach()))
        return losses + plain

    @torch.no_grad()
    def _hidden(self, inputs: Mapping[str, Any]) -> list[torch.Tensor]:
        found: list[torch.Tensor] = self.model(**inputs, output_hidden_states=True).hidden_states
        return found

    @staticmethod
    def _loss(grid: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        tokens = grid[0].flatten(1).T
        return functional.kl_div(
            tokens.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
        )
