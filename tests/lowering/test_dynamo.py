"""The door ``torch.compile(backend=...)``: the rewrite that capture gets, and gradients."""

from __future__ import annotations

import pytest
import torch
import zoo

import vlmopt
from vlmopt.lowering.dynamo import vlmopt_backend

TEXT = "v2drop{layers=2 keep=0.5}"


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("family", ["llava", "internvl"])
def test_equals_the_captured_program(family: str) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family)
    wanted = vlmopt.optimize(model, inputs, TEXT, backend="eager")
    compiled = torch.compile(
        model, backend=vlmopt_backend, options={"passes": TEXT, "lowering": "eager"}
    )
    with torch.no_grad():
        one, two = wanted(**inputs).logits, compiled(**inputs).logits
    assert one.shape == two.shape
    assert one.shape[1] == inputs["input_ids"].shape[1] - 8
    assert (one - two).abs().max() <= 1e-6


def test_gradients_flow_through_the_drop() -> None:
    model, inputs = zoo.build("llava"), zoo.inputs("llava")
    compiled = torch.compile(
        model, backend=vlmopt_backend, options={"passes": TEXT, "lowering": "eager"}
    )
    compiled(**inputs).logits.sum().backward()
    gradient = model.get_input_embeddings().weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
