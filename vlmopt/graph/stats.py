"""Figures of programs side by side: what they cost and what they are made of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from vlmopt.analysis.cost import (
    ASSUMPTIONS,
    PAIRS_ASSUMPTIONS,
    SYMBOLIC_ASSUMPTION,
    Pairs,
    StageCost,
    stage_cost,
)
from vlmopt.graph.text import op_text
from vlmopt.program import Program, Stage

SCHEMA = 1


@dataclass(frozen=True)
class StageStats:
    """One stage: its cost, and how often each operator stands in it."""

    name: str
    cost: StageCost
    operators: Mapping[str, int]


@dataclass(frozen=True)
class ProgramStats:
    """One program, under the label that heads its column."""

    label: str
    stages: Mapping[str, StageStats]


def program_stats(program: Program, label: str) -> ProgramStats:
    """Figures of every stage."""
    return ProgramStats(
        label,
        {
            stage.name: StageStats(stage.name, stage_cost(stage), operator_counts(stage))
            for stage in program
        },
    )


def operator_counts(stage: Stage) -> dict[str, int]:
    """Number of nodes by short operator name, most frequent first, then by name."""
    calls = (node for node in stage.graph.nodes if node.op == "call_function")
    counts = Counter(map(op_text, calls))
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def stats_text(programs: Sequence[ProgramStats], *, operators: bool = True) -> str:
    """The figures as one table per stage; with several programs, changes against the first.

    Args:
        operators: also count nodes by operator.
    """
    names = dict.fromkeys(name for program in programs for name in program.stages)
    blocks = []
    for name in names:
        stages = [program.stages.get(name) for program in programs]
        rows = [(name, *(program.label for program in programs))]
        rows += cost_rows(name, [stage.cost if stage else None for stage in stages])
        if operators:
            rows += _operator_rows(stages)
        blocks.append("\n".join([*table(rows), *_layer_lines(programs, stages)]))
    costs = [stage.cost for program in programs for stage in program.stages.values()]
    return "\n\n".join([*blocks, assumptions_text(costs)])


def stats_json(programs: Sequence[ProgramStats]) -> dict[str, Any]:
    """The figures as JSON values."""
    return {
        "schema": SCHEMA,
        "assumptions": ASSUMPTIONS,
        "programs": [
            {
                "label": program.label,
                "stages": [
                    {
                        "name": stage.name,
                        "cost": cost_json(stage.cost),
                        "operators": dict(stage.operators),
                    }
                    for stage in program.stages.values()
                ],
            }
            for program in programs
        ],
    }


def cost_json(cost: StageCost) -> dict[str, Any]:
    """A stage's cost as JSON values."""
    return {
        "flops": cost.flops,
        "bytes_moved": cost.bytes_moved,
        "nodes": cost.nodes,
        "parameter_bytes": cost.parameter_bytes,
        "kv_cache_bytes": cost.kv_cache_bytes,
        "mean_tokens": cost.mean_tokens,
        "symbolic": cost.symbolic,
        "pairs": str(cost.pairs),
        "container": cost.container,
        "layers": {str(index): vars(layer) for index, layer in cost.layers.items()},
    }


def assumptions_text(costs: Iterable[StageCost | None]) -> str:
    """What has to be printed below any figure of these costs."""
    given = [cost for cost in costs if cost is not None]
    lines = [f"attention FLOPs: {ASSUMPTIONS}."]
    if any(cost.symbolic for cost in given):
        lines.append(f"sizes: {SYMBOLIC_ASSUMPTION}.")
    for known, text in PAIRS_ASSUMPTIONS.items():
        if any(cost.pairs is known for cost in given):
            lines.append(f"experts: {text}.")
    return "\n".join(lines)


# -- tables ------------------------------------------------------------------------------------


