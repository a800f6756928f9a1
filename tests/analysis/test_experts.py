"""Mixtures of experts: what is found, what is not and why, and skipping in every form of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import zoo

import vlmopt
from tests import mixtures
from tests.toys import decoder
from vlmopt.analysis.experts import Dispatch, find_experts
from vlmopt.errors import PreconditionError
from vlmopt.passes.experts.modes import MoDES
from vlmopt.passes.experts.naee import Naee
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Modality

FORMS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "softmax of the chosen": {"score": "chosen"},
    "sigmoid": {"score": "sigmoid", "scale": 2.5},
    "corrected": {"score": "sigmoid", "correction": torch.tensor([0.5, -0.5, 0.2, 0.0])},
    "not renormalised": {"renormalise": False},
    "bias": {"bias": torch.arange(32.0).view(4, 8) / 10},
    "one of many": {"k": 1, "renormalise": False},
}


@pytest.fixture(scope="module")
def given() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    modality = torch.full((2, 5), Modality.TEXT)
    modality[:, 1:4] = Modality.VISION
    modality[0, 0] = Modality.PADDING
    return x, modality


@pytest.mark.parametrize("dispatch", ["grouped", "batched", "loop", "one_hot"])
@pytest.mark.parametrize("form", FORMS)
def test_skipping_in_every_form(
    form: str, dispatch: str, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    layer = mixtures.mixture(dispatch=dispatch, **FORMS[form])
    program = mixtures.mixtures(layer, *given)
    found = find_experts(program["model"])
    assert not found.misses
    (block,) = found.blocks
    options = {"score": "softmax", "k": 2, "renormalise": True, **FORMS[form]}
    assert block.dispatch is Dispatch(dispatch.replace("one_hot", "loop"))
    assert (block.experts, block.k) == (4, options["k"])
    assert block.router.score == options["score"].replace("chosen", "softmax")
    assert block.router.renormalised == options["renormalise"]
    assert block.router.corrected == ("correction" in options)
    assert block.router.scale == options.get("scale", 1.0)
    weights, _ = layer.route(given[0].reshape(-1, 8))
    stays = weights >= 0.8 * weights.amax(-1, keepdim=True)
    stays[0] = False  # padding
    run_pipeline(program, [Naee(beta=0.8)], verify="full")
    (out,) = program["model"].graph_module(*given)
    wanted = layer.reference(given[0], stays)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)
    assert (out[0, 0] == 0).all()


NEAR: dict[str, tuple[dict[str, Any], str]] = {
    "dense": ({"dispatch": "dense"}, "all 4 experts compute all tokens"),
    "relu": ({"score": "relu"}, "neither a softmax nor a sigmoid"),
    "counted": ({"counted": 3}, "rows are counted in 3 groups, and there are 4 experts"),
}


@pytest.mark.parametrize("form", NEAR)
def test_near_misses_say_why(form: str, given: tuple[torch.Tensor, torch.Tensor]) -> None:
    options, why = NEAR[form]
    program = mixtures.mixtures(mixtures.mixture(**options), *given)
    found = find_experts(program["model"])
    assert not found.blocks
    (miss,) = found.misses
    assert why in miss.what
    assert miss.node is not None
    with pytest.raises(PreconditionError, match=why):
        run_pipeline(program, "naee")


def test_a_model_without_experts(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    with pytest.raises(PreconditionError, match="no layer of this model has a mixture of experts"):
        run_pipeline(decoder(), "naee")


def test_experts_are_skipped_once(given: tuple[torch.Tensor, torch.Tensor]) -> None:
    program = mixtures.mixtures(mixtures.mixture(), *given)
    with pytest.raises(PreconditionError, match="has skipped some of these experts already"):
        run_pipeline(program, "naee | expert-topk")


FOUND = {
    # first layer with experts, score, corrected, limited, renormalised
    "ernie4_5_vl_moe": (1, "softmax", True, False, True),
    "aria": (0, "softmax", False, False, True),
    "kimi_k25": (1, "sigmoid", True, True, True),
}


@pytest.mark.parametrize("family", FOUND)
def test_routers_of_models(family: str) -> None:
    program = vlmopt.capture(zoo.build(family, layers=2), zoo.inputs(family))
    for name in ("language_model", "decode"):
        found = find_experts(program[name])
        assert not found.misses
        assert [block.layer for block in found.blocks] == list(range(FOUND[family][0], 2))
        for block in found.blocks:
            router = block.router
            assert block.dispatch is Dispatch.GROUPED
            assert (block.experts, block.k) == (4, 2)
            known = router.score, router.corrected, router.limited, router.renormalised
            assert known == FOUND[family][1:]
            assert router.scale == (2.5 if family == "kimi_k25" else 1.0)


def test_experts_that_all_compute_all_tokens() -> None:
    program = vlmopt.capture(zoo.build("llama4", layers=2), zoo.inputs("llama4"))
    with pytest.raises(PreconditionError, match="all 4 experts compute all tokens"):
        run_pipeline(program, "expert-topk")


@pytest.mark.parametrize("dispatch", ["grouped", "batched", "loop"])
@pytest.mark.parametrize("form", ["softmax", "softmax of the chosen", "sigmoid"])
def test_scores_over_all_experts(
    form: str, dispatch: str, given: tuple[torch.Tensor, torch.Tensor]
) -> None:
    """As in the paper of MoDES: not the weights, which sum to 1 over the chosen."""
    layer = mixtures.mixture(dispatch=dispatch, **FORMS[form])
    program = mixtures.mixtures(layer, *given)
    rows = given[0].reshape(-1, 8)
    logits = rows @ layer.gate.t()
    scores = logits.sigmoid() if form == "sigmoid" else logits.softmax(-1)
    weights, ids = layer.route(rows)
    chosen = scores.gather(1, ids)
    limit = float(chosen[:, 0].median())
    stays = chosen >= limit
    stays[0] = False  # padding
    assert not torch.equal(stays[1:], (weights >= limit)[1:])
    run_pipeline(program, [MoDES(text=limit, vision=limit, of="scores")], verify="full")
    (out,) = program["model"].graph_module(*given)
    torch.testing.assert_close(out, layer.reference(given[0], stays), atol=1e-5, rtol=1e-5)
