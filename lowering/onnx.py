"""Export to ONNX: each stage of a program as one file of standard operators and static shapes.

A stage is traced again on example inputs, so that no size stays symbolic: the ``decode`` stage
becomes a graph for one number of past tokens. To decode with fewer, hide the rest with the
attention mask.
"""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from vlmopt.analysis.experts import GROUPED_PRODUCTS
from vlmopt.errors import ArtifactError, LoweringError, describe_node
from vlmopt.folders import new_folder
from vlmopt.graph.compare import TOLERANCES, random_inputs
from vlmopt.graph.text import dtype_text, op_text
from vlmopt.ops import DECOMPOSITIONS, STEPS
from vlmopt.ops.experts import best_tile, grouped_mm_tiles, tile_count
from vlmopt.program import Port, Program, Role, Stage, copy_graph, fetch_attr
from vlmopt.rewrite.reuse import REUSE

aten = torch.ops.aten

MANIFEST = "manifest.json"
SCHEMA = 1

_OPSETS = (18, 25)
"""Lowest and highest operator set that torch's exporter can write ``Attention`` for."""

_IR_VERSION = 10
"""``onnx`` writes its newest format by default, which ONNX Runtime reads only versions later."""

_EXAMPLES = 4
"""Random inputs that a check runs."""

_STEPS = 256
"""Steps of a greedy selection that a file may hold; each is about ten nodes."""

_DATA_DEPENDENT = frozenset({"NonZero", "Compress", "Unique", "NonMaxSuppression"})
"""Operators whose result has a size that only the values tell: compilers for edge devices refuse
them, even where the size happens to be fixed."""

_STACK_TRACE = "pkg.torch.onnx.stack_trace"
"""Holds absolute paths of the machine that exports, and is a third of a small file."""

Translation = Callable[..., Any]


# -- what an export hands back -----------------------------------------------------------------


