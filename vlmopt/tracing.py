"""Capture: from a model and example inputs to a :class:`~vlmopt.program.Program`.

Hugging Face models are split and traced by ``transformers.exporters``; any other module by
``torch.export``. Weights may be absent (parameters on the meta device): the graphs are the same,
but the vision encoder gives all that its module returns, and not just what the model reads.
Everything works except running them, and passes that read the encoder.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import logging
import operator
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from vlmopt import families
from vlmopt.artifacts import fingerprint
from vlmopt.encoding import Encoding, describe_encoding, find_encoding
from vlmopt.errors import CaptureError, VlmoptError
from vlmopt.graph.canonical import canonical_graph
from vlmopt.graph.causal import drop_constant_masks
from vlmopt.program import Modality, Port, Program, Role, Stage
from vlmopt.rewrite.emit import propagate
from vlmopt.rewrite.windows import part_unevenly

Inputs = Mapping[str, Any] | Sequence[Any]

_KNOWN_INPUTS = {
    "timestep": Role.TIMESTEP,
    "encoder_attention_mask": Role.ATTENTION_MASK,
}
"""Roles of inputs of plain modules that are called so."""


def capture(
    model: nn.Module, inputs: Inputs, *, roles: Mapping[str, Role] | None = None
) -> Program:
    """Capture ``model`` as a program of fx graphs, specialised to the shapes of ``inputs``.

    Args:
        model: a Hugging Face model that generates, or any ``nn.Module``; eval mode is used and
            the module is left as it was. Parameters on the meta device are fine.
        inputs: keyword inputs as for ``model.generate`` (``input_ids``, ``attention_mask`` and
            image tensors, as a processor returns them); for a plain module keyword or positional
            inputs of ``forward``.
        roles: role of inputs of a plain module, by argument name.

    Returns:
        Stages ``vision_encoder``, ``projector``, ``language_model`` (prefill), ``lm_head`` and
        ``decode`` for a vision-language model (those that the model has); ``denoiser`` for a plain
        module with an input called ``timestep``, else ``model``.

    Raises:
        CaptureError: the model cannot be traced; the message holds the stage and the cause.
    """
    training = model.training
    model.eval()
    try:
        with _fake_weights(model) as mode:
            if _is_generative(model) and isinstance(inputs, Mapping):
                program = _capture_generative(model, dict(inputs), mode)
            else:
                program = _capture_plain(model, inputs, roles or {})
    finally:
        model.train(training)
    program.metadata["weights"] = mode is None
    program.metadata["fingerprint"] = fingerprint(program.model_type, model.parameters())
    return program.clone()  # names given later depend on no node that capture removed


def modality_of(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, visual_ids: Sequence[int]
) -> torch.Tensor:
    """Modality of each token of a prompt, int64 ``[batch, tokens]`` (see ``Modality``)."""
    modality = torch.full_like(input_ids, Modality.TEXT, dtype=torch.int64)
    for token in visual_ids:
        modality[input_ids == token] = Modality.VISION
    if attention_mask is not None and attention_mask.ndim == 2:
        modality[attention_mask[:, -input_ids.shape[1] :] == 0] = Modality.PADDING
    return modality


def submodules(model: Any) -> dict[str, nn.Module]:
    """Modules of a generative model by the name of the stage that they become."""
    from transformers.exporters.utils import _find_multimodal_submodules

    found = {
        families.STAGE_NAMES.get(name, name): module
        for name, module in _find_multimodal_submodules(model).items()
    }
    if "vision_encoder" in found and "projector" not in found:
        for name in families.PROJECTOR_NAMES:
            if isinstance(module := getattr(model.base_model, name, None), nn.Module):
                found["projector"] = module
    return found


def _is_generative(model: nn.Module) -> bool:
    from transformers import GenerationMixin, PreTrainedModel

    return isinstance(model, PreTrainedModel) and isinstance(model, GenerationMixin)


# -- Hugging Face ------------------------------------------------------------------------------


def _capture_generative(model: Any, inputs: dict[str, Any], mode: FakeTensorMode | None) -> Program:
    if model.config.is_encoder_decoder:
        raise CaptureError(
            f"{type(model).__name__} encodes its prompt apart from the text that it writes: its "
            "decoder holds no visual tokens",
            hint="choose a model whose decoder reads the prompt, or capture parts as plain modules",
        )
    with _quiet():
        with _generating(model) if mode else contextlib.nullcontext():
            components, encoded = _components(model, inputs)
        stages: dict[str, Stage] = {}
        facts = _prompt_facts(model, inputs)
        encoding = None if mode else _encoding(model, inputs, encoded)
        for name, (module, kwargs) in components.items():
            if name == "decode":
                _require_keys_of_tokens(model, kwargs, stages.get("language_model"), facts)
                kwargs = _with_full_cache(kwargs, stages.get("language_model"), mode)
            elif name == "lm_head":  # one row is all that generation needs
                kwargs = {key: value[:, -1:] for key, value in kwargs.items()}
            stages[name], given = export_stage(name, module, kwargs)
            if name == "vision_encoder" and encoding is not None:
                _keep_read_outputs(stages[name], encoding)
                facts_of = describe_encoding(stages[name], given, encoding)
                stages[name].facts["encoding"] = facts_of
            if name in ("language_model", "decode"):
                stages[name].facts.update(facts)
            if name == "decode":
                _measure_past_by_mask(stages[name])
        if "language_model" in stages and any(facts.get("visual_tokens", ())):
            _add_modality(stages["language_model"], facts)
            if len(set(facts["visual_tokens"])) == 1:  # else fillers may have to be hidden
                drop_constant_masks(stages["language_model"].graph)
                stages["language_model"].graph_module.recompile()
    order = list(dict.fromkeys(families.STAGE_NAMES.values()))
    ordered = sorted(
        stages.items(), key=lambda item: order.index(item[0]) if item[0] in order else -1
    )
    return Program(
        dict(ordered),
        model_type=model.config.model_type,
        metadata={
            "class": type(model).__name__,
            "visual_token_ids": list(families.visual_token_ids(model.config)),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        },
    )


def _components(
    model: Any, inputs: dict[str, Any]
) -> tuple[dict[str, tuple[nn.Module, dict[str, Any]]], list[Any]]:
    """Stages' modules with the keyword inputs they got while the model generated two tokens.

    Returns:
        These, and what the vision encoder returned, call by call.
    """
    from transformers.exporters.utils import _capture_forward, decompose_for_generation

    encoded: list[Any] = []

    def record(_: nn.Module, args: Any, output: Any) -> None:
        # models write what they make of it into it
        encoded.append(pytree.tree_map(lambda value: value, output))

    # generate() may encode images before forward(), where the decomposition does not look
    with contextlib.ExitStack() as stack:
        calls = {
            name: (module, stack.enter_context(_capture_forward(module)))
            for name, module in submodules(model).items()
            if name in ("vision_encoder", "projector")
        }
        if "vision_encoder" in calls:
            handle = calls["vision_encoder"][0].register_forward_hook(record)
            stack.callback(handle.remove)
        try:
            found = dict(decompose_for_generation(model, inputs))
        except Exception as error:
            raise CaptureError(
                f"{type(model).__name__} could not generate from these inputs: {_cause(error)}",
                hint="check that model.generate(**inputs, max_new_tokens=2) runs",
            ) from error
    components = {families.STAGE_NAMES.get(name, name): part for name, part in found.items()}
    for name, (module, seen) in calls.items():
        if seen:
            components[name] = (module, seen[-1])
    return components, encoded


def _encoding(model: Any, inputs: dict[str, Any], encoded: list[Any]) -> Encoding | None:
    """Where the patches of the capture batch end up; ``None`` for a model without an encoder.

    Args:
        encoded: what the encoder returned for them.
    """
    parts = submodules(model)
    ids = inputs.get("input_ids")
    if ids is None or not {"vision_encoder", "language_model"} <= parts.keys():
        return None
    visual = families.visual_token_ids(model.config)
    modality = modality_of(ids, inputs.get("attention_mask"), visual)
    return find_encoding(
        model,
        inputs,
        parts["vision_encoder"],
        parts.get("projector"),
        parts["language_model"],
        modality == Modality.VISION,
        encoded,
    )


def _keep_read_outputs(stage: Stage, encoding: Encoding) -> None:
    """Of what the encoder returns, keep what the language model is given."""
    read = [at for at, port in enumerate(stage.outputs) if port.name in encoding.read]
    if not read:
        return
    output = stage.graph.output_node()
    values: Any = output.args[0]
    output.args = (tuple(values[at] for at in read),)
    stage.outputs = tuple(stage.outputs[at] for at in read)
    stage.graph.eliminate_dead_code(
        is_impure_node=lambda node: node.op in ("placeholder", "output")
    )
    stage.graph_module.recompile()


class _SharedFakeMode(FakeTensorMode):
    """Copies of its tensors stay in this mode.

    transformers copies the inputs of each export; a copied mode would not match that of the
    weights, and would free its weak references to storages a second time.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _SharedFakeMode:
        return self


