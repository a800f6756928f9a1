"""The difference of two programs, as a person would tell it.

Nodes are added, removed, rewired (they read another value) or retyped (dtype or rank). Everything
else that happens when a sequence gets shorter, sizes in types and in arguments, is one *ripple* per
place instead of a line per node. Changes are grouped in hunks, one per place that a pass rewrote.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import StrEnum

from vlmopt.analysis.cost import StageCost
from vlmopt.graph.snapshot import NodeRecord, Provenance, Ref, Snapshot, StageRecord, snapshot
from vlmopt.program import Cut, Program, Role

Size = int | str
SizeChange = tuple[Size, Size]


class Matching(StrEnum):
    """How nodes of the two programs were told to be the same."""

    NAME = "name"
    """by name: both programs come from one capture"""
    STRUCTURE = "structure"
    """by module path, operator and order: the programs were captured apart"""


@dataclass(frozen=True)
class ArgumentChange:
    """One argument before and after, as text; ``where`` is such as ``arg 0``."""

    where: str
    before: str
    after: str


@dataclass(frozen=True)
class Rewired:
    """A node that reads another value, or got another argument, than before."""

    name: str
    changes: tuple[ArgumentChange, ...]


@dataclass(frozen=True)
class Retyped:
    """A node whose value has another dtype or rank than before."""

    name: str
    before: str
    after: str


@dataclass(frozen=True)
class Ripple:
    """Nodes in which only a size changed.

    Attributes:
        sizes: the size through all cuts, such as ``(640, 254)``; two sizes when no cut is known.
        tokens: whether that size is the number of tokens.
        nodes: those nodes, in order.
        in_products: how many of them show the size only as a factor (``tokens * heads``).
        places: the layers and modules that they are in, as text.
    """

    sizes: tuple[Size, ...]
    tokens: bool
    nodes: tuple[Retyped, ...]
    in_products: int
    places: tuple[str, ...]


@dataclass(frozen=True)
class FrontierGather:
    """A value from outside a shortened region, gathered along its token axes."""

    value: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class Hunk:
    """The changes at one place.

    Attributes:
        module, source: where it is; ``made_by``: the pass and match that did it, when stamped.
        context: untouched nodes that the added ones read, most telling first.
        gathers: what the frontier gathers read; ``gather_nodes`` counts the nodes they take.
        equal_layers: groups of layers in this place that are equal up to names.
        same_as: an earlier hunk with the same rewrite: of the same pass, or by no pass in another
            layer of the same container, then named by its module.
        cut: the token cut made here.
        notes: remarks by node name, such as ``64 text + 190 visual``.
    """

    module: str
    source: str | None = None
    made_by: Provenance | None = None
    context: tuple[NodeRecord, ...] = ()
    added: tuple[NodeRecord, ...] = ()
    removed: tuple[NodeRecord, ...] = ()
    rewired: tuple[Rewired, ...] = ()
    retyped: tuple[Retyped, ...] = ()
    gathers: tuple[FrontierGather, ...] = ()
    gather_nodes: int = 0
    ripples: tuple[Ripple, ...] = ()
    equal_layers: tuple[tuple[int, ...], ...] = ()
    same_as: Provenance | str | None = None
    cut: Cut | None = None
    notes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class PortChange:
    """An input or output that appeared (``before`` is ``None``), went, or has another type."""

    name: str
    role: Role
    layer: int | None
    is_output: bool
    before: str | None
    after: str | None
    sizes: tuple[Size, ...] = ()


@dataclass(frozen=True)
class StageDiff:
    """One stage before and after. A cost is ``None`` where the stage did not exist."""

    name: str
    hunks: tuple[Hunk, ...] = ()
    ports: tuple[PortChange, ...] = ()
    before: StageCost | None = None
    after: StageCost | None = None

    @property
    def changed(self) -> bool:
        return bool(self.hunks or self.ports or self.before is None or self.after is None)


@dataclass(frozen=True)
class ProgramDiff:
    """Two programs compared, stage by stage in execution order.

    Attributes:
        matching: how nodes were matched; the weakest of all stages.
        before_passes, after_passes: texts of the passes applied to each.
    """

    stages: tuple[StageDiff, ...]
    matching: Matching
    before_passes: tuple[str, ...] = ()
    after_passes: tuple[str, ...] = ()

    @property
    def changed(self) -> bool:
        return any(stage.changed for stage in self.stages)

    def hunks(self) -> Iterable[Hunk]:
        return (hunk for stage in self.stages for hunk in stage.hunks)


def diff(
    before: Program | Snapshot, after: Program | Snapshot, *, matching: Matching | None = None
) -> ProgramDiff:
    """Compare two programs.

    Args:
        before, after: programs, or snapshots of programs that were rewritten since.
        matching: how to match nodes; by default by name where the names agree.
    """
    old = before if isinstance(before, Snapshot) else snapshot(before)
    new = after if isinstance(after, Snapshot) else snapshot(after)
    names = list(old.stages)
    names += [name for name in new.stages if name not in old.stages]
    stages = []
    used = set()
    for name in names:
        left, right = old.stages.get(name), new.stages.get(name)
        if left is None or right is None:
            stages.append(
                StageDiff(name, before=left and left.cost, after=right and right.cost)  # type: ignore[arg-type]
            )
            continue
        how = matching or _choose_matching(left, right)
        used.add(how)
        stages.append(_StageComparison(left, right, how).result())
    weakest = Matching.STRUCTURE if Matching.STRUCTURE in used else Matching.NAME
    return ProgramDiff(tuple(stages), weakest, old.passes, new.passes)


def _choose_matching(before: StageRecord, after: StageRecord) -> Matching:
    """By name when most names exist in both, and stand for the same operator and module."""
    common = [name for name in before.nodes if name in after.nodes]
    agree = sum(_kind(before.nodes[name]) == _kind(after.nodes[name]) for name in common)
    smaller = min(len(before.nodes), len(after.nodes))
    enough = len(common) * 2 >= smaller and agree >= 0.9 * len(common)
    return Matching.NAME if enough else Matching.STRUCTURE


def _kind(node: NodeRecord) -> tuple[str, str, str]:
    return node.kind, node.target, node.module


def match_by_name(before: StageRecord, after: StageRecord) -> dict[str, str]:
    """Nodes of ``before`` that exist under the same name in ``after``."""
    return {
        name: name
        for name, node in before.nodes.items()
        if name in after.nodes and after.nodes[name].kind == node.kind
    }


def match_by_structure(before: StageRecord, after: StageRecord) -> dict[str, str]:
    """Nodes with the same module path and operator, aligned in order within each module."""
    matches: dict[str, str] = {}
    groups = [_by_module(stage) for stage in (before, after)]
    for module, left in groups[0].items():
        right = groups[1].get(module, [])
        matcher = SequenceMatcher(
            a=[node.target for node in left], b=[node.target for node in right], autojunk=False
        )
        for i, j, length in matcher.get_matching_blocks():
            matches.update((left[i + k].name, right[j + k].name) for k in range(length))
    return matches


def _by_module(stage: StageRecord) -> dict[tuple[str, str], list[NodeRecord]]:
    groups: dict[tuple[str, str], list[NodeRecord]] = defaultdict(list)
    for node in stage.nodes.values():
        groups[node.kind, node.module].append(node)
    return groups


_GATHER = re.compile(r"_(?:gather|mask)_")
"""Part of the names of nodes that gather a frontier value, or hide its fillers."""

_WHOLE_AXIS = 2**62
"""Ends of slices from here on mean "to the end"."""

_Site = tuple[Provenance | None, str]
"""What makes a hunk: the match of a pass, or (for unstamped changes) a module path."""


class _StageComparison:
    """Compares one stage; a method per question, since each needs the answers before it."""

    def __init__(self, before: StageRecord, after: StageRecord, matching: Matching) -> None:
        self.before = before
        self.after = after
        match = match_by_name if matching is Matching.NAME else match_by_structure
        self.new_name = match(before, after)
        self.old_name = {new: old for old, new in self.new_name.items()}
        self.position = {name: index for index, name in enumerate(after.nodes)}
        self.cuts = tuple(cut for cut in after.cuts if cut not in before.cuts)
        self.added = [
            node
            for node in after.nodes.values()
            if node.name not in self.old_name and node.kind != "output"
        ]
        self.removed = [
            node
            for node in before.nodes.values()
            if node.name not in self.new_name and node.kind != "output"
        ]
        self.gathers = {node.name for node in self.added if _is_frontier_gather(node)}
        self.pairs = self._size_changes()
        self.site_of = self._sites_added()
        self.resizing = {self.site_of[name] for name in self.gathers}

    def result(self) -> StageDiff:
        rewired: list[tuple[_Site, Rewired]] = []
        retyped: list[tuple[NodeRecord, Retyped]] = []
        rippled: list[NodeRecord] = []
        self._site_removed()
        for node in self.after.nodes.values():
            if node.name not in self.old_name or node.kind == "output":
                continue
            old = self.before.nodes[self.old_name[node.name]]
            changes, resized = self._argument_changes(old, node)
            if changes:
                rewired.append((self._site_rewired(node, old), Rewired(node.name, changes)))
            if _retyped(old, node):
                retyped.append((node, Retyped(node.name, old.type, node.type)))
            elif not changes and (resized or old.types != node.types):
                rippled.append(node)
        return StageDiff(
            self.after.name,
            self._hunks(rewired, retyped, rippled),
            self._port_changes(),
            self.before.cost,
            self.after.cost,
        )

    # -- what changed --------------------------------------------------------------------------

    def _size_changes(self) -> list[SizeChange]:
        """Size changes of matched values that are no multiple of another such change."""
        pairs: set[SizeChange] = set()
        for new, old in self.old_name.items():
            pairs.update(_dim_changes(self.before.nodes[old], self.after.nodes[new]))
        return sorted(
            (p for p in pairs if not any(q != p and _is_multiple(p, q) for q in pairs)), key=str
        )

    def _argument_changes(
        self, old: NodeRecord, new: NodeRecord
    ) -> tuple[tuple[ArgumentChange, ...], bool]:
        """Real changes of arguments, and whether a size among them rippled."""
        changes: list[ArgumentChange] = []
        resized = False
        if old.target != new.target and old.kind == "call_function":
            changes.append(ArgumentChange("op", old.op, new.op))
        before, after = dict(old.arguments), dict(new.arguments)
        for where in dict.fromkeys([*before, *after]):
            left, right = before.get(where), after.get(where)
            if isinstance(left, Ref) and isinstance(right, Ref):
                if self.new_name.get(left.name) != self._origin(right.name):
                    changes.append(ArgumentChange(where, str(left), str(right)))
            elif left != right:
                if isinstance(left, int) and isinstance(right, int) and self._rippled(left, right):
                    resized = True
                else:
                    changes.append(ArgumentChange(where, _shown(left), _shown(right)))
        return tuple(changes), resized

    def _rippled(self, old: int, new: int) -> bool:
        """Whether an integer argument changed with a size, or now counts from the end."""
        for pair in self.pairs:
            if _is_multiple((old, new), pair):
                return True
            if (old == pair[0] and new >= _WHOLE_AXIS) or (new == -1 and old + 1 == pair[0]):
                return True
        return False

    def _origin(self, name: str) -> str:
        """The value that a chain of frontier gathers starts from."""
        while name in self.gathers:
            name = self._gather_source(name)
        return name

    def _gather_source(self, name: str) -> str:
        """The value that one frontier gather takes, by the name that the gather carries."""
        node = self.after.nodes[name]
        outside = [
            leaf
            for step in self._gather_steps(name)
            for leaf in step.inputs
            if leaf in self.gathers or self.after.nodes[leaf].made_by != node.made_by
        ]
        label = _GATHER.split(name, maxsplit=1)[-1]
        named = [leaf for leaf in outside if label == leaf or label.startswith(f"{leaf}_")]
        return max(named, key=len, default=outside[0])

    def _gather_steps(self, name: str) -> list[NodeRecord]:
        """The nodes that one frontier gather takes (per axis one, and views), last one first."""
        node = self.after.nodes[name]
        steps, found = [node], {name}
        for step in steps:
            for leaf in step.inputs:
                source = self.after.nodes[leaf]
                stop = leaf in self.gathers or source.made_by != node.made_by
                if leaf not in found and not stop:
                    found.add(leaf)
                    steps.append(source)
        return steps

    # -- where it belongs ----------------------------------------------------------------------

    def _sites_added(self) -> dict[str, _Site]:
        """A match of a pass is one site, named after the module where it starts."""
        start: dict[Provenance, str] = {}
        for node in self.added:
            if node.made_by is not None:
                start.setdefault(node.made_by, _place(node))
        return {
            node.name: (node.made_by, start[node.made_by] if node.made_by else _place(node))
            for node in self.added
        }

    def _site_rewired(self, new: NodeRecord, old: NodeRecord) -> _Site:
        for name in new.inputs:
            if name in self.site_of and name not in self.gathers:
                return self.site_of[name]
        for name in old.inputs:
            if name in self.site_of and name not in self.new_name:
                return self.site_of[name]
        return None, _place(new)

    def _site_removed(self) -> None:
        """Removed nodes belong to the site that took over from them, else to their module."""
        gone = {node.name for node in self.removed}
        takeover: dict[str, _Site] = {}
        for new_name, old_name in self.old_name.items():
            before = dict(self.before.nodes[old_name].arguments)
            for where, leaf in self.after.nodes[new_name].arguments:
                past = before.get(where)
                if isinstance(leaf, Ref) and isinstance(past, Ref) and past.name in gone:
                    site = self.site_of.get(leaf.name)
                    if site is not None:
                        takeover.setdefault(past.name, site)
        for node in reversed(self.removed):
            site = takeover.get(node.name, (None, _place(node)))
            self.site_of[node.name] = site
            if site[0] is not None:
                for name in node.inputs:
                    if name in gone:
                        takeover.setdefault(name, site)

    def _hunks(
        self,
        rewired: Sequence[tuple[_Site, Rewired]],
        retyped: Sequence[tuple[NodeRecord, Retyped]],
        rippled: Sequence[NodeRecord],
    ) -> tuple[Hunk, ...]:
        starts: dict[_Site, int] = {}

        def start(site: _Site, position: int) -> None:
            starts[site] = min(position, starts.get(site, position))

        for node in self.added:
            start(self.site_of[node.name], self.position[node.name])
        for site, change in rewired:
            start(site, self.position[change.name])
        for node in self.removed:
            start(self.site_of[node.name], self._old_position(node))
        sites = sorted(starts, key=lambda site: (starts[site], str(site)))
        ripples: dict[_Site, list[NodeRecord]] = defaultdict(list)
        for node in rippled:
            ripples[self._upstream(node, sites, starts)].append(node)
        types: dict[_Site, list[Retyped]] = defaultdict(list)
        for node, retyping in retyped:
            types[self._upstream(node, sites, starts)].append(retyping)
        everywhere: _Site = (None, "")
        if everywhere not in starts and (everywhere in ripples or everywhere in types):
            sites.insert(0, everywhere)
        seen: dict[object, Provenance | str] = {}
        return tuple(
            self._hunk(
                site,
                [change for where, change in rewired if where == site],
                types[site],
                ripples[site],
                seen,
            )
            for site in sites
        )

    def _old_position(self, node: NodeRecord) -> int:
        """Where a removed node would stand: after the last kept node before it."""
        last = 0
        for name in self.before.nodes:
            if name == node.name:
                break
            if name in self.new_name:
                last = self.position[self.new_name[name]]
        return last

    def _upstream(
        self, node: NodeRecord, sites: Sequence[_Site], starts: Mapping[_Site, int]
    ) -> _Site:
        """The last place before a node whose change of size reached it, else the last rewritten."""
        position = self.position[node.name]
        before = [site for site in sites if starts[site] <= position]
        resizing = [site for site in before if site in self.resizing]
        nearest = [*sites[:1], *before, *resizing]
        return nearest[-1] if nearest else (None, "")

    # -- one hunk ------------------------------------------------------------------------------

    def _hunk(
        self,
        site: _Site,
        rewired: Sequence[Rewired],
        retyped: Sequence[Retyped],
        rippled: Sequence[NodeRecord],
        seen: dict[object, Provenance | str],
    ) -> Hunk:
        made_by, module = site
        inside = [node for node in self.added if self.site_of[node.name] == site]
        removed = [node for node in self.removed if self.site_of[node.name] == site]
        folded = self._gather_nodes(inside)
        added = [node for node in inside if node.name not in folded]
        place: Provenance | str = made_by or module
        among = made_by.index if made_by else module.rpartition(".")[0]
        same_as = seen.setdefault((among, self._signature(added, removed, rewired)), place)
        first = next(iter(added or removed), None)
        if first is None and rewired:
            first = self.after.nodes[rewired[0].name]
        cut = next((cut for cut in self.cuts if self._made_here(cut, site)), None)
        if cut is not None and rewired:  # a cut is at the layer that it shortens
            module = _place(self.after.nodes[rewired[0].name])
        return Hunk(
            module=module,
            source=first.source if first is not None else None,
            made_by=made_by,
            context=self._context(added, rewired),
            added=tuple(added),
            removed=tuple(removed),
            rewired=tuple(rewired),
            retyped=tuple(retyped),
            gathers=self._gathers([node for node in inside if node.name in self.gathers]),
            gather_nodes=len(folded),
            ripples=self._ripples(rippled),
            equal_layers=self._equal_layers(rippled),
            same_as=None if same_as == place else same_as,
            cut=cut,
            notes=self._notes(cut, added),
        )

    def _made_here(self, cut: Cut, site: _Site) -> bool:
        kept = [node for port, node in self.after.outputs if port.name == cut.kept]
        return any(self.site_of.get(name) == site for name in kept)

    def _notes(self, cut: Cut | None, added: Sequence[NodeRecord]) -> tuple[tuple[str, str], ...]:
        if cut is None:
            return ()
        kept = {node for port, node in self.after.outputs if port.name == cut.kept}
        counts = {after for _, after in cut.visual}
        if len(counts) == 1:
            visual = counts.pop()
            text = f"{cut.tokens[1] - visual} text + {visual} visual"
        else:
            text = f"{cut.tokens[1]} of {cut.tokens[0]} tokens"
        return tuple((node.name, text) for node in added if node.name in kept)

    def _context(
        self, added: Sequence[NodeRecord], rewired: Sequence[Rewired]
    ) -> tuple[NodeRecord, ...]:
        """Values that rewired nodes read before, then all others that the added nodes read."""
        replaced = [change.before[1:] for item in rewired for change in item.changes]
        replaced = [self.new_name.get(name, "") for name in replaced]
        read = [name for node in added for name in node.inputs]
        names = [*(name for name in replaced if name in read), *read]
        return tuple(
            self.after.nodes[name]
            for name in dict.fromkeys(names)
            if name in self.old_name and self.after.nodes[name].kind != "get_attr"
        )

    def _gather_nodes(self, inside: Sequence[NodeRecord]) -> set[str]:
        """Frontier gathers with the nodes that only they need, such as their expanded indices."""
        folded = {node.name for node in inside if node.name in self.gathers}
        users: dict[str, set[str]] = defaultdict(set)
        for node in self.after.nodes.values():
            for name in node.inputs:
                users[name].add(node.name)
        if folded:
            for node in reversed(inside):
                if users[node.name] and users[node.name] <= folded:
                    folded.add(node.name)
        return folded

    def _gathers(self, gathers: Sequence[NodeRecord]) -> tuple[FrontierGather, ...]:
        dims: dict[str, set[int]] = {}
        for node in gathers:
            found = dims.setdefault(self._origin(node.name), set())
            for step in self._gather_steps(node.name):
                dim = dict(step.arguments).get("arg 1") if step.op == "gather" else None
                if isinstance(dim, int):
                    found.add(dim)
        return tuple(FrontierGather(value, tuple(sorted(found))) for value, found in dims.items())

    def _signature(
        self,
        added: Sequence[NodeRecord],
        removed: Sequence[NodeRecord],
        rewired: Sequence[Rewired],
    ) -> object:
        """Equal for rewrites that differ only in names and sizes."""
        local = {node.name: index for index, node in enumerate(added)}
        return (
            tuple(
                (node.target, tuple(local.get(name, -1) for name in node.inputs)) for node in added
            ),
            tuple(node.target for node in removed),
            tuple(
                (self.after.nodes[item.name].target, tuple(change.where for change in item.changes))
                for item in rewired
            ),
        )

    def _ripples(self, nodes: Sequence[NodeRecord]) -> tuple[Ripple, ...]:
        groups: dict[SizeChange, list[NodeRecord]] = defaultdict(list)
        products: dict[SizeChange, int] = defaultdict(int)
        for node in nodes:
            old = self.before.nodes[self.old_name[node.name]]
            changes = _dim_changes(old, node) or _literal_changes(old, node)
            plain = [pair for pair in self.pairs if pair in changes]
            factors = [p for p in self.pairs if any(_is_multiple(c, p) for c in changes)]
            main = (plain or factors or self.pairs)[0]
            groups[main].append(node)
            products[main] += not plain
        return tuple(
            Ripple(
                *self._chain(pair),
                tuple(
                    Retyped(n.name, self.before.nodes[self.old_name[n.name]].type, n.type)
                    for n in members
                ),
                products[pair],
                _places(members),
            )
            for pair, members in groups.items()
        )

    def _chain(self, pair: SizeChange) -> tuple[tuple[Size, ...], bool]:
        """A change of size through all cuts, and whether it counts tokens."""
        chain: list[Size] = []
        for cut in self.after.cuts:
            chain += [size for size in cut.tokens if not chain or chain[-1] != size]
        if pair[0] in chain and pair[1] in chain[chain.index(pair[0]) + 1 :]:
            first = chain.index(pair[0])
            return tuple(chain[first : chain.index(pair[1], first + 1) + 1]), True
        return pair, False

    def _equal_layers(self, rippled: Sequence[NodeRecord]) -> tuple[tuple[int, ...], ...]:
        container = self.after.cost.container
        layers = {node.layer[1] for node in rippled if node.layer and node.layer[0] == container}
        if container is None or len(layers) < 2:
            return ()
        signatures = layer_signatures(self.after, container)
        groups: dict[object, list[int]] = defaultdict(list)
        for layer in sorted(layers):
            groups[signatures[layer]].append(layer)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)

    # -- ports ---------------------------------------------------------------------------------

    def _port_changes(self) -> tuple[PortChange, ...]:
        changes = []
        for is_output in (False, True):
            old = self.before.outputs if is_output else self.before.inputs
            new = self.after.outputs if is_output else self.after.inputs
            past = {port.name: self.before.nodes[node] for port, node in old}
            present = {port.name: self.after.nodes[node] for port, node in new}
            ports = {port.name: port for port, _ in (*old, *new)}
            for name, port in ports.items():
                left, right = past.get(name), present.get(name)
                before = left.type if left is not None else None
                after = right.type if right is not None else None
                if before == after:
                    continue
                pairs = _dim_changes(left, right) if left and right else set()
                sizes = self._chain(next(iter(pairs)))[0] if len(pairs) == 1 else ()
                changes.append(
                    PortChange(name, port.role, port.layer, is_output, before, after, sizes)
                )
        return tuple(changes)


def layer_signatures(stage: StageRecord, container: str) -> dict[int, object]:
    """Per layer a value that is equal for layers equal up to names, pass-made nodes left aside."""
    members: dict[int, list[NodeRecord]] = defaultdict(list)
    for node in stage.calls():
        if node.layer is not None and node.layer[0] == container and node.made_by is None:
            members[node.layer[1]].append(node)
    return {layer: _layer_signature(stage, nodes) for layer, nodes in members.items()}


def _layer_signature(stage: StageRecord, nodes: Sequence[NodeRecord]) -> object:
    local = {node.name: index for index, node in enumerate(nodes)}
    outside: dict[str, int] = {}

    def leaf(value: Ref | Size) -> object:
        if not isinstance(value, Ref):
            return value
        if value.name in local:
            return "inner", local[value.name]
        return "outer", outside.setdefault(value.name, len(outside)), stage.nodes[value.name].types

    return tuple(
        (node.target, node.types, tuple((where, leaf(value)) for where, value in node.arguments))
        for node in nodes
    )


def _place(node: NodeRecord) -> str:
    """Hunks are no finer than a layer: a rewrite inside one is read as a whole."""
    return f"{node.layer[0]}.{node.layer[1]}" if node.layer is not None else node.module


def _is_frontier_gather(node: NodeRecord) -> bool:
    if node.made_by is None:
        return False
    prefix = node.made_by.pass_name.replace("-", "_")
    return node.name.startswith(prefix) and _GATHER.match(node.name, len(prefix)) is not None


def _retyped(old: NodeRecord, new: NodeRecord) -> bool:
    left = [(type_.dtype, len(type_.shape)) for type_ in old.types]
    return left != [(type_.dtype, len(type_.shape)) for type_ in new.types]


def _dim_changes(old: NodeRecord, new: NodeRecord) -> set[SizeChange]:
    if _retyped(old, new):
        return set()
    return {(a, b) for a, b in zip(old.sizes, new.sizes, strict=True) if a != b}


def _literal_changes(old: NodeRecord, new: NodeRecord) -> set[SizeChange]:
    after = dict(new.arguments)
    return {
        (left, right)
        for where, left in old.arguments
        if isinstance(left, int) and isinstance(right := after.get(where), int) and left != right
    }


def _is_multiple(change: SizeChange, base: SizeChange) -> bool:
    """Whether ``change`` is ``base`` times one number."""
    if change == base:
        return True
    if not all(isinstance(size, int) for size in (*change, *base)):
        return False
    (old, new), (base_old, base_new) = change, base
    if not base_old or not base_new or old % base_old or new % base_new:  # type: ignore[operator]
        return False
    return old // base_old == new // base_new  # type: ignore[operator]


def _shown(leaf: Ref | Size | None) -> str:
    return "(default)" if leaf is None else str(leaf)


def _places(nodes: Iterable[NodeRecord]) -> tuple[str, ...]:
    """``layers 3-16`` for blocks, then the last component of every other module."""
    layers: dict[str, set[int]] = {}
    modules: dict[str, None] = {}
    for node in nodes:
        if node.layer is not None:
            layers.setdefault(node.layer[0].rpartition(".")[2], set()).add(node.layer[1])
        elif node.module:
            modules.setdefault(node.module.rpartition(".")[2])
    blocks = [
        f"{name.removesuffix('s') if len(numbers) == 1 else name} {ranges_text(numbers)}"
        for name, numbers in layers.items()
    ]
    return (*blocks, *modules)


def ranges_text(numbers: Iterable[int], *, separator: str = ", ") -> str:
    """``3-16, 18`` for a set of integers."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    texts = (str(a) if a == b else f"{a}-{b}" for a, b in runs)
    return separator.join(texts)


__all__ = [
    "ArgumentChange",
    "FrontierGather",
    "Hunk",
    "Matching",
    "PortChange",
    "ProgramDiff",
    "Retyped",
    "Rewired",
    "Ripple",
    "StageDiff",
    "diff",
    "layer_signatures",
    "match_by_name",
    "match_by_structure",
    "ranges_text",
]
