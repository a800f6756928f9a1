"""Numerical comparison of two programs, judged by what the passes between them promised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from vlmopt.analysis.cost import size_of
from vlmopt.errors import ArtifactError
from vlmopt.graph.text import value_text
from vlmopt.pipeline.passes import Semantics
from vlmopt.program import Modality, Port, Program, Role, Stage, attach_attr, fetch_attr

TOLERANCES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-10,
    torch.float32: 1e-4,
    torch.float16: 1e-2,
    torch.bfloat16: 3e-2,
}
"""Largest difference under NUMERIC semantics, relative to the largest value of an output."""


@dataclass(frozen=True)
class OutputComparison:
    """One output of one stage.

    Attributes:
        difference: largest absolute difference relative to the largest value of the reference.
        on_kept: the reference was compared on the tokens that the program kept.
        ok: whether the semantics hold; ``note`` says why not, or why nothing was compared.
    """

    stage: str
    output: str
    difference: float | None
    ok: bool
    on_kept: bool = False
    note: str = ""


@dataclass(frozen=True)
class Comparison:
    """All outputs that both programs have, under one promise."""

    semantics: Semantics
    outputs: tuple[OutputComparison, ...]

    @property
    def ok(self) -> bool:
        return all(output.ok for output in self.outputs)


def weakest(semantics: Sequence[Semantics]) -> Semantics:
    """What a chain of passes promises: as little as its weakest member; EXACT when empty."""
    order = (Semantics.EXACT, Semantics.NUMERIC, Semantics.LOSSY)
    return max(semantics, key=order.index, default=Semantics.EXACT)


def compare_programs(
    program: Program, reference: Program, semantics: Semantics, *, seed: int = 0
) -> Comparison:
    """Run the stages of both programs on the same random inputs and compare their outputs.

    A lossy program is compared on the tokens that it kept; there only values that are not finite
    fail, since how far it may differ is a matter of its quality, not of its correctness.

    Raises:
        ArtifactError: a program was loaded without weights.
    """
    results: list[OutputComparison] = []
    for stage in program:
        if stage.name in reference:
            results += _compare_stage(stage, reference[stage.name], semantics, seed)
        else:
            results.append(_skipped(stage.name, "*", "the reference has no such stage"))
    return Comparison(semantics, tuple(results))


def random_inputs(stage: Stage, seed: int = 0) -> list[Tensor]:
    """Inputs for a stage that respect the roles of its ports, in order."""
    generator = torch.Generator().manual_seed(seed)
    return [_random_input(stage, port, generator) for port in stage.inputs]


def _compare_stage(
    stage: Stage, reference: Stage, semantics: Semantics, seed: int
) -> list[OutputComparison]:
    if _input_types(stage) != _input_types(reference):
        return [_skipped(stage.name, "*", "its inputs differ from the reference's")]
    inputs = random_inputs(reference, seed)
    ours, theirs = _run(stage, inputs), _run(reference, inputs)
    results = []
    for port in stage.outputs:
        if port.role is Role.KEPT:
            continue
        if port.name not in theirs:
            results.append(_skipped(stage.name, port.name, "the reference has no such output"))
            continue
        kept = ours.get(port.kept) if port.kept is not None else None
        results.append(
            _compare(stage.name, port.name, ours[port.name], theirs[port.name], kept, semantics)
        )
    return results


def _compare(
    stage: str, name: str, ours: Tensor, theirs: Tensor, kept: Tensor | None, semantics: Semantics
) -> OutputComparison:
    present = torch.ones_like(ours, dtype=torch.bool)
    on_kept = kept is not None and ours.shape != theirs.shape
    if on_kept and kept is not None:
        theirs, present = _on_kept(ours, theirs, kept)
    if ours.shape != theirs.shape or ours.dtype != theirs.dtype:
        note = f"{value_text(ours)}, but the reference gives {value_text(theirs)}"
        return OutputComparison(stage, name, None, False, on_kept, note)
    left, right = ours[present].double(), theirs[present].double()
    if not left.isfinite().all() and right.isfinite().all():
        return OutputComparison(stage, name, None, False, on_kept, "holds values not finite")
    largest = right.abs().max().item() if right.numel() else 0.0
    gap = (left - right).abs().max().item() if left.numel() else 0.0
    difference = gap / largest if largest else gap
    limit = TOLERANCES.get(ours.dtype, 0.0)
    if semantics is Semantics.EXACT and not torch.equal(ours[present], theirs[present]):
        return OutputComparison(stage, name, difference, False, on_kept, "is not bit-equal")
    if semantics is Semantics.NUMERIC and difference > limit:
        note = f"differs by more than {limit:.0e} of its largest value"
        return OutputComparison(stage, name, difference, False, on_kept, note)
    return OutputComparison(stage, name, difference, True, on_kept)


def _on_kept(ours: Tensor, theirs: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """The reference at the kept slots of the prompt, and where those are no fillers."""
    pairs = zip(ours.shape, theirs.shape, strict=True)
    axes = [axis for axis, (left, right) in enumerate(pairs) if left != right]
    if len(axes) != 1 or ours.shape[axes[0]] != kept.shape[1]:
        return theirs, torch.ones_like(ours, dtype=torch.bool)
    view = [1] * ours.ndim
    view[0], view[axes[0]] = kept.shape
    index = kept.view(view).expand(ours.shape)
    return theirs.gather(axes[0], index.clamp(min=0)), index >= 0


def _skipped(stage: str, output: str, why: str) -> OutputComparison:
    return OutputComparison(stage, output, None, True, note=f"not compared: {why}")


def _input_types(stage: Stage) -> list[tuple[str, str]]:
    return [(p.name, value_text(stage.placeholder(p).meta["val"])) for p in stage.inputs]


def _run(stage: Stage, inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    module = stage.clone().graph_module
    for node in stage.graph.find_nodes(op="get_attr"):
        weight = fetch_attr(stage.graph_module, str(node.target))
        if isinstance(weight, FakeTensor) or weight.is_meta:
            raise ArtifactError(
                f"stage {stage.name} was loaded without weights, so it cannot be run",
                node=node,
                hint="capture the model with its weights",
            )
        if weight.data_ptr() % _ALIGNMENT:
            aligned = weight.detach().clone()
            if isinstance(weight, torch.nn.Parameter):
                aligned = torch.nn.Parameter(aligned, requires_grad=False)
            attach_attr(module, str(node.target), aligned)
    with torch.no_grad():
        values: Any = module(*inputs)
    return {port.name: value for port, value in zip(stage.outputs, values, strict=True)}


_ALIGNMENT = 64
"""Bytes, as torch allocates. Weights mapped from a file stand anywhere, and by their alignment the
kernels of a matmul, and with them the last bit, are chosen."""


def _random_input(stage: Stage, port: Port, generator: torch.Generator) -> Tensor:
    value: Tensor = stage.placeholder(port).meta["val"]
    shape = [size_of(size) for size in value.shape]
    if port.role in (Role.MODALITY, Role.VISUAL_MASK):
        modality = _modality(stage, shape)
        return modality if port.role is Role.MODALITY else modality == Modality.VISION
    if port.role in (Role.POSITION_IDS, Role.KEPT):
        places = torch.arange(shape[-1], dtype=value.dtype)
        if port.role is Role.KEPT:  # copies of tokens stand behind them all
            places = places % stage.facts.get("tokens", shape[-1])
        return places.expand(shape).contiguous()
    if port.role is Role.INPUT_IDS:
        limit = _vocabulary(stage, port)
        return torch.randint(limit, shape, generator=generator, dtype=value.dtype)
    if port.role is Role.ATTENTION_MASK:  # an additive mask hides nothing where it is zero
        filled = torch.zeros if value.is_floating_point() else torch.ones
        return filled(shape, dtype=value.dtype)
    if value.is_floating_point():
        return torch.randn(shape, generator=generator).to(value.dtype)
    return torch.full(shape, value.dtype is torch.bool, dtype=value.dtype)


def _modality(stage: Stage, shape: Sequence[int]) -> Tensor:
    """Padding, one token of text, the visual tokens, the rest of the text; as counted at capture.

    Where nothing was counted, all tokens are text.
    """
    modality = torch.full(tuple(shape), Modality.TEXT, dtype=torch.int64)
    counts = zip(
        stage.facts.get("padding_tokens", ()), stage.facts.get("visual_tokens", ()), strict=True
    )
    for sample, (padding, visual) in enumerate(counts):
        modality[sample, :padding] = Modality.PADDING
        modality[sample, padding + 1 : padding + 1 + visual] = Modality.VISION
    return modality


def _vocabulary(stage: Stage, port: Port) -> int:
    """Rows of the table that token ids look up; one id where there is none."""
    for user in stage.placeholder(port).users:
        if user.target is torch.ops.aten.embedding.default:
            return size_of(user.args[0].meta["val"].shape[0])  # type: ignore[union-attr]
    return 1
