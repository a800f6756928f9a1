"""Distributions are those that plain generation draws from; rules of acceptance as text."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from vlmopt.errors import OptionError, PreconditionError
from vlmopt.speculative.distribution import Sampling, guided
from vlmopt.speculative.lantern import nearest_codes
from vlmopt.speculative.rules import Exact, Lantern, parse_rule


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"temperature": 0.6},
        {"top_k": 5},
        {"top_k": 500},
        {"top_p": 0.7},
        {"temperature": 1.4, "top_k": 9, "top_p": 0.5},
    ],
)
def test_as_plain_generation(how: dict[str, Any]) -> None:
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    logits = torch.randn(1, 7, 30, generator=torch.Generator().manual_seed(0)) * 2
    plain = LogitsProcessorList()
    for name, kind in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in how:
            plain.append(kind(how[name]))
    before: Any = torch.zeros(7, 1, dtype=torch.int64)
    scores: Any = logits[0].clone()
    wanted = plain(before, scores).softmax(-1)
    found = Sampling(**how).distribution(logits)
    torch.testing.assert_close(found[0], wanted)
    assert (found[0] == 0).equal(wanted == 0)


def test_guidance() -> None:
    condition, without = torch.tensor([[[1.0, 0.0, 2.0]]]), torch.tensor([[[0.5, 1.0, 2.0]]])
    found = Sampling().distribution(guided(torch.cat([condition, without]).bfloat16(), 3.0))
    torch.testing.assert_close(found, torch.tensor([[[2.0, -2.0, 2.0]]]).softmax(-1))
    assert found.dtype == torch.float32


def test_greedy_has_no_temperature() -> None:
    logits = torch.tensor([[[1.0, 3.0, 2.0]]])
    how = Sampling(temperature=0)
    assert how.greedy and how.distribution(logits).equal(logits.softmax(-1))
    assert not Sampling().greedy


@pytest.mark.parametrize("how", [{"temperature": -1}, {"top_k": 0}, {"top_p": 0}, {"top_p": 1.1}])
def test_values_out_of_range(how: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(how))):
        Sampling(**how)


def test_rules() -> None:
    codes = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    assert parse_rule("exact") == Exact() and Exact().neighbours(codes) is None
    rule = parse_rule("lantern{delta=0.2 k=3}")
    assert rule == Lantern(delta=0.2, k=3)
    near = rule.neighbours(codes)
    assert near is not None and near.delta == 0.2 and near.nearest.equal(nearest_codes(codes, 3))
    with pytest.raises(PreconditionError, match="no codebook"):
        rule.neighbours(None)
    for text, message in [
        ("lantern{delta=-1}", "must be at least 0"),
        ("strict", "strict is not a rule of acceptance"),
    ]:
        with pytest.raises(OptionError, match=re.escape(message)):
            parse_rule(text)
