"""An encoder that is shortened: whether it may be, and where rows come back behind its blocks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import Layers
from vlmopt.analysis.token_axes import Dims
from vlmopt.errors import PreconditionError
from vlmopt.graph.reach import reached, sources
from vlmopt.program import Role, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.region import gather_tokens

aten = torch.ops.aten


def require_untouched(stage: Stage, what: str, *, hint: str) -> None:
    """Check that no pass has shortened an encoder, or reads values of its patches.

    Args:
        what: cannot be done otherwise: ``"tome cannot merge"``.
        hint: where a pass has shortened it.

    Raises:
        PreconditionError: one has.
    """
    if stage.facts.get("merges"):
        raise PreconditionError(
            f"{what} in stage {stage.name}: {stage.facts['merges'][0]['by']} has already", hint=hint
        )
    if stage.find_outputs(Role.ENCODED):
        raise PreconditionError(
            f"{what} in stage {stage.name}: a pass before reads what each patch of its own gets "
            "there",
            hint="leave out one of the two",
        )


def mark_exits(
    graph: fx.Graph, layers: Layers, first: fx.Node, emitter: Callable[[fx.Node], Emitter]
) -> list[fx.Node]:
    """Put an alias between the blocks and whatever comes behind them.

    Args:
        first: only what is computed from this value counts.

    Returns:
        The aliases.
    """
    inner = reached(layers.of, sources)
    shorter = {first}
    aliases = []
    for node in list(graph.nodes):
        if node not in inner or not shorter & {node, *node.all_input_nodes}:
            continue
        shorter.add(node)
        users = [user for user in node.users if user not in inner]
        if not users or not isinstance(node.meta["val"], Tensor):
            continue
        with graph.inserting_after(node):
            alias = emitter(node).call(aten.alias.default, node)
        for user in users:
            user.replace_input_with(node, alias)
        aliases.append(alias)
    return aliases


def restore_rows(alias: fx.Node, places: fx.Node, dims: Dims, emit: Emitter) -> fx.Node:
    """What left the blocks, with a row for each that entered them.

    Args:
        places: int64 ``[batch, rows]``: the row that each becomes.
        dims: of ``alias``.
    """
    with emit.graph.inserting_before(alias):
        return gather_tokens(
            emit, alias.all_input_nodes[0], dims, lambda _: places, name="restored"
        )


def remove_exit(alias: fx.Node, restored: fx.Node) -> None:
    """Let ``restored`` leave the blocks in place of an alias."""
    alias.replace_all_uses_with(restored)
    alias.graph.erase_node(alias)
