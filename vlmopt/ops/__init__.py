"""Operators of vlmopt that compute what no ATen operator gives, or gives fast."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from vlmopt.ops import (  # noqa: F401 - registers gradients
    attention,
    attention_gradient,
    experts,
    logsumexp,
    packed,
    ranking,
    selection,
)

_own = torch.ops.vlmopt

DECOMPOSITIONS: Mapping[Any, Callable[..., torch.Tensor]] = {
    _own.attention_rows.default: attention.attention_rows_reference,
    _own.attention_mass.default: attention.attention_mass_reference,
    _own.attention_logsumexp.default: logsumexp.attention_logsumexp_reference,
    _own.kth_largest.default: ranking.kth_largest_reference,
    _own.computed_rows.default: lambda places, ends: places.clone(),
    _own.restored_rows.default: experts.restored_rows_reference,
    _own.summed_rows.default: experts.summed_rows_reference,
    _own.grouped_mm.default: experts.grouped_mm_tiles,
    _own.farthest_point.default: selection.farthest_point_steps,
    _own.greedy_log_det.default: selection.greedy_log_det_steps,
    _own.facility_location.default: selection.facility_location_steps,
}
"""Each operator as a function in operators of torch, for targets that know no others."""

STEPS: Mapping[Any, int] = {
    _own.farthest_point.default: 4,
    _own.greedy_log_det.default: 5,
    _own.facility_location.default: 2,
}
"""Operators that decompose into one step per pick: which argument says how many."""
