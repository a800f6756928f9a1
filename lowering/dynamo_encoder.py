"""A vision encoder in a graph of Dynamo's: found by structure, a stage while passes work on it."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

from vlmopt.analysis.layers import layer_of
from vlmopt.errors import PreconditionError
from vlmopt.graph.attention import is_causal
from vlmopt.graph.reach import is_weight, reached, sources, users
from vlmopt.program import Port, Stage, attach_attr, fetch_attr
from vlmopt.rewrite.emit import value_of
from vlmopt.rewrite.tokens import remove_unread

aten = torch.ops.aten
_ATTENTION = aten.scaled_dot_product_attention.default


def may_hold_encoder(gm: fx.GraphModule) -> bool:
    """A glance at a graph as Dynamo made it: most graphs are spared the tracing."""
    given = [node for node in gm.graph.find_nodes(op="placeholder") if not is_weight(node)]
    if not any(_is_floating(node.meta["example_value"]) for node in given):
        return False  # text
    names = [
        getattr(node.target, "__name__", None) or str(node.target)
        for node in gm.graph.nodes
        if node.op.startswith("call")
    ]
    return any("scaled_dot_product" in name or _is_of_images(name) for name in names)


def _is_of_images(name: str) -> bool:
    return "conv2d" in name or "conv3d" in name


@dataclass(frozen=True)
class EncoderBlocks:
    """The blocks of a vision encoder in a graph that may hold more.

    Attributes:
        container: module path of their list.
        nodes: what is inside them.
        attentions: of the graph, those of a decoder included.
        prompt: embeddings of a prompt that their results are written into, if any are.
    """

    container: str
    nodes: tuple[fx.Node, ...]
    attentions: tuple[fx.Node, ...]
    prompt: fx.Node | None


def find_encoder_blocks(graph: fx.Graph, prompt: fx.Node | None) -> EncoderBlocks | None:
    """The first list of blocks that attends to what is made of images.

    Images are inputs of floating point that a convolution over two or three axes, or a projection
    outside of all blocks, makes patches of.

    Args:
        graph: canonical.
        prompt: embeddings of a prompt that features of images are written into, if any are.

    Returns:
        ``None`` where there is no such list, as in graphs of a language model.
    """
    attentions = tuple(graph.find_nodes(op="call_function", target=_ATTENTION))
    lists = {_list_of(node) for node in attentions} - {None}
    given = [node for node in graph.find_nodes(op="placeholder") if _may_be_images(node)]
    made = reached(given, users) - reached(attentions, users)
    patches = [
        node
        for node in made
        if (node.target is aten.linear.default or _is_of_images(str(node.target)))
        and _list_of(node) not in lists
    ]
    followed = reached(patches, users)
    if prompt is not None:
        followed &= reached([prompt], sources)
    first = next((n for n in attentions if n in followed and _list_of(n) is not None), None)
    if first is None or is_causal(first) or _embeds_ids(reached([first], sources)):
        return None  # else a decoder, behind features that another graph computes
    container = cast("str", _list_of(first))
    inside = tuple(node for node in graph.nodes if _list_of(node) == container)
    return EncoderBlocks(container, inside, attentions, prompt)


def fixed_sizes(blocks: EncoderBlocks) -> list[Any]:
    """Sizes of a query: images, heads, patches, width. Those left open become guards of Dynamo's.

    Returns:
        Numbers, and ``SymInt`` for those that were open.

    Raises:
        PreconditionError: one depends on data.
    """
    first: Any = next(node for node in blocks.nodes if node.target is _ATTENTION)
    sizes = [*value_of(first.args[0]).shape]
    try:
        for size in sizes:
            int(size)
    except GuardOnDataDependentSymNode as error:
        raise PreconditionError(
            "how many patches the vision encoder takes is known only when it runs",
            hint="vlmopt.optimize(model, inputs, passes)",
        ) from error
    return sizes


def takes_images(graph: fx.Graph) -> bool:
    """Whether a canonical graph makes patches, or other features, of images by convolution."""
    given = [node for node in graph.find_nodes(op="placeholder") if _may_be_images(node)]
    return any(_is_of_images(str(node.target)) for node in reached(given, users))


def _may_be_images(node: fx.Node) -> bool:
    return not is_weight(node) and _is_floating(value_of(node))


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _list_of(node: fx.Node) -> str | None:
    place = layer_of(node) if node.op == "call_function" else None
    return None if place is None else place[0]


def _embeds_ids(nodes: Iterable[fx.Node]) -> bool:
    """Whether rows of a table are looked up by an input, as ids of text are."""
    for node in nodes:
        if node.target is aten.embedding.default:
            table, ids = cast("tuple[fx.Node, fx.Node]", node.args[:2])
            if is_weight(table) and ids.op == "placeholder" and not is_weight(ids):
                return True
    return False


def take_encoder(module: fx.GraphModule, blocks: EncoderBlocks) -> tuple[Stage, dict[str, str]]:
    """Move an encoder into a stage of its own; what it gives is an input of ``module`` then.

    In front of a prompt the stage ends with its last block. Without one it holds whatever is
    computed from this encoder alone, such as a head that reads the class token.

    Returns:
        The stage: ``model``, as a plain module's, where what it gives leaves the graph at once,
        else ``vision_encoder``. And for each of its outputs the new input of ``module``, by name.
    """
    graph = module.graph
    part = reached(blocks.nodes, sources)
    if blocks.prompt is None:
        behind = reached(blocks.nodes, users)
        others = [
            node
            for node in blocks.attentions
            if node not in behind or _list_of(node) not in (None, blocks.container)
        ]
        ends = behind - reached(set(others) - part, users) - {graph.output_node()}
        part = reached(ends, sources)
    part |= {user for node in part for user in node.users if user.target is operator.getitem}
    results = [
        node
        for node in graph.nodes
        if node in part
        and node.op == "call_function"
        and isinstance(value_of(node), Tensor)
        and any(user not in part for user in node.users)
    ]
    readers = {user for node in results for user in node.users if user not in part}
    stage = Stage(
        "model" if readers <= {graph.output_node()} else "vision_encoder",
        _copy(module, part, results),
        tuple(Port(node.name) for node in graph.find_nodes(op="placeholder") if node in part),
        tuple(Port(node.name) for node in results),
    )
    inputs = {}
    last = graph.find_nodes(op="placeholder")[-1]
    for node in reversed(results):
        with graph.inserting_after(last):
            given = graph.placeholder(f"encoder_{node.name}")
        given.meta = {"val": value_of(node)}
        inputs[node.name] = given.name
        node.replace_all_uses_with(given, lambda user: user not in part)
    remove_unread(module)
    return stage, inputs


def _copy(module: fx.GraphModule, part: set[fx.Node], results: list[fx.Node]) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in part:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            copies[node].name, copies[node].meta = node.name, dict(node.meta)
    graph.output(tuple(copies[node] for node in results))
    return fx.GraphModule(module, graph)


def put_back(stage: Stage, module: fx.GraphModule, inputs: dict[str, str]) -> None:
    """Undo :func:`take_encoder`, with the stage as it is now.

    Args:
        inputs: as :func:`take_encoder` gave them.
    """
    graph = module.graph
    placeholders = {node.name: node for node in graph.find_nodes(op="placeholder")}
    values: dict[fx.Node, fx.Node] = {}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        for node in stage.graph.nodes:
            if node.op == "placeholder":
                values[node] = placeholders[node.name]
                continue
            if node.op == "output":
                break
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta = dict(node.meta)
            if node.op == "get_attr":
                path = f"vision_encoder.{node.target}"  # both may hold constants of one name
                attach_attr(module, path, fetch_attr(stage.graph_module, str(node.target)))
                values[node].target = path
    for output, name in inputs.items():
        given = placeholders[name]
        given.replace_all_uses_with(values[stage.output_node(output)])
        graph.erase_node(given)
    graph.lint()
    module.recompile()
