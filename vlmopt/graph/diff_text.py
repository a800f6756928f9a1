"""A program diff as text for people and as JSON for scripts.

The first lines are the summary; then one hunk per rewritten place; then what changed in the meaning
and size of inputs and outputs, what is saved, what was assumed, and the command that prints it all
again. Every changed line starts with a sign: ``+`` added, ``-`` removed, ``!`` rewired, ``~``
another type or size, ``=`` the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from fnmatch import fnmatchcase
from itertools import groupby
from typing import Any

from vlmopt.analysis.cost import ASSUMPTIONS, StageCost
from vlmopt.graph.diff import (
    FrontierGather,
    Hunk,
    Matching,
    PortChange,
    ProgramDiff,
    Ripple,
    StageDiff,
    ranges_text,
)
from vlmopt.graph.snapshot import NodeRecord, Provenance
from vlmopt.graph.stats import (
    assumptions_text,
    bounded,
    bytes_text,
    cost_json,
    flops_label,
    grouped,
    percent,
    runs_text,
    si,
    table,
)
from vlmopt.graph.text import WIDEST_CALL, align

SCHEMA = 1

FEW = 4
"""So many retyped nodes are listed; more are counted."""


class Display(StrEnum):
    """How hunks are shown."""

    INLINE = "inline"
    SPLIT = "split"
    SUMMARY = "summary"


@dataclass(frozen=True)
class PassLine:
    """One pass of the pipeline in the summary.

    Attributes:
        matches, changed: as the pass reported; ``note`` is free text such as a near miss.
        added, removed, touched: nodes; ``None`` where only the whole pipeline's are known.
    """

    name: str
    matches: int | None
    changed: bool
    semantics: str
    added: int | None = None
    removed: int | None = None
    touched: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Heading:
    """What stands around a diff: the two sides, the passes between them, how to see it again."""

    before: str
    after: str
    verified: str | None = None
    passes: tuple[PassLine, ...] = ()
    reproduce: str | None = None


def render(
    diff: ProgramDiff,
    heading: Heading | None = None,
    *,
    display: Display = Display.INLINE,
    context: int = 1,
    fold: bool = True,
    only: str | None = None,
    module: str | None = None,
) -> str:
    """The diff as text.

    Args:
        context: untouched nodes shown per hunk.
        fold: show equal hunks and ripples in one line each.
        only: show hunks of this pass only.
        module: show hunks whose module path matches this glob only.
    """
    blocks: list[list[str]] = []
    if heading is not None:
        blocks.append(list(_heading(heading)))
    if heading is None or not heading.passes:
        blocks.append([f"nodes matched by {_MATCHING[diff.matching]}"])
    if heading is not None and heading.passes:
        blocks.append(_pass_lines(heading.passes, diff))
    if not diff.changed:
        blocks.append(["no change"])
    for stage in diff.stages:
        if display is not Display.SUMMARY:
            hunks = [hunk for hunk in stage.hunks if _selected(hunk, only, module)]
            for run in _runs(hunks) if fold else [[hunk] for hunk in hunks]:
                if len(run) > 1:
                    blocks.append([_repetitions(stage, run)])
                else:
                    blocks.append(list(_hunk(stage, run[0], display, context, fold)))
    blocks += [[*_roles(stage), *_savings(stage)] for stage in diff.stages if stage.changed]
    if diff.changed:
        blocks.append(_footer(diff, heading))
    elif heading is not None and heading.reproduce is not None:
        blocks.append([f"Reproduce: {heading.reproduce}"])
    return "\n\n".join("\n".join(block) for block in blocks if block)


_MATCHING = {
    Matching.NAME: "name",
    Matching.STRUCTURE: "module path, operator and order (the names differ)",
}


def _selected(hunk: Hunk, only: str | None, module: str | None) -> bool:
    if only is not None and (hunk.made_by is None or hunk.made_by.pass_name != only):
        return False
    return module is None or fnmatchcase(hunk.module, module)


# -- heading -----------------------------------------------------------------------------------


def _heading(heading: Heading) -> Iterator[str]:
    line = f"{heading.before}  ->  {heading.after}"
    yield line if heading.verified is None else f"{line}    verified: {heading.verified}"


def _pass_lines(passes: Sequence[PassLine], diff: ProgramDiff) -> list[str]:
    rows = []
    for index, line in enumerate(passes):
        matches = "" if line.matches is None else _plural(line.matches, "match")
        if not line.changed:
            rows.append((line.name, matches, "no change", line.note and f"({line.note})", ""))
            continue
        rows.append((line.name, matches, _counts(line), _visual(diff, index), line.semantics))
    return table(rows)


def _counts(line: PassLine) -> str:
    if line.added is None or line.removed is None:
        return "changed"
    touched = "" if line.touched is None else f" ~{line.touched}"
    return f"+{line.added} -{line.removed}{touched} nodes"


def _visual(diff: ProgramDiff, index: int) -> str:
    """``visual tokens 576 -> 190 -> 63`` through the cuts of one pass."""
    counts: list[str] = []
    for hunk in diff.hunks():
        if hunk.cut is not None and hunk.made_by is not None and hunk.made_by.index == index:
            before, after = _visual_counts(hunk)
            counts += [before, after] if not counts else [after]
    return f"visual tokens {' -> '.join(counts)}" if counts else ""


def _visual_counts(hunk: Hunk) -> tuple[str, str]:
    """Visual tokens before and after a cut; per sample where samples differ."""
    assert hunk.cut is not None
    sides = [[pair[side] for pair in hunk.cut.visual] for side in (0, 1)]
    before, after = (
        str(side[0]) if len(set(side)) == 1 else "/".join(map(str, side)) for side in sides
    )
    return before, after


# -- hunks -------------------------------------------------------------------------------------


def _hunk(
    stage: StageDiff, hunk: Hunk, display: Display, context: int, fold: bool
) -> Iterator[str]:
    parts = [f"@@ {stage.name}", hunk.module or "(top)"]
    if hunk.made_by is not None:
        parts.append(f"[{hunk.made_by}]")
    repeated = fold and hunk.same_as is not None
    if repeated and hunk.same_as is not None:
        same = _same_as(hunk.same_as)
        parts.append(f"{same}, {' -> '.join(_visual_counts(hunk))}" if hunk.cut else same)
    elif hunk.source is not None:
        parts.append(hunk.source)
    yield "  ".join(parts)
    if not repeated:
        rows = _split_rows(hunk, context) if display is Display.SPLIT else _rows(hunk, context)
        yield from rows
        yield from _gather_lines(hunk.gathers, hunk.gather_nodes)
    yield from _retyped(hunk, fold)
    for ripple in hunk.ripples:
        yield from _ripple(ripple, fold)
    if fold:
        for group in hunk.equal_layers:
            layers = _layers_are(group[1:])
            yield f"= {layers} equal to layer {group[0]} up to names"


def _layers_are(layers: Sequence[int]) -> str:
    return f"layer {layers[0]} is" if len(layers) == 1 else f"layers {ranges_text(layers)} are"


def _runs(hunks: Sequence[Hunk]) -> list[list[Hunk]]:
    """Hunks in order, those in a row that only repeat the same earlier one taken together."""
    runs: list[list[Hunk]] = []
    for hunk in hunks:
        plain = hunk.same_as is not None and not (hunk.ripples or hunk.retyped or hunk.cut)
        if plain and runs and runs[-1][-1].same_as == hunk.same_as and not runs[-1][-1].ripples:
            runs[-1].append(hunk)
        else:
            runs.append([hunk])
    return runs


def _repetitions(stage: StageDiff, hunks: Sequence[Hunk]) -> str:
    first = hunks[0].same_as
    assert first is not None
    parts = [f"@@ {stage.name}", ", ".join(_modules_text(hunk.module for hunk in hunks))]
    if not isinstance(first, str):
        matches = ranges_text(hunk.made_by.match for hunk in hunks if hunk.made_by is not None)
        parts.append(f"[{first.pass_name} #{matches}]")
    return "  ".join([*parts, _same_as(first)])


def _same_as(earlier: Provenance | str) -> str:
    if isinstance(earlier, str):
        return f"same change as in {earlier}"
    return f"same rewrite as #{earlier.match}"


def _modules_text(modules: Iterable[str]) -> Iterator[str]:
    """``layers.1-15`` for ``layers.1``, ``layers.2`` and so on; other modules one by one."""
    blocks: dict[str, set[int]] = {}
    for module in modules:
        container, _, index = module.rpartition(".")
        if index.isdigit():
            blocks.setdefault(container, set()).add(int(index))
        else:
            yield module or "(top)"
    for container, indices in blocks.items():
        yield f"{container}.{ranges_text(indices, separator=',')}"


def _rows(hunk: Hunk, context: int) -> list[str]:
    signed = [(" ", node) for node in hunk.context[:context]]
    signed += [("-", node) for node in hunk.removed]
    signed += [("+", node) for node in hunk.added]
    notes = dict(hunk.notes)
    named = [node.name for _, node in signed if len(node.call) <= WIDEST_CALL]
    names = max(map(len, [*named, *(item.name for item in hunk.rewired)]), default=0)
    rows = []
    for sign, node in signed:
        note = notes.get(node.name)
        type_ = f"{node.type}      {note}" if note else node.type
        rows.append((f"{sign} {_aligned_call(node, names)}", type_))
    for item in hunk.rewired:
        changes = ", ".join(f"{c.where}: {c.before} -> {c.after}" for c in item.changes)
        rows.append((f"! {'%' + item.name:<{names + 1}}   {changes}", ""))
    return _align_types(rows)


def _aligned_call(node: NodeRecord, width: int) -> str:
    name, equals, call = node.call.partition(" = ")
    return f"{name:<{width + 1}} = {call}" if equals else node.call


def _align_types(rows: Sequence[tuple[str, str]]) -> list[str]:
    """As :func:`~vlmopt.graph.text.align`, but lines without a type do not widen the column."""
    typed = align(row for row in rows if row[1])
    lines = iter(typed)
    return [next(lines) if type_ else left for left, type_ in rows]


def _split_rows(hunk: Hunk, context: int) -> list[str]:
    """Before on the left, after on the right."""
    rows: list[tuple[str, str]] = []
    for node in hunk.context[:context]:
        line = f"  {node.call}  {node.type}"
        rows.append((line, line))
    rows += [(f"- {node.call}  {node.type}", "") for node in hunk.removed]
    rows += [("", f"+ {node.call}  {node.type}") for node in hunk.added]
    for item in hunk.rewired:
        for change in item.changes:
            where = f"! %{item.name}  {change.where}: "
            rows.append((where + change.before, where + change.after))
    width = max((len(left) for left, _ in rows), default=0)
    return [f"{left:<{width}} | {right}".rstrip() for left, right in rows]


def _gather_lines(gathers: Sequence[FrontierGather], nodes: int) -> Iterator[str]:
    if not gathers:
        return
    by_dims = groupby(
        sorted(gathers, key=lambda gather: gather.dims), key=lambda gather: gather.dims
    )
    parts = []
    for dims, members in by_dims:
        values = ", ".join(f"%{gather.value}" for gather in members)
        along = " and ".join(map(str, dims))
        parts.append(f"{values} along dim{'s' if len(dims) != 1 else ''} {along}")
    count = _plural(len(gathers), "frontier gather")
    yield f"+ {count}: {'; '.join(parts)}  ({_plural(nodes, 'node')})"


def _retyped(hunk: Hunk, fold: bool) -> Iterator[str]:
    if not fold or len(hunk.retyped) <= FEW:
        for item in hunk.retyped:
            yield f"~ %{item.name}  {item.before} -> {item.after}"
        return
    kinds: dict[str, int] = {}
    for item in hunk.retyped:
        kind = f"{item.before.split('[')[0]} -> {item.after.split('[')[0]}"
        kinds[kind] = kinds.get(kind, 0) + 1
    for kind, count in kinds.items():
        yield f"~ {_plural(count, 'node')} {_verb(count, 'change')} type {kind}"


def _ripple(ripple: Ripple, fold: bool) -> Iterator[str]:
    count = len(ripple.nodes)
    sizes = " -> ".join(map(str, ripple.sizes)) + (" tokens" if ripple.tokens else "")
    products = f" ({ripple.in_products} as a factor)" if ripple.in_products else ""
    places = f"          ({', '.join(ripple.places)})" if ripple.places else ""
    change = _verb(count, "change")
    yield f"~ {_plural(count, 'node')} {change} {sizes}{products}, nothing else{places}"
    if not fold:
        for node in ripple.nodes:
            yield f"    %{node.name}  {node.before} -> {node.after}"


# -- roles and savings -------------------------------------------------------------------------


def _roles(stage: StageDiff) -> Iterator[str]:
    texts = []
    for is_output in (False, True):
        changes = [change for change in stage.ports if change.is_output is is_output]
        text = "; ".join(_port_groups(changes))
        if text:
            texts.append(f"{'outputs' if is_output else 'inputs'} {text}")
    if stage.before is not None and stage.after is not None and stage.changed:
        yield f"roles         {'; '.join(texts) if texts else 'unchanged'}"


def _port_groups(changes: Iterable[PortChange]) -> Iterator[str]:
    """``key[3-16], value[3-16]: 640 -> 254`` for ports that changed alike."""
    groups: dict[object, list[PortChange]] = {}
    for change in changes:
        kind = "+" if change.before is None else "-" if change.after is None else change.sizes
        key = (kind, None) if change.sizes else (kind, change.before, change.after)
        groups.setdefault(key, []).append(change)
    for members in groups.values():
        first = members[0]
        names = ", ".join(_port_names(members))
        if first.before is None:
            yield f"+ {names} {first.after}"
        elif first.after is None:
            yield f"- {names} {first.before}"
        elif first.sizes:
            yield f"{names}: {' -> '.join(map(str, first.sizes))}"
        else:
            yield f"{names}: {first.before} -> {first.after}"


def _port_names(members: Iterable[PortChange]) -> Iterator[str]:
    layered: dict[str, list[int]] = {}
    for change in members:
        if change.layer is None:
            yield change.name
        else:
            layered.setdefault(str(change.role), []).append(change.layer)
    for role, layers in layered.items():
        yield f"{role}[{ranges_text(layers, separator=',')}]"


def _savings(stage: StageDiff) -> list[str]:
    before, after = stage.before, stage.after
    if before is None or after is None:
        cost = before or after
        assert cost is not None
        word = "added" if before is None else "removed"
        flops, nodes = si(cost.flops), grouped(cost.nodes)
        return [f"stage {stage.name} {word}: {nodes} nodes, {flops} FLOPs"]
    header = (stage.name, "before", "after", "change", "")
    left_text, right_text, change = _change(before.flops, after.flops, si)
    cells = bounded(left_text, before), bounded(right_text, after), change
    rows = [header, ("  " + flops_label(stage.name), *cells, _by_layer(before, after))]
    figures: list[tuple[str, float | None, float | None, Callable[[float], str]]] = [
        ("KV cache, 1 sequence", before.kv_cache_bytes, after.kv_cache_bytes, bytes_text),
        ("tokens, mean of layers", before.mean_tokens, after.mean_tokens, "{:.1f}".format),
    ]
    if before.parameter_bytes != after.parameter_bytes:
        figures.append(("weights", before.parameter_bytes, after.parameter_bytes, bytes_text))
    for label, left, right, form in figures:
        if left or right:
            rows.append((f"  {label}", *_change(left or 0, right or 0, form), ""))
    delta = f"{after.nodes - before.nodes:+d}"
    rows.append(("  nodes", grouped(before.nodes), grouped(after.nodes), delta, ""))
    return table(rows)


def _change(before: float, after: float, form: Callable[[float], str]) -> tuple[str, str, str]:
    return form(before).strip(), form(after).strip(), percent(before, after)


def _by_layer(before: StageCost, after: StageCost) -> str:
    """``by layer: 1.00 x3, 0.39 x14``: FLOPs of each layer as a share of what they were."""
    shares = [
        f"{after.layers[layer].flops / cost.flops:.2f}"
        for layer, cost in before.layers.items()
        if layer in after.layers and cost.flops
    ]
    return "" if set(shares) <= {"1.00"} else f"by layer: {runs_text(shares)}"


def _footer(diff: ProgramDiff, heading: Heading | None) -> list[str]:
    changed = [stage for stage in diff.stages if stage.changed]
    text = assumptions_text(cost for stage in changed for cost in (stage.before, stage.after))
    if heading is not None and heading.reproduce is not None:
        text += f"  Reproduce: {heading.reproduce}"
    return [text]


def _plural(count: int, noun: str) -> str:
    suffix = "" if count == 1 else "es" if noun.endswith("ch") else "s"
    return f"{count} {noun}{suffix}"


def _verb(count: int, verb: str) -> str:
    return f"{verb}s" if count == 1 else verb


# -- JSON --------------------------------------------------------------------------------------


def diff_json(diff: ProgramDiff, heading: Heading | None = None) -> dict[str, Any]:
    """The diff as JSON values; ``schema`` is raised when a reader would have to change."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "changed": diff.changed,
        "matching": str(diff.matching),
        "before": {"passes": list(diff.before_passes)},
        "after": {"passes": list(diff.after_passes)},
        "stages": [_stage_json(stage) for stage in diff.stages],
        "assumptions": ASSUMPTIONS,
    }
    if heading is not None:
        document["before"]["source"] = heading.before
        document["after"]["source"] = heading.after
        document["verified"] = heading.verified
        document["reproduce"] = heading.reproduce
        document["passes"] = [vars(line) for line in heading.passes]
    return document


