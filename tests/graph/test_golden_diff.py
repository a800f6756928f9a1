# ruff: noqa: E501 - golden text
"""The diff of a real rewrite, word for word: the first cut of a tiny LLaVA."""

from __future__ import annotations

import re

import pytest
import torch
import zoo
from expecttest import assert_expected_inline

from vlmopt.cli import main


def llava() -> object:
    return zoo.build("llava"), zoo.inputs("llava")


def test_the_layout_of_the_diff(capsys: pytest.CaptureFixture[str]) -> None:
    source = f"{__name__}:llava" if "." in __name__ else "tests.graph.test_golden_diff:llava"
    assert main(["diff", source, "-p", "v2drop{layers=2 keep=0.5}"]) == 0
    text = capsys.readouterr().out
    prefill = text[: text.index("@@ decode")] + text[text.index("roles ") :]
    # names of symbols and lines of transformers' files are not ours to pin
    prefill = re.sub(r"modeling_(\w+)\.py:\d+", r"modeling_\1.py:N", prefill)
    prefill = re.sub(r"\bs\d+\b", "s", prefill).replace(source, "llava")
    assert torch.__version__.startswith("2.13")
    assert_expected_inline(
        prefill,
        """\
llava  ->  v2drop{layers=2 keep=0.5}    verified: full

v2drop    1 match    +40 -0 ~148 nodes    visual tokens 16 -> 8    lossy

@@ language_model  layers.2  [v2drop #1]  modeling_llama.py:N
  %add_13                    = add(%add_11, %linear_13)                  f32[1,27,32]
+ %v2drop_eq                 = eq(%modality, 2)                          b8[1,27]
+ %v2drop_to                 = to(%add_13, f32)                          f32[1,27,32]
+ %v2drop_to_1               = to(%add_7, f32)                           f32[1,27,32]
+ %v2drop_sub                = sub(%v2drop_to, %v2drop_to_1)             f32[1,27,32]
+ %v2drop_linalg_vector_norm = linalg_vector_norm(%v2drop_sub, 2, [-1])  f32[1,27]
+ %v2drop_score              = to(%v2drop_linalg_vector_norm, f32)       f32[1,27]
+ %v2drop_where              = where(%v2drop_eq, %v2drop_score, inf)     f32[1,27]
+ %v2drop_sort               = sort(%v2drop_where, stable=True, descending=True)  (f32[1,27], i64[1,27])
+ %v2drop_getitem_1          = getitem(%v2drop_sort, 1)                  i64[1,27]
+ %v2drop_slice_1            = slice(%v2drop_getitem_1, 1, 0, 19)        i64[1,19]
+ %v2drop_sort_1             = sort(%v2drop_slice_1)                     (i64[1,19], i64[1,19])
+ %v2drop_keep               = getitem(%v2drop_sort_1, 0)                i64[1,19]      11 text + 8 visual
+ %v2drop_reshape            = reshape(%v2drop_keep, [1, 19, 1])         i64[1,19,1]
+ %v2drop_expand             = expand(%v2drop_reshape, [1, 19, 32])      i64[1,19,32]
+ %v2drop_out                = gather(%add_13, 1, %v2drop_expand)        f32[1,19,32]
! %pow_5                       arg 0: %add_13 -> %v2drop_out
! %mul_21                      arg 0: %add_13 -> %v2drop_out
! %add_17                      arg 0: %add_13 -> %v2drop_out
+ 2 frontier gathers: %mul_1, %mul_2 along dim 1  (6 nodes)
~ 117 nodes change 27 -> 19 tokens, nothing else          (layers 2-3, norm)
= layer 3 is equal to layer 2 up to names

roles         outputs last_hidden_state, key[2-3], value[2-3]: 27 -> 19; + kept_1 i64[1,19]
language_model              before    after    change
  FLOPs, prefill            2.0 M     1.7 M    -17 %     by layer: 1.00 x2, 0.67 x2
  KV cache, 1 sequence      14 kB     12 kB    -15 %
  tokens, mean of layers    27.0      23.0     -15 %
  nodes                     242       263      +21

roles         inputs key[2-3], value[2-3]: s -> s - 8; + kept_1_slots i64[1,19]; outputs key[2-3], value[2-3]: s + 1 -> s - 7
decode                    before    after    change
  FLOPs, one token        82 k      80 k     -2 %      by layer: 1.00 x2, 0.95 x2
  KV cache, 1 sequence    17 kB     15 kB    -12 %
  nodes                   286       304      +18

attention FLOPs: dense SDPA, no causal discount; 1 FMA = 2 FLOPs.
sizes: symbolic sizes count as the size seen at capture.  Reproduce: vlmopt diff llava -p 'v2drop{layers=2 keep=0.5}' (pipeline hash 083aa1)
""",
    )
