"""Fold constants: compute once what does not depend on any input or weight."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from vlmopt.graph.canonical import SYMBOLIC_FUNCTIONS
from vlmopt.pipeline.options import option
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Program, Stage

aten = torch.ops.aten

_FACTORIES = frozenset(
    {
        aten.arange.default,
        aten.arange.start,
        aten.arange.start_step,
        aten.full.default,
        aten.ones.default,
        aten.zeros.default,
        aten.scalar_tensor.default,
    }
)
"""Operators that make a tensor out of numbers alone."""


@dataclass(frozen=True, kw_only=True)
class FoldConstants(Pass):
    """Remove dead and repeated computations, and compute constant ones at compile time.

    Three steps, in each stage: nodes that nothing reads go; of nodes with the same operator and
    arguments one stays; and what operators compute from ``arange``, ``full``, ``ones``, ``zeros``
    and ``scalar_tensor`` alone, in static shapes, becomes a buffer. A bare factory stays: compilers
    make its values on the fly. So does whatever draws random numbers, and a broadcast that a
    buffer would have to spell out.
    """

    name = "fold-constants"
    family = "cleanup"
    phase = Phase.CLEANUP
    semantics = Semantics.EXACT
    example = "fold-constants{max_bytes=65536}"
    zero_matches_ok = True

    max_bytes: int = option(
        1048576, "largest constant to store, in bytes; values on the way to it count too", ge=0
    )

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        dead = repeated = folded = stored = 0
        for stage in program:
            dead_here = _remove_dead(stage)
            repeated_here = _merge_repeated(stage.graph)
            constants, shown = self._constants(stage), _shown_to_caller(stage.graph)
            for match, (node, value) in enumerate(constants, start=folded + 1):
                _replace(stage, node, value, ctx, match, copied=node in shown)
            if constants:
                _remove_dead(stage)
            if dead_here or repeated_here or constants:
                stage.graph_module.recompile()
            dead += dead_here
            repeated += repeated_here
            folded += len(constants)
            stored += sum(value.nbytes for _, value in constants)
        matches = dead + repeated + folded
        return PassResult(
            changed=matches > 0,
            matches=matches,
            statistics={
                "dead_nodes": dead,
                "repeated_nodes": repeated,
                "constants": folded,
                "constant_bytes": stored,
            },
        )

    def _constants(self, stage: Stage) -> list[tuple[fx.Node, torch.Tensor]]:
        """Nodes to replace, in graph order, with their values."""
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for node in stage.graph.nodes:
                if self._is_constant(node, values):
                    args, kwargs = pytree.tree_map_only(
                        fx.Node, values.__getitem__, (node.args, node.kwargs)
                    )
                    values[node] = node.target(*args, **kwargs)
        staying: set[fx.Node] = set()
        chosen: list[tuple[fx.Node, torch.Tensor]] = []
        for node in reversed(stage.graph.nodes):
            if node not in values or all(
                user in values and user not in staying for user in node.users
            ):
                continue  # no constant, or read by constants only
            value = values[node]
            if node.target in _FACTORIES or not isinstance(value, torch.Tensor) or _repeats(value):
                staying.add(node)
            else:
                chosen.append((node, value))
        # what a view shows of a larger tensor is all that is stored
        return [(node, value.clone()) for node, value in reversed(chosen)]

    def _is_constant(self, node: fx.Node, values: dict[fx.Node, Any]) -> bool:
        if node.op != "call_function" or not _is_pure(node.target):
            return False
        inputs = node.all_input_nodes
        if not inputs and node.target not in _FACTORIES:
            return False
        if not all(source in values for source in inputs) or _is_uninitialised(node.target):
            return False
        results = pytree.tree_leaves(node.meta["val"])
        return all(
            isinstance(result, torch.Tensor)
            and all(isinstance(size, int) for size in result.shape)
            and result.numel() * result.element_size() <= self.max_bytes
            and _is_present(result.device)
            for result in results
        )


def _is_pure(target: Any) -> bool:
    """Whether equal arguments always give equal values, and nothing else happens."""
    if not isinstance(target, torch._ops.OpOverload):
        return target in SYMBOLIC_FUNCTIONS
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and not target._schema.is_mutable


def _is_uninitialised(target: Any) -> bool:
    return isinstance(target, torch._ops.OpOverload) and "empty" in target._schema.name


def _is_present(device: torch.device) -> bool:
    """Whether values can be computed here on the device where the graph would."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return device.type == "cpu" or (accelerator is not None and device.type == accelerator.type)