@contextlib.contextmanager
def _fake_weights(model: nn.Module) -> Iterator[FakeTensorMode | None]:
    """Stand-ins on the CPU for parameters and buffers of the meta device, for a while.

    Yields their mode, or ``None`` when there are none.
    """
    if not any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        yield None
        return
    mode = _SharedFakeMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    swapped: list[tuple[dict[str, Any], str, Any]] = []
    stand_ins: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None or not tensor.is_meta:
                    continue
                if id(tensor) not in stand_ins:  # tied weights stay tied
                    twin: Any = FakeTensor(mode, tensor.detach(), torch.device("cpu"))
                    if isinstance(tensor, nn.Parameter):
                        twin = nn.Parameter(twin, requires_grad=False)
                    stand_ins[id(tensor)] = twin
                swapped.append((table, name, tensor))
                table[name] = stand_ins[id(tensor)]
    try:
        yield mode
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


@contextlib.contextmanager
def _generating(model: Any) -> Iterator[None]:
    """Let a model with fake weights generate: decisions that need values are taken for it.

    Its inputs are real, so that everything computed from them alone (masks, positions, grids) is.
    """

    def any_token(_: nn.Module, args: Any, output: Any) -> Any:
        output.logits = torch.zeros(output.logits.shape)
        return output

    namespace = vars(sys.modules[type(model).__module__])
    check = "torch_compilable_check"  # compares the number of placeholders with that of features
    original = namespace.get(check)
    if original is not None:
        namespace[check] = lambda *args, **kwargs: None
    handle = model.register_forward_hook(any_token)
    try:
        yield
    finally:
        handle.remove()
        if original is not None:
            namespace[check] = original


