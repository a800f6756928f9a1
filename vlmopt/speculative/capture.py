"""Stages for speculative decoding, made from decoders: what reads drafts, and what writes them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from vlmopt import families
from vlmopt.artifacts import fingerprint
from vlmopt.errors import OptionError, PreconditionError
from vlmopt.program import Port, Program, Role, Stage
from vlmopt.rewrite.drafted import drafted_stage
from vlmopt.rewrite.emit import Emitter
from vlmopt.speculative.decoders import TokenDecoder
from vlmopt.speculative.distribution import Sampling, guided
from vlmopt.speculative.eagle import EagleDecoder
from vlmopt.tracing import export_stage

VERIFY, RECOVER, DRAFT = "verify", "recover", "draft"
"""Names of stages: the target on a draft; on tokens that it has not seen, and a draft behind them;
the drafter."""

GUIDANCE = "guidance"
"""Input of stages of two branches: float32 scalar, the scale of classifier-free guidance."""


def guidance_of(sampling: Sampling) -> dict[str, Tensor]:
    """The scale, as an input of stages that take one."""
    return {} if sampling.guidance is None else {GUIDANCE: torch.tensor(sampling.guidance)}


@dataclass(frozen=True)
class DraftTree:
    """How large drafts are; see :mod:`vlmopt.speculative.pruning`.

    Attributes:
        depth: drafted tokens on the longest path.
        width: tokens tried behind each token that is gone on from, and of such tokens on each
            level.
        nodes: tokens that the target is asked about, the root among them.

    Raises:
        OptionError: a size is below 1, or there are more nodes than a draft has.
    """

    depth: int = 4
    width: int = 10
    nodes: int = 59

    @property
    def places(self) -> int:
        """Tokens that a drafter reads at once: a level, or what was accepted."""
        return max(self.width, self.depth + 1)

    @property
    def room(self) -> int:
        """Rows of buffers that a draft takes, beyond those of the prompt and of new tokens."""
        return self.depth + max(self.depth + self.nodes, self.depth * self.places)

    def __post_init__(self) -> None:
        most = 1 + self.width + (self.depth - 1) * self.width**2
        if min(self.depth, self.width) < 1 or not 1 <= self.nodes <= most:
            raise OptionError(
                f"{self} is no tree",
                hint=f"depth and width are at least 1, nodes from 1 to {most} for these",
            )


def capture_target(
    decoder: TokenDecoder, tree: DraftTree, *, capacity: int, branches: int = 1
) -> Program:
    """What reads drafts, as a program of the stages ``verify`` and ``recover``.

    Args:
        decoder: see :func:`vlmopt.speculative.decoders.text_decoder`; eval mode.
        tree: size of drafts.
        capacity: rows of buffers: for the prompt, new tokens, and ``tree.room`` more.
        branches: 2 for classifier-free guidance, the condition first, and logits are guided; else
            1.

    Raises:
        CaptureError: the decoder cannot be traced.
        PreconditionError: layers attend within windows shorter than ``capacity``; see
            :func:`vlmopt.rewrite.drafted.drafted_stage` too.
    """
    places = {VERIFY: tree.nodes, RECOVER: tree.nodes + tree.depth}
    return _capture(decoder, places, tree, capacity, branches)


def capture_draft(
    drafter: EagleDecoder, tree: DraftTree, *, capacity: int, branches: int = 1
) -> Program:
    """What writes drafts, as a program of the stage ``draft``; see :func:`capture_target`."""
    places = {DRAFT: tree.places}
    return _capture(drafter, places, tree, capacity, branches)


def _capture(
    module: TokenDecoder | EagleDecoder,
    places: dict[str, int],
    tree: DraftTree,
    capacity: int,
    branches: int,
) -> Program:
    _require_all_seen(module.config, capacity)
    stages = {
        name: drafted_stage(_forward(module, branches, tokens), capacity, name)
        for name, tokens in places.items()
    }
    if branches == 2:
        for stage in stages.values():
            _guide(stage)
    model_type = module.config.model_type
    metadata = {
        "class": type(module).__name__,
        "tree": asdict(tree),
        "branches": branches,
        "capacity": capacity,
        "dtype": str(next(module.parameters()).dtype).removeprefix("torch."),
        "fingerprint": fingerprint(model_type, module.parameters()),
    }
    return Program(stages, model_type, metadata=metadata).clone()


def _require_all_seen(config: Any, capacity: int) -> None:
    """Raise where layers look back less far than the buffers reach; a short block cannot tell."""
    kinds = families.attention_kinds(config)
    window = getattr(config, "sliding_window", None)
    if kinds and (window is None or window < capacity):
        raise PreconditionError(
            f"layers of this {config.model_type} attend by {', '.join(kinds)}"
            + (f" over {window} tokens" if window else "")
            + f", and in buffers of {capacity} rows every token sees all before",
            hint="choose a model whose layers attend to everything, or a smaller capacity",
        )


def _guide(stage: Stage) -> None:
    """Let a stage give the logits of both branches as one, by the scale that is an input."""
    (port,) = stage.find_outputs(Role.LOGITS)
    node = stage.output_node(port)
    scale = stage.add_input(Port(GUIDANCE, Role.OTHER))
    output = stage.graph.output_node()
    emit = Emitter(
        stage.graph,
        stamp=lambda node: None,
        place=node,
        prefix="guidance",
        fake_mode=stage.fake_mode(),
    )
    with stage.graph.inserting_before(output):
        result = emit.trace(guided, node, scale, names=("logits",))
    output.replace_input_with(node, result)
    stage.graph_module.recompile()


def _forward(module: nn.Module, branches: int, tokens: int) -> Stage:
    """One forward over a prompt of so many tokens."""
    weight = next(module.parameters())
    ids = torch.zeros(branches, tokens, dtype=torch.int64, device=weight.device)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(tokens, device=ids.device).expand(branches, -1),
        "use_cache": True,
    }
    if isinstance(module, EagleDecoder):
        width = cast("Any", module.config).hidden_size
        inputs["features"] = weight.new_zeros(branches, tokens, width)
    stage, _ = export_stage("language_model", module, inputs)
    stage.facts |= {"batch": branches, "tokens": tokens}
    return stage
