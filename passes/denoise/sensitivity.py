"""How much branches of a diffusion transformer suffer from reuse and from partial recomputation.

Algorithm 1 of "SODA: Sensitivity-Oriented Dynamic Acceleration for Diffusion Transformer", arXiv
2603.07057. What the branches give is measured as it leaves them, before the residual add.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmopt.rewrite.branches import largest_rows

SHARES = 8
"""Rows are recomputed in eighths of a branch's rows, so that few graphs differ."""
METRICS = ("cosine", "l2")
_NOTHING = 1e-12
"""Norm below which a branch gives nothing, such as one whose gate is closed."""


def cosine_error(new: Tensor, old: Tensor) -> Tensor:
    """One minus the cosine of two outputs, over all rows and channels together.

    Args:
        new, old: ``[B, N, D]``.

    Returns:
        float32 ``[B]``, 0 to 2; 0 where both are zero.
    """
    new, old = new.flatten(1).float(), old.flatten(1).float()
    lengths = new.norm(dim=1), old.norm(dim=1)
    product = lengths[0] * lengths[1]
    cosine = (new * old).sum(1) / torch.where(product > 0, product, 1.0)
    nothing = (lengths[0] < _NOTHING) & (lengths[1] < _NOTHING)
    return (1 - torch.where(nothing, 1.0, cosine)).clamp(0, 2)


def relative_error(new: Tensor, old: Tensor) -> Tensor:
    """Length of the difference of two outputs over that of ``new``; sees scales, unlike the cosine.

    Args:
        new, old: ``[B, N, D]``.

    Returns:
        float32 ``[B]``; 0 where both are zero.
    """
    new, old = new.flatten(1).float(), old.flatten(1).float()
    return (new - old).norm(dim=1) / new.norm(dim=1).clamp(min=_NOTHING)


def distance(new: Tensor, old: Tensor, metric: str = "cosine") -> Tensor:
    """One of :data:`METRICS`: float32 ``[B]``."""
    return (cosine_error if metric == "cosine" else relative_error)(new, old)


def refreshed(kept: Tensor, new: Tensor, chosen: Tensor) -> Tensor:
    """``kept`` with some rows of ``new``.

    Args:
        kept, new: ``[B, N, D]``.
        chosen: int64 ``[B, rows]``.
    """
    places = chosen[..., None].expand(-1, -1, kept.shape[-1])
    return kept.scatter(1, places, new.gather(1, places).to(kept.dtype))


