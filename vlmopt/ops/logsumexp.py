"""What attention divides by, as a logarithm: alone, or with the result of attention.

Kernels of attention know it. :func:`attention_logsumexp` asks for it beside an attention of its
own; lowering makes one of the two (``vlmopt/lowering/shared_attention.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmopt.ops.attention import attention_logits, attention_rows, row_blocks
from vlmopt.ops.attention_gradient import through_logits

aten = torch.ops.aten


def attention_logsumexp_reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """:func:`attention_logsumexp` by the full matrix."""
    positions = _positions(query, key) if causal else None
    return _sums(attention_logits(query, key, mask, positions, scale))


@torch.library.custom_op("vlmopt::attention_logsumexp", mutates_args=())
def attention_logsumexp(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    """Logarithm of the sum of exponentials of each query's logits.

    Args:
        query: ``[batch, heads, queries, size]``.
        key: ``[batch, key heads, keys, size]``; query head ``h`` uses key head
            ``h // (heads / key heads)``.
        mask: bool (True: may attend) or float (added), broadcastable to ``[batch, heads, queries,
            keys]``.
        causal: key ``t`` is seen by query ``q`` if ``t <= q + keys - queries``.
        scale: of the products, ``size ** -0.5`` by default.

    Returns:
        float32 ``[batch, heads, queries]``; 0 for a query that sees nothing.
    """
    result = query.new_empty(query.shape[:3], dtype=torch.float32)
    for at, block in row_blocks(query, key, mask, causal, scale):
        sums = _sums(attention_logits(*block))
        result[:, :, at : at + sums.shape[2]] = sums
    return result


@attention_logsumexp.register_fake
def _(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
) -> Tensor:
    return query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("vlmopt::attention_with_logsumexp", mutates_args=(), device_types="cpu")
def attention_with_logsumexp(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    """Attention, and :func:`attention_logsumexp` of the same, by one kernel.

    Args:
        query: ``[batch, heads, queries, size]``; ``key`` and ``value`` have as many heads, and as
            many tokens as the queries where it is ``causal``.
        mask: bool or float, ``[batch or 1, heads or 1, queries or 1, keys]``.

    Returns:
        ``[batch, heads, queries, size]``, laid out with heads side by side, and float32 ``[batch,
        heads, queries]``.
    """
    added = _added(mask, query.dtype)
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    result, sums = flash(query, key, value, 0.0, causal, attn_mask=added, scale=scale)
    # as promised below; the first costs nothing, as the kernel does the same
    return result.transpose(1, 2).contiguous().transpose(1, 2), sums.contiguous()


@attention_with_logsumexp.register_fake
def _(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
) -> tuple[Tensor, Tensor]:
    batch, heads, queries, size = query.shape
    result = query.new_empty(batch, queries, heads, size).transpose(1, 2)
    return result, query.new_empty(query.shape[:3], dtype=torch.float32)


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask that is added to logits."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def _positions(query: Tensor, key: Tensor) -> Tensor:
    places = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device)
    return places.expand(query.shape[0], -1)


def _sums(logits: Tensor) -> Tensor:
    sums = torch.logsumexp(logits, -1)
    return torch.where(sums > float("-inf"), sums, 0.0)


# -- gradients -----------------------------------------------------------------------------------


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, mask, causal, scale = inputs
    if mask is not None and mask.requires_grad:
        raise NotImplementedError("the logsumexp of attention has no gradient for its mask")
    ctx.save_for_backward(*tensors, mask, *(output if isinstance(output, tuple) else ()))
    ctx.given = causal, scale


def _sums_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    query, key, mask = ctx.saved_tensors
    causal, scale = ctx.given
    to_query, to_key = _through_sums(query, key, mask, causal, scale, gradient)
    return to_query, to_key, None, None, None


def _through_sums(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    gradient: Tensor,
) -> tuple[Tensor, Tensor]:
    positions = _positions(query, key) if causal else None
    rows = attention_rows(query, key, mask, positions, scale)
    logits = rows * gradient[..., None] * (query.shape[-1] ** -0.5 if scale is None else scale)
    to_query, to_key = through_logits(query, key, logits)
    return to_query.to(query.dtype), to_key.to(key.dtype)


def _both_backward(ctx: Any, gradient: Tensor, of_sums: Tensor) -> tuple[Tensor | None, ...]:
    query, key, value, mask, result, sums = ctx.saved_tensors
    causal, scale = ctx.given
    flash = aten._scaled_dot_product_flash_attention_for_cpu_backward
    added = _added(mask, query.dtype)
    given = (gradient, query, key, value, result, sums, 0.0, causal)
    to_query, to_key, to_value = flash(*given, attn_mask=added, scale=scale)
    more = _through_sums(query, key, mask, causal, scale, of_sums)
    return to_query + more[0], to_key + more[1], to_value, None, None, None


attention_logsumexp.register_autograd(_sums_backward, setup_context=_keep)
attention_with_logsumexp.register_autograd(_both_backward, setup_context=_keep)
