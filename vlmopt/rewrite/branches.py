"""Denoising steps: branches computed, taken from earlier steps, or computed for some rows only.

One captured step becomes as many stages as there are kinds of steps. What a step keeps for later
ones leaves its stage as an output and enters others as an input of the same name, apart from
:data:`NEW`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from vlmopt.analysis.branches import Branch, BranchSite, find_branches, projections
from vlmopt.analysis.token_axes import B, Dims, T, follow_tokens
from vlmopt.denoising.plan import Action, Choice, Site, StepPlan
from vlmopt.errors import BlockMismatchError, PreconditionError
from vlmopt.graph.attention import attention_arguments
from vlmopt.graph.reach import reached
from vlmopt.pipeline.passes import PassContext
from vlmopt.program import Port, Role, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.narrow import narrow_linears
from vlmopt.rewrite.region import gather_tokens
from vlmopt.rewrite.rows import run_on_rows
from vlmopt.rewrite.tokens import remove_unused

aten = torch.ops.aten

NEW = "_new"
"""What the name of a state ends with where it leaves a stage."""

PARTIAL = "_partial"
"""What the name of a branch ends with of which only some rows were computed; see
:func:`observe_step`."""

STATE = frozenset({Role.BRANCH, Role.BRANCH_KEY, Role.BRANCH_VALUE, Role.BRANCH_DIFFERENCE})
"""Roles of what steps keep for later ones."""


Kept = tuple[Site, Role]
"""States of a site that are kept together: what its branches added, differences of that, or all
keys and values."""

DISTANCE = "branch_distance"
"""Input of steps that forecast; see :attr:`~vlmopt.program.Role.BRANCH_DISTANCE`."""


def states_given(choice: Choice) -> frozenset[Role]:
    """What a step with this choice can leave to later ones."""
    if choice.action is Action.COMPUTE:
        return frozenset({Role.BRANCH, Role.BRANCH_KEY, Role.BRANCH_DIFFERENCE})
    partial = choice.action is Action.PARTIAL
    return frozenset({Role.BRANCH, Role.BRANCH_KEY} if partial else ())


def states_read(choice: Choice, kept: Collection[Role] = ()) -> frozenset[Role]:
    """What a step with this choice takes from earlier ones.

    Args:
        kept: what it leaves to later ones.
    """
    if choice.action is Action.COMPUTE:
        differs = Role.BRANCH_DIFFERENCE in kept
        return frozenset({Role.BRANCH, Role.BRANCH_DIFFERENCE} if differs else ())
    read = {Role.BRANCH}
    if choice.action is Action.PARTIAL:
        read.add(Role.BRANCH_KEY)
    if choice.action is Action.FORECAST and choice.order:
        read.add(Role.BRANCH_DIFFERENCE)
    return frozenset(read)


def branch_name(site: Site, index: int) -> str:
    """Name of the state that holds what the ``index``-th branch of a site added."""
    return f"branch_{site.layer}_{site.module}_{index}"


def write_step(
    stage: Stage,
    row: StepPlan,
    keep: Collection[Kept],
    ctx: PassContext,
    *,
    orders: Sequence[int] = (),
) -> None:
    """Make a captured step one that follows ``row``, in place.

    Args:
        stage: one step, as captured; :func:`~vlmopt.analysis.branches.find_branches` tells its
            sites, in whose order ``row`` is.
        keep: the states that a later step reads.
        ctx: of the pass that has the plan.
        orders: of the series that forecasts each site; 0, or left out, where none does.

    Raises:
        PreconditionError: the row is of another model.
        BlockMismatchError: a branch cannot be computed for some rows only.
    """
    sites = find_branches(stage)
    require_sites(stage, sites, row)
    orders = orders or [0] * len(sites)
    distance = _Distance(stage, ctx, orders)
    for match, (site, choice) in enumerate(zip(sites, row, strict=True), start=1):
        _Writer(stage, site, keep, ctx, match, distance).write(choice)
    remove_unused(stage)
    narrow_linears(stage, ctx)


def observe_step(stage: Stage, rows: Sequence[int] | None, ctx: PassContext) -> None:
    """Let a captured step give all that its branches add, in place; what it computes is the same.

    Args:
        rows: for each site, of how many rows a step computes anew that takes the others from an
            earlier one: what it adds then is given too, under the name of the branch and
            :data:`PARTIAL`, and so are keys and values. ``None``: nothing of the kind.
        ctx: of whoever measures.

    Raises:
        BlockMismatchError: a branch cannot be computed for some rows only.
    """
    sites = find_branches(stage)
    roles = (Role.BRANCH,) if rows is None else (Role.BRANCH, Role.BRANCH_KEY)
    keep = {(one.site, role) for one in sites for role in roles}
    for match, site in enumerate(sites, start=1):
        writer = _Writer(stage, site, keep, ctx, match)
        writer.write(Choice(Action.COMPUTE))
        if rows is not None:
            for index, value in writer.compute_rows(rows[match - 1]).items():
                name = branch_name(site.site, index) + PARTIAL
                stage.add_output(Port(name, Role.BRANCH, site.site.layer), value)
    remove_unused(stage)


def drop_unread(stages: Iterable[Stage]) -> None:
    """Let steps leave no state that none of them reads."""
    stages = list(stages)
    read = {port.name for stage in stages for port in stage.inputs}
    for stage in stages:
        output = stage.graph.output_node()
        kept = [
            (port, value)
            for port, value in zip(stage.outputs, output.args[0], strict=True)  # type: ignore[arg-type]
            if not port.name.endswith(NEW) or port.name.removesuffix(NEW) in read
        ]
        stage.outputs = tuple(port for port, _ in kept)
        output.args = (tuple(value for _, value in kept),)  # type: ignore[assignment]
        remove_unused(stage)


def require_sites(stage: Stage, sites: tuple[BranchSite, ...], row: StepPlan) -> None:
    """Check that a row chooses for each site, and computes no more rows than there are."""
    if len(sites) != len(row):
        raise PreconditionError(
            f"the plan is for {len(row)} branches, and stage {stage.name} has {len(sites)}",
            hint="make the plan for this model",
        )
    for site, choice in zip(sites, row, strict=True):
        if choice.rows > site.tokens:
            raise PreconditionError(
                f"the plan computes {choice.rows} rows of {site.site}, which has {site.tokens}",
                node=site.branches[0].value,
                hint="make the plan for this model, at this resolution",
            )


class _Distance:
    """The input that tells how long ago branches were computed, made when first asked for."""

    def __init__(self, stage: Stage, ctx: PassContext, orders: Sequence[int]) -> None:
        self.stage = stage
        self.ctx = ctx
        self.orders = orders
        self._node: fx.Node | None = None

    @property
    def node(self) -> fx.Node:
        if self._node is None:
            port = Port(DISTANCE, Role.BRANCH_DISTANCE)
            self._node = self.stage.add_input(port, len(self.orders), max(self.orders))
            self.ctx.stamp(self._node, 1)
        return self._node


class _Writer:
    """The rewrite of one site, stamped as the ``match``-th place."""

    def __init__(
        self,
        stage: Stage,
        site: BranchSite,
        keep: Collection[Kept],
        ctx: PassContext,
        match: int,
        distance: _Distance | None = None,
    ) -> None:
        self.distance = distance
        self.stage = stage
        self.site = site
        self.keep = keep
        self.ctx = ctx
        self.match = match
        self.given: dict[str, fx.Node] = {}
        """keys and values of which some rows were computed anew"""

    def write(self, choice: Choice) -> None:
        """Let the stage do what the step does about the site."""
        action = choice.action
        if action is Action.PARTIAL and choice.rows in (0, self.site.tokens):
            action = Action.COMPUTE if choice.rows else Action.REUSE
        if action is Action.COMPUTE:
            self._give_keys()
            for index, branch in enumerate(self.site.branches):
                self._give(self._name(index), Role.BRANCH, branch.value)
                self._give_differences(index, branch)
        elif action is Action.REUSE:
            for index, branch in enumerate(self.site.branches):
                state = self._take(self._name(index), Role.BRANCH, branch.value)
                branch.value.replace_all_uses_with(state)
        elif action is Action.PARTIAL:
            for index, value in self.compute_rows(choice.rows).items():
                self.site.branches[index].value.replace_all_uses_with(value)
                self._give(self._name(index), Role.BRANCH, value)
            for name, value in self.given.items():
                self._give(name, _role(name), value)
        else:
            for index, branch in enumerate(self.site.branches):
                branch.value.replace_all_uses_with(self._forecast(index, branch, choice.order))

    def _forecast(self, index: int, branch: Branch, order: int) -> fx.Node:
        """The series through what the branch was when it was computed last."""
        assert self.distance is not None
        state = self._take(self._name(index), Role.BRANCH, branch.value)
        if order == 0:
            return state
        factors = [state]
        for at in range(1, order + 1):
            name = f"{self._name(index)}_difference_{at}"
            factors.append(self._take(name, Role.BRANCH_DIFFERENCE, branch.value))
        distance = self.distance.node
        emit = Emitter.of_pass(self.ctx, self.stage, branch.value, "forecast", self.match)
        series = partial(taylor_series, site=self.match - 1)
        with self.stage.graph.inserting_before(branch.value.next):
            value: fx.Node = emit.trace(series, distance, *factors, names=("value",))
        return value

    def _give_differences(self, index: int, branch: Branch) -> None:
        """Differences of what the branch is now and what it was when it was computed last."""
        if (self.site.site, Role.BRANCH_DIFFERENCE) not in self.keep:
            return
        assert self.distance is not None
        order = self.distance.orders[self.match - 1]
        name = self._name(index)
        names = [f"{name}_difference_{at}" for at in range(1, order + 1)]
        before = [self._take(name, Role.BRANCH, branch.value)]
        before += [self._take(n, Role.BRANCH_DIFFERENCE, branch.value) for n in names[:-1]]
        distance = self.distance.node
        emit = Emitter.of_pass(self.ctx, self.stage, branch.value, "forecast", self.match)
        differ = partial(differences, site=self.match - 1)
        with self.stage.graph.inserting_before(branch.value.next):
            found = emit.trace(differ, distance, branch.value, *before, names=tuple(names))
        for name, value in zip(names, found, strict=True):
            self._give(name, Role.BRANCH_DIFFERENCE, value)

    def compute_rows(self, count: int) -> dict[int, fx.Node]:
        """Compute some rows of the stream that holds the sample; the others are as they were kept.

        What is there is left as it is. Rows of other streams are all computed.

        Returns:
            What the branches are then, by number.
        """
        found: dict[int, fx.Node] = {}
        for index, branch in enumerate(self.site.branches):
            if branch in self.site.rows:
                found |= self._compute_rows_of(index, branch, count)
        return {
            index: found.get(index, branch.value) for index, branch in enumerate(self.site.branches)
        }

    def _compute_rows_of(self, index: int, branch: Branch, count: int) -> dict[int, fx.Node]:
        graph, read = self.stage.graph, branch.reads
        if read is None or read.meta["val"].ndim != 3:
            raise BlockMismatchError(
                f"what {self.site.site} is computed from does not have a row for each row of what "
                "it adds",
                node=branch.value,
                hint="compute it in full, or not at all",
            )
        self._require_projections(index)
        emit = Emitter.of_pass(self.ctx, self.stage, read, "partial", self.match)
        batch, tokens, width = map(int, read.meta["val"].shape)
        dims: Dims = ((B,) if batch != 1 else (1,), (T,), (width,))
        state = self._take(self._name(index), Role.BRANCH, branch.value)
        with graph.inserting_before(read.next):
            slots = emit.trace(partial(largest_rows, count=count), read, names=("slots",))
            start = emit.call(aten.alias.default, read)  # apart from what needs all rows
            rows = gather_tokens(emit, read, dims, lambda _: slots, name="rows")
        known = self._scatter_keys(index, emit, rows, slots)
        others = [at for at, one in enumerate(self.site.branches) if one is not branch]
        region = branch.region.union(*(self.site.branches[at].region for at in others))
        below = {user for user in read.users if user in branch.region and user not in known}
        below |= {user for key in known for user in key.users if user in region}
        inside = reached(below, lambda node: [user for user in node.users if user in region])
        copies: dict[fx.Node, fx.Node] = {read: start, **known}
        for node in [node for node in graph.nodes if node in inside]:
            with graph.inserting_before(node.next):
                copies[node] = emit.copy(node, copies)
        end = copies[branch.value]
        axes = follow_tokens(
            graph, {start: dims}, tokens=tokens, batch=batch if batch != 1 else None, stops=[end]
        )
        for node in axes.ends:
            if node.target not in (operator.getitem, aten.slice.Tensor):  # rows of other streams
                raise BlockMismatchError(
                    f"{self.site.site} combines rows of a sample outside of attention",
                    node=node,
                    hint="compute it in full, or not at all",
                )
        run_on_rows(axes, emit, start, rows, slots, count)
        with graph.inserting_before(end.next):
            whole = emit.trace(write_rows, state, slots, end, names=("whole",))
        values = {
            at: copies[self.site.branches[at].value] for at in others if at in self._in(copies)
        }
        return {index: whole, **values}

    def _in(self, copies: Collection[fx.Node]) -> set[int]:
        """Branches that are computed anew, by number."""
        return {at for at, one in enumerate(self.site.branches) if one.value in copies}

    def _keys(self, index: int) -> dict[str, fx.Node]:
        """Projections to keys and values of the rows that a branch may leave out, by name."""
        return {
            f"{self._name(index)}_{name}": node for name, node in self.site.branches[index].keys
        }

    def _require_projections(self, index: int) -> None:
        """Queries, keys and values are made of the same rows, by projections of their own."""
        branch, keys = self.site.branches[index], self._keys(index)
        queries = [
            linear
            for attention in self.site.attention
            for linear in projections(attention_arguments(attention)["query"], branch.region)
        ]
        for linear in keys.values():
            if linear.args[0] is not branch.reads:
                raise BlockMismatchError(
                    f"keys or values of {self.site.site} are not projections of the rows that "
                    "queries are made of",
                    node=linear,
                    hint="compute it in full, or not at all",
                )
            if linear in queries or len(set(keys.values())) < len(keys):
                raise BlockMismatchError(
                    f"queries, keys and values of {self.site.site} share a projection",
                    node=linear,
                    hint="capture the model with projections of their own: in diffusers, call "
                    "unfuse_qkv_projections()",
                )

    def _give_keys(self) -> None:
        if (self.site.site, Role.BRANCH_KEY) not in self.keep:
            return
        for branch in self.site.rows:
            for name, linear in self._keys(self.site.branches.index(branch)).items():
                self._give(name, _role(name), linear)

    def _scatter_keys(
        self, index: int, emit: Emitter, rows: fx.Node, slots: fx.Node
    ) -> dict[fx.Node, fx.Node]:
        """All keys and values, of which some rows are new; by the projection they stand for."""
        found: dict[fx.Node, fx.Node] = {}
        for name, linear in self._keys(index).items():
            state = self._take(name, _role(name), linear)
            with self.stage.graph.inserting_before(linear.next):
                new = emit.call(aten.linear.default, rows, *linear.args[1:], name="linear")
                found[linear] = emit.trace(write_rows, state, slots, new, names=("whole",))
            self.given[name] = found[linear]
        return found

    def _name(self, index: int) -> str:
        return branch_name(self.site.site, index)

    def _take(self, name: str, role: Role, like: fx.Node) -> fx.Node:
        """The state of this name, as an input."""
        val = like.meta["val"]
        port = Port(name, role, self.site.site.layer)
        node = self.stage.add_input(port, *val.shape, dtype=val.dtype)
        self.ctx.stamp(node, self.match)
        return node

    def _give(self, name: str, role: Role, value: fx.Node) -> None:
        """Let ``value`` be that state from now on, if any later step reads it."""
        kept = Role.BRANCH_KEY if role is Role.BRANCH_VALUE else role
        if (self.site.site, kept) in self.keep:
            self.stage.add_output(Port(name + NEW, role, self.site.site.layer), value)


def _role(name: str) -> Role:
    return Role.BRANCH_KEY if "_key_" in name else Role.BRANCH_VALUE


def largest_rows(value: Tensor, count: int) -> Tensor:
    """Rows of the largest mean magnitude over channels; of equal ones, those in front.

    Args:
        value: ``[batch, tokens, width]``.

    Returns:
        int64 ``[batch, count]``, the largest first.
    """
    score = value.float().abs().mean(-1)
    return score.sort(dim=-1, descending=True, stable=True).indices[:, :count]


def write_rows(state: Tensor, slots: Tensor, rows: Tensor) -> Tensor:
    """``state`` with other rows at ``slots``.

    Of the operators that do this, it is the one that Inductor runs in place where the result is
    written back into the state: no row that stays is copied.

    Args:
        state: ``[batch, tokens, width]``.
        slots: int64 ``[batch, count]``.
        rows: ``[batch, count, width]``, of the type of ``state``.
    """
    samples = torch.arange(len(state), device=state.device)[:, None]
    return state.index_put((samples, slots), rows)


def taylor_series(distance: Tensor, *factors: Tensor, site: int) -> Tensor:
    """A branch some steps after it was computed, by its differences then.

    Reference: "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers", arXiv
    2503.06923.

    Args:
        distance: see :attr:`~vlmopt.program.Role.BRANCH_DISTANCE`; of it the row ``site``.
        factors: the branch, and its differences of order 1, 2 and so on.
    """
    steps = distance[site, 0]
    total = factors[0].float()
    for order, factor in enumerate(factors[1:], start=1):
        total = total + factor.float() * (steps**order / math.factorial(order))
    return total.to(factors[0].dtype)


def differences(distance: Tensor, value: Tensor, *before: Tensor, site: int) -> tuple[Tensor, ...]:
    """Differences of a branch of order 1, 2 and so on, by those when it was computed before.

    Args:
        distance: see :attr:`~vlmopt.program.Role.BRANCH_DISTANCE`; of it the row ``site``.
        before: the branch then, and its differences but the last; finite, even where ``distance``
            says that they mean nothing.
    """
    found = [value]
    for order, last in enumerate(before):
        gap = distance[site, order]
        found.append(((found[-1].float() - last.float()) / gap).to(value.dtype))
    return tuple(found[1:])