def rows_of(rows: int, eighths: int) -> int:
    """How many rows some eighths of them are, rounded up."""
    return -(-rows * eighths // SHARES)


@dataclass(frozen=True)
class Errors:
    """Mean errors, over generations, samples and both halves of guidance.

    Attributes:
        reuse: float32 ``[steps, branches, longest - 1]``: at a step, of what was stored
            1, 2, ... steps before it. Not a number where that is before step 0.
        partial: float32 ``[steps, branches, SHARES - 1]``: with 1, 2, ... eighths of the rows
            recomputed, and the others as they were a step before. Not a number at step 0.
    """

    reuse: Tensor
    partial: Tensor


class Sensitivity:
    """Measures generations one after the other, and can go on after an interruption.

    Call :meth:`begin`, and :meth:`step` for each step of a generation in the order of execution;
    a generation counts when its last step has been seen.

    Args:
        steps: of a generation.
        branches: of the transformer.
        longest: greatest interval between anchors, at least 2; outputs of ``longest - 1`` steps are
            kept.
        metric: one of :data:`METRICS`.
    """

    def __init__(self, steps: int, branches: int, longest: int = 6, metric: str = "cosine") -> None:
        self.steps, self.branches, self.longest, self.metric = steps, branches, longest, metric
        self._sums = self._empty()
        self._samples = torch.zeros((), dtype=torch.int64)
        self.begin()

    def _empty(self) -> tuple[Tensor, Tensor]:
        wide = (self.longest - 1, SHARES - 1)
        reuse, partial = (
            torch.zeros(self.steps, self.branches, width, dtype=torch.float64) for width in wide
        )
        return reuse, partial

    def begin(self) -> None:
        """A new generation; what was seen of an unfinished one is dropped."""
        self._current = self._empty()
        self._past: list[list[Tensor]] = []
        self._at = 0

    @torch.no_grad()
    def step(
        self,
        outputs: Sequence[Tensor],
        inputs: Sequence[Tensor],
        partly: Sequence[Sequence[Tensor]] = (),
    ) -> None:
        """The next step.

        Args:
            outputs: of each branch, ``[B, N, D]``; both halves of guidance are samples.
            inputs: of the module of each branch, ``[B, N, D]``.
            partly: for 1, 2, ... eighths of the rows, what each branch gives with those computed
                anew and the others as they were a step before; left out, the rows computed anew are
                those of ``outputs``, as they are unless rows read each other.

        Raises:
            ValueError: as many steps have been seen as a generation has.
        """
        if self._at == self.steps:
            raise ValueError(f"a generation has {self.steps} steps: begin a new one")
        reuse, partial = self._current
        for branch, (output, given) in enumerate(zip(outputs, inputs, strict=True)):
            for age, old in enumerate(reversed(self._past), start=1):
                error = distance(output, old[branch], self.metric)
                reuse[self._at, branch, age - 1] = error.double().sum()
            if not self._past:
                continue
            for eighths in range(1, SHARES):
                if partly:
                    mixed = partly[eighths - 1][branch]
                else:
                    chosen = largest_rows(given, rows_of(output.shape[1], eighths))
                    mixed = refreshed(self._past[-1][branch], output, chosen)
                error = distance(output, mixed, self.metric)
                partial[self._at, branch, eighths - 1] = error.double().sum()
        self._past.append([output.detach().clone() for output in outputs])
        self._past = self._past[-(self.longest - 1) :]
        self._at += 1
        if self._at == self.steps:
            for total, seen in zip(self._sums, self._current, strict=True):
                total += seen
            self._samples += len(outputs[0])

    @property
    def unfinished(self) -> int:
        """Steps seen of a generation that has more."""
        return self._at % self.steps

    def absorb(self, other: Sensitivity) -> None:
        """Take over what another has measured of finished generations, and leave it nothing."""
        for total, seen in zip(self._sums, other._sums, strict=True):
            total += seen
            seen.zero_()
        self._samples += other._samples
        other._samples.zero_()

    @property
    def samples(self) -> int:
        """Samples of finished generations, both halves of guidance counted."""
        return int(self._samples)

    def errors(self) -> Errors:
        """Means over what has been measured.

        Raises:
            ValueError: no generation is finished.
        """
        if not self.samples:
            raise ValueError("no generation is finished")
        reuse, partial = ((total / self.samples).float() for total in self._sums)
        early = torch.arange(self.steps)[:, None] <= torch.arange(self.longest - 1)
        reuse.masked_fill_(early[:, None], torch.nan)
        partial[0] = torch.nan
        return Errors(reuse, partial)

    def state(self) -> dict[str, Tensor]:
        """All that is needed to go on with the next generation."""
        reuse, partial = self._sums
        return {
            "reuse": reuse.clone(),
            "partial": partial.clone(),
            "samples": self._samples.clone(),
        }

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a :meth:`state`.

        Raises:
            ValueError: it is of other sizes.
        """
        expected = [tuple(total.shape) for total in self._sums]
        found = [tuple(state[name].shape) for name in ("reuse", "partial")]
        if found != expected:
            raise ValueError(f"tables of sizes {found} are no state of tables of sizes {expected}")
        self._sums = (state["reuse"].clone(), state["partial"].clone())
        self._samples = state["samples"].clone()
        self.begin()