def _stage_json(stage: StageDiff) -> dict[str, Any]:
    return {
        "name": stage.name,
        "changed": stage.changed,
        "hunks": [_hunk_json(hunk) for hunk in stage.hunks],
        "ports": [
            {
                "name": port.name,
                "role": str(port.role),
                "layer": port.layer,
                "direction": "out" if port.is_output else "in",
                "before": port.before,
                "after": port.after,
            }
            for port in stage.ports
        ],
        "cost": {"before": _cost_json(stage.before), "after": _cost_json(stage.after)},
    }


def _hunk_json(hunk: Hunk) -> dict[str, Any]:
    made_by = hunk.made_by
    return {
        "module": hunk.module,
        "source": hunk.source,
        "pass": None if made_by is None else made_by.pass_name,
        "match": None if made_by is None else made_by.match,
        "same_as": hunk.same_as if isinstance(hunk.same_as, str | None) else hunk.same_as.match,
        "added": [_node_json(node) for node in hunk.added],
        "removed": [_node_json(node) for node in hunk.removed],
        "rewired": [
            {"name": item.name, "changes": [vars(change) for change in item.changes]}
            for item in hunk.rewired
        ],
        "retyped": [vars(item) for item in hunk.retyped],
        "gathers": [{"value": g.value, "dims": list(g.dims)} for g in hunk.gathers],
        "gather_nodes": hunk.gather_nodes,
        "ripples": [
            {
                "sizes": list(ripple.sizes),
                "tokens": ripple.tokens,
                "nodes": [node.name for node in ripple.nodes],
                "places": list(ripple.places),
            }
            for ripple in hunk.ripples
        ],
        "equal_layers": [list(group) for group in hunk.equal_layers],
        "cut": None
        if hunk.cut is None
        else {
            "layer": hunk.cut.layer,
            "tokens": list(hunk.cut.tokens),
            "visual": [list(pair) for pair in hunk.cut.visual],
        },
    }


def _node_json(node: NodeRecord) -> dict[str, Any]:
    return {
        "name": node.name,
        "target": node.target,
        "text": node.call,
        "type": node.type,
        "module": node.module,
        "source": node.source,
    }


def _cost_json(cost: StageCost | None) -> dict[str, Any] | None:
    return None if cost is None else cost_json(cost)
