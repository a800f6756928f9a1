"""Analysis ``cost``: FLOPs, bytes moved, weights, key/value cache and tokens per layer.

Figures come from the shapes recorded in the graph; nothing is run. Counted are matrix products,
attention and convolutions, as ``torch.utils.flop_counter`` counts them; every other operator costs
no FLOPs. What is assumed is stated by :data:`ASSUMPTIONS` and belongs next to every figure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

import vlmopt.ops  # noqa: F401 - registers vlmopt::grouped_mm
from vlmopt.analysis.layers import layer_of
from vlmopt.program import Program, Role, Stage

aten = torch.ops.aten

ASSUMPTIONS = "dense SDPA, no causal discount; 1 FMA = 2 FLOPs"
SYMBOLIC_ASSUMPTION = "symbolic sizes count as the size seen at capture"


class Pairs(StrEnum):
    """How the pairs of token and expert that a stage computes are known."""

    ALL = "all"
    """each token takes as many experts as its router chooses; no pass skips any"""
    COUNTED = "counted"
    """the pass says how many are skipped, whatever the input"""
    MEASURED = "measured"
    """as many are skipped as when the pass was calibrated"""
    AT_MOST = "at most"
    """how many are skipped is known only when the stage runs; counted are all"""


PAIRS_ASSUMPTIONS = {
    Pairs.MEASURED: "as many pairs of token and expert are skipped as in calibration",
    Pairs.AT_MOST: "at most; how many pairs of token and expert are skipped is known at run time",
}

_UNBACKED_SIZE = 1
"""Size assumed where not even capture knew one, such as the number of rows of ``nonzero``."""


@dataclass(frozen=True)
class NodeCost:
    """What one node costs when it is run on its own.

    Attributes:
        flops: floating-point operations of matrix products, attention and convolutions.
        bytes_moved: tensors read and written, each once; views move nothing.
    """

    flops: int = 0
    bytes_moved: int = 0


@dataclass(frozen=True)
class LayerCost:
    """What one repeated block of a stage costs."""

    flops: int = 0
    bytes_moved: int = 0
    nodes: int = 0
    tokens: int | None = None


@dataclass(frozen=True)
class StageCost:
    """What a stage costs.

    Attributes:
        flops, bytes_moved, nodes: of the whole stage, one run over the captured batch.
        parameter_bytes: weights of the stage, shared tensors once.
        kv_cache_bytes: keys and values of one sequence, over all layers.
        layers: cost of each block of the container that holds most of the FLOPs.
        container: module path of that container, or ``None`` where nothing is repeated.
        mean_tokens: mean over layers of the tokens that they process, where tokens are known.
        symbolic: some size was symbolic; see :data:`SYMBOLIC_ASSUMPTION`.
        pairs: how the computed pairs of token and expert are known; see :data:`PAIRS_ASSUMPTIONS`.
    """

    flops: int = 0
    bytes_moved: int = 0
    nodes: int = 0
    parameter_bytes: int = 0
    kv_cache_bytes: int = 0
    layers: Mapping[int, LayerCost] = field(default_factory=dict)
    container: str | None = None
    mean_tokens: float | None = None
    symbolic: bool = False
    pairs: Pairs = Pairs.ALL


def program_cost(program: Program) -> dict[str, StageCost]:
    """Cost of every stage, by name."""
    return {stage.name: stage_cost(stage) for stage in program}


def stage_cost(stage: Stage) -> StageCost:
    """Cost of one stage."""
    total = NodeCost()
    nodes = 0
    computed = computed_pairs(stage)
    blocks: dict[str, dict[int, list[NodeCost]]] = {}
    for node in stage.graph.nodes:
        if node.op != "call_function":
            continue
        cost = node_cost(node)
        place = layer_of(node)
        if place is not None and place[1] in computed and _is_grouped(node):
            cost = NodeCost(round(cost.flops * computed[place[1]]), cost.bytes_moved)
        total = NodeCost(total.flops + cost.flops, total.bytes_moved + cost.bytes_moved)
        nodes += 1
        if place is not None:
            blocks.setdefault(place[0], {}).setdefault(place[1], []).append(cost)
    container = max(blocks, key=lambda name: _weight(blocks[name]), default=None)
    tokens = tokens_per_layer(stage, blocks[container]) if container is not None else {}
    layers = {
        index: LayerCost(
            sum(cost.flops for cost in costs),
            sum(cost.bytes_moved for cost in costs),
            len(costs),
            tokens.get(index),
        )
        for index, costs in sorted(blocks.get(container or "", {}).items())
    }
    return StageCost(
        total.flops,
        total.bytes_moved,
        nodes,
        parameter_bytes(stage),
        kv_cache_bytes(stage),
        layers,
        container,
        sum(tokens.values()) / len(tokens) if tokens else None,
        any(_is_symbolic(node) for node in stage.graph.nodes),
        Pairs(stage.facts["skipped_pairs"]["known"]) if computed else Pairs.ALL,
    )


def node_cost(node: fx.Node) -> NodeCost:
    """Cost of one node; nothing for inputs, weights and arithmetic on sizes."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return NodeCost()
    return NodeCost(node_flops(node), _bytes_moved(node))


