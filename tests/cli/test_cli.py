# ruff: noqa: E501 - golden text
"""One transcript per command, and what holds for all of them: exit codes, streams, colours."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline

from tests.toys import Decoder
from vlmopt.cli import main

TOY = "tests.toys:decoder"
WIDE = "tests.cli.test_cli:wide_decoder"
BROKEN = "tests.cli.test_cli:broken_decoder"
COMMANDS = (
    "passes",
    "capture",
    "run",
    "diff",
    "inspect",
    "stats",
    "verify",
    "export",
    "calibrate",
    "demo",
    "env",
)


def wide_decoder() -> Any:
    """A factory that returns a model and its inputs."""
    torch.manual_seed(0)
    return Decoder(layers=1, width=16), (torch.randn(1, 8, 16),)


def broken_decoder() -> Any:
    from tests.toys import decoder

    program = decoder(layers=1)
    node = next(n for n in program["model"].graph.nodes if n.name == "gelu")
    with program["model"].fake_mode():
        node.meta["val"] = torch.empty(1, 5, 32)
    return program


def no_program() -> Any:
    return 3


@pytest.fixture(autouse=True)
def in_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)


class Result:
    """What a command gave back."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err


@pytest.fixture
def vlmopt(capfd: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> Result:
        code = main(arguments)
        captured = capfd.readouterr()
        return Result(code, captured.out, captured.err)

    return run


# -- one transcript per command ----------------------------------------------------------------


def test_capture(vlmopt: Any) -> None:
    result = vlmopt("capture", WIDE)
    assert_expected_inline(
        result.out,
        """\
Decoder: model
model  17 nodes
  in   x       other
  out  output  other
""",
    )
    assert (result.code, result.err) == (0, "")


def test_diff_of_two_programs(vlmopt: Any) -> None:
    result = vlmopt("diff", "tests.cli.test_cli:short_decoder", WIDE)
    assert_expected_inline(
        result.out,
        """\
tests.cli.test_cli:short_decoder  ->  tests.cli.test_cli:wide_decoder

nodes matched by name

@@ model  (top)
~ 18 nodes change 6 -> 8, nothing else          (layer 0, head)

roles         inputs x: 6 -> 8; outputs output: 6 -> 8
model      before    after    change
  FLOPs    25 k      34 k     +38 %     by layer: 1.38 x1
  nodes    17        17       +0

attention FLOPs: dense SDPA, no causal discount; 1 FMA = 2 FLOPs.  Reproduce: vlmopt diff tests.cli.test_cli:short_decoder tests.cli.test_cli:wide_decoder
""",
    )
    assert (result.code, result.err) == (0, "")


def short_decoder() -> Any:
    torch.manual_seed(0)
    return Decoder(layers=1, width=16), (torch.randn(1, 6, 16),)


def test_inspect(vlmopt: Any) -> None:
    result = vlmopt("inspect", TOY, "--depth", "1")
    assert result.out.startswith("stage model: 33 nodes, 17 weights\n  in   %x")
    assert "\n@@ layers  toys.py:" in result.out
    assert result.code == 0


def test_inspect_one_node(vlmopt: Any) -> None:
    result = vlmopt("inspect", TOY, "--node", "%gelu")
    lines = [line for line in result.out.splitlines() if "source" not in line]
    assert_expected_inline(
        "\n".join(lines),
        """\
%gelu = gelu(%linear_1)  f32[1,6,32]
  stage    model
  module   layers.0
  made by  capture
  cost     0 FLOPs, 1.5 kB moved
  reads:
    %linear_1 = linear(%add, %p_layers_0_up_weight, %p_layers_0_up_bias)  f32[1,6,32]
  read by:
    %linear_2 = linear(%gelu, %p_layers_0_down_weight, %p_layers_0_down_bias)  f32[1,6,16]""",
    )
    assert result.code == 0


def test_stats(vlmopt: Any) -> None:
    result = vlmopt("stats", "tests.cli.test_cli:short_decoder", WIDE, "--no-operators")
    assert_expected_inline(
        result.out,
        """\
model                     tests.cli.test_cli:short_decoder    tests.cli.test_cli:wide_decoder
  FLOPs                   25 k                                34 k (+38 %)
  bytes moved, unfused    18 kB                               22 kB (+19 %)
  weights                 7.9 kB                              7.9 kB (0 %)
  nodes                   17                                  17 (0 %)

attention FLOPs: dense SDPA, no causal discount; 1 FMA = 2 FLOPs.
""",
    )
    assert (result.code, result.err) == (0, "")


def test_verify(vlmopt: Any) -> None:
    result = vlmopt("verify", TOY)
    assert_expected_inline(
        result.out,
        """\
tests.toys:decoder: all invariants hold (full; stages model)
""",
    )
    assert (result.code, result.err) == (0, "")


def test_verify_against_a_reference(vlmopt: Any) -> None:
    result = vlmopt("verify", TOY, "--against", TOY)
    assert_expected_inline(
        result.out,
        """\
tests.toys:decoder: all invariants hold (full; stages model)
compared with tests.toys:decoder, held to exact:
  model.output  relative difference 0.0e+00
""",
    )
    assert (result.code, result.err) == (0, "")


def test_env(vlmopt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLMOPT_VERIFY", "lint")
    result = vlmopt("env")
    assert result.out.startswith("python        3.")
    assert f"torch         {torch.__version__}" in result.out.splitlines()
    assert "VLMOPT_VERIFY lint" in result.out.splitlines()
    assert result.code == 0


def test_passes(vlmopt: Any) -> None:
    pytest.importorskip("vlmopt.pipeline.registry")
    result = vlmopt("passes", "--family", "tokens")
    names = [line.split()[0] for line in result.out.splitlines()]
    assert names == sorted(names)
    assert {"random-drop", "v2drop"} <= set(names)
    page = vlmopt("passes", "v2drop").out
    assert page.startswith("v2drop  (tokens, reduce, lossy)\n")
    assert "\n  layers     layers whose input is cut" in page


def tiny_llava() -> Any:
    from tests import zoo

    return zoo.build("llava", layers=4), zoo.inputs("llava")


def test_run_and_diff_of_a_pipeline(vlmopt: Any) -> None:
    pytest.importorskip("vlmopt.pipeline.manager")
    source, pipeline = "tests.cli.test_cli:tiny_llava", "v2drop{layers=2 keep=0.5}"
    result = vlmopt("run", source, "-p", pipeline)
    assert result.out.startswith(f"{source}  ->  {pipeline}    verified: full\n\nv2drop  ")
    assert "visual tokens 16 -> 8" in result.out
    assert result.code == 0
    changes = vlmopt("diff", source, "-p", pipeline, "--exit-code")
    assert "@@ language_model  layers.2  [v2drop #1]" in changes.out
    assert changes.code == 1


# -- what holds for all of them ----------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_two_examples(vlmopt: Any, name: str) -> None:
    result = vlmopt(name, "-h")
    examples = result.out.split("Examples:\n")[1].strip().splitlines()
    assert len(examples) == 2
    assert all(line.strip().startswith(f"vlmopt {name}") for line in examples)
    assert result.code == 0


def test_every_command_is_tested_here(vlmopt: Any) -> None:
    listing = vlmopt("-h").out.split("Commands:\n")[1]
    assert {line.split()[0] for line in listing.splitlines() if line[:3].strip()} == set(COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("frobnicate",), 2, "No such command 'frobnicate'"),
        (("diff", TOY), 2, "give either a second program or a pipeline (-p)"),
        (("diff", TOY, TOY, "-p", "x"), 2, "give either a second program or a pipeline (-p)"),
        (("export", TOY), 2, "say where to write: -o PATH"),
        (("capture", "nowhere"), 4, "error: nowhere is neither a program folder, nor a .pt2 file"),
        (("capture", "no.such.module:f"), 4, "there is no module no"),
        (("capture", "tests.toys:nothing"), 4, "module tests.toys has no callable nothing"),
        (("capture", "tests.cli.test_cli:no_program"), 4, "returned int, not a Program"),
        (("capture", "model.onnx"), 4, "vlmopt writes these but cannot read them"),
        (("capture", "missing.pt2"), 4, "there is no file missing.pt2"),
        (("inspect", TOY, "--stage", "decode"), 4, "its stages are model"),
        (("inspect", TOY, "--node", "nothing"), 4, "no node is called %nothing"),
        (("verify", BROKEN), 1, "%gelu is recorded as f32[1,5,32] but is f32[1,6,32]"),
        (("diff", TOY, WIDE, "--exit-code"), 1, ""),
        (("diff", TOY, TOY, "--exit-code"), 0, ""),
        (("verify", TOY, "--against", BROKEN, "--semantics", "exact"), 5, ""),
    ],
)
def test_exit_codes(vlmopt: Any, arguments: tuple[str, ...], code: int, message: str) -> None:
    result = vlmopt(*arguments)
    assert result.code == code
    assert message in result.err
    assert "Traceback" not in result.err + result.out
    if code in (2, 4):
        assert result.out == ""


