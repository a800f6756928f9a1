"""Training through the reduction: the bundled model learns on the tokens that are left."""

from __future__ import annotations

import random

import pytest
import torch

import vlmopt
from vlmopt import digits


@pytest.mark.parametrize("passes", ["duet-vlm{layers=2,4 keep=0.5,0}", "apet{layers=2 keep=0.5}"])
def test_a_few_steps_lower_the_loss(passes: str) -> None:
    model, processor = digits.load_model()
    torch.manual_seed(0)
    with torch.no_grad():  # something to learn again
        for layer in model.get_decoder().layers:
            weight = layer.mlp.down_proj.weight
            weight += 0.5 * weight.std() * torch.randn_like(weight)
    samples = digits.draw_samples(random.Random(0), *digits.heldout_digits(), 24)
    inputs = dict(digits.batch(processor, *map(list, zip(*samples, strict=True))))
    answers = processor.tokenizer(
        [question.answer for _, question in samples], add_special_tokens=False
    )["input_ids"]
    first = torch.tensor([answer[0] for answer in answers])
    annotation = vlmopt.annotate(model)
    compiled = torch.compile(
        model, backend="vlmopt", options={"passes": passes, "lowering": "eager"}
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for _ in range(6):
        logits = compiled(**inputs).logits
        assert logits.shape[1] < inputs["input_ids"].shape[1]  # tokens are gone
        loss = torch.nn.functional.cross_entropy(logits[:, -1], first)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    annotation.remove()
    torch._dynamo.reset()
    assert losses[-1] < 0.7 * losses[0]
    before_the_cut = model.get_decoder().layers[0].self_attn.q_proj.weight.grad
    assert before_the_cut is not None
    assert before_the_cut.abs().sum() > 0
