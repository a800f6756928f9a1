"""What stands in for the transformer of a diffusers pipeline, and is called by its loop."""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from vlmopt.encoding import named_tensors
from vlmopt.runtime.encoder import bind


class StandsIn(ABC):
    """Base of what runs the steps of a loop in place of a transformer."""

    def __init__(self) -> None:
        self._context: str | None = None

    @abstractmethod
    def run(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The next step.

        Args:
            values: inputs of the model, by the names of the program's ports.

        Returns:
            The model's outputs by name.
        """

    def module(self, model: nn.Module) -> Any:
        """A twin of ``model``, of the same class and with its weights, whose forward is a step.

        Args:
            model: the one that was captured.
        """
        twin: Any = copy.copy(model)

        def forward(*args: Any, **kwargs: Any) -> Any:
            given = bind(model, args, kwargs)
            outputs = self.run(dict(named_tensors(given)))
            if given.get("return_dict", True):
                from diffusers.models.modeling_outputs import Transformer2DModelOutput

                return Transformer2DModelOutput(sample=next(iter(outputs.values())))
            return tuple(outputs.values())

        twin.forward = forward
        twin.cache_context = self.cache_context
        twin.vlmopt = self
        return twin

    @contextlib.contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Calls inside have states of their own; as of diffusers' models, which are told more."""
        before, self._context = self._context, name
        try:
            yield
        finally:
            self._context = before