@dataclass(frozen=True)
class StageReport:
    """One exported stage.

    Attributes:
        file: name of the ``.onnx`` file in the folder of the export.
        size: bytes of the file, weights beside it included.
        operators: number of nodes by operator, most frequent first.
        past: past tokens of a decode stage.
        copies: bytes of matrices of experts that the largest grouped product copies.
        errors: largest absolute difference from eager by output; empty when not checked.
    """

    name: str
    file: str
    size: int
    operators: Mapping[str, int]
    past: int | None = None
    copies: int = 0
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class OnnxReport:
    """What :func:`export_program` wrote.

    Attributes:
        examples: random inputs per stage that ONNX Runtime was checked on; 0 for no check.
    """

    folder: Path
    opset: int
    ir_version: int
    examples: int
    stages: tuple[StageReport, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The ``.onnx`` files, in order of execution."""
        return tuple(self.folder / stage.file for stage in self.stages)

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes by stage."""
        return {stage.name: stage.size for stage in self.stages}

    @property
    def operators(self) -> dict[str, Mapping[str, int]]:
        """Histogram of operators by stage."""
        return {stage.name: stage.operators for stage in self.stages}

    @property
    def errors(self) -> dict[str, Mapping[str, float]]:
        """Largest absolute difference from eager, by stage and output."""
        return {stage.name: stage.errors for stage in self.stages}

    def to_json(self) -> dict[str, Any]:
        """The report as JSON values."""
        return {
            "schema": SCHEMA,
            "folder": str(self.folder),
            "opset": self.opset,
            "ir_version": self.ir_version,
            "examples": self.examples,
            "stages": [
                {
                    "name": stage.name,
                    "file": stage.file,
                    "size": stage.size,
                    "past": stage.past,
                    "copies": stage.copies,
                    "operators": dict(stage.operators),
                    "errors": dict(stage.errors),
                }
                for stage in self.stages
            ],
        }

    def text(self) -> str:
        """The report for people: one line per stage."""
        lines = [f"{self.folder}: opset {self.opset}, IR version {self.ir_version}"]
        width = max((len(stage.file) for stage in self.stages), default=0)
        for stage in self.stages:
            parts = [
                f"  {stage.file:<{width}}  {stage.size / 1e6:8.2f} MB",
                f"{sum(stage.operators.values()):5d} nodes",
            ]
            if stage.errors:
                worst = max(stage.errors, key=lambda name: stage.errors[name])
                parts.append(f"largest error {stage.errors[worst]:.1e} ({worst})")
            if stage.copies:
                parts.append(f"{stage.copies / 1e6:.2f} MB of experts copied")
            if stage.past is not None:
                parts.append(f"{stage.past} past tokens")
            lines.append("  ".join(parts))
        if self.examples:
            lines.append(f"  checked in ONNX Runtime (CPU) on {self.examples} random inputs each")
        else:
            lines.append("  not checked in ONNX Runtime")
        return "\n".join(lines)


class OnnxStage:
    """An exported stage, ready to run in ONNX Runtime on the CPU.

    Attributes:
        inputs, outputs: names of the ports, in order.

    Args:
        path: the ``.onnx`` file.

    Raises:
        ArtifactError: the file is missing.
        LoweringError: ONNX Runtime cannot load it.
    """

    def __init__(self, path: Path | str) -> None:
        _need("onnxruntime")
        import onnxruntime

        self.path = Path(path)
        if not self.path.is_file():
            raise ArtifactError(f"{self.path} is no file", hint="export the program first")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # its warnings are about its own optimizer
        try:
            self.session = onnxruntime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:
            raise LoweringError(
                f"ONNX Runtime {onnxruntime.__version__} (CPU) cannot load {self.path.name}: "
                f"{_first_line(error)}",
                hint="check=False exports it all the same, for a runtime that can",
            ) from error
        self.inputs = tuple(value.name for value in self.session.get_inputs())
        self.outputs = tuple(value.name for value in self.session.get_outputs())

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """The outputs by name; every input must be given, by name."""
        if set(inputs) != set(self.inputs):
            raise TypeError(
                f"{self.path.name} takes {', '.join(self.inputs)}; not {', '.join(inputs)}"
            )
        feed = {name: value.detach().cpu().contiguous().numpy() for name, value in inputs.items()}
        values = self.session.run(None, feed)
        return {name: torch.from_numpy(v) for name, v in zip(self.outputs, values, strict=True)}


# -- export ------------------------------------------------------------------------------------


def export_program(
    program: Program,
    out: Path,
    *,
    opset: int = 20,
    stages: Sequence[str] | None = None,
    past: int | None = None,
    overwrite: bool = False,
    check: bool = True,
    translations: Mapping[Any, Translation] | None = None,
) -> OnnxReport:
    """Write each stage of ``program`` as ``<out>/<stage>.onnx``, and ``<out>/manifest.json``.

    Inputs and outputs are called as the stage's ports; the manifest holds their roles. The folder
    appears whole or not at all.

    Args:
        opset: version of the ONNX operator set, from 18 to 25.
        stages: names of the stages to export; all by default.
        past: tokens that the decode stage has seen, dropped ones included; by default those of
            the prompt. Layers that a pass shortened take accordingly fewer.
        overwrite: replace what an earlier export wrote there.
        check: run every file in ONNX Runtime on random inputs and compare with eager. Slots of
            kept tokens, and all other integers, must be equal; floats within 1e-4 (float32) of the
            largest value, or of one where that is smaller.
        translations: by ``OpOverload``, functions that write operators of your own with those of
            ONNX, as for ``torch.onnx.export(custom_translation_table=...)``.

    Raises:
        LoweringError: something cannot be exported, or runs differently; the message names the
            operator, its node, its module and the pass that made it. Also for ``out`` that exists.
    """
    _need("onnx", "onnxscript", *(["onnxruntime"] if check else []))
    out = Path(out)
    if not _OPSETS[0] <= opset <= _OPSETS[1]:
        raise LoweringError(
            f"opset {opset} cannot be exported", hint=f"choose from {_OPSETS[0]} to {_OPSETS[1]}"
        )
    chosen = _choose(program, stages)
    for stage in chosen:
        _require_weights(stage)
        _require_few_steps(stage)
    table = {**_TRANSLATIONS, **(translations or {})}
    with new_folder(out, marker=MANIFEST, overwrite=overwrite, error=LoweringError) as folder:
        reports = []
        described = {}
        for stage in chosen:
            static, seen = _specialise(stage, past)
            report, ir_version = _export_stage(program, static, folder, opset, table, seen)
            if check:
                report = replace(report, errors=_check_stage(static, folder / report.file, seen))
            reports.append(report)
            described[stage.name] = _describe(static, report)
        manifest = {
            "schema": SCHEMA,
            "model_type": program.model_type,
            "pipeline": list(program.passes),
            "opset": opset,
            "ir_version": ir_version,
            "stages": described,
        }
        text = json.dumps(manifest, indent=2) + "\n"
        (folder / MANIFEST).write_text(text, encoding="utf-8")
    return OnnxReport(out, opset, ir_version, _EXAMPLES if check else 0, tuple(reports))


def _choose(program: Program, names: Sequence[str] | None) -> list[Stage]:
    unknown = [name for name in names or () if name not in program]
    if unknown:
        raise LoweringError(
            f"the program has no stage {', '.join(unknown)}",
            hint=f"its stages are {', '.join(program.stages)}",
        )
    chosen = [stage for stage in program if names is None or stage.name in names]
    if not chosen:
        raise LoweringError("there is no stage to export", hint="name at least one")
    return chosen


def _require_weights(stage: Stage) -> None:
    for node in stage.graph.find_nodes(op="get_attr"):
        weight = fetch_attr(stage.graph_module, str(node.target))
        if isinstance(weight, FakeTensor) or weight.is_meta:
            raise LoweringError(
                f"stage {stage.name} has no weights, so it cannot be exported",
                node=node,
                hint="load weights first: capture the model with them",
            )


def _require_few_steps(stage: Stage) -> None:
    """A greedy selection is written out step by step: devices know no loops."""
    for node in stage.graph.nodes:
        at = STEPS.get(node.target)
        if at is not None and node.args[at] > _STEPS:  # type: ignore[operator]
            raise LoweringError(
                f"{node.target} picks {node.args[at]} tokens one after the other, and ONNX would "
                f"hold every step; at most {_STEPS} are written out",
                node=node,
                hint="keep fewer tokens, or choose a method that needs no greedy selection",
            )


def _specialise(stage: Stage, past: int | None) -> tuple[Stage, int | None]:
    """The stage with every size of its inputs a number, and the past tokens that this means."""
    graph_module = fx.GraphModule(stage.graph_module, copy_graph(stage.graph))
    static = replace(stage, graph_module=graph_module)
    nodes = static.graph.find_nodes(op="placeholder")
    symbols = {
        symbol for node in nodes for size in node.meta["val"].shape for symbol in _free(size)
    }
    if not symbols:
        return static, None
    if len(symbols) > 1:
        raise LoweringError(
            f"stage {stage.name} has {len(symbols)} sizes that vary "
            f"({', '.join(sorted(map(str, symbols)))}); one, the past, can be fixed",
            hint="capture it with fixed sizes",
        )
    tokens = stage.facts.get("tokens")
    seen = tokens if past is None else past
    if seen is None:
        raise LoweringError(f"stage {stage.name} needs a number of past tokens", hint="give past")
    # positions of kept tokens count slots of the whole prompt
    least = tokens if stage.find_inputs(Role.KEPT) and tokens is not None else 1
    if seen < least:
        raise LoweringError(
            f"stage {stage.name} cannot have {seen} past tokens",
            hint=f"past counts all tokens seen, dropped ones included: give at least {least}",
        )
    (symbol,) = symbols
    for node in nodes:
        value = node.meta["val"]
        shape = [int(size.node.expr.subs({symbol: seen})) if _free(size) else int(size)
                 for size in value.shape]  # fmt: skip
        node.meta["val"] = torch.empty(shape, dtype=value.dtype, device="meta")
    return static, int(seen)


def _free(size: Any) -> set[Any]:
    return set(size.node.expr.free_symbols) if isinstance(size, torch.SymInt) else set()


def _export_stage(
    program: Program,
    stage: Stage,
    folder: Path,
    opset: int,
    table: Mapping[Any, Translation],
    past: int | None,
) -> tuple[StageReport, int]:
    import onnx

    inputs, outputs = [port.name for port in stage.inputs], [port.name for port in stage.outputs]
    twice = [name for name, count in Counter(inputs + outputs).items() if count > 1]
    if twice:
        raise LoweringError(
            f"stage {stage.name} has two ports called {', '.join(twice)}; ONNX names are unique"
        )
    with _quiet():
        try:
            with torch.no_grad():
                exported = torch.export.export(stage.graph_module, tuple(_examples(stage, 0, past)))
                if any(map(_goes_out_otherwise, exported.graph.nodes)):
                    exported = exported.run_decompositions(dict(_PLAIN))
        except Exception as error:
            raise LoweringError(
                f"stage {stage.name} cannot be traced with static shapes: {_first_line(error)}",
                hint="verify the program: a pass may have left a size that no longer holds",
            ) from error
        try:
            converted = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=opset,
                input_names=inputs,
                output_names=outputs,
                custom_translation_table=dict(table),
                verbose=False,
            )
        except Exception as error:
            raise _untranslatable(program, stage, error) from error
    assert converted is not None
    file = f"{stage.name}.onnx"
    proto = converted.model
    proto.ir_version = max(
        _IR_VERSION, onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    )
    for key, value in _properties(program, stage).items():
        proto.metadata_props[key] = value
    written = proto.opset_imports.get("")
    if written != opset:  # the exporter only logs that it cannot convert
        raise LoweringError(
            f"stage {stage.name} could be written with opset {written} only, not {opset}",
            hint=f"export with opset={written}",
        )
    for node in proto.graph.all_nodes():
        node.metadata_props.pop(_STACK_TRACE, None)
    converted.save(folder / file)
    model = onnx.load(folder / file, load_external_data=False)
    try:
        onnx.checker.check_model(str(folder / file), full_check=True)
    except Exception as error:
        raise LoweringError(
            f"the ONNX graph of stage {stage.name} is not valid: {_first_line(error)}"
        ) from error
    _require_standard(stage, model, inputs, outputs)
    size = sum(path.stat().st_size for path in folder.glob(f"{file}*"))
    operators = dict(Counter(node.op_type for node in _nodes(model.graph)).most_common())
    copies = max((product["copies"] for product in _grouped_products(stage)), default=0)
    return StageReport(stage.name, file, size, operators, past, copies), int(model.ir_version)


