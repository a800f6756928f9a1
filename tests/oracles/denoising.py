"""Denoising steps that reuse branches, by hooks on the user's own modules.

Every module runs in full at every step; what it gives is then replaced by what was kept, or by that
with some rows of what it gave. Keys and values are treated likewise, so that rows of attention see
those of other rows as they were kept.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

COMPUTE, REUSE, PARTIAL, FORECAST = 0, 1, 2, 3


@dataclass(frozen=True)
class Part:
    """A module whose result is kept.

    Attributes:
        module: gives it.
        reads: the module whose input tells which rows are computed; ``None``: all are, where some
            are of other parts.
        keys: modules that give keys and values of the rows that may be left out.
    """

    module: nn.Module
    reads: nn.Module | None = None
    keys: tuple[nn.Module, ...] = ()


Parts = dict[tuple[int, str], list[Part]]


def parts_of(name: str, model: Any) -> Parts:
    """The parts of a model by layer and kind."""
    found: Parts = {}
    blocks = model.blocks if name == "wan" else model.transformer_blocks
    for layer, block in enumerate(blocks):
        if name in ("flux", "sd3"):
            found[layer, "attention"] = [_attention(block.attn)]
            if getattr(block, "attn2", None) is not None:
                found[layer, "attention"].append(_attention(block.attn2))
            found[layer, "mlp"] = [Part(block.ff, block.ff)]
            if getattr(block, "ff_context", None) is not None:
                found[layer, "mlp"].append(Part(block.ff_context))
            continue
        found[layer, "attention"] = [_attention(block.attn1)]
        if block.attn2 is not None:
            found[layer, "cross_attention"] = [Part(block.attn2, block.attn2.to_q)]
        network = block.ffn if name == "wan" else block.ff
        found[layer, "mlp"] = [Part(network, network)]
    for layer, block in enumerate(getattr(model, "single_transformer_blocks", ()), len(blocks)):
        attn = block.attn
        found[layer, "attention"] = [Part(block.proj_out, attn.to_q, (attn.to_k, attn.to_v))]
    return found


def _attention(module: Any) -> Part:
    return Part(module, module.to_q, (module.to_k, module.to_v))


def rows_of(value: Tensor, count: int) -> Tensor:
    """Rows of the largest mean magnitude, bool ``[batch, tokens]``."""
    score = value.float().abs().mean(-1)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    for sample in range(len(score)):
        order = sorted(range(score.shape[1]), key=lambda at: (-float(score[sample, at]), at))
        chosen[sample, order[:count]] = True
    return chosen


class ByHand:
    """Hooks that make the calls of a model follow a plan.

    Args:
        plan: for each step, by layer and kind, ``(action, rows)``, or of a series its order.
        calls: of the model in each step, which keep things apart from each other.
    """

    def __init__(
        self, name: str, model: Any, plan: list[dict[tuple[int, str], Any]], calls: int = 1
    ) -> None:
        self.model = model
        self.plan = plan
        self.parts = parts_of(name, model)
        self.step = 0
        self.kept: dict[Any, Any] = {}
        self.factors: dict[Any, Any] = {}
        self.calls = calls

    @contextlib.contextmanager
    def following(self) -> Iterator[None]:
        handles = [self.model.register_forward_hook(self._next)]
        for site, parts in self.parts.items():
            for part in parts:
                handles += self._hooks(site, part)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _next(self, *_: Any) -> None:
        self.step += 1

    def _hooks(self, site: tuple[int, str], part: Part) -> list[Any]:
        chosen: dict[str, Tensor] = {}

        def choose(_: nn.Module, given: tuple[Any, ...]) -> None:
            action, count = self._choice(site)
            if action == PARTIAL:
                chosen["rows"] = rows_of(given[0], count)

        def keep(module: nn.Module, _: Any, result: Any) -> Any:
            action, count = self._choice(site)
            if action == PARTIAL and count == 0:
                action = REUSE
            key = self.step % self.calls, module
            if action == COMPUTE:
                self.kept[key] = result
                self._differ(key, result)
            elif action == FORECAST and module not in part.keys:
                return self._forecast(key, count)
            elif action == PARTIAL:
                rows = chosen.get("rows") if part.reads is not None else None
                first, *others = result if isinstance(result, tuple) else (result,)
                if rows is not None:
                    before = self.kept[key]
                    before = before[0] if isinstance(before, tuple) else before
                    first = torch.where(rows[..., None], first, before)
                self.kept[key] = (first, *others) if isinstance(result, tuple) else first
            elif module in part.keys:
                return None  # nobody reads it
            return self.kept[key]

        handles = [part.module.register_forward_hook(keep)]
        handles += [module.register_forward_hook(keep) for module in part.keys]
        if part.reads is not None:
            handles.append(part.reads.register_forward_pre_hook(choose))
        return handles

    def _differ(self, key: Any, result: Any) -> None:
        """Differences by step, of all orders that there can be."""
        at = self.step // self.calls
        factors = [result if isinstance(result, tuple) else (result,)]
        before, last = self.factors.get(key, ([], 0))
        for one in before:
            new = zip(factors[-1], one, strict=True)
            factors.append(tuple((now - then) / (at - last) for now, then in new))
        self.factors[key] = factors, at

    def _forecast(self, key: Any, order: int) -> Any:
        factors, last = self.factors[key]
        steps = self.step // self.calls - last
        sums = []
        for column in zip(*factors[: order + 1], strict=True):
            terms = [f * steps**at / math.factorial(at) for at, f in enumerate(column)]
            sums.append(sum(terms[1:], terms[0]))
        return tuple(sums) if isinstance(self.kept[key], tuple) else sums[0]

    def _choice(self, site: tuple[int, str]) -> Any:
        return self.plan[self.step // self.calls][site]
