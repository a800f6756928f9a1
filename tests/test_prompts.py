"""Prompts with several images, with videos, with both, and with unequal numbers of them."""

from __future__ import annotations

import pytest
import torch
import zoo
from oracles import methods
from oracles.agreement import Plan, assert_equals_oracle

import vlmopt

TWO_IMAGES = {"images": (2, 2)}
UNEQUAL = {"images": (1, 3)}
VIDEO = {"images": (0, 0), "videos": (1, 1)}
BOTH = {"images": (1, 1), "videos": (1, 1)}
EITHER = {"images": (1, 0), "videos": (0, 1)}

PROMPTS = [
    ("llava", TWO_IMAGES),
    ("internvl", TWO_IMAGES),
    ("qwen2_5_vl", UNEQUAL),
    ("qwen3_vl", UNEQUAL),
    ("smolvlm", UNEQUAL),
    ("gemma3", UNEQUAL),
    ("qwen2_5_vl", VIDEO),
    ("llava_onevision", VIDEO),
    ("smolvlm", VIDEO),
    ("qwen3_vl", BOTH),
    ("llava_onevision", EITHER),
]
TEXT = (
    "random-drop{layers=0 keep=0.75} | v2drop{layers=1 keep=0.75} | fastv{layers=2 keep=0.75} | "
    "divprune{layers=3 keep=0.75}"
)


def three_quarters(original: int, present: int) -> int:
    return present * 3 // 4


def _name(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    return " ".join(f"{kind}={list(counts)}" for kind, counts in value.items())


@pytest.mark.parametrize(("family", "prompt"), PROMPTS, ids=_name)
def test_dropping_equals_hiding(family: str, prompt: dict[str, tuple[int, ...]]) -> None:
    model, inputs = zoo.build(family), zoo.inputs(family, text=(6, 8), **prompt)
    visual = zoo.visual(inputs)

    def plan(kept: dict[str, torch.Tensor]) -> Plan:
        at_random = methods.given(kept["kept_1_slots"])
        return [
            (0, at_random),
            (1, methods.v2drop(three_quarters)),
            (2, methods.fastv(three_quarters)),
            (3, methods.divprune(three_quarters)),
        ]

    oracle = assert_equals_oracle(model, inputs, TEXT, plan)
    left = (oracle.choices[0].stays & visual).sum(1)
    assert left.tolist() == [count * 3 // 4 for count in visual.sum(1).tolist()]


@pytest.mark.parametrize("family", ["qwen2_5_vl", "llava_onevision"])
def test_the_encoder_of_a_video_is_a_stage(family: str) -> None:
    program = vlmopt.capture(zoo.build(family), zoo.inputs(family, images=(0,), videos=(1,)))
    assert next(iter(program.stages)) == "vision_encoder"
    assert program["language_model"].facts["visual_tokens"] == [zoo.video_tokens(family)]