def _require_keys_of_tokens(
    model: Any, kwargs: dict[str, Any], prefill: Stage | None, facts: dict[str, Any]
) -> None:
    """A decoder whose layers carry keys and values of the tokens of the prompt, and nothing else.

    Raises:
        CaptureError: with the layer that carries something else.
    """
    name = type(model).__name__
    for index, layer in enumerate(getattr(kwargs.get("past_key_values"), "layers", ())):
        states = [key for key in vars(layer) if key in families.RUNNING_STATES]
        if states:
            raise CaptureError(
                f"layer {index} of {name} carries a state that runs through all tokens "
                f"({', '.join(states)}), not keys and values of each: tokens cannot be left out "
                "of it later",
                hint="choose a model whose layers all attend",
            )
    for port in prefill.find_outputs(Role.KEY) if prefill else ():
        length = prefill.output_node(port).meta["val"].shape[2]  # type: ignore[union-attr]
        if length != facts.get("tokens", length):
            raise CaptureError(
                f"layer {port.layer} of {name} has {length} keys for a prompt of "
                f"{facts['tokens']} tokens: it attends to something beside the prompt, where "
                "visual tokens are not among the others",
                hint="choose a model that puts visual tokens into the prompt",
            )


def _with_full_cache(
    kwargs: dict[str, Any], prefill: Stage | None, mode: FakeTensorMode | None
) -> dict[str, Any]:
    """Decode inputs whose cache holds every token of the prompt, and more, in every layer.

    A sliding-window cache would hold fewer; the mask already keeps the window, and one length per
    layer is what lets passes shorten layers one by one. A few generated tokens keep the tracer
    from taking "just after the prompt" for the general case.
    """
    from transformers import DynamicCache

    if prefill is None:
        return kwargs
    cache = DynamicCache()
    keys = prefill.find_outputs(Role.KEY)
    values = prefill.find_outputs(Role.VALUE)
    with mode or contextlib.nullcontext():
        for layer, ports in enumerate(zip(keys, values, strict=True)):
            filled: list[Any] = []
            for port in ports:
                like = prefill.output_node(port).meta["val"]
                shape = (*like.shape[:2], like.shape[2] + _GENERATED, like.shape[3])
                filled.append(torch.zeros(shape, dtype=like.dtype))
            cache.update(*filled, layer)
        # generate() leaves it out where nothing is padded, but it is what counts the tokens seen
        seen = cache.get_seq_length() + 1
        mask = torch.ones(kwargs["input_ids"].shape[0], seen, dtype=torch.int64)
    return {**kwargs, "past_key_values": cache, "attention_mask": mask}


