"""Speculative decoding in a loop: drafts, what the target makes of them, and what it is not asked.

A drafter writes a tree of tokens, the target reads all of it at once, and a path of it stays.
Where image tokens stand in for one another, some drafts are not read at all: "VVS: Accelerating
Speculative Decoding for Visual Autoregressive Generation via Partial Verification Skipping",
arXiv 2511.13587.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmopt.errors import OptionError, PreconditionError
from vlmopt.program import Program
from vlmopt.runtime.model import require_backend
from vlmopt.speculative.capture import DRAFT, RECOVER, VERIFY, DraftTree
from vlmopt.speculative.distribution import Sampling
from vlmopt.speculative.drafters import Allowed, Drafter, EagleDrafter, NoDraft
from vlmopt.speculative.loop import Loop, Prefilled, Statistics
from vlmopt.speculative.rules import parse_rule
from vlmopt.speculative.skipping import parse_policy
from vlmopt.speculative.timed import Clock, TimedStage


@dataclass(frozen=True)
class Generated:
    """New tokens, int64 ``[tokens]``, and how they came about."""

    tokens: Tensor
    statistics: Statistics


class SpeculativeSession:
    """A target and what drafts for it, compiled; generates one sequence at a time.

    Args:
        program: the target, see :func:`vlmopt.speculative.capture.capture_target`.
        draft: a program, see :func:`vlmopt.speculative.capture.capture_draft`, or any
            :class:`~vlmopt.speculative.drafters.Drafter`; ``None`` for plain decoding.
        policy: which drafts the target is not asked about: ``"never"``, ``"uniform{interval=4}"``,
            ``"dynamic{threshold=0.65}"``; see :mod:`vlmopt.speculative.skipping`. Other than
            ``"never"`` is for images.
        acceptance: ``"exact"``, which loses nothing, or ``"lantern{delta=0.1 k=1000}"``; see
            :mod:`vlmopt.speculative.rules`.
        codebook: ``[codes, width]``, what the first tokens of the vocabulary look like; for
            policies and rules that compare them. Drafts with other tokens are never skipped.
        backend: see :func:`vlmopt.optimize`.

    Raises:
        OptionError: unknown backend, or an option out of range.
        PipelineSyntaxError: ``policy`` or ``acceptance`` cannot be read.
        PreconditionError: both programs do not fit together, or a codebook is needed.
    """

    def __init__(
        self,
        program: Program,
        draft: Program | Drafter | None,
        *,
        policy: str = "never",
        acceptance: str = "exact",
        codebook: Tensor | None = None,
        backend: str = "inductor",
    ) -> None:
        require_backend(backend)
        self.program = program
        self.codebook = codebook
        self._set_rules(policy, acceptance)
        self.tree = DraftTree(**program.metadata["tree"])
        self.branches = int(program.metadata["branches"])
        self._capacities = {"the target": int(program.metadata["capacity"])}
        self._clock = Clock()
        self._verify, self._recover = (
            TimedStage(program[name], backend, self._clock) for name in (VERIFY, RECOVER)
        )
        self._draft: Callable[[], Drafter]
        if isinstance(draft, Program):
            _require_fit(program, draft)
            stage = TimedStage(draft[DRAFT], backend, self._clock)
            self._capacities["the drafter"] = int(draft.metadata["capacity"])
            self._draft = lambda: EagleDrafter(draft, stage)
        else:
            self._draft = lambda: draft or NoDraft()

    def with_rules(self, policy: str, acceptance: str = "exact") -> SpeculativeSession:
        """A session with another policy and rule of acceptance, on what is compiled already."""
        twin = copy.copy(self)
        twin._set_rules(policy, acceptance)
        return twin

    def _set_rules(self, policy: str, acceptance: str) -> None:
        self.policy = parse_policy(policy)
        codes = None if self.codebook is None else torch.arange(len(self.codebook))
        self.neighbours = parse_rule(acceptance).neighbours(self.codebook, codes)
        if self.policy.compares and self.codebook is None:
            raise PreconditionError(
                f"policy {policy} compares image tokens by their codes, and there is no codebook",
                hint="pass the codebook, or use policy='uniform{interval=4}'",
            )

    def generate(
        self,
        prompt: Tensor | Prefilled,
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        present: Tensor | None = None,
        allowed: Allowed | None = None,
        stop: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Generated:
        """Go on from a prompt.

        Args:
            prompt: int64 ``[branches, tokens]``, with guidance the condition first; or what the
                model has made of it, see :class:`Prefilled`.
            max_new_tokens: so many tokens, unless one of ``stop`` comes before.
            sampling: temperature 1 and no guidance by default.
            present: bool ``[branches, tokens]``, ``False`` for padding on the left of a prompt.
            allowed: which tokens may stand where.
            stop: tokens that end the sequence; the first one is its last.
            generator: draws tokens, on the CPU.

        Raises:
            OptionError: guidance is given for one branch, or not for two; ``max_new_tokens`` is
                below 1.
            PreconditionError: prompt and new tokens do not fit in the buffers.
        """
        sampling = sampling or Sampling(guidance=None if self.branches == 1 else 1.0)
        self._require(prompt, max_new_tokens, sampling)
        loop = self._loop(sampling, allowed, generator)
        with torch.no_grad():
            loop.begin(prompt, present)
            self._clock.seconds, start = 0.0, time.perf_counter()
            tokens = loop.run(max_new_tokens, stop)
            seconds = time.perf_counter() - start
        found = replace(
            loop.statistics, tokens=len(tokens), seconds=seconds, stage_seconds=self._clock.seconds
        )
        return Generated(tokens, found)

    def _loop(
        self, sampling: Sampling, allowed: Allowed | None, generator: torch.Generator | None
    ) -> Loop:
        return Loop(
            self._verify,
            self._recover,
            self._draft(),
            self.policy,
            self.neighbours,
            self.codebook,
            self.tree.depth,
            sampling,
            allowed,
            generator,
        )

    def _require(self, prompt: Tensor | Prefilled, new: int, sampling: Sampling) -> None:
        if new < 1:
            raise OptionError(f"max_new_tokens is {new}", hint="at least 1")
        if (sampling.guidance is None) != (self.branches == 1):
            raise OptionError(
                f"guidance is {sampling.guidance}, and the target was captured with "
                f"{self.branches} branches",
                hint="capture it with branches=2 for guidance, else with one",
            )
        shape = (prompt.present if isinstance(prompt, Prefilled) else prompt).shape
        if len(shape) != 2 or shape[0] != self.branches or shape[1] < 1:
            raise PreconditionError(
                f"the prompt has the shape {list(shape)}, and the target was captured for "
                f"{self.branches} branches of one sequence",
                hint="give [branches, tokens], the condition first",
            )
        most = int(shape[1]) + new + self.tree.room
        for what, capacity in self._capacities.items():
            if most > capacity:
                raise PreconditionError(
                    f"{int(shape[1])} tokens of prompt, {new} new ones, and a draft need {most} "
                    f"rows, and the buffers of {what} have {capacity}",
                    hint=f"capture both with capacity={most}, or more",
                )


def _require_fit(target: Program, draft: Program) -> None:
    for name in ("branches", "tree"):
        if target.metadata[name] != draft.metadata[name]:
            raise PreconditionError(
                f"the target was captured for {name} {target.metadata[name]}, and its drafter for "
                f"{draft.metadata[name]}",
                hint="capture both with the same tree and branches",
            )
