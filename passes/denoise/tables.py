"""Sensitivity tables and the plan made of them, as an artifact of a calibration.

A safetensors file: tensors ``reuse`` and ``partial``, and in the header plan and conditions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from vlmopt import artifacts
from vlmopt.denoising.following import LOOP, denoiser_stage
from vlmopt.denoising.plan import Plan, Site
from vlmopt.errors import ArtifactError, PlanMismatchError
from vlmopt.passes.denoise.sensitivity import Errors
from vlmopt.program import Program

CONDITIONS = ("scheduler", "steps", "guidance", "shape", "timesteps")
"""What tables hold for: class of the scheduler; number of steps; weight of guidance; shape of a
sample that the denoiser is given, without the batch; timesteps in order of execution."""


@dataclass(frozen=True)
class Found:
    """What an artifact holds.

    Attributes:
        conditions: values of :data:`CONDITIONS`; ``None`` for what was not known.
    """

    errors: Errors
    plan: Plan
    conditions: Mapping[str, Any]


def write(
    path: str | Path,
    name: str,
    program: Program,
    found: Found,
    values: Mapping[str, Any],
    *,
    overwrite: bool = False,
) -> None:
    """Write an artifact for the pass ``name``.

    Args:
        values: JSON values beside plan and conditions.

    Raises:
        ArtifactError: the file exists and ``overwrite`` is false, or its name does not fit.
    """
    content = {**values, "conditions": dict(found.conditions), "plan": found.plan.to_json()}
    tensors = {"reuse": found.errors.reuse, "partial": found.errors.partial}
    artifacts.write(path, name, program, content, tensors, overwrite=overwrite)


def read(path: str | Path, name: str, program: Program | None = None) -> Found:
    """Read an artifact.

    Args:
        program: the one it is to be used on; its model is checked.

    Raises:
        ArtifactError: no such file, or not an artifact for this pass and model; plan and tables do
            not fit each other.
    """
    content = artifacts.read(path, name, program)
    plan = Plan.from_json(content.get("plan", {}))
    reuse, partial = (artifacts.tensor(path, one) for one in ("reuse", "partial"))
    _require_sizes(path, plan, reuse, partial)
    return Found(Errors(reuse, partial), plan, content.get("conditions", {}))


def _require_sizes(path: str | Path, plan: Plan, *tensors: Tensor) -> None:
    wanted = (len(plan.steps), len(plan.sites))
    for tensor in tensors:
        if tensor.ndim != 3 or tuple(tensor.shape[:2]) != wanted:
            raise ArtifactError(
                f"{path} has a plan for {wanted[0]} steps and {wanted[1]} branches, and tables of "
                f"size {list(tensor.shape)}",
                hint="calibrate anew",
            )


def require_sites(path: str | Path, known: tuple[Site, ...], found: tuple[Site, ...]) -> None:
    """Check that tables are of these branches.

    Raises:
        ArtifactError: they are not.
    """
    if known == found:
        return
    missing = [str(site) for site in found if site not in known]
    extra = [str(site) for site in known if site not in found]
    raise ArtifactError(
        f"{path} is of other branches: {len(known)}, and this model has {len(found)}"
        + (f"; without {', '.join(missing[:4])}" if missing else "")
        + (f"; with {', '.join(extra[:4])}" if extra else ""),
        hint="calibrate with this model",
    )


def loop_now(program: Program) -> dict[str, Any]:
    """What is known of :data:`CONDITIONS` for a captured denoiser."""
    stage = denoiser_stage(program)
    shape = stage.placeholder(stage.inputs[0]).meta["val"].shape[1:]
    return {**program.metadata.get(LOOP, {}), "shape": [int(size) for size in shape]}


def require_conditions(path: str | Path, made: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Check that tables hold for a loop; what is not known on one side is not compared.

    Raises:
        PlanMismatchError: they do not; every difference is named.
    """
    differ = [
        f"{name} {_short(made[name])}, and the loop has {_short(now[name])}"
        for name in CONDITIONS
        if made.get(name) is not None and now.get(name) is not None and made[name] != now[name]
    ]
    if differ:
        raise PlanMismatchError(
            f"{path} was made for " + "; for ".join(differ),
            hint="use the loop that it was made for, or calibrate with this one",
        )


def _short(value: Any) -> str:
    if isinstance(value, list) and len(value) > 5:
        return f"[{', '.join(f'{one:g}' for one in value[:3])}, ..., {value[-1]:g}]"
    return str(value)