def test_traceback_on_demand(vlmopt: Any) -> None:
    result = vlmopt("capture", "nowhere", "-v")
    assert result.err.startswith("Traceback")
    assert result.code == 4


def test_source_may_be_an_exported_program(vlmopt: Any, tmp_path: Path) -> None:
    path = tmp_path / "toy.pt2"
    torch.export.save(torch.export.export(Decoder(1).eval(), (torch.randn(1, 6, 16),)), path)
    result = vlmopt("verify", str(path))
    assert (result.code, result.err) == (0, "")


def test_file_that_is_no_exported_program(vlmopt: Any, tmp_path: Path) -> None:
    path = tmp_path / "toy.pt2"
    path.write_text("nothing of the kind")
    result = vlmopt("verify", str(path))
    assert result.code == 4
    assert "is no program saved by torch.export.save" in result.err


@pytest.mark.parametrize(
    ("arguments", "keys"),
    [
        (("capture", TOY), {"source", "model_type", "passes", "stages"}),
        (("diff", TOY, WIDE), {"changed", "matching", "before", "after", "stages"}),
        (("inspect", TOY), {"passes", "stages"}),
        (("inspect", TOY, "--node", "gelu"), {"node"}),
        (("stats", TOY), {"assumptions", "programs"}),
        (("verify", TOY), {"program", "level", "ok"}),
        (("verify", TOY, "--against", TOY), {"program", "ok", "against", "semantics", "outputs"}),
        (("env",), {"python", "platform", "versions", "devices", "variables"}),
    ],
)
def test_json_is_versioned(vlmopt: Any, arguments: tuple[str, ...], keys: set[str]) -> None:
    result = vlmopt(*arguments, "--format", "json")
    document = json.loads(result.out)
    assert document["schema"] == 1
    assert keys <= set(document)
    assert result.err == ""


