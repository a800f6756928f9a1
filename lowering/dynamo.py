"""The ``torch.compile`` door: ``torch.compile(model, backend="vlmopt", options={"passes": ...})``.

Dynamo hands over torch-level graphs. The one in which image features are written into text
embeddings is brought into canonical form, rewritten by the pipeline, and given to Inductor, which
differentiates it too. Every other graph goes to Inductor as it came.
"""

from __future__ import annotations

import contextlib
import logging
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from vlmopt.analysis.modality import TokenModality
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.graph.canonical import simplify
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.spec import parse_pipeline
from vlmopt.program import Modality, Port, Program, Stage
from vlmopt.rewrite.emit import Emitter

aten = torch.ops.aten
log = logging.getLogger("vlmopt.dynamo")

Compiled = Callable[..., Any]

LOWERINGS = ("inductor", "eager")


def vlmopt_backend(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Compiled:
    """Backend for ``torch.compile``.

    Args:
        options: ``passes``, the text of a pipeline (without it this is Inductor); ``lowering``,
            ``inductor`` or ``eager`` (run the rewritten graph as it is: compiles fast, runs
            slowly); all others are settings of Inductor.
        mode: as for Inductor.

    Raises:
        OptionError: an option that neither vlmopt nor Inductor knows.
        VlmoptError: of the pipeline.
    """
    chosen = _Options.read(options or {}, mode)
    if chosen.passes is None:
        return _lower(gm, example_inputs, chosen)
    parse_pipeline(chosen.passes)  # a mistake in it must not wait for a graph with an image
    rewritten = _rewritten(gm, chosen.passes) if _may_hold_visual_tokens(gm) else None
    if rewritten is None:
        log.debug("graph of %d nodes without visual tokens: left to Inductor", len(gm.graph.nodes))
        return _lower(gm, example_inputs, chosen)
    with torch._C._DisableAutocast():  # its casts are in the graph already
        return _lower(rewritten, example_inputs, chosen)


@dataclass(frozen=True)
class _Options:
    passes: str | None
    lowering: str
    inductor: dict[str, Any]

    @classmethod
    def read(cls, options: Mapping[str, Any], mode: str | None) -> _Options:
        from torch._inductor import config, list_mode_options

        known = config.shallow_copy_dict()
        rest = dict(list_mode_options(mode)) if mode and mode != "default" else {}
        for key, value in options.items():
            if key in ("passes", "lowering"):
                continue
            name = key.replace("-", "_")  # as Inductor spells it
            if name not in known:
                raise OptionError(
                    f"torch.compile option {key!r} is neither vlmopt's nor Inductor's",
                    hint="vlmopt's are passes and lowering; torch._inductor.list_options() lists "
                    "the others",
                )
            rest[name] = value
        passes = options.get("passes")
        if passes is not None and not isinstance(passes, str):
            raise OptionError(
                f"option passes is {passes!r}, not the text of a pipeline",
                hint='such as "v2drop{layers=3 keep=0.5}"',
            )
        lowering = options.get("lowering", "inductor")
        if lowering not in LOWERINGS:
            raise OptionError(f"option lowering is {lowering!r}, not one of {', '.join(LOWERINGS)}")
        return cls(passes, lowering, rest)


def _lower(gm: fx.GraphModule, example_inputs: Sequence[Any], options: _Options) -> Compiled:
    if options.lowering == "eager":
        return gm.forward  # type: ignore[no-any-return]
    from torch._inductor.compile_fx import compile_fx

    if not options.inductor:
        return compile_fx(gm, example_inputs)  # type: ignore[no-any-return]
    return compile_fx(gm, example_inputs, config_patches=options.inductor)  # type: ignore[no-any-return]


# -- one graph ---------------------------------------------------------------------------------

_WRITERS = ("masked_scatter", "index_put", "setitem", "mark_tokens")


def _may_hold_visual_tokens(gm: fx.GraphModule) -> bool:
    """A glance at Dynamo's graph; most graphs are spared the tracing."""
    return any(
        any(writer in _target_name(node) for writer in _WRITERS)
        for node in gm.graph.nodes
        if node.op in ("call_function", "call_method")
    )


def _target_name(node: fx.Node) -> str:
    return getattr(node.target, "__name__", None) or str(node.target)


def _rewritten(gm: fx.GraphModule, pipeline: str) -> fx.GraphModule | None:
    """``gm`` in canonical form after the pipeline, or ``None`` if it shows no visual tokens."""
    canonical = canonical_dynamo_graph(gm)
    found = find_visual_tokens(canonical.graph)
    if found is None:
        return None
    if not _feeds_attention(found.anchor):
        _warn_of_graph_breaks()
        return None
    outputs = canonical.graph.output_node().args[0]
    stage = _stage(canonical, found)
    tensors = len(stage.outputs)
    _drop_marks(stage)
    report = run_pipeline(Program({stage.name: stage}, model_type="torch.compile"), pipeline)
    log.debug("pipeline %s: %d passes on a graph of %d tokens", report.pipeline, len(report.records),
              stage.facts["tokens"])
    if len(stage.facts["visual_tokens"]) > 1 and any(r.result.changed for r in report.records):
        _assert_equal_counts(stage)
    # what passes added to the outputs is for the runtime, which has no part in this program
    values = iter(stage.graph.output_node().args[0][:tensors])  # type: ignore[index]
    stage.graph.output_node().args = (
        tuple(next(values) if isinstance(value, fx.Node) else value for value in outputs),  # type: ignore[union-attr]
    )
    stage.graph.eliminate_dead_code()
    stage.graph_module.recompile()
    return stage.graph_module


def canonical_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of Dynamo's as functional pre-dispatch ATen, with the same inputs and outputs.

    Module paths and source lines survive. Sizes that Dynamo left open stay open, except those of
    the values it passes as integers where the model asks for them.

    Raises:
        PreconditionError: the graph writes into one of its inputs.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = [_example(node) for node in placeholders]
    modes = [value.fake_mode for value in inputs if hasattr(value, "fake_mode")]
    mode = modes[0] if modes else FakeTensorMode()
    with mode, torch.no_grad():
        inputs = [_settled(value) for value in inputs]
    written: list[str] = []

    def run(*values: Any) -> Any:
        result = _Retrace(gm).run(*values)
        for node, value in zip(placeholders, values, strict=True):
            if isinstance(value, torch.Tensor) and _was_written(value):
                written.append(node.name)
        return result

    functional = dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True, export=True))
    # gradients are AOTAutograd's business, which differentiates the rewritten graph
    with torch.no_grad(), preserve_node_meta(), mode, _unchanged_autocast():
        traced = make_fx(functional, pre_dispatch=True)(*inputs)
    if written:
        raise PreconditionError(
            f"the graph with the visual tokens writes into its input {written[0]}",
            hint="call the model without a static cache, or use vlmopt.optimize",
        )
    _finish_trace(gm, traced, placeholders)
    return traced