def _properties(program: Program, stage: Stage) -> dict[str, str]:
    return {
        "vlmopt.model_type": program.model_type,
        "vlmopt.stage": stage.name,
        "vlmopt.pipeline": " ".join(program.passes),
    }


def _untranslatable(program: Program, stage: Stage, error: Exception) -> LoweringError:
    """The error for an operator without translation, with where it comes from."""
    found = None
    innermost: BaseException = error
    while True:
        found = found or re.search(r"target=torch\.ops\.([\w.]+)", str(innermost))
        if innermost.__cause__ is None:
            break
        innermost = innermost.__cause__
    if found is None:
        return LoweringError(
            f"stage {stage.name} cannot be written as ONNX: {_first_line(innermost)}"
        )
    name = found[1]
    # translation goes through the graph in order, so the first node of an operator is the one
    node = next((n for n in stage.graph.nodes if str(n.target) == name), None)
    what = f"stage {stage.name} cannot be written as ONNX: {name} "
    if type(innermost).__name__ == "DispatchError":
        what += "has no translation to standard operators"
    else:
        what += f"could not be translated ({_first_line(innermost)})"
    if node is not None:
        what += _made_by(node)
    return LoweringError(
        what, node=node, hint="give one in translations, or write it with other operators"
    )


def _require_standard(
    stage: Stage, model: Any, inputs: Sequence[str], outputs: Sequence[str]
) -> None:
    """Only standard operators, static shapes, and the ports under their names."""
    names = (
        [value.name for value in model.graph.input],
        [value.name for value in model.graph.output],
    )
    if names != (list(inputs), list(outputs)):
        raise LoweringError(
            f"the exporter renamed the ports of stage {stage.name} to {names[0]} and {names[1]}",
        )
    nodes = list(_nodes(model.graph))
    for node in nodes:
        if node.domain not in ("", "ai.onnx"):
            raise LoweringError(
                f"stage {stage.name} uses {node.domain}::{node.op_type} (node {node.name}), "
                "which is no standard operator",
                hint="translate it with operators of the ai.onnx domain",
            )
        if node.op_type in _DATA_DEPENDENT:
            raise LoweringError(
                f"stage {stage.name} uses {node.op_type} ({_origin(stage, node)}): the size of its "
                "result depends on values",
                hint="use a fixed number of elements and a mask",
            )
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        shape = value.type.tensor_type.shape
        if any(dim.WhichOneof("value") == "dim_param" for dim in shape.dim):
            text = ", ".join(dim.dim_param or str(dim.dim_value) for dim in shape.dim)
            raise LoweringError(
                f"{value.name} of stage {stage.name} has a dynamic shape [{text}]",
                hint="capture the model with fixed sizes",
            )