def test_output_file_is_not_overwritten(vlmopt: Any, tmp_path: Path) -> None:
    path = tmp_path / "stats.json"
    arguments = ("stats", TOY, "--format", "json", "-o", str(path))
    first = vlmopt(*arguments)
    assert (first.code, first.out) == (0, "")
    assert first.err == f"wrote {path}\n"
    assert json.loads(path.read_text())["schema"] == 1
    path.write_text("mine")
    assert vlmopt(*arguments).code == 2
    assert path.read_text() == "mine"
    assert vlmopt(*arguments, "--force", "-q").err == ""
    assert path.read_text() != "mine"


@pytest.mark.parametrize(
    ("options", "variables", "colored"),
    [
        ((), {}, False),
        (("--color", "always"), {}, True),
        (("--color", "always"), {"NO_COLOR": "1"}, True),
        (("--color", "never"), {}, False),
        (("--color", "always", "--format", "json"), {}, False),
    ],
)
def test_colors(
    vlmopt: Any,
    monkeypatch: pytest.MonkeyPatch,
    options: tuple[str, ...],
    variables: dict[str, str],
    colored: bool,
) -> None:
    for key, value in variables.items():
        monkeypatch.setenv(key, value)
    result = vlmopt("diff", "tests.cli.test_cli:short_decoder", WIDE, *options)
    assert ("\x1b[" in result.out) is colored
    assert result.code == 0


def test_colors_on_a_terminal_unless_the_user_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmopt.cli.output import Output

    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert Output().in_color
    monkeypatch.setenv("NO_COLOR", "1")
    assert not Output().in_color


def test_colored_text_is_the_same_text(vlmopt: Any) -> None:
    import re

    arguments = ("diff", "tests.cli.test_cli:short_decoder", WIDE)
    plain, colored = vlmopt(*arguments).out, vlmopt(*arguments, "--color", "always").out
    assert re.sub(r"\x1b\[[\d;]*m", "", colored) == plain


def test_pipeline_file(tmp_path: Path) -> None:
    from vlmopt.cli.pipelines import pipeline_hash, read_pipeline
    from vlmopt.errors import ArtifactError

    path = tmp_path / "pipeline.txt"
    path.write_text("a{x=1} |  b\n")
    assert read_pipeline(f"@{path}") == "a{x=1} |  b"
    assert read_pipeline("a | b") == "a | b"
    assert pipeline_hash("a{x=1} |  b") == pipeline_hash("a{x=1} | b") != pipeline_hash("b | a")
    with pytest.raises(ArtifactError, match="cannot be read"):
        read_pipeline(f"@{tmp_path}/none")


def in_shell(script: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", script],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHON": sys.executable},
        check=False,
    )


def test_reader_may_close_the_pipe_early() -> None:
    # true is gone long before torch is imported
    done = in_shell(f'"$PYTHON" -m vlmopt.cli inspect {TOY} --format json | true')
    assert (done.returncode, done.stderr) == (0, "")


def test_help_does_not_import_transformers() -> None:
    done = in_shell('"$PYTHON" -X importtime -m vlmopt.cli --help 2>&1 | grep -c " transformers$"')
    assert done.stdout.strip() == "0"
