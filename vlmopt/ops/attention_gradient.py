"""Gradients of the attention scores, for what is trained through them and not only by them.

A choice of tokens passes no gradient on. Weights that tokens are merged by, and losses on scores,
do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmopt.ops.attention import attention_mass, attention_rows, probability_blocks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors, output)
    ctx.given = tuple(None if isinstance(value, Tensor) else value for value in inputs)
    ctx.places = tuple(at for at, value in enumerate(inputs) if isinstance(value, Tensor))
    ctx.mask = 2 if len(inputs) == 5 else 3


def _kept(ctx: Any) -> tuple[list[Any], Tensor]:
    """The inputs, and the output."""
    if any(ctx.needs_input_grad[ctx.mask : ctx.mask + 1]):  # given, and asks for one
        raise NotImplementedError(
            "attention_rows and attention_mass have no gradient for their mask; detach it"
        )
    *tensors, output = ctx.saved_tensors
    inputs = list(ctx.given)
    for at, tensor in zip(ctx.places, tensors, strict=True):
        inputs[at] = tensor
    return inputs, output


def _rows_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (query, key, _, _, scale), rows = _kept(ctx)
    to_query, to_key = _through_softmax(query, key, rows, gradient, scale)
    return to_query.to(query.dtype), to_key.to(key.dtype), None, None, None


def _mass_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    inputs, _ = _kept(ctx)
    return *attention_mass_backward(gradient, *inputs), None, None, None, None


def _through_softmax(
    query: Tensor, key: Tensor, rows: Tensor, gradient: Tensor, scale: float | None
) -> tuple[Tensor, Tensor]:
    """Gradients of query and key, float32, from that of ``rows = softmax(query key^T)``."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = rows * (gradient - (rows * gradient).sum(-1, keepdim=True)) * scale
    return through_logits(query, key, logits)


def through_logits(query: Tensor, key: Tensor, logits: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of query and key, float32, from that of ``query key^T``, all heads."""
    shared = (key.shape[1], query.shape[1] // key.shape[1])  # heads by their key head
    logits, query = logits.unflatten(1, shared), query.float().unflatten(1, shared)
    to_query = torch.einsum("bkgqt,bktd->bkgqd", logits, key.float()).flatten(1, 2)
    return to_query, torch.einsum("bkgqt,bkgqd->bktd", logits, query)


@torch.library.custom_op("vlmopt::attention_mass_backward", mutates_args=())
def attention_mass_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    over: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and weights of :func:`vlmopt.ops.attention.attention_mass`.

    The rows are computed again, a block at a time.

    Args:
        gradient: of the result, in its shape.

    Returns:
        Each in the shape and type of its input.
    """
    to_query = torch.empty_like(query, dtype=torch.float32)
    to_key = torch.zeros_like(key, dtype=torch.float32)
    to_weights = torch.zeros_like(weights, dtype=torch.float32)
    wide = weights.float()
    for at, rows in probability_blocks(query, key, mask, causal, scale):
        end, seen = at + rows.shape[2], rows.shape[3]
        if over == "queries":
            part = gradient[..., :seen]
            to_rows = torch.einsum("bgq,bhgt->bhqt", wide[..., at:end], part)
            to_weights[..., at:end] = torch.einsum("bhgt,bhqt->bgq", part, rows)
        else:
            part = gradient[..., at:end]
            to_rows = torch.einsum("bgt,bhgq->bhqt", wide[..., :seen], part)
            to_weights[..., :seen] += torch.einsum("bhgq,bhqt->bgt", part, rows)
        block = _through_softmax(query[:, :, at:end], key[:, :, :seen], rows, to_rows, scale)
        to_query[:, :, at:end] = block[0]
        to_key[:, :, :seen] += block[1]
    return to_query.to(query.dtype), to_key.to(key.dtype), to_weights.to(weights.dtype)


@attention_mass_backward.register_fake
def _(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    over: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(weights)


attention_rows.register_autograd(_rows_backward, setup_context=_keep)
attention_mass.register_autograd(_mass_backward, setup_context=_keep)