def _nodes(graph: Any) -> Iterator[Any]:
    """Nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs):
                yield from _nodes(inner)


def _origin(stage: Stage, node: Any) -> str:
    """Which operator of the stage an ONNX node comes from, as far as the exporter recorded it."""
    recorded = {entry.key: entry.value for entry in node.metadata_props}
    found = re.search(r"torch\.ops\.([\w.]+)", recorded.get("pkg.torch.onnx.fx_node", ""))
    origin = next((n for n in stage.graph.nodes if found and str(n.target) == found[1]), None)
    if origin is None:
        return f"node {node.name}"
    return f"from {op_text(origin)} {describe_node(origin)}{_made_by(origin)}"


def _made_by(node: fx.Node) -> str:
    made = (node.meta.get("custom") or {}).get("vlmopt", {})
    return f", made by pass {made['pass']}" if "pass" in made else ""


def _describe(stage: Stage, report: StageReport) -> dict[str, Any]:
    """A stage in the manifest."""
    described: dict[str, Any] = {
        "file": report.file,
        "inputs": [_describe_port(stage, port, stage.placeholder(port)) for port in stage.inputs],
        "outputs": [],
    }
    with torch.no_grad():
        values = stage.graph_module(*_examples(stage, 0, report.past))
    for port, value in zip(stage.outputs, values, strict=True):
        described["outputs"].append(_describe_port(stage, port, value))
    if report.past is not None:
        described["past"] = report.past
    if products := _grouped_products(stage):
        described["grouped_products"] = products
    if "encoding" in stage.facts:
        described["encoding"] = stage.facts["encoding"]
    if REUSE in stage.facts:
        described[REUSE] = stage.facts[REUSE]
    if stage.cuts:
        described["cuts"] = [
            {
                "layer": cut.layer,
                "tokens": list(cut.tokens),
                "kept": cut.kept,
                "made_by": cut.made_by,
            }
            for cut in stage.cuts
        ]
    return described


def _grouped_products(stage: Stage) -> list[dict[str, int]]:
    """Products of rows sorted by expert, and the tiles that they are written as."""
    found = []
    for node in stage.graph.nodes:
        if node.target not in GROUPED_PRODUCTS:
            continue
        (rows, _), weights = (value.meta["val"].shape for value in node.args[:2])
        size = best_tile(int(rows), int(weights[0]))
        tiles = tile_count(int(rows), int(weights[0]), size)
        matrix = node.args[1].meta["val"][0].nbytes
        found.append(
            {
                "rows": int(rows),
                "experts": int(weights[0]),
                "tile": size,
                "tiles": tiles,
                "copies": tiles * matrix,
            }
        )
    return found


def _describe_port(stage: Stage, port: Port, value: fx.Node | Tensor) -> dict[str, Any]:
    tensor: Tensor = value.meta["val"] if isinstance(value, fx.Node) else value
    described: dict[str, Any] = {
        "name": port.name,
        "role": str(port.role),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "shape": [int(size) for size in tensor.shape],
    }
    if port.layer is not None:
        described["layer"] = port.layer
    if port.kept is not None:
        described["kept"] = port.kept
    return described


# -- check -------------------------------------------------------------------------------------


def _check_stage(stage: Stage, path: Path, past: int | None) -> dict[str, float]:
    """Largest absolute difference between ONNX Runtime and eager, by output.

    Raises:
        LoweringError: it is too large, or kept tokens differ.
    """
    runner = _load_for_check(stage, path)
    errors = {port.name: 0.0 for port in stage.outputs}
    for seed in range(_EXAMPLES):
        inputs = _examples(stage, seed, past)
        with torch.no_grad():
            expected = stage.graph_module(*inputs)
        feed = {port.name: value for port, value in zip(stage.inputs, inputs, strict=True)}
        try:
            found = runner(**feed)
        except Exception as error:
            raise LoweringError(
                f"ONNX Runtime (CPU) fails on stage {stage.name}: {_first_line(error)}"
            ) from error
        # kept slots first: where they differ, everything after does too
        order = sorted(
            zip(stage.outputs, expected, strict=True),
            key=lambda pair: pair[0].role is not Role.KEPT,
        )
        for port, value in order:
            error_here = _difference(stage, port, value, found[port.name])
            errors[port.name] = max(errors[port.name], error_here)
    return errors


def _load_for_check(stage: Stage, path: Path) -> OnnxStage:
    values = [*stage.graph_module.parameters(), *stage.graph_module.buffers()]
    values += [stage.placeholder(port).meta["val"] for port in stage.inputs]
    if not any(value.dtype is torch.bfloat16 for value in values):
        return OnnxStage(path)
    why = "neither ONNX Runtime's CPU kernels nor NumPy take it everywhere"
    try:
        OnnxStage(path)
    except LoweringError as error:
        why = error.what
    raise LoweringError(
        f"stage {stage.name} computes in bfloat16, so its export cannot be checked: {why}",
        hint="capture the model in float32, or export with check=False",
    )


def _difference(stage: Stage, port: Port, expected: Tensor, found: Tensor) -> float:
    place = f"output {port.name} of stage {stage.name}"
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise LoweringError(
            f"{place} is {dtype_text(found.dtype)}{list(found.shape)} in ONNX Runtime, but "
            f"{dtype_text(expected.dtype)}{list(expected.shape)} in eager"
        )
    differs = (expected != found) & ~(expected.isnan() & found.isnan())
    if not expected.is_floating_point():
        if differs.any():
            what = "slots" if port.role is Role.KEPT else "elements"
            raise LoweringError(
                f"{place} differs between ONNX Runtime and eager in {int(differs.sum())} of "
                f"{differs.numel()} {what}",
                hint="scores that are nearly tied may be ranked either way; check=False skips this"
                if port.role is Role.KEPT
                else None,
            )
        return 0.0
    if not differs.any():
        return 0.0
    gap = float((expected.double() - found.double())[differs].abs().max())
    finite = expected[expected.isfinite()].abs()
    largest = float(finite.max()) if finite.numel() else 0.0
    limit = TOLERANCES.get(expected.dtype, 0.0) * max(1.0, largest)
    if not gap <= limit:  # also where it is not a number
        raise LoweringError(
            f"{place} differs by {gap:.1e} between ONNX Runtime and eager; {limit:.1e} is allowed",
            hint="try another opset",
        )
    return gap


def _examples(stage: Stage, seed: int, past: int | None) -> list[Tensor]:
    """Random inputs that also vary what the common ones leave as it is: places and masks."""
    generator = torch.Generator().manual_seed(seed)
    inputs = random_inputs(stage, seed)
    shuffle = _shuffle(stage, generator)
    for index, port in enumerate(stage.inputs):
        value = inputs[index]
        if port.role in (Role.MODALITY, Role.VISUAL_MASK) and shuffle is not None:
            inputs[index] = value.gather(1, shuffle)  # counts per sample are part of the graph
        elif port.role is Role.ATTENTION_MASK and seed:
            inputs[index] = _random_mask(value, generator)
        elif port.role is Role.POSITION_IDS and past is not None and value.shape[-1] == 1:
            inputs[index] = torch.full_like(value, past)
        elif port.role is Role.KEPT:
            inputs[index] = _random_slots(stage, value, generator)
    return inputs


def _shuffle(stage: Stage, generator: torch.Generator) -> Tensor | None:
    """A permutation of each sample's tokens that leaves its padding in front."""
    tokens = stage.facts.get("tokens")
    if tokens is None:
        return None
    rows = [
        torch.cat([torch.arange(pad), pad + torch.randperm(tokens - pad, generator=generator)])
        for pad in stage.facts["padding_tokens"]
    ]
    return torch.stack(rows)


