"""Moving cached keys to other positions, by the model's own rotary embedding.

Rotating by ``-d`` what was rotated by ``p`` gives what rotating by ``p - d`` would: so the part of
a stage between keys and rotated keys, run once more, renumbers a cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from vlmopt.graph.reach import reached, sources, users
from vlmopt.program import Role, Stage


@dataclass(frozen=True)
class Rotation:
    """A model's rotary embedding of keys, to be run once more.

    Attributes:
        graph: of ``(keys [1, heads, 1, width], position_ids)``, which gives keys.
        positions: example of ``position_ids``, for one token.
    """

    graph: fx.GraphModule
    positions: Tensor

    def __call__(self, keys: Tensor, by: int) -> Tensor:
        """Keys of tokens that stand ``by`` positions further: ``[1, heads, rows, width]``."""
        shift = torch.full(self.positions.shape, by, dtype=self.positions.dtype, device=keys.device)
        rows = keys.permute(2, 0, 1, 3)[:, :, :, None]
        with torch.no_grad():
            moved = torch.vmap(self.graph, in_dims=(0, None))(rows, shift)
        return moved[:, :, :, 0].permute(1, 2, 0, 3)


def rotation_of(stage: Stage) -> Rotation | None:
    """The rotary embedding of keys in the first layer of a stage.

    Args:
        stage: prefill of one token.

    Returns:
        ``None`` where positions do not enter by rotation alone, or keys are laid out otherwise
        before it.
    """
    ports = stage.find_inputs(Role.POSITION_IDS)
    if not ports:
        return None
    positions = stage.placeholder(ports[0])
    rotated = stage.output_node(stage.find_outputs(Role.KEY)[0])
    plain = _before_rotation(stage, rotated, reached([positions], users))
    if plain is None:
        return None
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {
        plain: graph.placeholder("keys"),
        positions: graph.placeholder("position_ids"),
    }
    inside = _ancestors(rotated, {plain, positions})
    for node in stage.graph.nodes:
        if node in inside and node not in copies:
            if node.op == "placeholder":
                return None
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[rotated])
    found = Rotation(fx.GraphModule(stage.graph_module, graph), positions.meta["val"])
    return found if _is_rotation(found, rotated) else None


def _before_rotation(stage: Stage, rotated: fx.Node, positioned: set[fx.Node]) -> fx.Node | None:
    """The last value on the way to ``rotated`` that knows of no positions and is all of the way."""
    (embeds,) = (stage.placeholder(port) for port in stage.find_inputs(Role.INPUTS_EMBEDS)[:1])
    behind = reached([embeds], users)
    before = reached([rotated], sources)
    shape = rotated.meta["val"].shape
    for node in reversed(list(stage.graph.nodes)):
        if node not in before or node not in behind or node in positioned:
            continue
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.shape != shape:
            continue
        if embeds not in _ancestors(rotated, {node}):
            return node
    return None


def _ancestors(node: fx.Node, stop: set[fx.Node]) -> set[fx.Node]:
    return reached([node], lambda value: () if value in stop else sources(value))


def _is_rotation(found: Rotation, keys: fx.Node) -> bool:
    """Whether going forth and back leaves keys as they were, which scaled embeddings do not."""
    value = keys.meta["val"]
    generator = torch.Generator(device=value.device).manual_seed(0)
    given = torch.randn(value.shape, generator=generator, device=value.device).to(value.dtype)
    back = found(found(given, 7), -7)
    limit = 8 * torch.finfo(value.dtype).eps * given.abs().max()
    return bool((back - given).abs().max() <= limit)
