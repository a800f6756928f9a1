"""All of the benchmarks but the clock: no test depends on how fast this machine is."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from vlmopt.bench import loops, mixture, operators, prefill, rewriting, vision
from vlmopt.bench.environment import Environment
from vlmopt.bench.models import Shape, build_llava, llava_7b, parse_shape, prompt
from vlmopt.bench.steps import Steps
from vlmopt.bench.timing import Ratio, interleave, is_noisy
from vlmopt.errors import OptionError, VerifyError
from vlmopt.ops.attention import attention_rows

TOOL = Path(__file__).resolve().parents[2] / "tools" / "bench"
TINY = Shape(4, 64, heads=1, visual=16, text=8)


@pytest.fixture(scope="module")
def result() -> prefill.Prefill:
    """Made-up times of two cuts."""
    return prefill.Prefill(
        parse_shape("12x512"),
        "float32",
        "inductor",
        (
            prefill.Cut("v2drop", 192, "v2drop{layers=2 keep=192}", 2.0, 1.0, 1e-6),
            prefill.Cut("v2drop", 64, "v2drop{layers=2 keep=64}", 4.0, 1.0, 1e-6),
        ),
        {
            "hf": [0.4, 0.41, 0.42],
            "hf_mask": [0.5, 0.5, 0.5],
            "captured": [0.44, 0.44, 0.44],
            "v2drop{layers=2 keep=192}": [0.2, 0.205, 0.21],
            "v2drop{layers=2 keep=64}": [0.1, 0.125, 0.13],
        },
        {"hf": 0.0, "hf_mask": 0.0, "captured": 0.0},
    )


@pytest.fixture
def tool() -> ModuleType:
    if not TOOL.exists():
        pytest.skip("tools/bench is not part of an installed package")
    loader = importlib.machinery.SourceFileLoader("bench_tool", str(TOOL))
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_shapes_have_llava_proportions() -> None:
    shape = parse_shape("12x512")
    assert (shape.layers, shape.width, shape.heads, shape.tokens) == (12, 512, 8, 640)
    assert [parse_shape(text).intermediate for text in ("12x512", "8x768")] == [1376, 2064]
    model = build_llava(llava_7b(), device="meta")
    assert model.config.text_config.intermediate_size == 11008
    assert 7.0e9 < sum(parameter.numel() for parameter in model.parameters()) < 7.2e9
    ids = prompt(shape)["input_ids"]
    assert ids.shape == (1, 640)
    assert int((ids == model.config.image_token_id).sum()) == 576


@pytest.mark.parametrize("text", ["12", "0x512", "12x500", "12x512x3", "12x32"])
def test_a_bad_shape_is_refused(text: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_shape(text)
    assert str(caught.value) == (
        f"{text!r} is no size of a decoder\n"
        "  try: LAYERSxWIDTH, such as 12x512; the width is a multiple of 64"
    )


def flops_of_layers(count: int, tokens: int, shape: Shape) -> int:
    """By hand: four square projections, three of the feed-forward block, scores and mixture.

    Neither the output head nor anything before the decoder counts.
    """
    weights = 4 * shape.width**2 + 3 * shape.width * shape.intermediate
    return count * (2 * tokens * weights + 2 * 2 * tokens**2 * shape.width)


def test_measuring_with_a_compiler_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_nothing(module: Any, **options: Any) -> Any:
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile_nothing)
    told: list[str] = []
    (found,) = prefill.measure(TINY, (4, 8), rounds=2, progress=told.append)
    assert list(found.seconds) == [*prefill.BASELINES, *(cut.pipeline for cut in found.cuts)]
    assert all(len(times) == 2 for times in found.seconds.values())
    assert len(compiled) == 5
    assert [cut.same_tokens for cut in found.cuts] == [1, 1]
    assert all(error < 1e-5 for error in found.errors.values())
    whole = flops_of_layers(4, 24, TINY)
    for cut, tokens in zip(found.cuts, (8 + 4, 8 + 8), strict=True):
        rest = flops_of_layers(2, 24, TINY) + flops_of_layers(2, tokens, TINY)
        assert cut.ideal == whole / rest
    assert told[-1] == "4x64 float32: v2drop, round 2 of 2"


def test_a_compiler_that_is_wrong_stops_the_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(module: Any, **options: Any) -> Callable[..., Any]:
        return lambda *args: tuple(
            value + 1 if value.is_floating_point() else value for value in module(*args)
        )

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with pytest.raises(VerifyError, match=r"^parity: captured: .* differ by .* more than 0.0001$"):
        prefill.measure(TINY, (4,), baselines=("captured",))


def test_other_tokens_stop_the_measurement_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(module: Any, **options: Any) -> Callable[..., Any]:
        def run(*args: Any) -> tuple[Any, ...]:
            values = list(module(*args))
            if not values[-1].is_floating_point():  # the slots that stayed
                values[-1] = values[-1].clone()
                values[-1][0, 20] = 3 + values[-1][0, 20]
            return tuple(values)

        return run

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with pytest.raises(VerifyError) as caught:
        prefill.measure(TINY, (14,), baselines=("captured",))
    assert str(caught.value) == (
        "parity: v2drop{layers=2 keep=14}: Inductor keeps other tokens than eager mode "
        "(95.5% shared)"
    )


def test_encoding_is_measured_and_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    size = vision.Size(2, 64, image=64)  # 16 patches and the class token
    found = vision.measure(size, 2, "tome{r=4}", rounds=2)
    assert list(found.seconds) == [*vision.BASELINES, "tome{r=4}"]
    assert found.errors == dict.fromkeys(found.seconds, 0.0)

    def block(entering: int, leaving: int) -> int:
        """By hand: four square projections and attention, then the feed-forward network."""
        attention = 2 * entering * 4 * 64**2 + 4 * entering**2 * 64
        return attention + 2 * leaving * 8 * 64**2

    def matching(tokens: int) -> int:
        return 2 * (tokens - tokens // 2) * (tokens // 2) * 64

    around = 2 * 16 * 3 * 16**2 * 64 + 2 * 64 * 1000
    whole = around + 2 * block(17, 17)
    fewer = around + block(17, 13) + matching(17) + block(13, 9) + matching(13)
    assert found.ideal == pytest.approx(whole / fewer)
    document = json.loads(json.dumps(found.to_json()))
    assert document["of_ideal"] == pytest.approx(found.speedup().value / found.ideal)
    (line,) = vision.table([found]).splitlines()[2:]
    assert line.startswith("| 2x64  | float32 | 2     | tome{r=4} |")


def test_a_wrong_encoder_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(module: Any, **options: Any) -> Callable[..., Any]:
        return lambda images: module(images * 1.1)

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    with pytest.raises(VerifyError, match=r"^parity: hf: logits of Inductor and eager mode differ"):
        vision.measure(vision.Size(1, 64, image=32), 1, "tome{r=1}")
    with pytest.raises(OptionError, match="'12x100' is no size of a vision transformer"):
        vision.parse_size("12x100")


def test_every_round_starts_with_another_function() -> None:
    calls: list[str] = []
    done: list[int] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}  # type: ignore[misc]
    seconds = interleave(functions, 3, progress=done.append)
    assert {name: len(times) for name, times in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    rounds = ["".join(calls[start : start + 3]) for start in range(0, 12, 3)]
    assert rounds == ["cab", "abc", "bca", "cab"]  # the first is not counted
    assert done == [0, 1, 2, 3]


def test_ratio_and_its_interval() -> None:
    same = Ratio.of([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert same == Ratio(2.0, 2.0, 2.0)  # rounds are resampled together
    spread = Ratio.of([2.0, 2.0, 2.0, 3.0, 4.0], [1.0] * 5)
    assert spread.value == spread.low == 2.0
    assert 2.0 < spread.high <= 4.0
    assert Ratio.of([2.0, 4.0], [1.0, 1.0]) == Ratio.of([2.0, 4.0], [1.0, 1.0])


def test_noise() -> None:
    assert not is_noisy([1.0, 1.1, 1.1])
    assert is_noisy([1.0, 1.2, 1.2])


def test_table_of_made_up_times(result: prefill.Prefill) -> None:
    assert prefill.table([result]).splitlines() == [
        "| model  | dtype   | backend  | method "
        "| visual tokens | Inductor | vlmopt   | speed-up (90 %)        "
        "| FLOPs ideal | of ideal | over HF with mask | over captured |",
        "| ------ | ------- | -------- | ------ "
        "| ------------- | -------- | -------- | ---------------------- "
        "| ----------- | -------- | ----------------- | ------------- |",
        "| 12x512 | float32 | inductor | v2drop "
        "| 576 -> 192    | 410.0 ms | 205.0 ms | 2.00 (2.00-2.00) noisy "
        "| 2.00        | 1.00     | 2.44 (1.22)       | 2.15 (1.07)   |",
        "| 12x512 | float32 | inductor | v2drop "
        "| 576 -> 64     | 410.0 ms | 125.0 ms | 3.28 (3.23-4.00) noisy "
        "| 4.00        | 0.82     | 4.00 (1.00)       | 3.52 (0.88)   |",
    ]


def test_json_of_made_up_times(result: prefill.Prefill) -> None:
    document = json.loads(json.dumps(result.to_json()))
    assert document["baseline"] == "hf"
    assert document["shape"]["intermediate"] == 1376
    assert document["seconds"]["v2drop{layers=2 keep=64}"] == [0.1, 0.125, 0.13]
    first, second = document["cuts"]
    assert first["speedup"]["hf"]["value"] == pytest.approx(2.0)
    assert first["of_ideal"] == pytest.approx(1.0)
    assert second["speedup"]["hf_mask"]["value"] == pytest.approx(4.0)
    assert second["of_ideal"] == pytest.approx(3.28 / 4)


def test_rewriting_is_measured_without_weights() -> None:
    found = rewriting.measure_shape(TINY)
    assert found.pipeline == "v2drop{layers=2,3 keep=0.5,0.5}"
    document = json.loads(json.dumps(found.to_json()))
    assert document["nodes"][1] > document["nodes"][0] > 100
    assert found.peak_bytes > 50 * 2**20
    (line,) = rewriting.table([found]).splitlines()[2:]
    assert line.startswith(f"| 4      | {found.nodes[0]} -> {found.nodes[1]} |")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_mixtures_are_measured_and_told(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    size = mixture.parse_size("2x64", experts=4, k=2, tokens=48)
    told: list[str] = []
    found = mixture.measure(size, (0.0, 0.5), dtype=dtype, rounds=2, progress=told.append)
    assert list(found.seconds) == [*mixture.BASELINES, *(cut.pipeline for cut in found.cuts)]
    assert all(len(times) == 2 for times in found.seconds.values())
    assert [cut.skipped for cut in found.cuts] == pytest.approx([0.0, 0.5], abs=0.02)
    pairs = 2 * 48 * 2  # layers, tokens, experts of each; a router and three products of an expert
    router, expert = 2 * 64 * 4, 2 * 3 * 64 * 32
    for cut in found.cuts:
        computed = round(pairs * (1 - cut.skipped))
        whole, rest = (2 * 48 * router + count * expert for count in (pairs, computed))
        assert cut.ideal == pytest.approx(whole / rest)
        assert cut.error <= 1e-6  # the same graph
    kind = str(dtype).removeprefix("torch.")
    assert told[0] == f"2x64, 2 of 4 {kind} inductor: capturing"
    assert told[-1].endswith("round 2 of 2")
    (document,) = json.loads(json.dumps([found.to_json()]))
    assert [cut["of_ideal"] > 0 for cut in document["cuts"]] == [True, True]
    lines = mixture.table([found]).splitlines()
    assert [line.split("|")[4].strip() for line in lines[2:]] == [
        f"{cut.skipped:.1%}" for cut in found.cuts
    ]


def test_a_mixture_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_wrongly(module: Any, **options: Any) -> Any:
        if isinstance(module, mixture.Stack):
            return module
        return lambda *args: tuple(value * 1.01 for value in module(*args))

    monkeypatch.setattr(torch, "compile", compile_wrongly)
    size = mixture.parse_size("1x64", experts=4, k=2, tokens=8)
    with pytest.raises(VerifyError, match=r"^parity: captured: .* differ by .* more than"):
        mixture.measure(size, (0.5,), rounds=1)


def test_operators_are_measured_and_told() -> None:
    told: list[str] = []
    found = operators.measure(operators.Scores(40, 4, 2, 8), rounds=2, progress=told.append)
    assert [result.name for result in found] == ["last row", "column means", "row means"]
    for result in found:
        assert {name: len(times) for name, times in result.seconds.items()} == {
            "eager": 2,
            "operator": 2,
        }
        assert not result.kernels
    assert told[0] == "last row of 40 tokens, float32: checking"
    assert told[-1] == "row means of 40 tokens, float32: round 2 of 2"
    document = json.loads(json.dumps([result.to_json() for result in found]))
    assert document[0]["scores"] == {"tokens": 40, "heads": 4, "key_heads": 2, "size": 8}


def test_table_of_made_up_operators() -> None:
    scores = operators.Scores(1024)
    times = {"eager": [0.4, 0.4], "operator": [0.1, 0.1]}
    here = operators.Measured("last row", scores, "float32", False, times)
    assert operators.table([here]).splitlines()[2:] == [
        "| last row | float32 | 1024   | 8 on 2 x 64 | 32 MiB | 400.0 ms | 100.0 ms "
        "| 4.00 (4.00-4.00) |"
    ]
    there = operators.Measured("last row", scores, "float32", True, {**times, "blocks": [0.2] * 2})
    head, _, line = operators.table([there]).splitlines()
    assert "| operator | without Triton | speed-up (90 %)" in head
    assert "| 100.0 ms | 200.0 ms       | 4.00" in line


def test_an_operator_that_is_wrong_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "attention_rows", lambda *args: 1.01 * attention_rows(*args))
    with pytest.raises(VerifyError) as caught:
        operators.measure(operators.Scores(40, 4, 2, 8), rounds=1)
    assert str(caught.value) == (
        "parity: last row of 40 tokens, float32: the operator differs from its reference by "
        "1.0e-02 of the largest value, more than 0.0001"
    )


@pytest.mark.parametrize("numbers", [(0, 4, 2, 8), (8, 4, 3, 8)])
def test_heads_that_cannot_be_are_refused(numbers: tuple[int, ...]) -> None:
    with pytest.raises(OptionError, match=r"positive|4 heads cannot share 3 key heads"):
        operators.Scores(*numbers)


def test_environment_names_what_matters() -> None:
    here = Environment.here()
    assert here.text() == f"{here.device}, {_threads()}, torch {torch.__version__}, {here.date}"
    assert here.device and here.date.count("-") == 2


def _threads() -> str:
    count = torch.get_num_threads()
    return "1 thread" if count == 1 else f"{count} threads"


def test_progress_is_plain_lines_away_from_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Steps(2) as steps:
        steps.step("first")
        steps.detail("part of it")
        steps.print("result")
        steps.step("second")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("result\n", "[1/2] first\n[2/2] second\n")
    with Steps(1, quiet=True) as steps:
        steps.step("first")
        steps.print("result")
    told = capsys.readouterr()
    assert (told.out, told.err) == ("result\n", "")


def test_the_tool_prints_and_writes(
    tool: ModuleType,
    result: prefill.Prefill,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measure(shape: Shape, keeps: Any, *, dtype: torch.dtype, **options: Any) -> Any:
        if dtype is torch.bfloat16:
            raise VerifyError("parity", "made up")
        assert (shape.name, tuple(keeps), options["rounds"]) == ("12x512", (192, 64), 3)
        return [result]

    monkeypatch.setattr(prefill, "measure", measure)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    threads = str(torch.get_num_threads())
    path = tmp_path / "times.json"
    arguments = ["prefill", "--shape", "12x512", "--rounds", "3", "--json", str(path)]
    # what one model lacks does not cost the others their results
    assert tool.main([*arguments, "--threads", threads]) == 1
    told = capsys.readouterr()
    assert told.out == f"{prefill.table([result])}\n\n{Environment.here().text()}\n"
    assert told.err.splitlines() == [
        "[1/2] 12x512 float32 inductor",
        "[2/2] 12x512 bfloat16 inductor",
        "error: parity: made up",
    ]
    document = json.loads(path.read_text())
    assert document["schema"] == 1
    assert document["environment"]["torch"] == torch.__version__
    assert [entry["dtype"] for entry in document["prefill"]] == ["float32"]


def test_the_tool_tells_of_mistakes(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert tool.main(["prefill", "--shape", "wide"]) == 1
    assert capsys.readouterr().err.startswith("error: 'wide' is no size of a decoder\n")


def test_the_tool_times_operators(tool: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    shape = ["--tokens", "16", "--heads", "2", "--key-heads", "1", "--size", "4"]
    assert tool.main(["ops", *shape, "--dtype", "bfloat16", "--rounds", "1", "-q"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:5]] == [
        "last row",
        "column means",
        "row means",
    ]
    assert tool.main(["ops", *shape, "--key-heads", "3", "-q"]) == 1
    assert capsys.readouterr().err.startswith("error: 2 heads cannot share 3 key heads\n")


def test_the_tool_times_mixtures(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda module, **options: module)
    size = ["--size", "1x64", "--experts", "4", "--top", "2", "--tokens", "24"]
    rest = ["--dtype", "float32", "--skip", "0.5", "--rounds", "1", "-q"]
    assert tool.main(["moe", *size, *rest]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 1x64, 2 of 4 | float32 | inductor | 50.0%")
    assert tool.main(["moe", "--size", "wide", *rest]) == 1
    assert capsys.readouterr().err.startswith("error: 'wide' is no size of a stack of mixtures")


def test_the_tool_times_streams(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    size = ["--size", "1x64", "--tokens", "16", "--interval", "3", "--ratio", "0.5"]
    assert tool.main(["stream", *size, "--dtype", "float32", "--rounds", "1", "-q"]) == 0
    line = capsys.readouterr().out.splitlines()[2]
    cells = [cell.strip() for cell in line.split("|")[1:6]]
    assert cells == ["1x64", "16, 8 anew", "float32", "3", "inductor"]
    assert tool.main(["stream", "--tokens", "17", "-q"]) == 1
    assert capsys.readouterr().err.startswith("error: 17 patches are no square picture\n")


def test_the_tool_times_denoising_loops(
    tool: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    given: list[Any] = []

    def measure(size: loops.Size, **options: Any) -> loops.Loop:
        given.append((size, options["batch"], options["steps"], options["backends"]))
        times = {loops.BASELINE: [3.0, 3.0]}
        ways: dict[str, loops.Way] = {}
        for backend in options["backends"]:
            full = loops.Way(loops.CAPTURED, backend, 0, 1)
            half = loops.Way("fixed-interval{interval=2}", backend, 0.5, 1.9)
            ways |= {way.key: way for way in (full, half)}
            times |= {full.key: [2.0, 2.0], half.key: [1.0, 1.0]}
        return loops.Loop(size, "float32", options["batch"], 4, 0.1, ways, times, {}, {})

    monkeypatch.setattr(loops, "measure", measure)
    size = ["--size", "2x64", "--tokens", "16", "--steps", "4", "-q"]
    both = ["--batch", "1", "--batch", "2", "--backend", "inductor", "--backend", "onednn"]
    assert tool.main(["dit", *size, *both]) == 0
    backends = ["inductor", "onednn"]
    assert given == [(loops.Size(2, 64, 16), batch, 4, backends) for batch in (1, 2)]
    cells = [cell.strip() for cell in capsys.readouterr().out.splitlines()[6].split("|")]
    assert cells[4:12] == [
        "fixed-interval{interval=2}",
        "onednn",
        "50 %",
        "1000.0 ms",
        "3.00 (3.00-3.00)",
        "1.90",
        "1.58",
        "2.00 (1.05)",
    ]
    assert tool.main(["dit", *size]) == 0
    assert given[2:] == [(loops.Size(2, 64, 16), 1, 4, ("inductor",))]
    capsys.readouterr()
    assert tool.main(["dit", "--tokens", "17", "-q"]) == 1
    assert capsys.readouterr().err.startswith("error: 17 patches are no square picture\n")