def _random_mask(value: Tensor, generator: torch.Generator) -> Tensor:
    """Like ``value``, hiding a few tokens; every query still sees itself, and the first token."""
    keys = value.shape[-1]
    visible = torch.rand(value.shape, generator=generator) < 0.8
    visible[..., 0] = visible[..., -1] = True
    if value.ndim > 2:
        queries = value.shape[-2]
        visible |= torch.eye(keys, dtype=torch.bool)[keys - queries :] if queries <= keys else True
    if value.is_floating_point():
        return torch.where(visible, 0.0, torch.finfo(value.dtype).min).to(value.dtype)
    return visible.to(value.dtype)


def _random_slots(stage: Stage, value: Tensor, generator: torch.Generator) -> Tensor:
    """Kept slots: any choice among those of the prompt, with a few fillers.

    Ascending, and none twice before all are there once.
    """
    count = value.shape[1]
    tokens = stage.facts.get("tokens", count)
    more = max(0, count - tokens)
    rows = [
        torch.cat(
            [
                torch.randperm(tokens, generator=generator)[:count].sort().values,
                torch.randint(tokens, (more,), generator=generator),
            ]
        )
        for _ in value
    ]
    fillers = torch.rand(value.shape, generator=generator) < 0.1
    return torch.stack(rows).masked_fill(fillers, -1).to(value.dtype)


