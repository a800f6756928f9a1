"""Attention scores without the full matrix: a few rows, or sums over rows or columns.

Everything is computed in float32 whatever the inputs are. On CUDA they run as Triton kernels where
Triton is installed, elsewhere as blocks of rows in operators of torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from importlib.util import find_spec

import torch
from torch import Tensor


def attention_rows_reference(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """:func:`attention_rows` in operators of torch."""
    logits = attention_logits(query, key, mask, positions, scale)
    return torch.softmax(logits, -1).nan_to_num(0.0)


def attention_logits(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """What :func:`attention_rows` takes the softmax of, ``-inf`` where nothing is seen."""
    query, key = query.float(), key.float()
    if key.shape[1] != query.shape[1]:
        key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        logits = (
            logits.masked_fill(~mask, float("-inf"))
            if mask.dtype == torch.bool
            else logits + mask.float()
        )
    if positions is not None:
        place = torch.arange(key.shape[2], device=key.device)
        logits = logits.masked_fill(place > positions[:, None, :, None], float("-inf"))
    return logits


@torch.library.custom_op("vlmopt::attention_rows", mutates_args=())
def attention_rows(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention of a few rows: ``softmax(query key^T)``.

    Args:
        query: ``[batch, heads, rows, size]``.
        key: ``[batch, key heads, keys, size]``; query head ``h`` uses key head
            ``h // (heads / key heads)``.
        mask: bool (True: may attend) or float (added), broadcastable to the result.
        positions: int64 ``[batch, rows]``: the slot of each row; it sees keys up to there.
        scale: of the products, ``size ** -0.5`` by default.

    Returns:
        float32 ``[batch, heads, rows, keys]``; zeros for a row that sees nothing.
    """
    if uses_kernels(query):
        from vlmopt.lowering.triton import attention as kernels

        with torch.cuda.device_of(query):
            return kernels.attention_rows(query, key, mask, positions, scale)
    return attention_rows_reference(query, key, mask, positions, scale)


@attention_rows.register_fake
def _(
    query: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    return query.new_empty(*query.shape[:3], key.shape[2], dtype=torch.float32)


OVER = ("queries", "keys")


def attention_mass_reference(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    over: str = "queries",
) -> Tensor:
    """:func:`attention_mass` by the full matrix."""
    _check_over(over)
    positions = None
    if causal:
        offset = key.shape[2] - query.shape[2]
        positions = torch.arange(offset, key.shape[2], device=key.device)
        positions = positions.expand(query.shape[0], -1)
    rows = attention_rows_reference(query, key, mask, positions, scale)
    equation = "bgq,bhqt->bhgt" if over == "queries" else "bgt,bhqt->bhgq"
    return torch.einsum(equation, weights.float(), rows)


@torch.library.custom_op("vlmopt::attention_mass", mutates_args=())
def attention_mass(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    over: str = "queries",
) -> Tensor:
    """Weighted column or row sums of ``softmax(query key^T)``, never held as a whole.

    Over queries: what each key gets. Over keys: what each query gives to a set of keys.

    Args:
        query: ``[batch, heads, queries, size]``.
        key: ``[batch, key heads, keys, size]``; query head ``h`` uses key head
            ``h // (heads / key heads)``.
        weights: float32, of what is summed over: ``[batch, groups, queries]``, or ``[batch,
            groups, keys]`` with ``over="keys"``. A mean is a sum with weights ``1 / queries``, a
            subset one with weights 0 and 1.
        mask: bool (True: may attend) or float (added), broadcastable to ``[batch, heads, queries,
            keys]``.
        causal: key ``t`` is seen by query ``q`` if ``t <= q + keys - queries``.
        scale: of the products, ``size ** -0.5`` by default.
        over: ``queries`` (column sums) or ``keys`` (row sums).

    Returns:
        float32 ``[batch, heads, groups, keys]``, or ``[batch, heads, groups, queries]`` with
        ``over="keys"``. A query that sees nothing adds nothing.

    Raises:
        ValueError: ``over`` is neither.
    """
    _check_over(over)
    if uses_kernels(query):
        from vlmopt.lowering.triton import attention as kernels

        with torch.cuda.device_of(query):
            return kernels.attention_mass(query, key, weights, mask, causal, scale, over)
    return attention_mass_blocks(query, key, weights, mask, causal, scale, over)


def attention_mass_blocks(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    over: str,
) -> Tensor:
    """:func:`attention_mass` in operators of torch, a block of rows at a time."""
    result = _empty_mass(query, key, weights, over)
    if over == "queries":
        result.zero_()
    weights = weights.float()
    for at, rows in probability_blocks(query, key, mask, causal, scale):
        end, seen = at + rows.shape[2], rows.shape[3]
        if over == "queries":
            result[..., :seen] += torch.einsum("bgq,bhqt->bhgt", weights[..., at:end], rows)
        else:
            result[..., at:end] = torch.einsum("bgt,bhqt->bhgq", weights[..., :seen], rows)
    return result


_ROWS = 128
"""Queries of a block."""


def probability_blocks(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Iterator[tuple[int, Tensor]]:
    """``softmax(query key^T)``, block by block: the first query of each, and its rows.

    Rows of a causal block end with the last key that one of them sees.
    """
    for at, block in row_blocks(query, key, mask, causal, scale):
        yield at, attention_rows_reference(*block)


def row_blocks(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None
) -> Iterator[tuple[int, tuple[Tensor, Tensor, Tensor | None, Tensor | None, float | None]]]:
    """The first query of each block, and what :func:`attention_logits` takes for it."""
    queries, keys = query.shape[2], key.shape[2]
    for at in range(0, queries, _ROWS):
        end = min(at + _ROWS, queries)
        positions, part, seen = None, mask, keys
        if causal:
            positions = torch.arange(at, end, device=key.device) + keys - queries
            positions = positions.expand(query.shape[0], -1)
            seen = max(0, end + keys - queries)
        if part is not None and part.shape[-2] != 1:
            part = part[..., at:end, :]
        if part is not None and part.shape[-1] != 1:
            part = part[..., :seen]
        yield at, (query[:, :, at:end], key[:, :, :seen], part, positions, scale)


@attention_mass.register_fake
def _(
    query: Tensor,
    key: Tensor,
    weights: Tensor,
    mask: Tensor | None = None,
    causal: bool = False,
    scale: float | None = None,
    over: str = "queries",
) -> Tensor:
    _check_over(over)
    return _empty_mass(query, key, weights, over)


def _empty_mass(query: Tensor, key: Tensor, weights: Tensor, over: str) -> Tensor:
    length = key.shape[2] if over == "queries" else query.shape[2]
    return query.new_empty(
        query.shape[0], query.shape[1], weights.shape[1], length, dtype=torch.float32
    )


def _check_over(over: str) -> None:
    if over not in OVER:
        raise ValueError(f"over is {over!r}, not one of {', '.join(OVER)}")


# -- kernels -------------------------------------------------------------------------------------


@functools.cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def uses_kernels(query: Tensor) -> bool:
    """Whether the operators run as Triton kernels: on CUDA, where Triton is installed.

    The operators stay opaque to Inductor, which calls them between its own kernels. It would see
    the kernels through ``torch.library.triton_op``, but then fixes the strides that it traced in
    the call, and promises only their order: a padded or sliced query would be read wrongly.
    """
    return query.device.type == "cuda" and _has_triton()
