"""The vision encoder of an optimized model, where a pass has rewritten it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from vlmopt.errors import PreconditionError
from vlmopt.program import Program, Stage

Run = Callable[..., tuple[torch.Tensor, ...]]

STAGE = "vision_encoder"


def rewritten_encoder(program: Program) -> Stage | None:
    """The stage that encodes images, if a pass has changed it."""
    stage = program.stages.get(STAGE)
    if stage is None:
        return None
    made = any("vlmopt" in (node.meta.get("custom") or {}) for node in stage.graph.nodes)
    return stage if made else None


class RewrittenEncoder:
    """Rewritten graphs of one encoder module, by the shapes of what it is given.

    Args:
        module: the original, a Hugging Face vision model.
        compile_stage: makes a stage callable.
    """

    def __init__(self, module: Any, compile_stage: Callable[[Stage], Run]) -> None:
        self.module = module
        self._compile = compile_stage
        self._names = list(inspect.signature(module.forward).parameters)
        self._made: list[tuple[Stage, Run]] = []

    def add(self, stage: Stage) -> None:
        """Use this stage for images of the shapes that it was captured with."""
        shapes = [_shape(stage, port.name) for port in stage.inputs]
        if not any([_shape(s, p.name) for p in s.inputs] == shapes for s, _ in self._made):
            self._made.append((stage, self._compile(stage)))

    def named(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments of a call of the module, by name."""
        return {**dict(zip(self._names, args, strict=False)), **kwargs}

    def knows(self, values: Mapping[str, Any]) -> bool:
        """Whether there is a stage for these arguments."""
        return self._find(values) is not None

    def __call__(self, values: Mapping[str, Any]) -> Any:
        """What the module would return, computed by its stage.

        Raises:
            PreconditionError: there is no stage for images of this shape, or it does not return
                the hidden states that are asked for.
        """
        from transformers.modeling_outputs import BaseModelOutputWithPooling

        found = self._find(values)
        if found is None:
            shapes = {
                name: list(value.shape) for name, value in values.items() if hasattr(value, "shape")
            }
            raise PreconditionError(
                f"there is no rewritten vision encoder for {shapes}",
                hint="optimize the model with inputs of this shape",
            )
        stage, run = found
        results = run(*(values[port.name] for port in stage.inputs))
        named = {port.name: value for port, value in zip(stage.outputs, results, strict=True)}
        hidden = self._hidden_states(named, values.get("output_hidden_states"))
        return BaseModelOutputWithPooling(
            last_hidden_state=named["last_hidden_state"],
            pooler_output=named.get("pooler_output"),
            hidden_states=hidden,
        )

    def _find(self, values: Mapping[str, Any]) -> tuple[Stage, Run] | None:
        for stage, run in self._made:
            given = [getattr(values.get(port.name), "shape", None) for port in stage.inputs]
            if given == [_shape(stage, port.name) for port in stage.inputs]:
                return stage, run
        return None

    def _hidden_states(self, named: Mapping[str, torch.Tensor], wanted: Any) -> Any:
        """As many as the module has, ``None`` for those that the graph does not return."""
        if wanted is None or wanted is False:
            return None
        count = self.module.config.num_hidden_layers + 1
        states = tuple(named.get(f"hidden_states_{at}") for at in range(count))
        asked = range(count) if wanted is True else [wanted] if isinstance(wanted, int) else wanted
        missing = [at for at in asked if states[at] is None]
        if missing:
            raise PreconditionError(
                f"the rewritten vision encoder does not return the hidden states of {missing}",
                hint="optimize with the vision_feature_layer that is used later",
            )
        return states


def _shape(stage: Stage, name: str) -> torch.Size:
    shape: torch.Size = stage.placeholder(name).meta["val"].shape
    return shape


def encoder_module(model: nn.Module) -> nn.Module | None:
    """The module that the stage ``vision_encoder`` of a captured model comes from."""
    from transformers.exporters.utils import _find_multimodal_submodules

    from vlmopt import families

    parts = _find_multimodal_submodules(model)  # type: ignore[arg-type]
    found = [module for name, module in parts.items() if families.STAGE_NAMES.get(name) == STAGE]
    return found[0] if found else None