# -- translations ------------------------------------------------------------------------------


def _operators() -> Any:
    """ONNX operators as functions; the exporter converts them to the opset asked for."""
    from onnxscript import opset18

    return opset18


def _sort(self: Any, dim: int = -1, descending: bool = False, stable: bool = False) -> Any:
    """TopK of everything: ONNX ranks equal elements by index, as a stable sort does."""
    op = _operators()

    axis = dim % len(self.shape)
    values, indices = op.TopK(
        self,
        op.Constant(value_ints=[int(self.shape[axis])]),
        axis=axis,
        largest=int(descending),
        sorted=1,
    )
    return values, indices


def _stable_sort(
    self: Any, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> Any:
    return _sort(self, dim, descending)


def _masked_scatter(self: Any, mask: Any, source: Any) -> Any:
    """Each element under the mask takes the row of its rank; torch's own goes through NonZero."""
    from onnx import TensorProto

    op = _operators()

    shape = np.broadcast_shapes(tuple(map(int, self.shape)), tuple(map(int, mask.shape)))
    full = op.Constant(value_ints=list(shape))
    flat = op.Constant(value_ints=[-1])
    wide = op.Expand(mask, full)
    # int32: edge devices have few int64 kernels
    ones = op.Cast(op.Reshape(wide, flat), to=TensorProto.INT32)
    zero, one = (op.Cast(op.Constant(value_int=v), to=TensorProto.INT32) for v in (0, 1))
    rank = op.Max(op.Sub(op.CumSum(ones, op.Constant(value_int=0)), one), zero)
    rows = op.Gather(op.Reshape(source, flat), rank, axis=0)
    return op.Where(wide, op.Reshape(rows, full), self)


def _grouped_product(
    rows: Tensor,
    weights: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Any:
    """The kernel of torch for sorted rows, as our own operator."""
    if rows.ndim != 2 or weights.ndim != 3 or offs is None or bias is not None or out_dtype:
        return NotImplemented
    return grouped_mm_tiles(rows, weights, offs)


def _where(condition: Tensor, one: Tensor, other: Tensor) -> Any:
    """ONNX Runtime has no kernel for a choice between truth values."""
    if one.dtype is not torch.bool or other.dtype is not torch.bool:
        return NotImplemented
    return (condition & one) | (~condition & other)


def _index_put(
    value: Tensor, indices: Sequence[Tensor | None], new: Tensor, accumulate: bool = False
) -> Any:
    """One value under a mask is a choice; torch's own goes through NonZero."""
    mask = indices[0]
    if accumulate or len(indices) > 1 or mask is None or mask.dtype is not torch.bool:
        return NotImplemented
    if new.numel() != 1:
        return NotImplemented
    wide = mask.reshape(*mask.shape, *(1,) * (value.ndim - mask.ndim))
    return torch.where(wide, new.reshape(()), value)


_PLAIN: Mapping[Any, Callable[..., Any]] = {
    **DECOMPOSITIONS,
    aten._grouped_mm.default: _grouped_product,
    aten.where.self: _where,
    aten.index_put.default: _index_put,
}
"""Operators that go out as others; some only with some arguments, and else as they are."""


def _goes_out_otherwise(node: fx.Node) -> bool:
    if node.target is aten.where.self:
        return bool(node.meta["val"].dtype is torch.bool)
    if node.target is aten.index_put.default:
        return any(value.meta["val"].dtype is torch.bool for value in node.all_input_nodes)
    return node.target in _PLAIN


_TRANSLATIONS: dict[Any, Translation] = {
    aten.sort.default: _sort,
    aten.sort.stable: _stable_sort,
    aten.masked_scatter.default: _masked_scatter,
}


# -- helpers -----------------------------------------------------------------------------------


def _need(*packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise LoweringError(
            f"ONNX export needs {', '.join(missing)}", hint=f"pip install {' '.join(missing)}"
        )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter logs what optional packages it does without; that is no news to our user."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
