"""The ``torch.compile`` door: ``torch.compile(model, backend="vlmopt", options={"passes": ...})``.

Dynamo hands over torch-level graphs. The one in which image features are written into text
embeddings is brought into canonical form, rewritten by the pipeline, and given to Inductor, which
differentiates it too. So is one that holds a vision encoder, by passes that work on encoders. Where
all tokens of a graph are text, passes that need no vision apply. Every other graph goes to Inductor
as it came.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx

from vlmopt.analysis.experts import find_experts
from vlmopt.analysis.layers import find_layers
from vlmopt.annotation import annotated_model_runs
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.lowering.dynamo_encoder import (
    EncoderBlocks,
    find_encoder_blocks,
    fixed_sizes,
    may_hold_encoder,
    put_back,
    take_encoder,
    takes_images,
)
from vlmopt.lowering.dynamo_graph import canonical_dynamo_graph
from vlmopt.lowering.dynamo_tokens import (
    KEPT,
    VisualTokens,
    embeds_ids,
    find_visual_tokens,
    fixed_counts,
    may_choose_experts,
    may_hold_visual_tokens,
)
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.passes import Pass
from vlmopt.pipeline.spec import parse_pipeline
from vlmopt.program import Modality, Port, Program, Stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.rewrite.streams import require_no_streams

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
        mode: as for Inductor. ``torch.compile`` takes no options beside it.

    Raises:
        OptionError: an option that neither vlmopt nor Inductor knows.
        VlmoptError: of the pipeline.
    """
    chosen = _Options.read(options or {}, mode)
    if chosen.passes is None:
        return chosen.lower(gm, example_inputs)
    # a mistake in it must not wait for a graph with an image
    passes = parse_pipeline(chosen.passes)
    for one in passes:
        if one.needs_capture:
            raise OptionError(
                f"{one.name} cannot work under torch.compile: {one.needs_capture}",
                hint="vlmopt.optimize(model, inputs, passes)",
            )
    shown = _shown_vision(gm, passes, options) or _text_alone(gm, passes, options)
    if shown is None:
        log.debug("graph of %d nodes: left to Inductor", len(gm.graph.nodes))
        return chosen.lower(gm, example_inputs)
    with torch._C._DisableAutocast():  # its casts are in the graph now
        rewritten = _rewritten(shown)
        return _without_autocast(chosen.lower(rewritten, example_inputs))


def _without_autocast(compiled: Compiled) -> Compiled:
    @functools.wraps(compiled)
    def run(*args: Any) -> Any:
        with torch._C._DisableAutocast():
            return compiled(*args)

    return run


