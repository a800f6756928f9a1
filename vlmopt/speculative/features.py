"""Features of the target that stand for those of tokens which it has not seen.

"VVS: Accelerating Speculative Decoding for Visual Autoregressive Generation via Partial
Verification Skipping", arXiv 2511.13587.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vlmopt.errors import PreconditionError


def stale_features(features: Tensor, count: int) -> Tensor:
    """The last ``count`` features; where there are fewer, the last one is repeated behind them.

    Args:
        features: ``[..., tokens, width]`` of tokens that the target has seen.

    Returns:
        ``[..., count, width]``.

    Raises:
        PreconditionError: there are none.
    """
    seen = features.shape[-2]
    if seen == 0:
        raise PreconditionError(
            "there is no feature to stand in for others", hint="verify a draft first"
        )
    places = torch.arange(count, device=features.device) + max(seen - count, 0)
    return features.index_select(-2, places.clamp(max=seen - 1))
