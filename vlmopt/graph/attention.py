"""Arguments of the attention operator, however a graph passes them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

ARGUMENTS = tuple(
    argument.name
    for argument in torch.ops.aten.scaled_dot_product_attention.default._schema.arguments
)


def attention_arguments(attention: fx.Node) -> dict[str, Any]:
    """Those that are given, by name."""
    return dict(zip(ARGUMENTS, attention.args, strict=False)) | attention.kwargs


def attention_mask(attention: fx.Node) -> Any:
    """The mask that an attention operator takes, if any."""
    return attention_arguments(attention).get("attn_mask")


def replace_mask(attention: fx.Node, mask: fx.Node) -> None:
    """Let an attention operator take ``mask``, and hide nothing by itself."""
    given = attention_arguments(attention) | {"attn_mask": mask}
    given.pop("is_causal", None)
    attention.args = tuple(given.pop(name) for name in ARGUMENTS[:4])
    attention.kwargs = {name: given[name] for name in ARGUMENTS if name in given}


def is_causal(attention: fx.Node) -> bool:
    """Whether an attention operator hides later keys by itself."""
    return bool(attention_arguments(attention).get("is_causal"))
