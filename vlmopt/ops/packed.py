"""A linear layer on a weight that was packed beforehand for the kernels of oneDNN."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_mkldnn = torch.ops.mkldnn


def is_available() -> bool:
    """Whether this build of PyTorch has oneDNN."""
    return torch.backends.mkldnn.is_available()


def pack(weight: Tensor) -> Tensor:
    """``[out features, in features]`` on the CPU, laid out as oneDNN's matrix products read it.

    The result is opaque: it knows its shape, and only :func:`packed_linear` reads it.
    """
    result: Tensor = _mkldnn._reorder_linear_weight(weight.detach(), None)
    return result


Made = TypeVar("Made")

_made = WeakTensorKeyDictionary()
"""What was made of a weight, and its version then: stages share it, and it lives as long as the
weight does."""


def made_once(weight: Tensor, make: Callable[[Tensor], Made]) -> Made:
    """``make(weight)``, kept until the weight changes."""
    found = _made.get(weight)
    if found is None or found[0] != weight._version:
        found = _made[weight] = (weight._version, make(weight))
    return cast("Made", found[1])


def packed(weight: Tensor) -> Tensor:
    """What :func:`pack` makes of a weight, once."""
    return made_once(weight, pack)


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` by oneDNN, whatever the library that PyTorch prefers."""
    result: Tensor = _mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


@torch.library.custom_op("vlmopt::packed_linear", mutates_args=())
def packed_linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``torch.nn.functional.linear`` for inference.

    Args:
        rows: float32 or bfloat16 ``[..., in features]`` on the CPU.
        weight: of :func:`pack`, same dtype.
        bias: ``[out features]``.
    """
    return linear(rows, weight, bias)


@packed_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])
