"""The program: a captured model as named stages of fx graphs, with the meaning of each port.

A stage's graph is functional pre-dispatch ATen (no operator mutates its inputs; ``aten.linear``
and ``aten.scaled_dot_product_attention`` are whole), flat: its placeholders are the stage's
inputs, weights are ``get_attr`` nodes, and its output is one tuple of tensors.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import fx


class Role(StrEnum):
    """What an input or output of a stage means."""

    PIXEL_VALUES = "pixel_values"
    IMAGE_FEATURES = "image_features"
    INPUT_IDS = "input_ids"
    INPUTS_EMBEDS = "inputs_embeds"
    ATTENTION_MASK = "attention_mask"
    POSITION_IDS = "position_ids"
    MODALITY = "modality"
    """int64 ``[batch, tokens]``, values of :class:`Modality`."""
    VISUAL_MASK = "visual_mask"
    """bool ``[batch, tokens]``: the token comes from vision (an input of some models)."""
    KEY = "key"
    """``[batch, kv_heads, tokens, head_dim]`` of layer ``Port.layer``; as an input: the past."""
    VALUE = "value"
    KEPT = "kept"
    """int64 ``[batch, kept tokens]``: for every token still present, its slot in the prompt;
    -1 marks a filler that no one may attend to."""
    ENCODED = "encoded"
    """Of the vision encoder: ``[rows, ...]`` as it leaves that stage; brought into the order of the
    prompt, ``[batch, tokens, ...]``, where the language model takes it."""
    RETRIEVED_QUESTION = "retrieved_question"
    """Embeddings by a retriever of each sample's question, ``[batch, tokens, width]``; an input of
    the vision encoder."""
    RETRIEVED_PAGE = "retrieved_page"
    """Embeddings by a retriever of each image, ``[images, patches of the retriever, width]``."""
    REFERENCE_KEY = "reference_key"
    """``[tokens, width]`` of the reference frame of a stream, in block ``Port.layer`` of the vision
    encoder: keys of all heads side by side, as their projection gives them."""
    REFERENCE_VALUE = "reference_value"
    """Likewise: values."""
    REFERENCE_ATTENTION = "reference_attention"
    """Likewise: what attention adds to the residual stream."""
    REFERENCE_FFN = "reference_ffn"
    """Likewise: what the feed-forward network adds to the residual stream."""
    FRAME_SIMILARITY = "frame_similarity"
    """float32 ``[frames]``: how much a frame resembles the reference frame."""
    STREAM_MEMORY = "stream_memory"
    """What a pass remembers of a stream from prompt to prompt: an input, and an output of the same
    name; all zeros before the first."""
    SLOTS = "slots"
    """int64 ``[tokens]``: rows of the buffers of keys and values that a stage writes."""
    FILLED = "filled"
    """bool ``[rows]``: rows of those buffers that hold tokens seen before."""
    VISIBLE = "visible"
    """bool ``[batch, 1, tokens, rows]``, queries first: rows of those buffers that tokens attend
    to."""
    FEATURES = "features"
    """``[batch, tokens, width]``: hidden states of a target before its head, of the tokens before
    those that a drafter reads."""
    TIMESTEP = "timestep"
    """Noise level of a denoising step; an input of a stage called ``denoiser``."""
    BRANCH = "branch"
    """``[batch, tokens, width]``: what a module of block ``Port.layer`` of a denoiser added to a
    residual stream at an earlier step, before its gate."""
    BRANCH_KEY = "branch_key"
    """``[batch, tokens, width]``: keys of that module's attention, as their projection gives
    them."""
    BRANCH_VALUE = "branch_value"
    """Likewise: values."""
    BRANCH_DIFFERENCE = "branch_difference"
    """Likewise: a difference, of some order, of what it added at the steps that computed it."""
    BRANCH_DISTANCE = "branch_distance"
    """float32 ``[branches, order]``: for each branch of a denoiser, steps since it was computed
    last. Where a step computes it, by the order of the differences that are made of both results;
    infinite, where earlier steps have not left as many."""
    HIDDEN_STATES = "hidden_states"
    LOGITS = "logits"
    COUNTS = "counts"
    """int64, what a pass counts while the graph runs."""
    OTHER = "other"


class Modality:
    """Values of a :attr:`Role.MODALITY` tensor."""

    PADDING = 0
    TEXT = 1
    VISION = 2


@dataclass(frozen=True)
class Port:
    """One input or output of a stage.

    Attributes:
        name: placeholder name, or a stable name of the output.
        role: its meaning.
        layer: decoder layer, for keys and values.
        kept: name of the :attr:`Role.KEPT` port that lists the tokens along this port's token
            axis; ``None`` when all tokens of the prompt are there.
    """

    name: str
    role: Role = Role.OTHER
    layer: int | None = None
    kept: str | None = None


@dataclass(frozen=True)
class Cut:
    """A place where tokens were dropped: everything from ``layer`` on runs on fewer tokens.

    Attributes:
        layer: first layer that sees the shorter sequence.
        tokens: ``(before, after)``, per sequence.
        visual: ``(before, after)`` visual tokens, one pair per sample of the capture batch.
        kept: name of the KEPT output port of the stage.
        made_by: text of the pass.
        renumbered: the tokens that stayed got new positions, without gaps.
        slots: the tokens that stay, by slot of the prompt, where they are the same for every
            prompt that the program is for; else empty.
        until: layer before which the tokens come back, ``None`` where they are gone for good.
        fillers: fewer visual tokens than ``visual`` says may be left; others stand in for them.
    """

    layer: int
    tokens: tuple[int, int]
    visual: tuple[tuple[int, int], ...]
    kept: str
    made_by: str
    renumbered: bool = False
    slots: tuple[int, ...] = ()
    until: int | None = None
    fillers: bool = False

    def covers(self, layer: int) -> bool:
        """Whether ``layer`` runs on the tokens that this cut left, or on fewer."""
        return self.layer <= layer and (self.until is None or layer < self.until)


@dataclass
class Stage:
    """One graph of a program.

    Attributes:
        graph_module: the flat graph; ``node.meta["val"]`` holds a fake tensor for every value.
        inputs, outputs: one port per placeholder and per element of the output tuple, in order.
        facts: what capture measured, JSON values: ``visual_tokens`` (list of counts per sample),
            ``text_tokens`` and ``padding_tokens`` likewise, ``tokens`` (length), ``batch``,
            ``layout`` (per sample, runs of equal modality as ``[modality, length]``). Passes that
            skip experts add ``skipped_pairs``: by layer, the shares of text and of vision.
        cuts: token cuts made by passes, in order of layer.
    """

    name: str
    graph_module: fx.GraphModule
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    facts: dict[str, Any] = field(default_factory=dict)
    cuts: tuple[Cut, ...] = ()

    @property
    def graph(self) -> fx.Graph:
        return self.graph_module.graph

    @property
    def last_cut(self) -> Cut | None:
        """The last cut whose tokens are gone for good."""
        return next((cut for cut in reversed(self.cuts) if cut.until is None), None)

    def find_inputs(self, role: Role) -> list[Port]:
        """Input ports with this role, in order."""
        return [port for port in self.inputs if port.role is role]

    def find_outputs(self, role: Role) -> list[Port]:
        """Output ports with this role, in order."""
        return [port for port in self.outputs if port.role is role]

    def placeholder(self, port: Port | str) -> fx.Node:
        """The placeholder node of an input port."""
        name = port if isinstance(port, str) else port.name
        for node in self.graph.find_nodes(op="placeholder"):
            if node.name == name:
                return node
        raise KeyError(f"stage {self.name} has no input {name}")

    def zeros(self, port: Port | str) -> torch.Tensor:
        """Zeros of the shape, type and device of an input."""
        val = self.placeholder(port).meta["val"]
        return torch.zeros(val.shape, dtype=val.dtype, device=val.device)

    def output_node(self, port: Port | str) -> fx.Node:
        """The node whose value leaves the stage through an output port."""
        name = port if isinstance(port, str) else port.name
        values = self.graph.output_node().args[0]
        for candidate, node in zip(self.outputs, values, strict=True):  # type: ignore[arg-type]
            if candidate.name == name:
                return node  # type: ignore[return-value]
        raise KeyError(f"stage {self.name} has no output {name}")

    def add_input(self, port: Port, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        """Let a tensor enter the stage, behind the other inputs; its placeholder."""
        known = self.graph.find_nodes(op="placeholder")
        with self.graph.inserting_after(known[-1]):
            node = self.graph.placeholder(port.name)
        with self.fake_mode():
            node.meta["val"] = torch.empty(shape, dtype=dtype, device=known[0].meta["val"].device)
        self.inputs = (*self.inputs, replace(port, name=node.name))
        return node

    def add_output(self, port: Port, node: fx.Node) -> None:
        """Let a value leave the stage, behind the other outputs; the graph is made callable."""
        output = self.graph.output_node()
        output.args = ((*output.args[0], node),)  # type: ignore[misc]
        self.outputs = (*self.outputs, port)
        self.graph.lint()
        self.graph_module.recompile()

    def fake_mode(self) -> torch._subclasses.FakeTensorMode:
        """The mode that made the fake tensors in this graph's metadata."""
        for node in self.graph.nodes:
            mode = getattr(node.meta.get("val"), "fake_mode", None)
            if mode is not None:
                return mode  # type: ignore[no-any-return]
        raise AssertionError(f"stage {self.name} holds no fake tensor")

    def clone(self) -> Stage:
        """A copy whose graph can be rewritten without touching this one; weights are shared."""
        twin = fx.GraphModule(self.graph_module, copy_graph(self.graph))
        twin.meta = dict(self.graph_module.meta)
        return replace(self, graph_module=twin, facts=copy.deepcopy(self.facts))


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of ``graph`` with the same node names and (shallowly copied) metadata."""
    twin = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        copied = twin.node_copy(node, mapping.__getitem__)
        copied.name = node.name
        copied.meta = dict(node.meta)
        mapping[node] = copied
    twin.set_codegen(fx.graph.CodeGen())
    return twin


@dataclass
class Program:
    """A captured model: ordered stages plus what is needed to run and to identify it.

    Attributes:
        stages: by name, in execution order; ``vision_encoder``, ``language_model`` (prefill),
            ``lm_head``, ``decode`` for a vision-language model, ``denoiser`` for one step of
            diffusion, ``model`` for any other plain module.
        model_type: Hugging Face ``config.model_type``, or the class name of a plain module.
        passes: texts of the passes applied so far.
    """

    stages: dict[str, Stage]
    model_type: str
    passes: tuple[str, ...] = ()
    metadata: dict[str, Any] = field(default_factory=dict)

    def __iter__(self) -> Iterator[Stage]:
        return iter(self.stages.values())

    def __getitem__(self, name: str) -> Stage:
        return self.stages[name]

    def __contains__(self, name: object) -> bool:
        return name in self.stages

    def clone(self) -> Program:
        """A copy that can be rewritten without touching this one; weights are shared."""
        return replace(
            self,
            stages={name: stage.clone() for name, stage in self.stages.items()},
            metadata=copy.deepcopy(self.metadata),
        )

    def restore(self, snapshot: Program) -> None:
        """Make this program equal to ``snapshot`` (made by :meth:`clone`), in place."""
        self.stages = snapshot.stages
        self.passes = snapshot.passes
        self.metadata = snapshot.metadata

    def save(self, directory: str | Path, *, overwrite: bool = False) -> None:
        """Write the program as a folder, see :func:`vlmopt.storage.save`."""
        from vlmopt.storage import save

        save(self, directory, overwrite=overwrite)

    def named_weights(self) -> Mapping[str, torch.Tensor]:
        """Every weight tensor once, under the first ``stage.path`` that names it."""
        seen: dict[int, str] = {}
        weights: dict[str, torch.Tensor] = {}
        for stage in self:
            for node in stage.graph.find_nodes(op="get_attr"):
                tensor = fetch_attr(stage.graph_module, str(node.target))
                if id(tensor) not in seen:
                    seen[id(tensor)] = f"{stage.name}.{node.target}"
                    weights[seen[id(tensor)]] = tensor
        return weights


def attach_attr(root: torch.nn.Module, path: str, tensor: torch.Tensor) -> None:
    """Put a tensor at a dotted path below ``root``, making the modules on the way."""
    *parents, leaf = path.split(".")
    module = root
    for name in parents:
        if not hasattr(module, name):
            module.add_module(name, torch.nn.Module())
        module = getattr(module, name)
    if isinstance(tensor, torch.nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)


def fetch_attr(root: torch.nn.Module, path: str) -> torch.Tensor:
    """The tensor at a dotted path below ``root``."""
    value: Any = root
    for part in path.split("."):
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]