_GENERATED = 5


def export_stage(
    name: str, module: nn.Module, kwargs: dict[str, Any]
) -> tuple[Stage, dict[str, Any]]:
    """The stage, and the inputs it was traced with: some are computed from those of the module."""
    from transformers.exporters.configs import DynamoConfig
    from transformers.exporters.exporter_dynamo import (
        DynamoExporter,
        register_cache_pytrees_for_model,
    )

    constants = {key: value for key, value in kwargs.items() if key in families.OUTPUT_FLAGS}
    returned = ["use_cache", "return_dict"]
    if name == "vision_encoder":  # models read one of its inner states
        returned.append("output_hidden_states")
    kwargs = {
        key: value for key, value in kwargs.items() if value is not None and key not in constants
    }
    register_cache_pytrees_for_model(module)  # type: ignore[arg-type]
    config = DynamoConfig(
        dynamic=False, dynamic_shapes=_decode_shapes(kwargs) if name == "decode" else None
    )
    kwargs |= {key: constants[key] for key in returned if key in constants}
    try:
        with _quiet():
            exported, _ = DynamoExporter().export_program(module, kwargs, config)  # type: ignore[arg-type]
            graph_module, leaves = canonical_graph(exported)
    except VlmoptError:
        raise
    except Exception as error:
        raise CaptureError(
            f"stage {name} ({type(module).__name__}) cannot be traced: {_cause(error)}",
            hint="run with -v for the tracer's own message",
        ) from error
    stage = _stage(name, graph_module, leaves, exported.call_spec)
    assert exported.example_inputs is not None, "the exporter traces with examples"
    given = exported.example_inputs[1]
    if name == "vision_encoder":
        part_unevenly(stage, given)
    _drop_unread_inputs(stage)
    return stage, given


def _drop_unread_inputs(stage: Stage) -> None:
    """Inputs that Python code read and no operator does; the mask may be needed by a pass."""
    for port in stage.inputs:
        node = stage.placeholder(port)
        if not node.users and port.role is not Role.ATTENTION_MASK:
            stage.graph.erase_node(node)
            stage.inputs = tuple(one for one in stage.inputs if one is not port)
    stage.graph_module.recompile()


