"""Learning a few tensors for each of some layers, which takes no part in learning the others'."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from vlmopt.calibration import Learner


class LayerLearner(Learner):
    """Tensors of some layers, and an AdamW for each layer.

    Args:
        start: by layer, then by name: where each tensor begins.
        rate: learning rate.

    Attributes:
        tensors: as ``start``, as far as they have come.
    """

    def __init__(self, start: Mapping[int, Mapping[str, Tensor]], rate: float) -> None:
        self.tensors = {
            layer: {name: tensor.requires_grad_() for name, tensor in named.items()}
            for layer, named in start.items()
        }
        self._optimizers = {
            layer: torch.optim.AdamW(named.values(), lr=rate)
            for layer, named in self.tensors.items()
        }

    def step(self, layer: int, loss: Tensor) -> float:
        """Lower a loss of one layer's tensors; returns what it was."""
        optimizer = self._optimizers[layer]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    def state(self) -> dict[str, Tensor]:
        state = {}
        for layer, named in self.tensors.items():
            saved = self._optimizers[layer].state_dict()["state"]
            for at, (name, tensor) in enumerate(named.items()):
                state[f"{layer}.{name}"] = tensor.detach()
                for moment, value in saved.get(at, {}).items():
                    state[f"{layer}.{name}.{moment}"] = value
        return state

    def restore(self, state: Mapping[str, Tensor]) -> None:
        for layer, named in self.tensors.items():
            known = self._optimizers[layer].state_dict()
            for at, (name, tensor) in enumerate(named.items()):
                start = f"{layer}.{name}"
                with torch.no_grad():
                    tensor.copy_(state[start])
                known["state"][at] = {
                    key.removeprefix(f"{start}."): value
                    for key, value in state.items()
                    if key.startswith(f"{start}.")
                }
            self._optimizers[layer].load_state_dict(known)
