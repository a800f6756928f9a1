"""How alike the paths of a draft are: the cosine of their tokens' codes, depth by depth.

"VVS: Accelerating Speculative Decoding for Visual Autoregressive Generation via Partial
Verification Skipping", arXiv 2511.13587.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vlmopt.speculative.tree import PAD


def path_similarity(candidates: Tensor, codebook: Tensor, *, decay: float = 0.9) -> Tensor:
    """Mean over pairs of paths of the cosines at each depth; shallow ones weigh more.

    Where one of two paths has ended they count as unlike, so paths of uneven length are less alike.

    Args:
        candidates: int64 ``[paths, length]``, tokens; the first column is the root, which does not
            count, -1 stands behind the end of a path.
        codebook: ``[vocabulary, width]``, what tokens look like.
        decay: weight of a depth against the one above it.

    Returns:
        float32 scalar, from -1 to 1; 0 where fewer than two paths hold any token.
    """
    drafts = candidates[:, 1:]
    drafts = drafts[:, (drafts != PAD).any(0)]
    present = drafts != PAD
    drafts, present = drafts[present.any(1)], present[present.any(1)]
    if len(drafts) < 2:
        return codebook.new_zeros((), dtype=torch.float32)
    codes = F.normalize(codebook[drafts.clamp(min=0)].float(), dim=-1)
    codes = (codes * present[..., None]).transpose(0, 1)  # by depth
    cosines = codes @ codes.transpose(1, 2)
    weights = decay ** torch.arange(len(codes), device=codes.device, dtype=torch.float32)
    alike = (cosines * (weights / weights.sum())[:, None, None]).sum(0)
    first, second = torch.triu_indices(len(drafts), len(drafts), offset=1, device=codes.device)
    return alike[first, second].mean()
