"""Pipelines of methods that choose tokens in the language model, and the same as eager plans."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from oracles import methods
from oracles.agreement import Plan
from oracles.centrifugal import vlm_pruner


def half(original: int, present: int) -> int:
    return present // 2


def quarter_of_all(original: int, present: int) -> int:
    return original // 4


def none(original: int, present: int) -> int:
    return 0


def nearly(share: float) -> methods.Keep:
    return lambda original, present: int(original * share)


CASES: dict[str, tuple[str, Callable[[Any], Plan]]] = {
    "fastv": (
        "fastv{layers=1,3 keep=0.5}",
        lambda model: [(at, methods.fastv(half)) for at in (1, 3)],
    ),
    "pyramid-drop": (
        "pyramid-drop{layers=0,2 keep=0.5,0.25}",
        lambda model: [
            (0, methods.pyramid_drop(half)),
            (2, methods.pyramid_drop(quarter_of_all)),
        ],
    ),
    "duet-vlm": (
        "duet-vlm{layers=1,3 keep=0.5,0 positions=keep}",
        lambda model: [(1, methods.duet(half)), (3, methods.duet(none))],
    ),
    "transprune": (
        "transprune{layers=1,2,3 keep=0.75,0.5,0.25 scored=3 positions=keep}",
        lambda model: [
            (layer, methods.transprune(nearly(share), range(3)))
            for layer, share in ((1, 0.75), (2, 0.5), (3, 0.25))
        ],
    ),
    "hawk": ("hawk{keep=0.5}", lambda model: [(0, methods.hawk(half, model))]),
    "divprune": ("divprune{keep=0.5}", lambda model: [(0, methods.divprune(half))]),
    "prune2drive": (
        "prune2drive{layers=1 keep=0.5}",
        lambda model: [(1, methods.divprune(half))],
    ),
    "stride-drop": (
        "stride-drop{layers=0,2 keep=0.4,0.5}",
        lambda model: [(0, methods.stride_drop(nearly(0.4))), (2, methods.stride_drop(half))],
    ),
    "v2drop": (
        "v2drop{layers=1,3 keep=0.5}",
        lambda model: [(at, methods.v2drop(half)) for at in (1, 3)],
    ),
    "information-horizon": (
        "information-horizon{layers=1,3 keep=0.5,0}",
        lambda model: [(1, methods.stride_drop(half)), (3, methods.stride_drop(none))],
    ),
    "vlm-pruner": (
        "vlm-pruner{layers=2 keep=0.5 channels=16 batch=3 threshold=0.1 pivots=3}",
        lambda model: [
            (2, vlm_pruner(half, (4, 4), channels=16, batch=3, threshold=0.1, pivots=3))
        ],
    ),
    "vlm-pruner, rounds that end early": (
        "vlm-pruner{layers=1 keep=0.5 threshold=-0.5 clamp=false}",
        lambda model: [
            (1, vlm_pruner(half, (4, 4), channels=256, batch=16, threshold=-0.5, clamp=False))
        ],
    ),
    "coin": ("coin{keep=0.25 positions=keep}", lambda model: [(0, methods.coin(quarter_of_all))]),
    "apet": ("apet{layers=1 keep=0.5 basis=3}", lambda model: [(1, methods.apet(half, 3))]),
    "alvts": (
        "alvts{layers=0,1,3 keep=0.5 rank=32}",
        lambda model: [(at, methods.alvts(half, model)) for at in (0, 1, 3)],
    ),
    "composed": (
        "hawk{keep=0.5} | fastv{layers=2 keep=0.5} | alvts{layers=3 keep=0.5 rank=32}",
        lambda model: [
            (0, methods.hawk(half, model)),
            (2, methods.fastv(half)),
            (3, methods.alvts(half, model)),
        ],
    ),
}
FAMILIES = dict.fromkeys(CASES, ("llava", "qwen2_5_vl")) | {
    "fastv": ("llava", "gemma3", "qwen3_vl", "internvl"),
    "duet-vlm": ("llava", "gemma3", "qwen3_vl", "smolvlm"),
    "hawk": ("llava", "qwen2_5_vl", "qwen3_vl"),
    "alvts": ("llava", "internvl"),
}