def node_flops(node: fx.Node) -> int:
    """FLOPs of one node by :data:`FLOP_FORMULAS`; 0 for operators that are not listed."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return 0
    formula = FLOP_FORMULAS.get(node.target.overloadpacket)
    return 0 if formula is None else formula(node)


def parameter_bytes(stage: Stage) -> int:
    """Bytes of the weights that a stage reads, shared tensors once."""
    paths = {str(node.target): node for node in stage.graph.find_nodes(op="get_attr")}
    tensors: dict[int, torch.Tensor] = {}
    for path, node in paths.items():
        tensor = _attribute(stage.graph_module, path, node.meta.get("val"))
        if isinstance(tensor, torch.Tensor):
            tensors[id(tensor)] = tensor
    return sum(_tensor_bytes(tensor) for tensor in tensors.values())


def kv_cache_bytes(stage: Stage) -> int:
    """Bytes of keys and values of one sequence, as the stage leaves them to the next step."""
    produced = [stage.output_node(p) for p in stage.outputs if p.role in (Role.KEY, Role.VALUE)]
    held = [stage.placeholder(p) for p in stage.inputs if p.role in (Role.KEY, Role.VALUE)]
    total = 0
    for node in produced or held:
        value = node.meta["val"]
        total += _tensor_bytes(value) // max(size_of(value.shape[0]), 1)
    return total


def tokens_per_layer(stage: Stage, layers: Iterable[int]) -> dict[int, int]:
    """Tokens that each layer processes, from what capture measured and the cuts made since.

    Empty where capture measured no tokens, and for ``decode``, which takes one token at a time.
    """
    tokens = stage.facts.get("tokens")
    if tokens is None or stage.name == "decode":
        return {}
    counts: dict[int, int] = {}
    for layer in sorted(layers):
        cut = next((cut for cut in reversed(stage.cuts) if cut.covers(layer)), None)
        counts[layer] = tokens if cut is None else cut.tokens[1]
    return counts


def computed_pairs(stage: Stage) -> dict[int, float]:
    """The share of pairs of token and expert that is computed, by layer.

    Empty where no pass skips any. Padding takes no expert then.
    """
    facts = stage.facts
    shares = facts.get("skipped_pairs", {}).get("layers", {})
    lengths = tokens_per_layer(stage, map(int, shares))
    found = {}
    for layer, (text, vision) in ((int(name), share) for name, share in shares.items()):
        if layer not in lengths:  # decoding
            found[layer] = 1 - text
            continue
        cut = next((cut for cut in reversed(stage.cuts) if cut.covers(layer)), None)
        visual = facts["visual_tokens"] if cut is None else [after for _, after in cut.visual]
        kept = sum(facts["text_tokens"]) * (1 - text) + sum(visual) * (1 - vision)
        found[layer] = kept / (facts["batch"] * lengths[layer])
    return found


def size_of(size: int | torch.SymInt) -> int:
    """A dimension as a number; a symbolic one by the size seen at capture."""
    return optimization_hint(size, fallback=_UNBACKED_SIZE)


# -- FLOPs -------------------------------------------------------------------------------------


def _shape(value: Any) -> tuple[int, ...]:
    tensor = value.meta["val"] if isinstance(value, fx.Node) else value
    return tuple(size_of(size) for size in tensor.shape)


def _product(left: int) -> Callable[[fx.Node], int]:
    """Matrix product: every element of the output sums over the last axis of the left operand."""

    def flops(node: fx.Node) -> int:
        return 2 * math.prod(_shape(node)) * _shape(node.args[left])[-1]

    return flops


def _grouped_product(node: fx.Node) -> int:
    """Rows in groups, each group with a matrix of its own: every row meets one matrix."""
    left, right = _shape(node.args[0]), _shape(node.args[1])
    if len(left) == 2:
        return 2 * math.prod(left) * right[-1]
    return 2 * math.prod(_shape(node)) * left[-1]


def _is_grouped(node: fx.Node) -> bool:
    target: Any = node.target
    return FLOP_FORMULAS.get(getattr(target, "overloadpacket", None)) is _grouped_product


def _attention(node: fx.Node) -> int:
    query, key, value = (_shape(argument) for argument in node.args[:3])
    *batch, queries, width = query
    return 2 * math.prod(batch) * queries * key[-2] * (width + value[-1])


def _convolution(node: fx.Node) -> int:
    """Every element of the output (of the input, when transposed) meets one filter."""
    weight = _shape(node.args[1])
    transposed = "transpose" in str(node.target) or (
        node.target is aten.convolution.default and bool(node.args[6])
    )
    elements = _shape(node.args[0]) if transposed else _shape(node)
    return 2 * math.prod(elements) * math.prod(weight[1:])


def _einsum(node: fx.Node) -> int:
    """One FMA per point of the joint index space and per product of two operands."""
    equation, operands = node.args[:2]
    sizes: dict[str, int] = {}
    terms = str(equation).replace(" ", "").split("->")[0].split(",")
    for term, operand in zip(terms, operands, strict=True):  # type: ignore[arg-type]
        shape = _shape(operand)
        head, _, tail = term.partition("...")
        sizes.update(zip(head, shape[: len(head)], strict=True))
        sizes.update(zip(tail, shape[len(shape) - len(tail) :], strict=True))
        if "..." in term:
            ellipsis = math.prod(shape[len(head) : len(shape) - len(tail)])
            sizes["..."] = max(sizes.get("...", 1), ellipsis)
    return 2 * math.prod(sizes.values()) * max(len(terms) - 1, 0)


FLOP_FORMULAS: dict[Any, Callable[[fx.Node], int]] = {
    aten.linear: _product(0),
    aten.matmul: _product(0),
    aten.mm: _product(0),
    aten.bmm: _product(0),
    aten.mv: _product(0),
    aten.dot: _product(0),
    aten.addmm: _product(1),
    aten.baddbmm: _product(1),
    aten._grouped_mm: _grouped_product,
    torch.ops.vlmopt.grouped_mm: _grouped_product,
    aten.einsum: _einsum,
    aten.scaled_dot_product_attention: _attention,
    aten.conv1d: _convolution,
    aten.conv2d: _convolution,
    aten.conv3d: _convolution,
    aten.conv_transpose1d: _convolution,
    aten.conv_transpose2d: _convolution,
    aten.conv_transpose3d: _convolution,
    aten.convolution: _convolution,
}
"""FLOPs by operator; a kernel that replaces one of these adds its own formula."""


# -- bytes -------------------------------------------------------------------------------------

_LOOKUPS = {
    aten.embedding: 0,
    aten.gather: 0,
    aten.index: 0,
    aten.index_select: 0,
    aten.take_along_dim: 0,
}
"""Operators that read only the rows they return, with the position of the table they read."""


def _bytes_moved(node: fx.Node) -> int:
    target: Any = node.target
    if any(result.alias_info is not None for result in target._schema.returns):
        return 0  # a view
    written = _value_bytes(node.meta.get("val"))
    table = _LOOKUPS.get(target.overloadpacket)
    if table is None:
        return written + sum(_value_bytes(n.meta.get("val")) for n in node.all_input_nodes)
    others = [n for n in node.all_input_nodes if n is not node.args[table]]
    return 2 * written + sum(_value_bytes(n.meta.get("val")) for n in others)


def _value_bytes(value: Any) -> int:
    if isinstance(value, (list, tuple)):
        return sum(map(_value_bytes, value))
    return _tensor_bytes(value) if isinstance(value, torch.Tensor) else 0


def _tensor_bytes(tensor: torch.Tensor) -> int:
    return math.prod(_shape(tensor)) * tensor.element_size()


def _attribute(root: torch.nn.Module, path: str, default: Any) -> Any:
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part, None)
    return default if value is None else value


def _is_symbolic(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and any(not isinstance(n, int) for n in value.shape)


def _weight(layers: Mapping[int, list[NodeCost]]) -> tuple[bool, int, int]:
    """Containers compare by being repeated, then by FLOPs, then by number of nodes."""
    costs = [cost for layer in layers.values() for cost in layer]
    return len(layers) > 1, sum(cost.flops for cost in costs), len(costs)
