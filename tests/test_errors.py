# ruff: noqa: E501 - golden text
"""What a user reads when something is wrong: one real situation per class of error, word for word."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from torch import nn

import vlmopt
from tests.mixtures import mixture, mixtures
from tests.toys import Block, Decoder, decoder
from vlmopt import errors
from vlmopt.graph.verify import verify_program
from vlmopt.lowering.onnx import export_program
from vlmopt.passes.denoise.tables import require_conditions
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Program, Role
from vlmopt.runtime.stream_memory import Room, StreamMemory

SHOWN: dict[type[errors.VlmoptError], str] = {}
"""Every error that a test below caused."""


def message(kind: type[errors.VlmoptError], action: Callable[[], object]) -> str:
    """The text of the error of exactly this class that ``action`` causes."""
    with pytest.raises(kind) as raised:
        action()
    assert type(raised.value) is kind
    SHOWN[kind] = str(raised.value)
    return re.sub(r"(\w+\.py):\d+", r"\1:LINE", str(raised.value))


class Mixing(nn.Module):
    """A decoder with an operator between its layers that no token may be taken from."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(16) for _ in range(3))
        self.mix = nn.Conv1d(16, 16, 3, padding=1)

    def forward(self, x: torch.Tensor, modality: torch.Tensor) -> torch.Tensor:
        x = self.layers[1](self.layers[0](x))
        x = self.mix(x.transpose(1, 2)).transpose(1, 2)
        out: torch.Tensor = self.layers[2](x)
        return out


def mixing() -> Program:
    modality = torch.tensor([[1, 2, 2, 2, 2, 1]])
    return vlmopt.capture(
        Mixing(), (torch.randn(1, 6, 16), modality), roles={"modality": Role.MODALITY}
    )


@dataclass(frozen=True, kw_only=True)
class Failing(Pass):
    """A pass with a bug."""

    name = "failing"
    family = "test"
    phase = Phase.CLEANUP
    semantics = Semantics.EXACT

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        empty: list[PassResult] = []
        return empty[len(program.passes)]


def test_pipeline_syntax() -> None:
    assert_expected_inline(
        message(
            errors.PipelineSyntaxError, lambda: run_pipeline(decoder(), "v2drop{layers=3 | fold")
        ),
        """\
expected the name of an option
  v2drop{layers=3 | fold
                  ^
  try: a pipeline looks like v2drop{layers=3 keep=0.5} | fold-constants""",
    )


def test_unknown_pass() -> None:
    assert_expected_inline(
        message(errors.UnknownPassError, lambda: run_pipeline(decoder(), "v2dorp{layers=3}")),
        """\
no pass is called 'v2dorp'
  try: v2drop; vlmopt passes lists them""",
    )


def test_option() -> None:
    assert_expected_inline(
        message(errors.OptionError, lambda: run_pipeline(decoder(), "v2drop{layer=3}")),
        """\
v2drop has no option layer
  try: layers; the options of v2drop are layers, keep, of, positions, metric""",
    )


def test_option_out_of_range() -> None:
    assert_expected_inline(
        message(errors.OptionError, lambda: run_pipeline(decoder(), "v2drop{layers=3,2}")),
        """\
v2drop: option layers must increase, but 2 comes after 3
  try: layers stands for: layers whose input is cut, counted from 0""",
    )


def test_values_that_do_not_fit_together() -> None:
    assert_expected_inline(
        message(errors.OptionError, lambda: run_pipeline(mixing(), "v2drop{layers=2}")),
        """\
v2drop: option keep has 3 values for 1 layer
  try: give one value, or one per layer: v2drop{layers=2 keep=0.5}
  in:  pass 1 of 1, v2drop{layers=2}""",
    )


def test_backend() -> None:
    assert_expected_inline(
        message(
            errors.OptionError,
            lambda: vlmopt.optimize(
                Decoder(), (torch.ones(1, 2, 16),), "fold-constants", backend="tensorrt"
            ),
        ),
        """\
there is no backend 'tensorrt'
  try: choose one of inductor, onednn, eager""",
    )


