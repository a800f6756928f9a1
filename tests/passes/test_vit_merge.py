"""Token merging inside vision transformers, against plain loops on the untouched models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import encoders
import pytest
import torch
import zoo
from oracles import vit
from torch import Tensor

import vlmopt
from vlmopt.analysis.encoder import find_encoder
from vlmopt.errors import ArtifactError, OptionError, PreconditionError
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program

TOME = "tome{r=3 restore=RESTORE prop_attn=PROP}"
SAD = "sad-tm{mr=0.1 tau=1 alpha=1 beta=0 restore=RESTORE prop_attn=PROP}"
COUNTS = {"tome": dict.fromkeys(range(4), 3), "sad-tm": {1: 3, 2: 2, 3: 2}}  # 25 -> 22, 20, 18
CHOOSE = {"tome": vit.tome, "sad-tm": vit.sad_tm(1.0)}


def text(method: str, restore: str = "auto", prop: bool = True) -> str:
    chosen = {"tome": TOME, "sad-tm": SAD}[method]
    return chosen.replace("RESTORE", restore).replace("PROP", str(prop).lower())


def outputs(result: Any) -> list[Tensor]:
    """Tensors of whatever a model returns."""
    if isinstance(result, Tensor):
        return [result]
    return list(result if isinstance(result, tuple) else result.to_tuple())


def agree(found: Any, wanted: Any) -> None:
    found, wanted = outputs(found), outputs(wanted)
    assert len(found) == len(wanted)
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-5 * max(1.0, float(other.abs().max()))


@pytest.mark.parametrize("method", ["tome", "sad-tm"])
@pytest.mark.parametrize("name", encoders.ENCODERS)
def test_merging_equals_its_eager_reference(name: str, method: str) -> None:
    kind, model, images = encoders.ENCODERS[name], encoders.build(name), encoders.images()
    with torch.no_grad():
        original = outputs(model(images))[0]
    for restore in ("true", "false", "auto"):
        for prop in (True, False):
            run = vlmopt.optimize(model, (images,), text(method, restore, prop), backend="eager")
            back = restore == "true" or (restore == "auto" and kind.dense)
            oracle = vit.MergedEncoder(
                model, kind.parts, CHOOSE[method], COUNTS[method], prop, back
            )
            wanted = oracle(pixel_values=images)
            with torch.no_grad():
                found = run(images)
            agree(found, wanted)
            first = outputs(wanted)[0]
            if back:
                assert first.shape == original.shape
            if first.shape == original.shape:
                assert (first - original).abs().max() > 1e-3  # merging makes a difference
