"""``vlmopt.optimize``: a drop-in model whose language model runs as rewritten graphs.

The result is a shallow twin of the user's Hugging Face model: same class, same weights, same
``generate()``. Its decoder hands prompts with images to the rewritten prefill stage, and decoding
steps go to the rewritten decode stage; so does its vision encoder, where a pass has rewritten
that. Everything else runs as it was.
"""

from __future__ import annotations

import copy
import logging
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial, update_wrapper
from typing import Any

import torch
from torch import nn
from transformers import Cache

from vlmopt import families
from vlmopt.encoding import named_tensors
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.lowering.experts import (
    has_skipped_rows,
    with_kernels,
    with_shapes_of_data,
    without_skipped_rows,
)
from vlmopt.lowering.in_place import written_in_place
from vlmopt.lowering.onednn import with_packed_weights
from vlmopt.lowering.shared_attention import has_shared_attention, with_shared_attention
from vlmopt.pipeline.manager import Report, run_pipeline
from vlmopt.program import Modality, Program, Role, Stage
from vlmopt.rewrite.streams import require_no_streams
from vlmopt.runtime.cache import RaggedCache
from vlmopt.runtime.encoder import (
    RETRIEVED,
    Encoded,
    EncoderModules,
    EncoderStage,
    runs_encoder,
)
from vlmopt.tracing import capture, layout_of, modality_of, submodules

_log = logging.getLogger("vlmopt")

BACKENDS = ("inductor", "onednn", "eager")


def optimize(model: nn.Module, inputs: Any, passes: str, *, backend: str = "inductor") -> Any:
    """Capture ``model``, rewrite it by ``passes``, compile it.

    Args:
        model: a Hugging Face vision-language model, or any ``nn.Module``. It is not changed, and
            shares its weights with the result.
        inputs: example inputs, as for :func:`vlmopt.capture`. Prompts of other shapes work too:
            each new shape is captured when it first appears.
        passes: pipeline text.
        backend: ``"inductor"``; ``"onednn"``, the same with linear layers on packed weights, which
            is faster on most CPUs and takes the memory of the weights a second time (see
            :mod:`vlmopt.lowering.onednn`); or ``"eager"`` to run the rewritten graphs as they are.

    Returns:
        For a generative model, a model of the same class with ``forward`` and ``generate``; its
        ``vlmopt`` attribute is an :class:`Engine` with the report and the rewritten program.
        ``forward`` returns logits for the tokens that are left. For a plain module, a module with
        the same ``forward``.

    Raises:
        OptionError: unknown backend.
        PreconditionError: ``"onednn"`` has nothing to do on this device or in this dtype.
        VlmoptError: see :func:`vlmopt.capture` and :func:`~vlmopt.pipeline.manager.run_pipeline`.
    """
    require_backend(backend)
    if isinstance(inputs, Mapping):
        inputs = {name: value for name, value in inputs.items() if name not in RETRIEVED}
    program = capture(model, inputs)
    report = run_pipeline(program, passes)
    require_no_streams(program)
    if {"model", "denoiser"} & program.stages.keys():
        return OptimizedModule(program, report, backend)
    engine = Engine(model, partial(run_pipeline, pipeline=passes), backend)
    engine.add(program, report, inputs)
    return engine.twin


class OptimizedModule(nn.Module):
    """A captured plain module, rewritten and compiled; called as the module was."""

    def __init__(self, program: Program, report: Report, backend: str) -> None:
        super().__init__()
        self.program = program
        self.report = report
        self._stage = next(iter(program))
        self._run = compile_stage(self._stage, backend)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        ports = self._stage.inputs
        named = dict(zip((port.name for port in ports), args, strict=False)) | kwargs
        results = self._run(*(named[port.name] for port in ports))
        return results[0] if len(results) == 1 else results


def require_backend(backend: str) -> None:
    """Raise an OptionError for a backend that there is not."""
    if backend not in BACKENDS:
        raise OptionError(
            f"there is no backend {backend!r}", hint=f"choose one of {', '.join(BACKENDS)}"
        )