def _decode_shapes(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Only the number of past tokens varies from step to step."""
    shapes: dict[str, Any] = {}
    for key, value in kwargs.items():
        if key == "past_key_values":
            leaves = pytree.tree_leaves(value)
            shapes[key] = [{2: Dim.AUTO} if leaf.ndim == 4 else None for leaf in leaves]
        else:
            shapes[key] = {1: Dim.AUTO} if key == "attention_mask" else None
    return shapes


def _measure_past_by_mask(stage: Stage) -> None:
    """Read the number of tokens seen off the attention mask instead of some layer's cache.

    The tracer asks any one of the equal sizes; once a pass shortens a layer they differ, and only
    the mask still counts all tokens.
    """
    aten = torch.ops.aten
    caches = {
        stage.placeholder(port) for port in stage.inputs if port.role in (Role.KEY, Role.VALUE)
    }
    masks = [stage.placeholder(port) for port in stage.find_inputs(Role.ATTENTION_MASK)]
    sizes = [
        node
        for node in stage.graph.find_nodes(op="call_function", target=aten.sym_size.int)
        if node.args[0] in caches and node.args[1] == 2
    ]
    if not sizes or not masks or masks[0].meta["val"].ndim != 2:
        return
    val = masks[0].meta["val"]
    with stage.fake_mode():  # the tracer does not know that the mask is one longer than the past
        length = next(iter(caches)).meta["val"].shape[2] + 1
        masks[0].meta["val"] = torch.empty(val.shape[0], length, dtype=val.dtype)
    with stage.graph.inserting_before(sizes[0]):
        seen = stage.graph.call_function(aten.sym_size.int, (masks[0], 1))
        past = stage.graph.call_function(operator.sub, (seen, 1))
    seen.meta = {**sizes[0].meta, "val": masks[0].meta["val"].shape[1]}
    past.meta = dict(sizes[0].meta)
    for node in sizes:
        node.replace_all_uses_with(past)
        stage.graph.erase_node(node)
    propagate(stage.graph, set(stage.graph.nodes), stage.fake_mode())
    stage.graph.lint()
    stage.graph_module.recompile()


def _stage(name: str, graph_module: Any, leaves: list[str | None], call_spec: Any) -> Stage:
    """Read the meaning of inputs and outputs off their place in the pytrees of the call."""
    _, kwargs = pytree.tree_unflatten(list(leaves), call_spec.in_spec)
    by_name: dict[str, Port] = {}
    for key, value in kwargs.items():
        for port in _ports(key, value, families.INPUT_ROLES.get(key, Role.OTHER)):
            by_name[port.name] = port
    values = graph_module.graph.output_node().args[0]
    result = pytree.tree_unflatten(list(range(call_spec.out_spec.num_leaves)), call_spec.out_spec)
    found: dict[int, Port] = {}
    items = result.items() if hasattr(result, "items") else [("output", result)]
    for key, value in items:
        for port in _ports(key, value, _OUTPUT_ROLES.get(key, Role.OTHER)):
            found[int(port.name.rsplit("#", 1)[-1])] = port
    # what has no port is a constant, or bookkeeping of the cache
    kept = [at for at, node in enumerate(values) if at in found and isinstance(node, fx.Node)]
    graph = graph_module.graph
    graph.output_node().args = (tuple(values[index] for index in kept),)
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))
    inputs = tuple(by_name.get(n.name, Port(n.name)) for n in graph.find_nodes(op="placeholder"))
    graph_module.recompile()
    outputs = tuple(_rename(found[index], index) for index in kept)
    return Stage(name, graph_module, inputs, outputs)


_OUTPUT_ROLES = {
    "last_hidden_state": Role.HIDDEN_STATES,
    "hidden_states": Role.HIDDEN_STATES,
    "logits": Role.LOGITS,
    "output": Role.OTHER,
}


def _ports(key: str, value: Any, role: Role) -> Iterator[Port]:
    """Ports of one argument or result; leaves are placeholder names or output indices."""
    if hasattr(value, "layers"):  # a cache
        for layer, entry in enumerate(value.layers):
            for kind, leaf in vars(entry).items():
                kind_role = {"keys": Role.KEY, "values": Role.VALUE}.get(kind)
                if kind_role is not None and leaf is not None:
                    yield _leaf_port(f"{kind_role}_{layer}", leaf, kind_role, layer)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            yield from _ports(f"{key}_{name}", item, role)
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _ports(f"{key}_{index}", item, role)
    elif isinstance(value, (str, int)) and not isinstance(value, bool):
        yield _leaf_port(key, value, role, None)


def _leaf_port(name: str, leaf: str | int, role: Role, layer: int | None) -> Port:
    return Port(leaf if isinstance(leaf, str) else f"{name}#{leaf}", role, layer)


def _rename(port: Port, index: int) -> Port:
    return Port(port.name.removesuffix(f"#{index}"), port.role, port.layer)


def _prompt_facts(model: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """Counts per sample of the capture batch."""
    ids = inputs.get("input_ids")
    if ids is None:
        return {}
    return _modality_facts(
        modality_of(ids, inputs.get("attention_mask"), families.visual_token_ids(model.config))
    )


def _modality_facts(modality: torch.Tensor) -> dict[str, Any]:
    def counts(kind: int) -> list[int]:
        return [int(n) for n in (modality == kind).sum(1)]

    return {
        "batch": modality.shape[0],
        "tokens": modality.shape[1],
        "visual_tokens": counts(Modality.VISION),
        "text_tokens": counts(Modality.TEXT),
        "padding_tokens": counts(Modality.PADDING),
        "layout": layout_of(modality),
    }


def layout_of(modality: torch.Tensor) -> list[list[list[int]]]:
    """Runs of equal modality of each sample, as ``[modality, length]``."""
    return [
        [[kind, len(list(run))] for kind, run in itertools.groupby(sample)]
        for sample in modality.tolist()
    ]


def _add_modality(stage: Stage, facts: dict[str, Any]) -> None:
    """Give the language model one more input: where each of its tokens comes from."""
    graph = stage.graph
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder("modality")
    with stage.fake_mode():
        node.meta["val"] = torch.empty(facts["batch"], facts["tokens"], dtype=torch.int64)
    stage.inputs = (*stage.inputs, Port(node.name, Role.MODALITY))
    stage.graph_module.recompile()


# -- any other module --------------------------------------------------------------------------


def _capture_plain(model: nn.Module, inputs: Inputs, roles: Mapping[str, Role]) -> Program:
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (tuple(inputs), {})
    try:
        with torch.no_grad():
            exported = torch.export.export(model, args, copy.copy(kwargs))
        graph_module, leaves = canonical_graph(exported)
    except VlmoptError:
        raise
    except Exception as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be traced by torch.export: {_cause(error)}",
            hint="torch.export.export(model, args) must work: no decision may depend on values",
        ) from error
    stage = _stage("model", graph_module, leaves, exported.call_spec)
    unknown = set(roles) - {port.name for port in stage.inputs}
    if unknown:
        raise CaptureError(
            f"no input is called {', '.join(sorted(unknown))}",
            hint=f"the inputs are {', '.join(port.name for port in stage.inputs)}",
        )
    known = _KNOWN_INPUTS | dict(roles)
    stage.inputs = tuple(
        Port(port.name, known.get(port.name, port.role), port.layer) for port in stage.inputs
    )
    if stage.find_inputs(Role.TIMESTEP):
        stage.name = "denoiser"
    names = [port.name for port in stage.inputs]
    for name, value in {**dict(zip(names, args, strict=False)), **kwargs}.items():
        if roles.get(name) is Role.MODALITY:
            stage.facts.update(_modality_facts(value))
    dtype = next((str(p.dtype).removeprefix("torch.") for p in model.parameters()), "float32")
    return Program(
        {stage.name: stage},
        model_type=type(model).__name__,
        metadata={"class": type(model).__name__, "dtype": dtype},
    )


def _cause(error: BaseException) -> str:
    """The first line of the innermost cause, and the line of the model that ran into it."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    beside = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if not frame.filename.startswith(beside):
            return f"{text} ({Path(frame.filename).name}:{frame.lineno})"
    return text


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters warn of being experimental, and of copying fake tensors: no news to our user."""
    logger = logging.getLogger("transformers.exporters")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")
            warnings.filterwarnings("ignore", ".*LeafSpec.*", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
