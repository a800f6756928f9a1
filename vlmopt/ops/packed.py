"""A linear layer on a weight that was packed beforehand for the kernels of oneDNN."""

from __future__ import annotations

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


_packed = WeakTensorKeyDictionary()
"""The version of a weight, and its parts as packed then: stages share them, and they live as long
as the weight does."""


def packed(weight: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """What :func:`pack` makes of a weight, or of its output features from ``start`` on, once."""
    features = slice(start, stop).indices(weight.shape[0])[:2]
    found: tuple[int, dict[tuple[int, int], Tensor]] | None = _packed.get(weight)
    if found is None or found[0] != weight._version:
        found = _packed[weight] = (weight._version, {})
    if features not in found[1]:
        found[1][features] = pack(weight[slice(*features)])
    return found[1][features]


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` by oneDNN, whatever the library that PyTorch prefers.

    For inference; in graphs it is the operator ``vlmopt::packed_linear``.

    Args:
        rows: float32 or bfloat16 ``[..., in features]`` on the CPU.
        weight: of :func:`pack`, same dtype.
        bias: ``[out features]``.
    """
    result: Tensor = _mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def _shape(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(*rows.shape[:-1], weight.shape[0])


# defined as the dispatcher's own: torch.library.custom_op takes 10 us more for a call, of which a
# graph makes a hundred
_library = torch.library.Library("vlmopt", "FRAGMENT")
_library.define("packed_linear(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")
for _key in ("CPU", "MkldnnCPU"):  # the latter is that of packed weights
    _library.impl("packed_linear", linear, _key)
torch.library.register_fake("vlmopt::packed_linear", _shape)