def compile_stage(
    stage: Stage, backend: str, *, writes: Mapping[int, str] | None = None
) -> Callable[..., tuple[torch.Tensor, ...]]:
    """A stage as a function of its inputs, in order.

    Args:
        writes: outputs that are not returned but written into inputs, by their number; see
            :func:`vlmopt.lowering.in_place.written_in_place`.
    """
    gm = with_packed_weights(stage.graph_module) if backend == "onednn" else stage.graph_module
    skips = backend != "eager" and has_skipped_rows(gm)
    if backend != "eager":
        gm = with_kernels(gm)
        if has_shared_attention(gm):
            gm = with_shared_attention(gm)
        gm = without_skipped_rows(gm) if skips else gm
    if writes:
        gm = written_in_place(gm, writes)
    if backend == "eager":
        return gm
    compiled = torch.compile(gm, dynamic=stage.name == "decode")
    return with_shapes_of_data(compiled) if skips else compiled


@dataclass(frozen=True)
class _Key:
    """What a specialised prefill graph is good for."""

    batch: int
    tokens: int
    visual: tuple[int, ...]
    padded: bool
    layout: str = ""
    """where the visual tokens stand, if graphs are made for that too"""
    grids: str = ""
    """sizes of the images, if graphs are made for those too"""


class Specialisation:
    """Compiled prefill and decode stages for one shape of prompts."""

    def __init__(self, program: Program, report: Report | None, backend: str) -> None:
        self.program = program
        self.report = report
        self.prefill_stage = program["language_model"]
        self.decode_stage = program["decode"]
        self.encoder: EncoderStage | None = None
        if runs_encoder(program):
            self.encoder = EncoderStage(program, partial(compile_stage, backend=backend))
        self._prefill = compile_stage(self.prefill_stage, backend)
        self._decode = compile_stage(self.decode_stage, backend)

    def prefill(self, values: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, RaggedCache]:
        """What the decoder returns for the tokens that are left, and the cache to continue from.

        That is hidden states, or logits where the decoder is a language model with its head.
        """
        stage = self.prefill_stage
        results = self._prefill(*arguments_of(stage, values))
        by_role: dict[Role, list[torch.Tensor]] = {
            role: [] for role in (Role.HIDDEN_STATES, Role.LOGITS, Role.KEY, Role.VALUE)
        }
        kept: dict[str, torch.Tensor] = {}
        reported: dict[str, torch.Tensor] = {}
        for port, value in zip(stage.outputs, results, strict=True):
            if port.role is Role.KEPT:
                kept[f"{port.name}_slots"] = value
            elif port.role is Role.COUNTS:
                reported[port.name] = value
            elif port.role in by_role:
                by_role[port.role].append(value)
        cache = RaggedCache(kept, stage.facts["tokens"], self)
        cache.reported = reported
        for layer, pair in enumerate(zip(by_role[Role.KEY], by_role[Role.VALUE], strict=True)):
            cache.update(*pair, layer)
        return (by_role[Role.HIDDEN_STATES] + by_role[Role.LOGITS])[0], cache

    def decode(self, values: Mapping[str, Any], cache: RaggedCache) -> torch.Tensor:
        """Logits of one more token; ``cache`` grows by it."""
        stage = self.decode_stage
        past = {
            port.name: getattr(cache.layers[port.layer], _FIELDS[port.role])
            for port in stage.inputs
            if port.role in _FIELDS and port.layer is not None
        }
        results = self._decode(*arguments_of(stage, {**values, **past, **cache.kept}))
        logits: torch.Tensor | None = None
        for port, value in zip(stage.outputs, results, strict=True):
            if port.role in _FIELDS and port.layer is not None:
                setattr(cache.layers[port.layer], _FIELDS[port.role], value)
            elif port.role is Role.LOGITS:
                logits = value
        cache.seen += 1
        assert logits is not None, "the decode stage of a generative model has logits"
        return logits


_FIELDS = {Role.KEY: "keys", Role.VALUE: "values"}


def arguments_of(stage: Stage, values: Mapping[str, Any]) -> list[torch.Tensor]:
    """The inputs of a stage in order, by the names of its ports.

    Raises:
        PreconditionError: some are not there.
    """
    missing = [port.name for port in stage.inputs if values.get(port.name) is None]
    if missing:
        raise PreconditionError(
            f"stage {stage.name} needs {', '.join(missing)}",
            hint="call the model with the inputs that its processor returns",
        )
    return [values[port.name] for port in stage.inputs]


