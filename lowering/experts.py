"""Mixtures of experts on the rows that are computed, and no others.

In a program's graphs rows of skipped pairs stay where they are, so that all shapes are known. A
compiler that can do with shapes that depend on data gives the rest of the work, activations and
copies, only the rows that the grouped products compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import fx
from torch._dynamo import config

import vlmopt.ops  # noqa: F401 - registers vlmopt::computed_rows
from vlmopt.program import copy_graph

aten = torch.ops.aten
_OPS = torch.ops.vlmopt
MARK = _OPS.computed_rows.default


def has_skipped_rows(gm: fx.GraphModule) -> bool:
    """Whether some rows are marked as not computed."""
    return bool(gm.graph.find_nodes(op="call_function", target=MARK))


def with_kernels(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose grouped products on the CPU are vlmopt's; ATen's take one after the other."""
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    for node in result.graph.find_nodes(op="call_function", target=aten._grouped_mm.default):
        if node.meta["val"].device.type == "cpu" and len(node.args) == 3 and not node.kwargs:
            node.target = _OPS.grouped_mm.default
    result.recompile()
    return result


def without_skipped_rows(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy in which rows of skipped pairs are left out, and ``gm`` unchanged.

    How many rows are left is read from the device, which on a GPU waits for it: there they stay.
    """
    result = fx.GraphModule(gm, copy_graph(gm.graph))
    for node in result.graph.find_nodes(op="call_function", target=MARK):
        if node.meta["val"].device.type == "cpu":
            node.target = _OPS.only_computed_rows.default
    result.recompile()
    return result


def with_shapes_of_data(compiled: Callable[..., Any]) -> Callable[..., Any]:
    """What ``torch.compile`` returned, where operators with shapes that depend on data compile."""

    @wraps(compiled)
    def call(*args: Any) -> Any:
        with config.patch(capture_dynamic_output_shape_ops=True):
            return compiled(*args)

    return call
