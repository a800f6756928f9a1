"""Invariants of a program's graphs, checked after every pass.

``graph.lint()`` sees neither a shape that went stale, nor a port that lost its placeholder, nor an
operator that writes into its input: all three give wrong results far away from their cause. The
level ``lint`` costs milliseconds; ``full`` also computes every recorded shape anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils import _pytree as pytree

from vlmopt.errors import VerifyError
from vlmopt.graph.canonical import SYMBOLIC_FUNCTIONS
from vlmopt.graph.text import op_text, value_text
from vlmopt.program import Program, Role, Stage

Level = Literal["off", "lint", "full"]
LEVELS: tuple[Level, ...] = ("off", "lint", "full")

OPERATOR_NAMESPACES = frozenset({"aten", "vlmopt"})
"""Operators of these libraries may stand in a graph."""


def verify_program(program: Program, level: Level = "full") -> None:
    """Check the invariants of every stage.

    Args:
        level: ``off`` checks nothing; ``lint`` structure, ports, weights and operators; ``full``
            also that every recorded dtype and shape is what the operators give.

    Raises:
        VerifyError: the first invariant that does not hold, with the node.
        ValueError: the level is none of these.
    """
    if level not in LEVELS:
        raise ValueError(f"level is {level!r}, not one of {', '.join(LEVELS)}")
    if level == "off":
        return
    for name, stage in program.stages.items():
        if name != stage.name:
            raise VerifyError("stages", f"stage {stage.name} is filed under {name}")
        verify_stage(stage, level)


def verify_stage(stage: Stage, level: Level = "full") -> None:
    """Check the invariants of one stage; see :func:`verify_program`."""
    for check in _LINT:
        check(stage)
    if level == "full":
        _check_propagation(stage)


# -- lint --------------------------------------------------------------------------------------


def _check_order(stage: Stage) -> None:
    seen: set[fx.Node] = set()
    for node in stage.graph.nodes:
        for value in node.all_input_nodes:
            if value not in seen:
                raise VerifyError(
                    "order", f"%{node.name} reads %{value.name} before it is computed", node=node
                )
        seen.add(node)


def _check_attributes(stage: Stage) -> None:
    used = set()
    for node in stage.graph.find_nodes(op="get_attr"):
        value: Any = stage.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part, None)
        if not isinstance(value, torch.Tensor):
            raise VerifyError("attributes", f"no tensor is called {node.target}", node=node)
        used.add(str(node.target))
    module = stage.graph_module
    named: list[tuple[str, torch.Tensor]] = [*module.named_parameters(remove_duplicate=False)]
    named += [*module.named_buffers(remove_duplicate=False)]
    orphans = sorted(name for name, _ in named if name not in used)
    if orphans:
        raise VerifyError(
            "attributes",
            f"stage {stage.name} holds weights that no node reads: {_some(orphans)}",
            hint="delete them with the nodes that read them",
        )


def _check_lint(stage: Stage) -> None:
    try:
        stage.graph.lint()
    except (RuntimeError, ValueError) as error:
        # the message ends with the whole graph
        raise VerifyError("lint", str(error).splitlines()[0]) from error


def _check_operators(stage: Stage) -> None:
    for node in stage.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        target: Any = node.target
        if node.op != "call_function":
            raise VerifyError("operators", f"{node.op} does not belong in a flat graph", node=node)
        if isinstance(target, torch._ops.OpOverload):
            if target._schema.is_mutable:
                raise VerifyError("mutation", f"{target} writes into its input", node=node)
            if target.namespace not in OPERATOR_NAMESPACES:
                raise VerifyError(
                    "operators",
                    f"{target} is neither an ATen nor a vlmopt operator",
                    node=node,
                    hint="choose another implementation before capturing; for the experts of a "
                    "mixture: model.set_experts_implementation('batched_mm')",
                )
        elif target not in SYMBOLIC_FUNCTIONS:
            raise VerifyError(
                "operators", f"{op_text(node)} is a Python function, no operator", node=node
            )


def _check_metadata(stage: Stage) -> None:
    for node in stage.graph.nodes:
        if node.op != "output" and node.meta.get("val") is None:
            raise VerifyError("metadata", f'%{node.name} has no meta["val"]', node=node)


def _check_signature(stage: Stage) -> None:
    placeholders = [node.name for node in stage.graph.find_nodes(op="placeholder")]
    ports = [port.name for port in stage.inputs]
    if placeholders != ports:
        raise VerifyError(
            "signature",
            f"stage {stage.name} has placeholders {_differing(placeholders, ports)} but input "
            f"ports {_differing(ports, placeholders)}",
        )
    values = stage.graph.output_node().args[0]
    if not isinstance(values, tuple) or not all(isinstance(value, fx.Node) for value in values):
        raise VerifyError("signature", f"stage {stage.name} does not return one tuple of values")
    if len(values) != len(stage.outputs):
        raise VerifyError(
            "signature",
            f"stage {stage.name} returns {len(values)} values through {len(stage.outputs)} ports",
        )
    for direction, found in (("input", stage.inputs), ("output", stage.outputs)):
        repeated = [name for name, n in Counter(port.name for port in found).items() if n > 1]
        if repeated:
            raise VerifyError(
                "signature",
                f"stage {stage.name} has more than one {direction} called {_some(repeated)}",
            )


def _check_kept(stage: Stage) -> None:
    """Whatever lost tokens says which port lists the tokens that are left."""
    lists = {p.name for p in (*stage.inputs, *stage.outputs) if p.role is Role.KEPT}
    wanted: list[tuple[str, str]] = [
        (f"port {port.name}", port.kept)
        for port in (*stage.inputs, *stage.outputs)
        if port.kept is not None
    ]
    wanted += [(f"the cut at layer {cut.layer}", cut.kept) for cut in stage.cuts]
    for what, name in wanted:
        if name not in lists:
            raise VerifyError(
                "kept", f"{what} of stage {stage.name} refers to {name}, which is no kept port"
            )


_LINT: tuple[Callable[[Stage], None], ...] = (
    _check_order,
    _check_attributes,
    _check_lint,
    _check_operators,
    _check_metadata,
    _check_signature,
    _check_kept,
)


# -- full --------------------------------------------------------------------------------------


def _check_propagation(stage: Stage) -> None:
    """Every operator, run on the recorded types of its inputs, gives its recorded type.

    By induction the recorded types are then those of a run from the inputs on; and the first node
    reported is the one at fault, not one downstream of it.
    """
    _check_leaves(stage)
    mode = stage.fake_mode()
    known: dict[object, tuple[str, ...]] = {}
    with mode, torch.no_grad(), _no_new_symbols(mode):
        for node in stage.graph.nodes:
            if node.op != "call_function":
                continue
            # blocks repeat: what was checked once for these types holds for all
            key = _memo_key(node)
            recorded = tuple(_signature(node.meta["val"]))
            if key is not None and known.get(key) == recorded:
                continue
            _check_node(node)
            if key is not None:
                known[key] = recorded


def _check_leaves(stage: Stage) -> None:
    for node in stage.graph.find_nodes(op="get_attr"):
        value: Any = stage.graph_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
        if not _same(value, node.meta["val"]):
            raise VerifyError("propagation", _stale(node, value), node=node)


def _check_node(node: fx.Node) -> None:
    target: Any = node.target
    try:
        args, kwargs = pytree.tree_map_only(
            fx.Node, lambda value: value.meta["val"], (node.args, node.kwargs)
        )
        value = target(*args, **kwargs)
    except Exception as error:  # whatever an operator raises for arguments that do not fit
        reason = str(error).strip().splitlines()
        raise VerifyError(
            "propagation",
            f"%{node.name} cannot be computed from the recorded types of its arguments "
            f"({reason[0] if reason else type(error).__name__})",
            node=node,
        ) from error
    if not _same(value, node.meta["val"]):
        raise VerifyError("propagation", _stale(node, value), node=node)


def _stale(node: fx.Node, value: Any) -> str:
    recorded, real = value_text(node.meta["val"]), value_text(value)
    return f"%{node.name} is recorded as {recorded} but is {real}"


def _same(left: Any, right: Any) -> bool:
    """Whether two values have the same dtypes and shapes."""
    if isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        if left.dtype != right.dtype or left.ndim != right.ndim:
            return False
        return all(map(_same_size, left.shape, right.shape))
    return _same_size(left, right)


def _same_size(left: Any, right: Any) -> bool:
    if isinstance(left, int) and isinstance(right, int):
        return left == right
    if _is_unbacked(left) and _is_unbacked(right):
        return True  # each run of nonzero and the like makes a symbol of its own
    return statically_known_true(left == right)


def _is_unbacked(size: Any) -> bool:
    return isinstance(size, torch.SymInt) and not size.node.has_hint()


def _memo_key(node: fx.Node) -> object | None:
    """Operator, types of the inputs and constants; ``None`` where sizes are symbolic."""
    flat, spec = pytree.tree_flatten((node.args, node.kwargs))
    key: list[object] = [node.target, str(spec)]
    for leaf in flat:
        if isinstance(leaf, fx.Node):
            for part in _signature(leaf.meta["val"], strides=True):
                if "symbolic" in part:
                    return None
                key.append(part)
        else:
            key.append((type(leaf), str(leaf)))
    return tuple(key)


def _signature(value: Any, *, strides: bool = False) -> Iterator[str]:
    if isinstance(value, (list, tuple)):
        yield f"tuple of {len(value)}"
        for item in value:
            yield from _signature(item, strides=strides)
    elif isinstance(value, torch.Tensor):
        if not all(isinstance(size, int) for size in value.shape):
            yield f"symbolic {value_text(value)}"
        else:
            layout = f" {value.stride()}" if strides else ""
            yield f"{value_text(value)} {value.device}{layout}"
    else:
        yield f"symbolic {value}" if isinstance(value, torch.SymInt) else repr(value)


def _no_new_symbols(mode: Any) -> Any:
    """Symbols that propagation makes are thrown away: tell the shape environment so."""
    env = mode.shape_env
    return env.ignore_fresh_unbacked_symbols() if env is not None else torch.no_grad()


def _some(names: list[str], limit: int = 3) -> str:
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def _differing(names: list[str], others: list[str]) -> str:
    """The names from the first difference on, so that a long signature stays readable."""
    pairs = zip(names, others, strict=False)
    first = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(names), len(others)))
    rest = _some(names[first:]) or "nothing"
    return f"{rest} (from position {first})" if first else rest