@dataclass
class _Prompt(Encoded):
    """A prompt between the model's forward and its decoder's.

    Attributes:
        ids, modality: int64 ``[batch, tokens]``.
        specialisation: the graphs for it, ``None`` when it runs as in the original model.
        retrieved: embeddings of a retriever.
    """

    ids: torch.Tensor
    modality: torch.Tensor
    specialisation: Specialisation | None
    retrieved: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Engine:
    """Specialisations of one model, made when a prompt of a new shape appears.

    They are kept for as long as the engine lives: weights are shared, so each costs its graphs and
    compiled code only. Threads may generate at the same time.

    Attributes:
        twin: the drop-in model.
        capture: makes a program for inputs of a new shape.
        rewrite: what is done to each such program, in place.
        specialisations: by shape of the prompt.
    """

    def __init__(
        self, model: Any, rewrite: Callable[[Program], Report | None], backend: str
    ) -> None:
        self.model = model
        self.rewrite = rewrite
        self.capture: Callable[[dict[str, Any]], Program] = partial(capture, model)
        self.backend = backend
        self.specialisations: dict[_Key, Specialisation] = {}
        self._fixed = False  # whether graphs are made for one layout of prompts
        self._sized = False  # whether graphs are made for one size of images
        self._textual = False  # whether graphs are made for prompts without images
        self._retrieved: tuple[str, ...] = ()  # arguments that only a rewritten encoder takes
        self._running = threading.local()
        parts = submodules(model)
        self._text_model = not parts  # its language model is all of it
        self._modules = EncoderModules(parts.get("vision_encoder"), parts.get("projector"))
        replaced = {
            model.get_decoder(): self._decoder_forward,
            self._modules.encoder: self._encoder_forward,
            self._modules.projector: self._projector_forward,
        }
        self.twin = twin_of(model, self._forward, replaced)
        self.twin.vlmopt = self
        # encoded beforehand, images would not be there for the prompt that they belong to
        self.twin._supports_mm_encoder_outputs = lambda: (
            bool(self.specialisations) and not self._sized and model._supports_mm_encoder_outputs()
        )
        self.twin._validate_model_kwargs = lambda given: model._validate_model_kwargs(
            {name: value for name, value in given.items() if name not in self._retrieved}
        )
        self.twin.train = self._train

    @property
    def program(self) -> Program:
        """The rewritten program of the latest shape."""
        return list(self.specialisations.values())[-1].program

    @property
    def report(self) -> Report:
        """What the pipeline did to the latest shape."""
        report = list(self.specialisations.values())[-1].report
        assert report is not None, "made by a pipeline"
        return report

    def add(
        self, program: Program, report: Report | None, inputs: Mapping[str, Any]
    ) -> Specialisation:
        """Use ``program`` for prompts shaped as those that it was captured with.

        Args:
            inputs: of the capture.
        """
        made = Specialisation(program, report, self.backend)
        self._fixed = any(cut.slots for cut in made.prefill_stage.cuts)
        self._sized = made.encoder is not None
        self._retrieved = tuple(made.encoder.retrieved) if made.encoder is not None else ()
        visual = families.visual_token_ids(self.model.config)
        modality = modality_of(inputs["input_ids"], inputs.get("attention_mask"), visual)
        self._textual = self._textual or not bool((modality == Modality.VISION).any())
        self.specialisations[self._key(modality, inputs)] = made
        return made

    def _key(self, modality: torch.Tensor, inputs: Mapping[str, Any]) -> _Key:
        return _Key(
            modality.shape[0],
            modality.shape[1],
            tuple(int(n) for n in (modality == Modality.VISION).sum(1)),
            bool((modality == Modality.PADDING).any()),
            str(layout_of(modality)) if self._fixed else "",
            _grids(inputs, modality) if self._sized else "",
        )

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """``forward`` of the twin: a decoding step, or a prompt through the original's code."""
        cache = kwargs.get("past_key_values")
        ids = args[0] if args else kwargs.get("input_ids")
        retrieved = {name: kwargs.pop(name) for name in self._retrieved if name in kwargs}
        if isinstance(cache, RaggedCache):
            return self._step(ids, cache, kwargs)
        original = type(self.model).forward
        if ids is None:
            warnings.warn(
                "vlmopt: a prompt given as embeddings does not show which tokens come from vision, "
                "so it runs as in the original model; give input_ids",
                stacklevel=2,
            )
            return original(self.twin, *args, **kwargs)
        visual = families.visual_token_ids(self.model.config)
        modality = modality_of(ids, kwargs.get("attention_mask"), visual)
        specialisation = None
        past = kwargs.get("past_key_values")
        if self._textual or bool((modality == Modality.VISION).any()):
            self._require_supported(kwargs)
            if past is None or past.get_seq_length() == 0:
                specialisation = self._specialisation(modality, {**kwargs, "input_ids": ids})
        self._running.prompt = _Prompt(ids, modality, specialisation, retrieved=retrieved)
        try:
            if specialisation is not None and self._text_model:
                result = self._whole(kwargs)
            else:
                result = original(self.twin, *args, **kwargs)
        finally:
            self._running.prompt = None
        if kwargs.get("use_cache") is False and not isinstance(result, tuple):
            result.past_key_values = None
        return result

    def _require_supported(self, kwargs: dict[str, Any]) -> None:
        """Refuse what the rewritten graphs would silently not do."""
        for flag in ("output_attentions", "output_hidden_states"):
            chosen = kwargs.get(flag)
            if getattr(self.model.config, flag, False) if chosen is None else chosen:
                raise PreconditionError(
                    f"an optimized model does not return what {flag} asks for",
                    hint="ask the original model",
                )
        if kwargs.get("labels") is not None:
            raise PreconditionError(
                "an optimized model returns logits for the tokens left, which labels do not match",
                hint="take the loss of the original model, or train through torch.compile",
            )
        if isinstance(kwargs.get("logits_to_keep"), torch.Tensor):
            raise PreconditionError(
                "logits_to_keep lists tokens by position, and an optimized model drops some",
                hint="give a number: that many last tokens",
            )
        cache = kwargs.get("past_key_values")
        if isinstance(cache, Cache) and cache.is_compileable:
            raise PreconditionError(
                f"a {type(cache).__name__} holds equally many tokens in each layer, and an "
                "optimized model does not",
                hint="generate without cache_implementation",
            )

    def _train(self, mode: bool = True) -> Any:
        if mode:
            raise PreconditionError(
                "an optimized model is captured in eval mode and cannot be trained",
                hint="train the original, or torch.compile(model, backend='vlmopt', options=...)",
            )
        return self.twin

    def _step(self, ids: torch.Tensor | None, cache: RaggedCache, kwargs: dict[str, Any]) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        if ids is None or ids.shape[1] != 1:
            raise PreconditionError(
                "after a prompt with dropped tokens only one token at a time can be decoded",
                hint="start a new prompt without past_key_values",
            )
        values = {**kwargs, "input_ids": ids}
        if values.get("attention_mask") is None:
            values["attention_mask"] = torch.ones(
                ids.shape[0], cache.seen + 1, dtype=torch.int64, device=ids.device
            )
        logits = cache.made_by.decode(values, cache)
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def _whole(self, kwargs: dict[str, Any]) -> Any:
        """A prompt through a model that is a decoder with its head, and nothing else."""
        from transformers.modeling_outputs import CausalLMOutputWithPast

        result = self._prefill(kwargs)
        assert result is not None, "there are graphs for this prompt"
        logits, cache = result
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)  # type: ignore[arg-type]

    def _encoder_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prompt: _Prompt | None = getattr(self._running, "prompt", None)
        if prompt is None or prompt.specialisation is None:
            return original(*args, **kwargs)
        stage = prompt.specialisation.encoder
        if stage is None:
            return original(*args, **kwargs)
        return self._modules.encode(stage, prompt, original, args, kwargs, prompt.retrieved)

    def _projector_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        prompt: _Prompt | None = getattr(self._running, "prompt", None)
        if prompt is None:
            return original(*args, **kwargs)
        stage = prompt.specialisation.encoder if prompt.specialisation else None
        return self._modules.project(stage, prompt, original, args, kwargs)

    def _decoder_forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        from transformers.modeling_outputs import MoeModelOutputWithPast

        result = self._prefill(kwargs) if not args else None
        if result is None:
            return original(*args, **kwargs)
        hidden, cache = result
        # what every decoder's output has, and the router's of those with experts
        return MoeModelOutputWithPast(last_hidden_state=hidden, past_key_values=cache)

    def _specialisation(self, modality: torch.Tensor, inputs: dict[str, Any]) -> Specialisation:
        key = self._key(modality, inputs)
        specialisation = self.specialisations.get(key)
        if specialisation is None:
            _log.info("capturing prompts of shape %s", key)
            given = _generate_inputs(inputs)
            program = self.capture(given)
            specialisation = self.add(program, self.rewrite(program), given)
        return specialisation

    def _prefill(self, kwargs: dict[str, Any]) -> tuple[torch.Tensor, RaggedCache] | None:
        """Run a prompt on the rewritten stage; ``None`` when there is none for it."""
        prompt: _Prompt | None = getattr(self._running, "prompt", None)
        if prompt is None or prompt.specialisation is None:
            return None
        modality, specialisation = prompt.modality, prompt.specialisation
        values: dict[str, Any] = dict(named_tensors(kwargs)) | {"modality": modality}
        values.setdefault("input_ids", prompt.ids)
        if specialisation.encoder is not None:
            values |= prompt.tokens(specialisation.encoder, modality)
        if "attention_mask" not in values:
            values["attention_mask"] = (modality != Modality.PADDING).long()
        values["position_ids"] = positions_for(
            specialisation.prefill_stage, values.get("position_ids"), modality
        )
        result, cache = specialisation.prefill(values)
        last = kwargs.get("logits_to_keep")
        return (result[:, -last:] if last else result), cache