@dataclass(frozen=True)
class _Options:
    passes: str | None
    lowering: str
    inductor: Compiled

    @classmethod
    def read(cls, options: Mapping[str, Any], mode: str | None) -> _Options:
        from torch._inductor import config

        settings = {k: v for k, v in options.items() if k not in ("passes", "lowering")}
        known = config.get_config_copy()
        for key in settings:
            if key.replace("-", "_") not in known:  # as Inductor spells it
                raise OptionError(
                    f"torch.compile option {key!r} is neither vlmopt's nor Inductor's",
                    hint="vlmopt's are passes and lowering; torch._inductor.list_options() lists "
                    "the others",
                )
        passes = options.get("passes")
        if passes is not None and not isinstance(passes, str):
            raise OptionError(
                f"option passes is {passes!r}, not the text of a pipeline",
                hint='such as "v2drop{layers=3 keep=0.5}"',
            )
        lowering = options.get("lowering", "inductor")
        if lowering not in LOWERINGS:
            raise OptionError(f"option lowering is {lowering!r}, not one of {', '.join(LOWERINGS)}")
        try:  # what torch.compile itself makes of backend="inductor"
            inductor = torch._TorchCompileInductorWrapper(mode, settings, None)
        except RuntimeError as error:
            raise OptionError(f"Inductor does not take these settings: {error}") from error
        return cls(passes, lowering, inductor)

    def lower(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Compiled:
        if self.lowering == "eager":
            return gm.forward  # type: ignore[no-any-return]
        return self.inductor(gm, example_inputs)  # type: ignore[no-any-return]


# -- which graph ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Shown:
    """A graph that passes can work on.

    Attributes:
        module: in canonical form.
        passes: those that have something to do in it.
        visual, counts: its visual tokens, and how many each sample has; ``None`` and none of text
            alone, and where no pass asks for them.
        blocks: its vision encoder, where a pass asks for it.
    """

    module: fx.GraphModule
    passes: tuple[Pass, ...]
    visual: VisualTokens | None = None
    counts: tuple[int, ...] = ()
    blocks: EncoderBlocks | None = None


def _shown_vision(
    gm: fx.GraphModule, passes: Sequence[Pass], options: Mapping[str, Any] | None
) -> _Shown | None:
    """``gm``, if it shows visual tokens, or a vision encoder, and passes that ask for these."""
    look = _Look(
        tokens=not all(one.in_encoder for one in passes)
        and may_hold_visual_tokens(gm, marked=annotated_model_runs()),
        encoder=any(one.in_encoder for one in passes) and may_hold_encoder(gm),
        options=options,
    )
    if not look.tokens and not look.encoder:
        return None
    canonical, written = canonical_dynamo_graph(gm)
    found, blocks = look.at(canonical.graph)
    if found is None and blocks is None:
        return None
    _check_written(written)
    counts = fixed_counts(found) if found is not None else []
    sizes = fixed_sizes(blocks) if blocks is not None else []
    if found is not None:
        sizes += [found.batch, found.total]
    if any(isinstance(size, torch.SymInt) for size in sizes):
        # fixing them settled symbols that the trace still holds open
        canonical, _ = canonical_dynamo_graph(gm)
        found, blocks = look.at(canonical.graph)
    asked = {True: blocks is not None, False: found is not None}
    own = tuple(one for one in passes if asked[one.in_encoder])
    return _Shown(canonical, own, found, tuple(counts), blocks)


@dataclass(frozen=True)
class _Look:
    """What passes ask a graph for: visual tokens in front of a decoder, a vision encoder."""

    tokens: bool
    encoder: bool
    options: Mapping[str, Any] | None

    def at(self, graph: fx.Graph) -> tuple[VisualTokens | None, EncoderBlocks | None]:
        """Those of a canonical graph that passes can work on."""
        found = find_visual_tokens(graph)
        blocks = None
        if self.encoder:
            blocks = find_encoder_blocks(graph, found.anchor if found is not None else None)
            if blocks is None and takes_images(graph):
                _warn_once(_NO_BLOCKS, self.options)
        if found is None or not self.tokens:
            return None, blocks
        if not found.enters_layers:
            _warn_of_graph_break(found, self.options)
            return None, blocks
        return found, blocks


_NO_BLOCKS = (
    "vlmopt: this graph takes images, but holds no list of blocks that attend to their patches (by "
    "scaled_dot_product_attention), so that passes for vision encoders do not apply; a graph break "
    "may separate them: use vlmopt.optimize(model, inputs, passes)"
)


def _text_alone(
    gm: fx.GraphModule, passes: Sequence[Pass], options: Mapping[str, Any] | None
) -> _Shown | None:
    """``gm``, if it routes tokens to experts, all of them are text, and passes need no vision."""
    passes = tuple(one for one in passes if not (one.needs_vision or one.in_encoder))
    if not passes or not may_choose_experts(gm):
        return None
    canonical, written = canonical_dynamo_graph(gm)
    stage = Stage("model", canonical, (), ())
    found = find_experts(stage)
    if not found.blocks and not found.misses:
        return None
    if not embeds_ids(find_layers(stage).entries[0]):
        if not annotated_model_runs():
            _warn_once(
                "vlmopt: this graph routes tokens to experts, but does not show which of them come "
                "from vision, so that its passes do not apply; call the model with input_ids, call "
                "vlmopt.annotate(model) before torch.compile if it takes images, or use "
                "vlmopt.optimize(model, inputs, passes)",
                options,
            )
        return None
    _check_written(written)
    return _Shown(canonical, passes)


def _check_written(names: list[str]) -> None:
    if names:
        raise PreconditionError(
            f"the graph that passes would rewrite writes into its input {names[0]}",
            hint="call the model without a static cache, or use vlmopt.optimize",
        )


_warned: dict[tuple[int, str], Mapping[str, Any] | None] = {}


def _warn_of_graph_break(found: VisualTokens, options: Mapping[str, Any] | None) -> None:
    if found.marked:
        message = (
            "vlmopt: graph breaks inside the decoder of this annotated model keep its layers out "
            "of the graph that holds the visual tokens, so that its passes do not apply; use "
            "vlmopt.optimize(model, inputs, passes)"
        )
    else:
        message = (
            "vlmopt: a graph break separates the visual tokens from the decoder of this model, so "
            "that its passes do not apply; call vlmopt.annotate(model) before torch.compile, or "
            "use vlmopt.optimize(model, inputs, passes)"
        )
    _warn_once(message, options)


def _warn_once(message: str, options: Mapping[str, Any] | None) -> None:
    """Once for each call of ``torch.compile``: its options are one object for all graphs."""
    if (id(options), message) not in _warned:
        _warned[id(options), message] = options  # held, so that no other object gets its id
        warnings.warn(message, stacklevel=2)


# -- its rewrite ---------------------------------------------------------------------------------


def _rewritten(shown: _Shown) -> fx.GraphModule:
    """The graph after the passes, with as many outputs as before."""
    module, stages = shown.module, []
    inputs: dict[str, str] = {}
    if shown.blocks is not None:
        encoder, inputs = take_encoder(module, shown.blocks)
        stages.append(encoder)
    tokens = None
    if not all(one.in_encoder for one in shown.passes):
        tokens = _Tokens.of(module, shown.visual, list(shown.counts))
        stages.append(tokens.stage)
    program = Program({stage.name: stage for stage in stages}, model_type="torch.compile")
    report = run_pipeline(program, shown.passes)
    log.debug(
        "%s on a graph with %s visual tokens: %s",
        report.pipeline,
        list(shown.counts),
        [dict(record.result.statistics) for record in report.records],
    )
    require_no_streams(program)
    if tokens is not None:
        tokens.finish()
        module = tokens.stage.graph_module
    if shown.blocks is not None:
        put_back(encoder, module, inputs)
    return module


@dataclass(frozen=True)
class _Tokens:
    """A graph in which tokens flow, as a stage, and how its outputs were arranged.

    Attributes:
        found, counts: visual tokens, and how many each sample has; ``None`` and none of text alone.
        results: what the graph gave; of a window, what it is the end of.
        windows: by place among these.
    """

    stage: Stage
    found: VisualTokens | None
    counts: list[int]
    results: list[Any]
    windows: dict[int, _Window]

    @classmethod
    def of(cls, module: fx.GraphModule, found: VisualTokens | None, counts: list[int]) -> _Tokens:
        results: list[Any] = list(module.graph.output_node().args[0])  # type: ignore[arg-type]
        windows = {at: window for at, value in enumerate(results) if (window := _Window.of(value))}
        for at, window in windows.items():
            results[at] = window.source
        stage = _stage(module, found, counts, [v for v in results if isinstance(v, fx.Node)])
        return cls(stage, found, counts, results, windows)

    def finish(self) -> None:
        """Arrange the outputs of the rewritten stage as those of the graph were."""
        stage, graph, results = self.stage, self.stage.graph, list(self.results)
        # what passes added to the outputs is for vlmopt's runtime, which has no part in this
        values = iter(zip(stage.outputs, graph.output_node().args[0], strict=True))  # type: ignore[arg-type]
        emit = _emitter(stage, graph.output_node())
        known = stage.facts.get("modality")
        prompt = cast("Any", next((n for n in graph.nodes if n.name == known), None))
        with graph.inserting_before(graph.output_node()):
            for at, value in enumerate(results):
                if isinstance(value, fx.Node):
                    port, results[at] = next(values)
                    if at in self.windows:
                        kept = stage.output_node(port.kept) if port.kept else None
                        results[at] = self.windows[at].put_back(emit, results[at], kept, prompt)
            unchecked = self.found is not None and not self.found.counts
            if unchecked and stage.cuts and len(self.counts) > 1:
                _assert_equal_counts(emit, prompt, self.counts[0])
        last_kept = stage.output_node(stage.last_cut.kept) if stage.last_cut else None
        graph.output_node().args = (tuple(results),)
        for node in graph.find_nodes(op="call_function", target=KEPT):
            if last_kept is not None:
                node.replace_all_uses_with(last_kept)
        graph.eliminate_dead_code()
        graph.lint()
        stage.graph_module.recompile()


def _stage(
    module: fx.GraphModule, found: VisualTokens | None, counts: list[int], outputs: list[fx.Node]
) -> Stage:
    """The graph as a stage, with the modality of its tokens computed inside."""
    graph = module.graph
    graph.output_node().args = (tuple(outputs),)
    graph.eliminate_dead_code()
    stage = Stage(
        "model",
        module,
        tuple(Port(node.name) for node in graph.find_nodes(op="placeholder")),
        tuple(Port(f"output_{index}") for index in range(len(outputs))),
    )
    if found is None:
        module.recompile()
        return stage

    def read(*masks: Tensor) -> Tensor:
        rows = [mask[..., 0] if mask.ndim == 3 else mask for mask in masks]
        visual = rows[0].expand(len(counts), -1)
        for more in rows[1:]:
            visual = visual | more
        return visual.to(torch.int64) * (Modality.VISION - Modality.TEXT) + Modality.TEXT

    anchor = found.anchor
    with graph.inserting_before(anchor):
        modality = _emitter(stage, anchor).trace(read, *found.masks, names=("modality",))
    if found.marked:
        embeds: Any = anchor.args[0]
        anchor.replace_all_uses_with(embeds)
        graph.erase_node(anchor)
        anchor = embeds
    module.recompile()
    stage.facts = {  # the number of tokens may be open
        "visual_tokens": counts,
        "batch": len(counts),
        "anchor": anchor.name,
        "modality": modality.name,
    }
    return stage


def _emitter(stage: Stage, place: fx.Node) -> Emitter:
    return Emitter(
        stage.graph,
        stamp=lambda node: None,
        place=place,
        prefix="vlmopt",
        fake_mode=stage.fake_mode(),
    )


def _assert_equal_counts(emit: Emitter, modality: fx.Node, count: int) -> None:
    """The graph is made for one number of visual tokens per sample: check it at run time."""

    def equal(modality: Tensor) -> Tensor:
        return ((modality == Modality.VISION).sum(1) == count).all()

    right = emit.trace(equal, modality, names=("equal",))
    emit.call(
        aten._assert_async.msg,
        right,
        f"vlmopt: the samples of this batch do not all have {count} visual tokens; call "
        "vlmopt.annotate(model) before torch.compile: then each may have its own number",
    )


@dataclass(frozen=True)
class _Window:
    """An output that holds the last tokens of ``source``: the cache of sliding-window attention.

    Attributes:
        source: ``[batch, ..., tokens, ...]``, tokens along ``dim``.
        length: tokens in the window.
    """

    source: fx.Node
    dim: int
    length: int

    @classmethod
    def of(cls, value: Any) -> _Window | None:
        if not isinstance(value, fx.Node) or value.target is not aten.slice.Tensor:
            return None
        left_out: tuple[Any, ...] = (0, None, None, 1)[len(value.args) - 1 :]
        source, dim, start, end, step = cast("Any", (*value.args, *left_out))
        to_the_end = end is None or (isinstance(end, int) and end == 2**63 - 1)
        if not (isinstance(start, int) and start < 0 and to_the_end and step == 1 and dim > 0):
            return None
        return cls(source, dim, -start)

    def put_back(
        self, emit: Emitter, source: fx.Node, kept: fx.Node | None, prompt: fx.Node
    ) -> fx.Node:
        """The window over what is left of ``source``.

        Of the prompt's last tokens some may be gone. Earlier ones that take their places in the
        window must not pass for them: they become NaN.

        Args:
            kept: slots of the tokens left, where some were dropped.
            prompt: any value ``[batch, tokens]`` over the whole prompt.
        """
        if kept is None:
            return emit.call(aten.slice.Tensor, source, self.dim, -self.length)

        def window(tensor: Tensor, kept: Tensor, prompt: Tensor) -> Tensor:
            slots = kept[:, -self.length :]
            tokens = prompt.shape[1]
            last = torch.arange(tokens - slots.shape[1], tokens, device=slots.device)
            shape = [slots.shape[0], *[1] * (tensor.ndim - 1)]
            shape[self.dim] = slots.shape[1]
            part = tensor.narrow(self.dim, tensor.shape[self.dim] - slots.shape[1], slots.shape[1])
            return torch.where((slots == last).view(shape), part, float("nan"))

        return emit.trace(window, source, kept, prompt, names=("window",))