def test_capture() -> None:
    class Deciding(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if x.sum() > 0 else x

    assert_expected_inline(
        message(errors.CaptureError, lambda: vlmopt.capture(Deciding(), (torch.ones(2),))),
        """\
Deciding cannot be traced by torch.export: GuardOnDataDependentSymNode: Could not guard on data-dependent expression Eq(u0, 1) (unhinted: Eq(u0, 1)).  (Size-like symbols: none) (test_errors.py:LINE)
  try: torch.export.export(model, args) must work: no decision may depend on values""",
    )


def test_artifact(tmp_path: Path) -> None:
    assert_expected_inline(
        message(errors.ArtifactError, lambda: vlmopt.load(tmp_path)).replace(str(tmp_path), "DIR"),
        """\
DIR is no program folder: it holds no program.json
  try: vlmopt capture SOURCE -o DIR writes one""",
    )


def test_precondition() -> None:
    assert_expected_inline(
        message(
            errors.PreconditionError, lambda: run_pipeline(mixing(), "v2drop{layers=7 keep=0.5}")
        ),
        """\
v2drop cannot cut at layer 7: stage model has layers 0 to 2, and the method needs 1 earlier layer
  try: choose layers from 1 to 2
  in:  pass 1 of 1, v2drop{layers=7 keep=0.5}""",
    )


def test_order_of_phases() -> None:
    assert_expected_inline(
        message(
            errors.PreconditionError,
            lambda: run_pipeline(mixing(), "fold-constants | v2drop{layers=1 keep=0.5}"),
        ),
        """\
the pipeline goes back to an earlier phase: v2drop (reduce) comes after fold-constants (cleanup)
  try: put the passes in the order annotate, reduce, cleanup, lower""",
    )


def test_no_visual_tokens() -> None:
    assert_expected_inline(
        message(
            errors.NoVisualTokensError,
            lambda: run_pipeline(decoder(), "v2drop{layers=1 keep=0.5}"),
        ),
        """\
no token of this Decoder program comes from vision
  try: capture it with inputs that hold an image; for a plain module name the input that tells modalities: capture(..., roles={'modality': Role.MODALITY})
  in:  pass 1 of 1, v2drop{layers=1 keep=0.5}""",
    )


def test_expert_mismatch() -> None:
    modality = torch.ones(1, 6, dtype=torch.int64)
    program = mixtures(mixture(dispatch="dense"), torch.randn(1, 6, 8), modality)
    assert_expected_inline(
        message(errors.ExpertMismatchError, lambda: run_pipeline(program, "expert-topk")),
        """\
all 4 experts compute all tokens, whatever the router chooses
  at:  %getitem_1 (layers.0, mixtures.py:LINE)
  try: nothing can be skipped unless tokens are sent to their experts; choose another implementation of the experts before capturing, if the model has one
  in:  pass 1 of 1, expert-topk""",
    )


class Mixer(Block):
    """Tokens mixed by no attention."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.norm(x).mean(1, keepdim=True)
        mlp: torch.Tensor = self.down(self.up(x))
        return x + mlp


def test_block_mismatch() -> None:
    model = Decoder()
    model.layers = nn.ModuleList(Mixer(16) for _ in range(2))
    program = vlmopt.capture(model, (torch.randn(1, 6, 16),))
    assert_expected_inline(
        message(errors.BlockMismatchError, lambda: run_pipeline(program, "stc-cacher")),
        """\
block 0 of layers has no attention operator (scaled_dot_product_attention)
  at:  %x
  try: capture the model with attn_implementation='sdpa'
  in:  pass 1 of 1, stc-cacher""",
    )


def test_stream_full() -> None:
    room = Room(2, 4, 1, (), (), positions=None, rotation=None, evict="oldest")
    memory = StreamMemory(decoder()["model"], room)
    assert_expected_inline(
        message(errors.StreamFullError, lambda: memory.make_room_for_text(5)),
        """\
5 tokens of text do not fit: 4 may be remembered, and 0 are
  try: a larger text, or shorter questions""",
    )


def test_plan_mismatch() -> None:
    made, now = {"steps": 20, "guidance": 4.0}, {"steps": 50, "guidance": None}
    assert_expected_inline(
        message(
            errors.PlanMismatchError, lambda: require_conditions("soda.safetensors", made, now)
        ),
        """\
soda.safetensors was made for steps 20, and the loop has 50
  try: use the loop that it was made for, or calibrate with this one""",
    )


def test_no_match() -> None:
    class Idle(Failing):
        name = "idle"

        def run(self, program: Program, ctx: PassContext) -> PassResult:
            ctx.remark("the residual of layer 0 is read twice")
            return PassResult(changed=False, matches=0)

    assert_expected_inline(
        message(errors.NoMatchError, lambda: run_pipeline(decoder(), [Idle()])),
        """\
idle found nothing to rewrite: the residual of layer 0 is read twice
  try: take it out of the pipeline, or allow this with allow_no_match (--allow-no-match)
  in:  pass 1 of 1, idle""",
    )


def test_unsupported_operator() -> None:
    assert_expected_inline(
        message(
            errors.UnsupportedOperatorError,
            lambda: run_pipeline(mixing(), "v2drop{layers=1 keep=0.5}"),
        ),
        """\
aten.conv1d.default: a token axis reaches this operator, which has no rule
  at:  %conv1d (mix, test_errors.py:LINE)
  try: cut after this operator (a later layer), or report the model
  in:  pass 1 of 1, v2drop{layers=1 keep=0.5}""",
    )


def test_pass_failed() -> None:
    assert_expected_inline(
        message(errors.PassFailed, lambda: run_pipeline(decoder(), [Failing()])),
        """\
failing raised IndexError: list index out of range
  in:  pass 1 of 1, failing""",
    )


def test_verify() -> None:
    program = decoder(layers=1)
    node = next(node for node in program["model"].graph.nodes if node.name == "gelu")
    with program["model"].fake_mode():
        node.meta["val"] = torch.empty(1, 5, 32)
    assert_expected_inline(
        message(errors.VerifyError, lambda: verify_program(program, "full")),
        """\
propagation: %gelu is recorded as f32[1,5,32] but is f32[1,6,32]
  at:  %gelu (layers.0, toys.py:LINE)""",
    )


def test_lowering(tmp_path: Path) -> None:
    class Sorting(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.linalg.qr(x)[0]

    program = vlmopt.capture(Sorting(), (torch.randn(3, 3),))
    assert_expected_inline(
        message(errors.LoweringError, lambda: export_program(program, tmp_path / "onnx")),
        """\
stage model cannot be written as ONNX: aten.linalg_qr.default has no translation to standard operators
  at:  %linalg_qr (test_errors.py:LINE)
  try: give one in translations, or write it with other operators""",
    )


def test_every_class_of_error_is_shown_above() -> None:
    def classes(kind: type[errors.VlmoptError]) -> set[type[errors.VlmoptError]]:
        below = kind.__subclasses__()
        return {*below, *(one for sub in below for one in classes(sub))}

    ours = {kind for kind in classes(errors.VlmoptError) if kind.__module__ == errors.__name__}
    assert ours == set(SHOWN)


def test_every_error_says_what_to_try() -> None:
    assert {kind.__name__ for kind, text in SHOWN.items() if "\n  try: " not in text} <= {
        "PassFailed",  # a bug of the pass
        "VerifyError",
    }


def test_errors_are_values() -> None:
    error: Any = errors.PreconditionError("the cat is out", hint="close the door")
    assert (error.what, error.node, error.hint) == ("the cat is out", None, "close the door")
    assert str(error) == "the cat is out\n  try: close the door"