def _repeats(value: torch.Tensor) -> bool:
    """Whether several elements share memory, as after ``expand``."""
    pairs = zip(value.shape, value.stride(), strict=True)
    return any(size > 1 and stride == 0 for size, stride in pairs)


def _remove_dead(stage: Stage) -> int:
    """Remove nodes that nothing reads, and the weights that only they read.

    Returns:
        Number of nodes removed.
    """
    graph, module = stage.graph, stage.graph_module
    before = len(graph.nodes)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    removed = before - len(graph.nodes)
    if removed:
        read = {str(node.target) for node in graph.find_nodes(op="get_attr")}
        named: list[tuple[str, torch.Tensor]] = [*module.named_parameters(remove_duplicate=False)]
        named += [*module.named_buffers(remove_duplicate=False)]
        for path, _ in named:
            if path not in read:
                owner, _, leaf = path.rpartition(".")
                delattr(module.get_submodule(owner), leaf)
    return removed


def _merge_repeated(graph: fx.Graph) -> int:
    """Of nodes with the same operator and arguments, keep the first.

    torch's own pass for this takes the arguments 1, 1.0 and True for the same, and copies the
    graph.

    Returns:
        Number of nodes removed.
    """
    first: dict[object, fx.Node] = {}
    shown = _shown_to_caller(graph)
    removed = 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not _is_pure(node.target):
            continue
        flat, spec = pytree.tree_flatten((node.args, node.kwargs))
        leaves = tuple(
            leaf if isinstance(leaf, fx.Node) else (type(leaf), repr(leaf)) for leaf in flat
        )
        kept = first.setdefault((node.target, str(spec), leaves), node)
        # a caller may write into one output, and must not find it in another
        if kept is node or {kept, node} <= shown:
            continue
        node.replace_all_uses_with(kept)
        graph.erase_node(node)
        if node in shown:
            shown.add(kept)
        removed += 1
    return removed


def _shown_to_caller(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory may be that of an output: the outputs, and what they are views of."""
    shown: set[fx.Node] = set()
    waiting = graph.output_node().all_input_nodes
    while waiting:
        node = waiting.pop()
        if node not in shown:
            shown.add(node)
            if _is_view(node):
                waiting += node.all_input_nodes
    return shown


def _is_view(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return True  # an item of a result
    return any(result.alias_info is not None for result in node.target._schema.returns)


def _replace(
    stage: Stage, node: fx.Node, value: torch.Tensor, ctx: PassContext, match: int, *, copied: bool
) -> None:
    """Put a buffer with ``value`` in the place of ``node``, which is left unread.

    Args:
        copied: the caller may write into the value, so that each run needs a copy of its own.
    """
    graph, mode = stage.graph, stage.fake_mode()
    names = (f"folded_constant_{number}" for number in count(1))
    name = next(name for name in names if not hasattr(stage.graph_module, name))
    stage.graph_module.register_buffer(name, value)
    with graph.inserting_before(node):
        constant = graph.get_attr(name)
    constant.meta = {
        key: node.meta[key] for key in ("nn_module_stack", "stack_trace") if key in node.meta
    }
    constant.meta["val"] = mode.from_tensor(value, static_shapes=True)
    ctx.stamp(constant, match)
    if copied:
        with graph.inserting_before(node):
            copy = graph.call_function(aten.clone.default, (constant,))
        copy.meta = dict(constant.meta)
        constant = copy
    node.replace_all_uses_with(constant)