def cost_rows(stage: str, costs: Sequence[StageCost | None]) -> list[tuple[str, ...]]:
    """A row per figure, a cell per program; figures that are zero everywhere are left out."""
    rows: list[tuple[str, Callable[[StageCost], float], Callable[[float], str]]] = [
        (flops_label(stage), lambda cost: cost.flops, si),
        ("bytes moved, unfused", lambda cost: cost.bytes_moved, bytes_text),
        ("weights", lambda cost: cost.parameter_bytes, bytes_text),
        ("KV cache, 1 sequence", lambda cost: cost.kv_cache_bytes, bytes_text),
        ("tokens, mean of layers", lambda cost: cost.mean_tokens or 0, lambda n: f"{n:.1f}"),
        ("nodes", lambda cost: cost.nodes, lambda n: grouped(int(n))),
    ]
    result = []
    for label, figure, form in rows:
        figures = [None if cost is None else figure(cost) for cost in costs]
        if any(figures):
            result.append((f"  {label}", *_cells(figures, form)))
    flops = result[0] if result and "FLOPs" in result[0][0] else None
    if flops is not None:
        result[0] = flops[0], *map(bounded, flops[1:], costs)
    return result


def bounded(text: str, cost: StageCost | None) -> str:
    """FLOPs as text, ``at most`` if a part of them may be skipped."""
    at_most = cost is not None and cost.pairs is Pairs.AT_MOST
    return f"at most {text}" if at_most else text


def flops_label(stage: str) -> str:
    """What one run of a stage is, beside its FLOPs."""
    kind = {"language_model": ", prefill", "decode": ", one token"}.get(stage, "")
    return f"FLOPs{kind}"


def _cells(figures: Sequence[float | None], form: Callable[[float], str]) -> list[str]:
    first = figures[0]
    cells = []
    for column, figure in enumerate(figures):
        if figure is None:
            cells.append("-")
        elif column == 0 or first is None:
            cells.append(form(figure).strip())
        else:
            cells.append(f"{form(figure).strip()} ({percent(first, figure)})")
    return cells


def _operator_rows(stages: Sequence[StageStats | None]) -> list[tuple[str, ...]]:
    names = dict.fromkeys(name for stage in stages if stage for name in stage.operators)
    rows = []
    for name in names:
        counts = [None if stage is None else stage.operators.get(name, 0) for stage in stages]
        first = counts[0] or 0
        cells = ["-" if n is None else str(n) for n in counts]
        for column, count in enumerate(counts[1:], start=1):
            if count is not None and count != first:
                cells[column] += f" ({count - first:+d})"
        rows.append((f"    {name}", *cells))
    return rows


def _layer_lines(
    programs: Sequence[ProgramStats], stages: Sequence[StageStats | None]
) -> list[str]:
    """``tokens by layer: 640 x3, 254 x14``, for each program that knows its tokens."""
    lines = []
    for program, stage in zip(programs, stages, strict=True):
        if stage is None:
            continue
        tokens = [layer.tokens for layer in stage.cost.layers.values() if layer.tokens is not None]
        if tokens:
            label = f", {program.label}" if len(programs) > 1 else ""
            lines.append(f"  tokens by layer{label}: {runs_text(map(str, tokens))}")
    return lines


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as lines of left-aligned columns, four spaces apart."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "    ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def runs_text(values: Iterable[str]) -> str:
    """``1.00 x3, 0.39 x14`` for values with many repetitions in a row."""
    runs = [(value, len(list(run))) for value, run in groupby(values)]
    return ", ".join(f"{value} x{count}" for value, count in runs)


# -- numbers -----------------------------------------------------------------------------------


def si(number: float) -> str:
    """A figure with a decimal prefix: ``8.5 T``, ``336 M``, and plain below a thousand: ``12 ``.

    A unit can be put right behind it.
    """
    for prefix, scale in (("P", 1e15), ("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            value = number / scale
            return f"{value:.1f} {prefix}" if value < 9.95 else f"{value:.0f} {prefix}"
    return f"{number:.0f} "


def grouped(number: int) -> str:
    """An integer in groups of three digits: ``1 472``."""
    return f"{number:,}".replace(",", " ")


def percent(before: float, after: float) -> str:
    """Change of a figure: ``-64 %``; ``new`` where there was none."""
    if before == after:
        return "0 %"
    return "new" if not before else f"{100 * (after - before) / before:+.0f} %"


def bytes_text(number: float) -> str:
    """A number of bytes: ``336 MB``."""
    return f"{si(number)}B"
