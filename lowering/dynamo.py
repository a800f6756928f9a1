"""The ``torch.compile`` door: ``torch.compile(model, backend="vlmopt", options={"passes": ...})``.

Dynamo hands over torch-level graphs. The one in which image features are written into text
embeddings is brought into canonical form, rewritten by the pipeline, and given to Inductor, which
differentiates it too. Every other graph goes to Inductor as it came.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import (
    FunctionalTensor,
    FunctionalTensorMode,
    dispatch_functionalize,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from vlmopt.analysis.layers import layer_of
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

        known = config.get_config_copy()
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
    if not _enters_layers(found.anchor):
        _warn_of_graph_breaks()
        return None
    if any(isinstance(size, torch.SymInt) for size in (found.batch, found.tokens, found.count)):
        # counts become part of the graph; each conversion adds a guard, so others recompile
        int(found.batch), int(found.tokens), int(found.count)
        canonical = canonical_dynamo_graph(gm)
        found = find_visual_tokens(canonical.graph)
        assert found is not None, "the same graph shows the same tokens"
    results = canonical.graph.output_node().args[0]
    stage = _stage(canonical, found)
    kept = len(stage.outputs)
    report = run_pipeline(Program({stage.name: stage}, model_type="torch.compile"), pipeline)
    log.debug(
        "%s on a graph with %s visual tokens: %s",
        report.pipeline,
        stage.facts["visual_tokens"],
        [dict(record.result.statistics) for record in report.records],
    )
    graph = stage.graph
    # what passes added to the outputs is for vlmopt's runtime, which has no part in this program
    values = iter(graph.output_node().args[0][:kept])  # type: ignore[index]
    graph.output_node().args = (
        tuple(next(values) if isinstance(value, fx.Node) else value for value in results),  # type: ignore[union-attr]
    )
    if stage.cuts and len(stage.facts["visual_tokens"]) > 1:
        _assert_equal_counts(stage)
    graph.eliminate_dead_code()
    graph.lint()
    stage.graph_module.recompile()
    return stage.graph_module


@dataclass(frozen=True)
class VisualTokens:
    """Where a graph holds the embeddings of text and vision together.

    Attributes:
        anchor: the embeddings, ``[batch, tokens, width]``.
        mask: bool, which of them come from vision; ``[batch, tokens]``, or with a last dimension
            along which it is constant.
        total: visual tokens of all samples.
    """

    anchor: fx.Node
    masks: tuple[fx.Node, ...]
    total: Any

    @property
    def batch(self) -> Any:
        return self.anchor.meta["val"].shape[0]

    @property
    def tokens(self) -> Any:
        return self.anchor.meta["val"].shape[1]

    @property
    def count(self) -> Any:
        """Visual tokens per sample."""
        return self.total // self.batch


def find_visual_tokens(graph: fx.Graph) -> VisualTokens | None:
    """The place where rows of features are written into embeddings, told by structure alone."""
    writes = {}
    for node in graph.nodes:
        if node.op == "call_function":
            write = _write_of(node)
            if write is not None:
                writes[node] = write
    for anchor in reversed(list(writes)):
        if anchor.target is _mark_operator() or not any(w in writes for w in anchor.users):
            break
    else:
        return None
    masks, total = [], 0
    node: Any = anchor
    while node in writes:  # images, then videos, into the same embeddings
        mask, rows = writes[node]
        masks.append(mask)
        total = total + rows
        if node.target is _mark_operator():
            break
        node = _through_copies(node.args[0])
    return VisualTokens(anchor, tuple(masks), total)


def _write_of(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """``(mask, number of rows)`` if ``node`` writes rows into ``[batch, tokens, width]``."""
    if node.target is _mark_operator():
        return node.args[1], node.args[2]  # type: ignore[return-value]
    if node.target is aten.masked_scatter.default:
        base, mask, source = node.args
    elif node.target is aten.index_put.default and len(node.args[1]) == 1:  # type: ignore[arg-type]
        base, (mask,), source = node.args[:3]  # type: ignore[misc]
    else:
        return None
    nodes = (base, mask, source)
    if not all(isinstance(value, fx.Node) for value in nodes):
        return None
    embeds, where, rows = (value.meta["val"] for value in nodes)  # type: ignore[union-attr]
    if embeds.ndim != 3 or not embeds.is_floating_point() or where.dtype != torch.bool:
        return None
    if node.target is aten.index_put.default:
        if where.ndim != 2 or rows.ndim != 2:
            return None
    elif where.ndim != 3 or not (where.shape[2] == 1 or where.stride(2) == 0):
        return None  # single elements are written, not whole rows
    return mask, rows.numel() // embeds.shape[2]  # type: ignore[return-value]


def _through_copies(value: Any) -> Any:
    while isinstance(value, fx.Node) and value.target in (
        aten.clone.default,
        aten.alias.default,
        aten._to_copy.default,
        aten.to.dtype,
    ):
        value = value.args[0]
    return value


def _mark_operator() -> Any:
    from vlmopt.annotate import mark_tokens_operator

    return mark_tokens_operator()


def _enters_layers(anchor: fx.Node) -> bool:
    """Whether repeated blocks follow in the same graph."""
    seen, stack = {anchor}, [anchor]
    while stack:
        for user in stack.pop().users:
            if user.target is aten.linear.default and layer_of(user) is not None:
                return True
            if user not in seen:
                seen.add(user)
                stack.append(user)
    return False


_warned = False


def _warn_of_graph_breaks() -> None:
    global _warned
    message = (
        "vlmopt: a graph break separates the visual tokens from the decoder of this model, so "
        "that its passes do not apply; call vlmopt.annotate(model) before torch.compile, or use "
        "vlmopt.optimize(model, inputs, passes)"
    )
    log.debug(message)
    if not _warned:
        _warned = True
        warnings.warn(message, stacklevel=2)


# -- the stage that passes see -----------------------------------------------------------------


def _stage(module: fx.GraphModule, found: VisualTokens) -> Stage:
    """The graph as a stage, with the modality of its tokens computed inside."""
    graph = module.graph
    outputs = [value for value in graph.output_node().args[0] if isinstance(value, fx.Node)]  # type: ignore[union-attr]
    graph.output_node().args = (tuple(outputs),)
    stage = Stage(
        "model",
        module,
        tuple(Port(node.name) for node in graph.find_nodes(op="placeholder")),
        tuple(Port(f"output_{index}") for index in range(len(outputs))),
    )
    emit = Emitter(
        graph,
        stamp=lambda node: None,
        place=found.anchor,
        prefix="vlmopt",
        fake_mode=stage.fake_mode(),
    )

    def read(*masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [mask[..., 0] if mask.ndim == 3 else mask for mask in masks]
        visual = rows[0].expand(int(found.batch), -1)
        for more in rows[1:]:
            visual = visual | more
        return visual, visual.to(torch.int64) * (Modality.VISION - Modality.TEXT) + Modality.TEXT

    with graph.inserting_before(found.anchor):
        visual, modality = emit.trace(read, *found.masks, names=("visual", "modality"))
    anchor = found.anchor
    for node in list(graph.nodes):
        if node.target is _mark_operator():
            if node is anchor:
                anchor = node.args[0]
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    module.recompile()
    batch = int(found.batch)
    stage.facts = {
        "visual_tokens": [int(found.count)] * batch,
        "tokens": int(found.tokens),
        "batch": batch,
        "anchor": anchor.name,
        "modality": modality.name,
        "visual_mask": visual.name,
    }
    return stage


def _assert_equal_counts(stage: Stage) -> None:
    """The graph is made for one number of visual tokens per sample: check it at run time."""
    graph, count = stage.graph, stage.facts["visual_tokens"][0]
    mask = next(node for node in graph.nodes if node.name == stage.facts["visual_mask"])
    emit = Emitter(
        graph,
        stamp=lambda node: None,
        place=mask,
        prefix="vlmopt",
        fake_mode=stage.fake_mode(),
    )
    with graph.inserting_after(mask):
        after = graph.call_function(aten.alias.default, (mask,))
    with graph.inserting_before(after):
        equal = emit.trace(lambda visual: (visual.sum(1) == count).all(), mask, names=("equal",))
        emit.call(
            aten._assert_async.msg,
            equal,
            f"vlmopt: samples of a batch must have equally many visual tokens ({count} here) when "
            "torch.compile drops some; batch prompts with equal images, or use vlmopt.optimize",
        )
    graph.erase_node(after)


# -- canonical form ----------------------------------------------------------------------------


def canonical_dynamo_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph of Dynamo's as functional pre-dispatch ATen, with the same inputs and outputs.

    Module paths and source lines survive; sizes that Dynamo left open stay open.

    Raises:
        PreconditionError: the graph writes into one of its inputs.
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta["example_value"] for node in placeholders]
    mode = next(value.fake_mode for value in examples if isinstance(value, FakeTensor))
    retrace = _Retrace(gm, keep_gradients_out=torch.is_grad_enabled())
    written: list[str] = []

    def run(*values: Any) -> Any:
        result = retrace.run(*values)
        written.extend(
            node.name
            for node, value in zip(placeholders, values, strict=True)
            if isinstance(value, FunctionalTensor)
            and torch._functionalize_has_data_mutation(value.elem)  # type: ignore[attr-defined]
        )
        return result

    functional = dispatch_functionalize(run, FunctionalTensorMode(pre_dispatch=True, export=True))
    # gradients are left to AOTAutograd, which differentiates the rewritten graph
    with torch.no_grad(), mode, preserve_node_meta():
        inputs = [_settled(value) for value in examples]
        traced: fx.GraphModule = make_fx(functional, pre_dispatch=True)(*inputs)
    if written:
        raise PreconditionError(
            f"the graph that holds the visual tokens writes into its input {written[0]}",
            hint="call the model without a static cache, or use vlmopt.optimize",
        )
    for node, source, value in zip(
        traced.graph.find_nodes(op="placeholder"), placeholders, inputs, strict=True
    ):
        # AOTAutograd reads off these which inputs are parameters
        node.meta = {**source.meta, "val": value, **node.meta}
        node._dynamo_source = getattr(source, "_dynamo_source", None)
    _tidy(traced)
    traced.meta.update(gm.meta)
    return traced


def _settled(value: Any) -> Any:
    """An input for the trace: open sizes that a guard has settled become plain integers."""
    if isinstance(value, torch.SymInt):
        return _settled_size(value)
    if not isinstance(value, torch.Tensor):
        return value
    sizes = (*value.shape, *value.stride())
    if not any(_settled_size(size) is not size for size in sizes):
        # a scalar that stands for a Python number must stay itself: it remembers its symbol
        return value.detach() if value.requires_grad else value
    return torch.empty_strided(
        [_settled_size(size) for size in value.shape],
        [_settled_size(step) for step in value.stride()],
        dtype=value.dtype,
        device=value.device,
    )


def _settled_size(size: Any) -> Any:
    if isinstance(size, torch.SymInt) and size.node.expr.is_number:
        return int(size)
    return size


def _tidy(traced: fx.GraphModule) -> None:
    graph = traced.graph
    values = graph.output_node().args[0]
    graph.output_node().args = (tuple(values) if isinstance(values, (list, tuple)) else (values,),)
    graph.set_codegen(fx.graph.CodeGen())
    simplify(graph)
    used = {str(node.target) for node in graph.find_nodes(op="get_attr")}
    for name, value in list(vars(traced).items()):  # constants of the trace
        if isinstance(value, torch.Tensor):
            delattr(traced, name)
            if name in used:
                traced.register_buffer(name, value)
    for table in (traced._parameters, traced._buffers):
        for name in set(table) - used:
            del table[name]
    traced.recompile()


class _Retrace(fx.Interpreter):
    """Runs Dynamo's graph; switches of autograd and autocast act, but are not recorded."""

    def __init__(self, gm: fx.GraphModule, *, keep_gradients_out: bool) -> None:
        super().__init__(gm)
        self.frozen: set[fx.Node] = set()
        enabled = keep_gradients_out
        for node in gm.graph.nodes:
            if node.target is torch._C._set_grad_enabled:
                enabled = bool(node.args[0])
            elif keep_gradients_out and not enabled:
                self.frozen.add(node)

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        leaves = any(user not in self.frozen for user in n.users)
        if n in self.frozen and n.op.startswith("call") and leaves:
            # what a no_grad block computed must not pass gradients on
            return pytree.tree_map_only(torch.Tensor, aten.detach.default, result)
        return result

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target is torch._C._set_grad_enabled:
            return None
        if target in (_enter_autocast, _exit_autocast):
            with torch._C.DisableTorchFunction():
                return target(*args, **kwargs)
        return super().call_function(target, args, kwargs)


_enter_autocast = torch.amp.autocast_mode._enter_autocast
_exit_autocast = torch.amp.autocast_mode._exit_autocast