def _grids(inputs: Mapping[str, Any], modality: torch.Tensor) -> str:
    """Sizes of images and grids among the inputs of a model."""
    small = {
        name: value.tolist()
        for name, value in sorted(inputs.items())
        if isinstance(value, torch.Tensor)
        and not value.is_floating_point()
        and value.shape[-1:] != modality.shape[-1:]  # no value for each token
    }
    return str(small)


def _refuse_to_move(*args: Any, **kwargs: Any) -> Any:
    raise PreconditionError(
        "an optimized model shares its weights with the original, and its graphs are made for "
        "their type and device: it cannot be copied, moved or cast",
        hint="copy, move or cast the original, then optimize that",
    )


def positions_for(
    stage: Stage, positions: torch.Tensor | None, modality: torch.Tensor
) -> torch.Tensor:
    """Positions as the graph takes them, where a direct call of ``forward`` leaves some out.

    A decoder counts from 0 when it gets none; ``generate()`` puts a row of plain text positions
    before the three of M-RoPE.
    """
    ports = stage.find_inputs(Role.POSITION_IDS)
    if positions is None:
        return torch.arange(modality.shape[1], device=modality.device).expand(modality.shape)
    if positions.ndim == 2:  # one row may stand for all samples
        return positions.expand(modality.shape)
    if not ports or positions.ndim != 3:
        return positions
    if positions.shape[0] + 1 != stage.placeholder(ports[0]).meta["val"].shape[0]:
        return positions
    text = ((modality != Modality.PADDING).long().cumsum(-1) - 1).clamp(min=0)
    return torch.cat([text[None], positions])