def _finish_trace(
    gm: fx.GraphModule, traced: fx.GraphModule, placeholders: Sequence[fx.Node]
) -> None:
    graph = traced.graph
    for node, source in zip(graph.find_nodes(op="placeholder"), placeholders, strict=True):
        # AOTAutograd reads off these which inputs are parameters
        node.meta = {**source.meta, **node.meta}
        if hasattr(source, "_dynamo_source"):
            node._dynamo_source = source._dynamo_source
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target is operator.getitem:
            continue
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)
    output = graph.output_node()
    values = output.args[0]
    output.args = (tuple(values) if isinstance(values, (list, tuple)) else (values,),)
    graph.set_codegen(fx.graph.CodeGen())
    simplify(graph)
    traced.delete_all_unused_submodules()
    used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for table in (traced._parameters, traced._buffers):
        for name in [name for name in table if name not in used]:
            del table[name]
    for name in used:  # constants of the trace are plain attributes; weights of a stage are not
        value = getattr(traced, name, None)
        if isinstance(value, torch.Tensor) and name not in traced._buffers | traced._parameters:
            delattr(traced, name)
            traced.register_buffer(name, value)
    traced.meta = {**gm.meta, **traced.meta}
    traced.recompile()


class _Retrace(fx.Interpreter):
    """Runs Dynamo's graph with the modes that it switches, without recording the switches."""

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm)
        self.fetch: dict[fx.Node, bool] = {}
        self.frozen: set[fx.Node] = set()
        enabled = [torch.is_grad_enabled()]
        self.track = _TRACK_GRADIENTS.get()
        for node in gm.graph.nodes:
            if node.op == "call_function" and node.target is torch._C._set_grad_enabled:
                enabled.append(bool(node.args[0]))
            elif not enabled[-1]:
                self.frozen.add(node)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if self.track and n in self.frozen and n.op.startswith("call_"):
            if any(user not in self.frozen for user in n.users):
                # what a no_grad block computed must stay without gradient
                with fx.traceback.set_current_meta(n):
                    return torch.utils._pytree.tree_map_only(
                        torch.Tensor, lambda value: aten.detach.default(value), result
                    )
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            return None
        if target in (torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast):
            with torch._C.DisableTorchFunction():
                return target(*args, **kwargs)
        return super().call_function(target, args, kwargs)
