"""Tiny mixtures of experts, in the forms that models give them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmopt.ops.experts import grouped_mm
from vlmopt.program import Program, Role
from vlmopt.tracing import capture


def spread(model: Any) -> Any:
    """The model with routers that tell experts apart: tiny random ones weigh all alike."""
    for name, weight in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            weight.data *= 20
    return model


def mixtral() -> Any:
    """A tiny Mixtral, a model of text alone; 0 pads."""
    from transformers import MixtralConfig, MixtralForCausalLM

    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        vocab_size=64,
        pad_token_id=0,
    )
    return spread(MixtralForCausalLM(config).eval())


def prompt_of_text(length: int) -> dict[str, torch.Tensor]:
    """Two samples of random ids, the first padded."""
    ids = torch.randint(3, 64, (2, length), generator=torch.Generator().manual_seed(0))
    ids[0, :3] = 0
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


class Mixture(nn.Module):
    """A mixture of experts, each ``down(silu(gate) * up)``, in the forms that models give it.

    Args:
        gate: of the router, ``[experts, width]``.
        gate_up, down: ``[experts, width, 2 * inner]`` and ``[experts, inner, width]``.
        score: ``softmax``, ``sigmoid``, ``chosen`` (softmax of the chosen logits) or ``relu``.
        correction: added to the scores for the choice alone.
        bias: of the last product, ``[experts, width]``.
        dispatch: ``grouped``, ``batched``, ``dense`` (all experts for all tokens), ``loop`` (tokens
            of an expert found by its number) or ``one_hot`` (found in a mask of all).
        counted: experts that rows are counted for, if not all.
    """

    def __init__(
        self,
        gate: torch.Tensor,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        k: int,
        *,
        score: str = "softmax",
        correction: torch.Tensor | None = None,
        renormalise: bool = True,
        scale: float = 1.0,
        bias: torch.Tensor | None = None,
        dispatch: str = "grouped",
        counted: int | None = None,
    ) -> None:
        super().__init__()
        self.gate, self.gate_up, self.down = map(_weight, (gate, gate_up, down))
        self.correction = None if correction is None else _weight(correction)
        self.bias = None if bias is None else _weight(bias)
        self.k, self.score, self.renormalise, self.scale = k, score, renormalise, scale
        self.dispatch, self.counted = dispatch, counted or len(gate)

    def route(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights before the factor, and ids, of the chosen: ``[tokens, k]``."""
        logits = nn.functional.linear(rows, self.gate)
        if self.score == "chosen":
            best, ids = torch.topk(logits, self.k, dim=-1)
            return best.softmax(-1), ids
        scores = {"softmax": lambda x: x.softmax(-1), "sigmoid": torch.sigmoid, "relu": torch.relu}
        own = scores[self.score](logits)
        ranked = own if self.correction is None else own + self.correction
        weights, ids = torch.topk(ranked, self.k, dim=-1)
        if self.correction is not None:
            weights = own.gather(1, ids)
        if self.renormalise:
            weights = weights / weights.sum(-1, keepdim=True)
        return weights, ids

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(rows)
        if self.scale != 1:
            weights = weights * self.scale
        out: torch.Tensor = getattr(self, f"_{self.dispatch}")(rows, weights, ids)
        return out.view_as(x)

    def reference(self, x: torch.Tensor, stays: torch.Tensor) -> torch.Tensor:
        """One pair of token and expert after the other; ``stays`` is bool ``[tokens, k]``."""
        rows = x.reshape(-1, x.shape[-1])
        weights, ids = self.route(rows)
        out = torch.zeros_like(rows)
        for token, place in stays.nonzero().tolist():
            value = self._expert(int(ids[token, place]), rows[token])
            out[token] += weights[token, place] * self.scale * value
        return out.view_as(x)

    def _expert(self, expert: int, rows: torch.Tensor) -> torch.Tensor:
        out = _gated(rows @ self.gate_up[expert]) @ self.down[expert]
        return out if self.bias is None else out + self.bias[expert]

    def _grouped(
        self, rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        order, places = torch.sort(ids.reshape(-1))
        counts = torch.histc(order.float(), bins=self.counted, min=0, max=self.counted - 1)
        ends = torch.cumsum(counts, dim=0, dtype=torch.int32)
        inner = grouped_mm(rows[places // self.k], self.gate_up[: self.counted], ends)
        out = grouped_mm(_gated(inner), self.down[: self.counted], ends)
        if self.bias is not None:
            out = out + self.bias[order]
        out = out * weights.reshape(-1)[places].unsqueeze(-1)
        back = torch.empty_like(places)
        back[places] = torch.arange(len(places))
        return out[back].view(len(rows), self.k, -1).sum(1)

    def _batched(
        self, rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        chosen = ids.reshape(-1)
        each = rows.repeat_interleave(self.k, dim=0)
        inner = torch.bmm(each.unsqueeze(1), self.gate_up[chosen]).squeeze(1)
        out = torch.bmm(_gated(inner).unsqueeze(1), self.down[chosen]).squeeze(1)
        if self.bias is not None:
            out = out + self.bias[chosen]
        out = out * weights.reshape(-1).unsqueeze(-1)
        return out.view(len(rows), self.k, -1).sum(1)

    def _dense(self, rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        spread = torch.zeros(len(rows), len(self.gate)).scatter(1, ids, weights)
        inner = torch.bmm(rows.expand(len(self.gate), -1, -1), self.gate_up)
        out = torch.bmm(_gated(inner), self.down)
        return (out * spread.t().unsqueeze(-1)).sum(0)

    def _loop(self, rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return self._one_by_one(rows, weights, [ids == at for at in range(len(self.gate))])

    def _one_hot(
        self, rows: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        masks = nn.functional.one_hot(ids, len(self.gate) + 1).permute(2, 0, 1)
        return self._one_by_one(rows, weights, [masks[at] for at in range(len(self.gate))])

    def _one_by_one(
        self, rows: torch.Tensor, weights: torch.Tensor, masks: list[torch.Tensor]
    ) -> torch.Tensor:
        out = torch.zeros_like(rows)
        for expert, mask in enumerate(masks):
            tokens, places = torch.where(mask)
            value = self._expert(expert, rows[tokens]) * weights[tokens, places].unsqueeze(-1)
            out = out.index_add(0, tokens, value)
        return out


def _weight(tensor: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _gated(rows: torch.Tensor) -> torch.Tensor:
    gate, up = rows.chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


class Mixtures(nn.Module):
    """Layers that each are a mixture of experts."""

    def __init__(self, *layers: Mixture) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def mixture(*, experts: int = 4, k: int = 2, width: int = 8, **options: Any) -> Mixture:
    """A :class:`Mixture` with random weights."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    given = draw(experts, width), draw(experts, width, 12), draw(experts, 6, width)
    return Mixture(*given, k, **options)


def mixtures(layer: Mixture, x: torch.Tensor, modality: torch.Tensor) -> Program:
    """One layer, captured: stage ``model``."""
    return capture(Mixtures(layer), (x, modality), roles={"modality": Role.MODALITY})