def _generate_inputs(inputs: dict[str, Any]) -> dict[str, Any]:
    """What ``generate()`` would be called with, from what ``forward()`` was."""
    skip = {*families.OUTPUT_FLAGS, "past_key_values", "position_ids", "cache_position", "labels"}
    return {
        key: value
        for key, value in inputs.items()
        if key not in skip and isinstance(value, torch.Tensor)
    }


def twin_of(
    model: Any, forward: Callable[..., Any], inner: Mapping[nn.Module | None, Callable[..., Any]]
) -> Any:
    """A shallow copy of ``model`` that shares its weights, and runs otherwise.

    The modules around ``inner`` are copied too, so that the originals stay as they are. Signatures
    stay, which ``generate()`` reads.

    Args:
        forward: in place of the model's.
        inner: by module within it, what runs in place of its forward; gets that first. ``None``
            stands for one that the model does not have.
    """
    paths = {module: name for name, module in model.named_modules()}
    copies: dict[nn.Module, Any] = {model: copy.copy(model)}
    present = {module: run for module, run in inner.items() if module is not None}
    for wanted in present:
        module = model
        for name in paths[wanted].split("."):
            parent, module = copies[module], module._modules[name]
            if module not in copies:
                copies[module] = copy.copy(module)
                parent._modules = {**parent._modules, name: copies[module]}
    twin = copies[model]
    twin.forward = update_wrapper(partial(forward), model.forward)
    for original, replaced in present.items():
        copies[original].forward = update_wrapper(
            partial(replaced, original.forward), original.forward
        )
    twin._apply = twin.__deepcopy__ = _refuse_to_move
    return twin
