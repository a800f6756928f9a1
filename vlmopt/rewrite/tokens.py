"""Cutting tokens: in the prefill at one layer, and in the decode stage that continues from it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from vlmopt.analysis.layers import find_layers
from vlmopt.analysis.token_axes import B, Dims, Factor, T, TokenAxes, follow_tokens, has_tokens
from vlmopt.errors import PreconditionError, UnsupportedOperatorError
from vlmopt.graph.attention import attention_mask, is_causal, replace_mask
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Cut, Modality, Port, Role, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.positions import carries_positions, dropped_before, renumbered
from vlmopt.rewrite.region import gather_tokens, shorten_region

aten = torch.ops.aten


@dataclass(frozen=True)
class CutSite:
    """Where and how much to cut.

    Attributes:
        hidden: residual stream entering ``layer``, ``[batch, tokens, width]``.
        modality: modality of the tokens of the whole prompt, int64 ``[batch, tokens]``.
        kept: slots of the tokens still present, ``None`` before the first cut.
        visual, quotas: visual tokens before and after, per sample.
        renumber: the tokens that stay get new positions, as if the others had never been.
        fixed: the tokens that stay, by slot among those present, if that is settled already.
        until: the value from which on all tokens are back, and the layer that comes after it;
            those that were left out hold there what they held before. ``None``: they are gone.
        fillers: a sample may keep fewer visual tokens than ``quotas`` says, or have fewer already.
        match: number of this cut among those of the stage, from 1.
        prefix: first part of the names of new nodes.
    """

    stage: Stage
    layer: int
    hidden: fx.Node
    modality: fx.Node
    kept: fx.Node | None
    visual: tuple[int, ...]
    quotas: tuple[int, ...]
    match: int
    prefix: str
    ctx: PassContext
    renumber: bool = False
    fixed: tuple[int, ...] = ()
    until: tuple[fx.Node, int] | None = None
    fillers: bool = False

    @property
    def ragged(self) -> bool:
        """Whether fillers stand among the tokens that stay."""
        return self.fillers or len(set(self.visual)) > 1


Choice = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def cut_tokens(
    site: CutSite,
    choose: Callable[..., Choice],
    read: Callable[[Emitter, fx.Node], Sequence[Any]],
    carry: Mapping[str, fx.Node] | None = None,
) -> dict[str, fx.Node]:
    """Keep the tokens that ``choose`` selects, from ``site.hidden`` on.

    Args:
        choose: ``(modality, length, *values) -> (score, slots, valid, rows)``: float32 ``[batch,
            tokens]``; int64 ``[batch, length]`` ascending; bool ``[batch, length]``, False for
            fillers that no one may attend to, or ``None`` where there are none; what the residual
            stream holds for the tokens that stay, ``[batch, length, width]``, or ``None`` where
            it holds what it held.
        read: called with an emitter at the cut and the modality of the tokens present there;
            returns the values for ``choose``.
        carry: per-token values ``[batch, tokens]`` to take along.

    Returns:
        What was to be carried, for the tokens that stay.

    Raises:
        UnsupportedOperatorError: what follows cannot run on fewer tokens.
    """
    graph = site.stage.graph
    val = site.hidden.meta["val"]
    batch, tokens = val.shape[0], val.shape[1]
    dropped = min(b - a for b, a in zip(site.visual, site.quotas, strict=True))
    length: int | fx.Node = tokens - dropped
    ragged = site.ragged
    starts: dict[fx.Node, Dims] = {
        site.hidden: ((B,) if batch != 1 else (1,), (T,), (int(val.shape[2]),))
    }
    stops = [site.until[0]] if site.until else []
    axes = follow_tokens(graph, starts, tokens=_factor(tokens), batch=_batch(batch), stops=stops)
    present = [site.kept] if site.kept is not None else []
    carry = carry or {}
    with emitting(site, site.hidden, *carry.values()) as (emit, modality, anchor):
        if isinstance(tokens, torch.SymInt):  # a graph for prompts of any length
            size = emit.call(aten.sym_size.int, site.hidden, 1)
            length = emit.call(operator.sub, size, dropped, name="length")
        _score, slots, valid, shorter = emit.trace(
            choose,
            modality,
            length,
            *read(emit, modality),
            names=("score", "keep", "valid", "out"),
        )

        def gather(value: fx.Node, dims: Dims, name: str, index: fx.Node = slots) -> fx.Node:
            chosen = site.fixed if site.fixed and index is slots else lambda _: index
            return gather_tokens(emit, value, dims, chosen, name=name)

        hidden_dims = starts[site.hidden]
        if shorter is None:
            shorter = gather(site.hidden, hidden_dims, "out")
        carried = {name: gather(value, hidden_dims[:2], name) for name, value in carry.items()}
        places = slots
        if site.renumber:
            places = emit.trace(renumbered, modality, slots, valid, names=("places",))
        kept = slots
        if site.fixed and present:
            original = _original_slots(site)
            kept = emit.trace(_fixed_slots, modality, original, names=("kept",))
        elif present or valid is not None:
            kept = emit.trace(kept_slots, slots, valid, *present, names=("kept",))
        frontier: dict[fx.Node, fx.Node] = {}
        for value, dims in axes.frontier.items():
            if any(has_tokens(dim) and dim[-1] != T for dim in dims):
                raise UnsupportedOperatorError(
                    f"%{value.name} counts more tokens than this prompt has",
                    node=value,
                    hint="start a new prompt, without past_key_values",
                )
            index = places if site.renumber and carries_positions(value) else slots
            with graph.inserting_before(later_of(graph, value, anchor)):
                fewer = gather(value, dims, f"gather_{value.name}", index)
                if ragged and is_mask(axes, value):
                    fewer = emit.trace(mask_fillers, fewer, valid, names=(f"mask_{value.name}",))
            frontier[value] = fewer
        if ragged:
            with graph.inserting_before(anchor):
                _mask_causal(axes, emit, slots, valid)
            _require_masks(axes)
        later = {
            stop: [user for user in stop.users if user not in axes.dims and user not in axes.ends]
            for stop in stops
        }
        shorten_region(axes, emit, starts={site.hidden: shorter}, length=length, frontier=frontier)
        for stop, users in later.items():
            with graph.inserting_before(stop.next):
                inside = Emitter.of_pass(site.ctx, site.stage, stop, site.prefix, site.match)
                rows = (site.hidden, slots, valid, stop)
                whole = inside.trace(put_back, *rows, names=("restored",))
            for user in users:
                user.replace_input_with(stop, whole)
    finish_cut(site, axes, kept, tokens, tokens - dropped, set(carried.values()))
    return carried


@contextmanager
def emitting(site: CutSite, *after: fx.Node) -> Iterator[tuple[Emitter, fx.Node, fx.Node]]:
    """Insert after some values.

    Yields:
        An emitter, the modality of the tokens present there, and the node before which it inserts.
    """
    graph = site.stage.graph
    present = [site.kept] if site.kept is not None else []
    emit = Emitter.of_pass(site.ctx, site.stage, site.hidden, site.prefix, site.match)
    last = _latest(graph, [site.modality, *present, *after])
    with graph.inserting_after(last):
        anchor = graph.call_function(aten.alias.default, (last,))  # keeps the insertion point
    try:
        with graph.inserting_before(anchor):
            modality = site.modality
            if present:
                modality = emit.trace(modality_of_kept, modality, *present, names=("modality",))
            yield emit, modality, anchor
    finally:
        graph.erase_node(anchor)


def cut_decode(
    decode: Stage, prefill: Stage, cut: Cut, ctx: PassContext, *, match: int, prefix: str
) -> None:
    """Make the decode stage take the shorter keys and values of the layers from a cut on."""
    graph = decode.graph
    kept_name = f"{cut.kept}_slots"
    ports = [
        port
        for port in decode.inputs
        if port.role in (Role.KEY, Role.VALUE) and port.layer is not None and cut.covers(port.layer)
    ]
    nodes = {port: decode.placeholder(port) for port in ports}
    first = next(iter(nodes.values()))
    emit = Emitter.of_pass(ctx, decode, first, prefix, match)
    batch = first.meta["val"].shape[0]
    starts: dict[fx.Node, Dims] = {}
    for node in nodes.values():
        shape = node.meta["val"].shape
        starts[node] = (
            (B,) if batch != 1 else (1,),
            (int(shape[1]),),
            (T,),
            (int(shape[3]),),
        )
    past = first.meta["val"].shape[2]
    # a later cut moves some layers to other slots: each layer's own mask must stay in sight
    axes = follow_tokens(graph, starts, tokens=_factor(past), batch=_batch(batch), absorb=False)

    prompt = decode.facts["tokens"]
    with graph.inserting_after(graph.find_nodes(op="placeholder")[-1]):
        kept = graph.placeholder(kept_name)
    with decode.fake_mode():
        kept.meta["val"] = torch.empty(batch, cut.tokens[1], dtype=torch.int64)
    ctx.stamp(kept, match)
    dropped = cut.tokens[0] - cut.tokens[1]
    for node in nodes.values():
        shape = list(node.meta["val"].shape)
        shape[2] = shape[2] - dropped
        with decode.fake_mode():
            node.meta["val"] = torch.empty(shape, dtype=node.meta["val"].dtype)
    after_inputs = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(after_inputs):
        length = emit.call(aten.sym_size.int, first, 2)
        seen = emit.call(aten.sym_size.int, _mask_over_all(decode), 1) if axes.frontier else None
    indices: dict[Any, fx.Node] = {}
    ragged = cut.fillers or len(set(cut.visual)) > 1 or cut.tokens[1] > cut.tokens[0]
    frontier: dict[fx.Node, fx.Node] = {}
    for value, dims in axes.frontier.items():
        source = _ungathered(graph, value)
        before = later_of(graph, value, after_inputs)
        with graph.inserting_before(before):

            def index(expression: Any) -> fx.Node:
                new = int(expression - T)
                if expression not in indices:
                    indices[expression] = emit.trace(
                        _slots_in_decode, kept, seen, prompt, new, names=("slots",)
                    )
                return indices[expression]

            for dim in dims:
                if has_tokens(dim):
                    index(dim[0])
            fewer = gather_tokens(emit, source, dims, index, name=f"gather_{source.name}")
            if ragged:
                expression = next(dim[0] for dim in dims if has_tokens(dim))
                fewer = emit.trace(
                    _mask_decode_fillers,
                    fewer,
                    kept,
                    index(expression),
                    names=(f"mask_{source.name}",),
                )
            fewer.meta["custom"]["vlmopt"]["source"] = source.name
        frontier[value] = fewer
    shorten_region(
        axes, emit, starts={node: node for node in starts}, length=length, frontier=frontier
    )
    if cut.renumbered:
        _lower_positions(decode, cut.layer, kept, emit)
    remove_unused(decode)
    decode.inputs = (
        *(replace(port, kept=kept_name) if port in nodes else port for port in decode.inputs),
        Port(kept_name, Role.KEPT),
    )
    decode.outputs = _outputs_on_kept(decode, axes, kept_name)


def _lower_positions(decode: Stage, layer: int, kept: fx.Node, emit: Emitter) -> None:
    """From ``layer`` on, a new token stands right behind the tokens that were kept."""
    graph = decode.graph
    ports = decode.find_inputs(Role.POSITION_IDS)
    if not ports:
        raise PreconditionError(
            f"the decode stage of this {decode.name} has no position ids that could be lowered",
            hint="let tokens keep their positions: positions=keep",
        )
    positions = decode.placeholder(ports[0])
    later = {node for node, index in find_layers(decode).of.items() if index >= layer}
    entering = {
        value: [user for user in value.users if user in later]
        for value in graph.nodes
        if value not in later and (value is positions or carries_positions(value))
    }
    entering = {value: users for value, users in entering.items() if users}
    start = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    with graph.inserting_before(start):
        dropped = emit.trace(
            dropped_before,
            _mask_over_all(decode),
            kept,
            decode.facts["tokens"],
            names=("dropped",),
        )
        lowered = emit.call(aten.sub.Tensor, positions, dropped, name="positions")
        lowered.meta["custom"]["vlmopt"]["lowers"] = positions.name
    # an earlier cut may have lowered them before
    before = [user for user in positions.users if user is not lowered and _lowers(user, positions)]
    known = dict.fromkeys([positions, *before], lowered)
    for value, users in entering.items():
        copies = dict(known)
        for node in _made_from(set(known), value):
            with graph.inserting_before(node.next):
                copies[node] = emit.copy(node, copies)
        for user in users:
            user.replace_input_with(value, copies.get(value, value))


def _lowers(node: fx.Node, positions: fx.Node) -> bool:
    made = (node.meta.get("custom") or {}).get("vlmopt", {})
    return made.get("lowers") == positions.name


def _made_from(starts: set[fx.Node], end: fx.Node) -> list[fx.Node]:
    """Nodes on the ways from ``starts`` to ``end``, the end included, in order."""
    above: set[fx.Node] = set()
    stack = [end]
    while stack:
        node = stack.pop()
        if node not in above and node not in starts:
            above.add(node)
            stack.extend(node.all_input_nodes)
    below = set(starts)
    for node in end.graph.nodes:
        if node in above and any(value in below for value in node.all_input_nodes):
            below.add(node)
    return [node for node in end.graph.nodes if node in below - starts]


# -- pieces ------------------------------------------------------------------------------------


def put_back(hidden: Tensor, slots: Tensor, valid: Tensor | None, rows: Tensor) -> Tensor:
    """``hidden`` with ``rows`` at ``slots``, fillers apart."""
    index = slots[..., None].expand(*slots.shape, hidden.shape[-1])
    if valid is not None:
        rows = torch.where(valid[..., None], rows, hidden.gather(1, index))
    return hidden.scatter(1, index, rows)


def _fixed_slots(modality: Tensor, slots: tuple[int, ...]) -> Tensor:
    return torch.tensor(slots, device=modality.device).expand(modality.shape[0], -1)


def kept_slots(slots: Tensor, valid: Tensor | None, earlier: Tensor | None = None) -> Tensor:
    """Original slot of each token still present, -1 for fillers."""
    original = slots if earlier is None else earlier.gather(1, slots)
    return original if valid is None else torch.where(valid, original, -1)


def mask_fillers(mask: Tensor, valid: Tensor) -> Tensor:
    """An attention mask ``[batch, ..., keys]`` that hides fillers too."""
    visible = valid.view(valid.shape[0], *[1] * (mask.ndim - 2), valid.shape[1])
    if mask.dtype == torch.bool:
        return mask & visible
    return torch.where(visible, mask, torch.finfo(mask.dtype).min)


def _slots_in_decode(kept: Tensor, seen: Any, prompt: int, new: int) -> Tensor:
    """Positions of the kept tokens and of all generated ones in a mask over everything seen."""
    generated = torch.arange(prompt, seen - 1 + new, device=kept.device)
    return torch.cat([kept.clamp(min=0), generated.expand(kept.shape[0], -1)], dim=1)


def _mask_decode_fillers(mask: Tensor, kept: Tensor, slots: Tensor) -> Tensor:
    rest = torch.ones_like(slots[:, kept.shape[1] :], dtype=torch.bool)
    return mask_fillers(mask, torch.cat([kept >= 0, rest], dim=1))


def modality_of_kept(modality: Tensor, kept: Tensor) -> Tensor:
    """Modality of the tokens still present; a filler counts as padding."""
    present = modality.gather(1, kept.clamp(min=0))
    return torch.where(kept >= 0, present, Modality.PADDING)


def finish_cut(
    site: CutSite, axes: TokenAxes, kept: fx.Node, before: Any, after: Any, carried: set[fx.Node]
) -> None:
    stage, graph = site.stage, site.stage.graph
    name = f"kept_{site.match}"
    output = graph.output_node()
    output.args = ((*output.args[0], kept),)  # type: ignore[misc]
    stage.outputs = (*_outputs_on_kept(stage, axes, name), Port(name, Role.KEPT))
    stage.cuts = (
        *stage.cuts,
        Cut(
            site.layer,
            (before, after),
            tuple(zip(site.visual, site.quotas, strict=True)),
            name,
            site.ctx.spec,
            site.renumber,
            _original_slots(site),
            site.until[1] if site.until else None,
            site.fillers,
        ),
    )
    remove_unused(stage, but=carried)


def _original_slots(site: CutSite) -> tuple[int, ...]:
    last = site.stage.last_cut
    if not site.fixed or last is None:
        return site.fixed
    earlier = last.slots
    return tuple(earlier[slot] for slot in site.fixed)


def remove_unused(stage: Stage, but: AbstractSet[fx.Node] = frozenset()) -> None:
    """Delete what no output needs, inputs apart; check the graph and make it callable again."""
    remove_unread(stage.graph_module, but)


def remove_unread(module: fx.GraphModule, but: AbstractSet[fx.Node] = frozenset()) -> None:
    """:func:`remove_unused` for a graph that is no stage."""
    module.graph.eliminate_dead_code(
        is_impure_node=lambda node: node.op in ("placeholder", "output") or node in but
    )
    read = {str(node.target) for node in module.graph.find_nodes(op="get_attr")}
    held = [
        *(name for name, _ in module.named_parameters(remove_duplicate=False)),
        *(name for name, _ in module.named_buffers(remove_duplicate=False)),
    ]
    for path in held:
        if path not in read:
            parent, _, name = path.rpartition(".")
            delattr(module.get_submodule(parent), name)
    module.graph.lint()
    module.recompile()


def _outputs_on_kept(stage: Stage, axes: TokenAxes, kept: str) -> tuple[Port, ...]:
    values = stage.graph.output_node().args[0]
    ports = []
    for port, node in zip(stage.outputs, values, strict=False):  # type: ignore[arg-type]
        dims = axes.dims.get(node)
        touched = dims is not None and any(map(has_tokens, dims))
        ports.append(replace(port, kept=kept) if touched else port)
    return tuple(ports)


def is_mask(axes: TokenAxes, value: fx.Node) -> bool:
    """Whether attention takes a frontier value, or a view of it, as its mask."""
    stack, seen = [value], set()
    while stack:
        node = stack.pop()
        for user in node.users:
            if (user not in axes.dims and user not in axes.ends) or user in seen:
                continue
            seen.add(user)
            if user.target is aten.scaled_dot_product_attention.default:
                if attention_mask(user) is node:
                    return True
            elif _mask_like(user, node):
                stack.append(user)
    return False


def _mask_like(user: fx.Node, node: fx.Node) -> bool:
    return user.meta["val"].dtype == node.meta["val"].dtype and len(user.all_input_nodes) == 1


def _mask_causal(axes: TokenAxes, emit: Emitter, slots: fx.Node, valid: fx.Node) -> None:
    """Give attention that hides later keys by itself a mask that hides fillers too."""
    mask = None
    for node in (*axes.dims, *axes.ends):
        if node.target is not aten.scaled_dot_product_attention.default or not is_causal(node):
            continue
        if mask is None:
            mask = emit.trace(_causal_mask, slots, valid, names=("mask",))
        replace_mask(node, mask)


def _causal_mask(slots: Tensor, valid: Tensor) -> Tensor:
    """A filler sees itself, for no row may see nothing: bool ``[batch, 1, length, length]``."""
    place = torch.arange(slots.shape[1], device=slots.device)
    own = place == place[:, None]
    return ((place <= place[:, None]) & (valid[:, None] | own))[:, None]


def _require_masks(axes: TokenAxes) -> None:
    attention = aten.scaled_dot_product_attention.default
    for node in (*axes.dims, *axes.ends):
        if node.target is attention and attention_mask(node) is None:
            raise UnsupportedOperatorError(
                "samples keep different numbers of visual tokens, but this attention has no mask "
                "that could hide the fillers",
                node=node,
                hint="pass an attention_mask when capturing, or batch samples with equal images",
            )


def _factor(size: Any) -> Factor:
    if isinstance(size, torch.SymInt):
        return size.node.expr
    return int(size)


def _batch(batch: Any) -> Factor | None:
    return None if batch == 1 else _factor(batch)


def _latest(graph: fx.Graph, nodes: list[fx.Node]) -> fx.Node:
    wanted = set(nodes)
    return [node for node in graph.nodes if node in wanted][-1]


def later_of(graph: fx.Graph, value: fx.Node, anchor: fx.Node) -> fx.Node:
    """The node before which something may be inserted that needs both ``value`` and ``anchor``."""
    return value.next if value > anchor else anchor


def _ungathered(graph: fx.Graph, value: fx.Node) -> fx.Node:
    """What an earlier cut gathered ``value`` from: positions are those of the whole prompt."""
    made = (value.meta.get("custom") or {}).get("vlmopt", {})
    name = made.get("source")
    if name is None:
        return value
    return next(node for node in graph.nodes if node.name == name)


def _mask_over_all(decode: Stage) -> fx.Node:
    """An input whose size tells how many tokens have been seen, dropped ones included."""
    masks = decode.find_inputs(Role.ATTENTION_MASK)
    for port in masks:
        node = decode.placeholder(port)
        if node.meta["val"].ndim == 2:
            return node
    raise PreconditionError(
        "the decode stage has no attention mask over all tokens seen",
        hint="capture with an attention_mask among the inputs",
    )
