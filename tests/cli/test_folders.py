"""Commands on program folders: captured once, then rewritten, compared and exported from disk."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from vlmopt.cli import main
from vlmopt.storage import load

LLAVA = "tests.cli.test_folders:llava"
PIPELINE = "v2drop{layers=1,3 keep=0.5}"


def llava() -> Any:
    return zoo.build("llava"), zoo.inputs("llava")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``llava`` as captured, and ``fast`` after a pipeline."""
    root = tmp_path_factory.mktemp("folders")
    assert main(["capture", LLAVA, "-o", str(root / "llava"), "-q"]) == 0
    run = ["run", str(root / "llava"), "-p", PIPELINE, "-o", str(root / "fast"), "-q"]
    assert main(run) == 0
    return root


def test_two_folders_differ_as_the_pipeline_says(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = str(folders / "llava"), str(folders / "fast")
    assert main(["diff", before, after, "--format", "json", "--exit-code"]) == 1
    of_folders = json.loads(capsys.readouterr().out)
    assert main(["diff", LLAVA, "-p", PIPELINE, "--format", "json"]) == 0
    of_pipeline = json.loads(capsys.readouterr().out)
    assert of_folders["stages"] == of_pipeline["stages"]
    assert of_folders["matching"] == "name"
    assert main(["diff", before, before, "--exit-code"]) == 0


@pytest.mark.parametrize("command", ["inspect", "stats", "verify"])
def test_looking_needs_no_weights(
    folders: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "p"
    shutil.copytree(folders / "fast", copy)
    (copy / "weights.safetensors").unlink()
    assert main([command, str(copy)]) == 0
    assert "language_model" in capsys.readouterr().out


def test_running_a_folder_against_another(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = str(folders / "llava")
    same = str(tmp_path / "same")
    assert main(["run", whole, "-p", "fold-constants", "-o", same, "-q"]) == 0
    assert main(["verify", same, "--against", whole]) == 0
    assert main(["verify", str(folders / "fast"), "--against", whole, "--semantics", "exact"]) == 5
    capsys.readouterr()
    program, copy = load(whole), tmp_path / "changed"
    weights = program.named_weights()
    with torch.no_grad():
        next(value for key, value in weights.items() if key.endswith("lm_head.weight")).add_(1)
    program.save(copy)
    assert main(["verify", str(copy), "--against", whole]) == 5
    assert "lm_head" in capsys.readouterr().out


def test_export_from_a_folder(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "onnx"
    assert main(["export", str(folders / "fast"), "-o", str(out), "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [stage["name"] for stage in document["stages"]][-1] == "decode"
    assert all((out / stage["file"]).is_file() for stage in document["stages"])
    assert max(max(stage["errors"].values()) for stage in document["stages"]) <= 1e-4


def test_folders_are_not_overwritten(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = folders / "fast"
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    arguments = ["run", str(folders / "llava"), "-p", PIPELINE, "-o", str(target)]
    assert main(arguments) == 2
    assert f"{target} exists; --force overwrites it" in capsys.readouterr().err
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before
    assert main([*arguments, "--force"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} != before
    assert sorted(path.name for path in folders.iterdir()) == ["fast", "llava"]


def test_a_folder_of_other_things_is_not_overwritten_even_by_force(
    folders: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert (
        main(["run", str(folders / "llava"), "-p", PIPELINE, "-o", str(tmp_path), "--force"]) == 4
    )
    assert "is not replaced: it is no folder with a program.json" in capsys.readouterr().err
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stats", str(tmp_path)]) == 4
    error = capsys.readouterr().err
    assert f"{tmp_path} is no program folder: it holds no program.json" in error
    assert "Traceback" not in error


def test_a_failed_pass_leaves_a_reproducer(
    folders: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("VLMOPT_DEBUG_DIR", str(tmp_path))
    assert main(["run", str(folders / "fast"), "-p", "v2drop{layers=2 keep=0.5}"]) == 3
    command = (tmp_path / "000" / "reproduce.txt").read_text().strip()
    assert f"reproduce: {command}" in capsys.readouterr().err
    monkeypatch.delenv("VLMOPT_DEBUG_DIR")
    assert main(["run", command.split()[2], "-p", "v2drop{layers=2 keep=0.5}"]) == 3


def test_an_exported_program_with_example_inputs_can_be_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exported = torch.export.export(torch.nn.Linear(4, 2), (torch.ones(3, 4),))
    torch.export.save(exported, tmp_path / "linear.pt2")
    assert main(["inspect", str(tmp_path / "linear.pt2")]) == 0
    assert "linear" in capsys.readouterr().out


class Mixed(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        return {"sum": x + 1, "none": None, "count": 3, "rows": x.shape[0]}


def test_of_a_file_only_tensors_are_outputs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, folder = str(tmp_path / "mixed.pt2"), str(tmp_path / "mixed")
    rows = {"x": {0: torch.export.Dim("rows")}}
    exported = torch.export.export(Mixed(), (torch.ones(4, 2),), dynamic_shapes=rows)
    torch.export.save(exported, file)
    assert main(["capture", file, "-o", folder, "--format", "json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [port["name"] for port in document["stages"][0]["outputs"]] == ["output_0"]
    assert main(["diff", file, folder, "--exit-code"]) == 0
    assert main(["verify", folder, "--against", file]) == 0
    assert "model.output_0  relative difference 0.0e+00" in capsys.readouterr().out


def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.pt2"
    assert main(["stats", str(file)]) == 4
    file.write_text("hello")
    assert main(["stats", str(file)]) == 4
    error = capsys.readouterr().err
    assert f"error: there is no file {file}\n" in error
    assert f"error: {file} is no program saved by torch.export.save: " in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    "arguments", [["stats"], ["capture"], ["run", "-p", "fold-constants"], ["diff", "TOY"]]
)
def test_where_nothing_can_be_written(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A file stands where a folder would have to be."""
    (tmp_path / "file").write_text("mine")
    toy = "tests.toys:decoder"
    given = [toy if argument == "TOY" else argument for argument in arguments]
    assert main([*given, toy, "-o", str(tmp_path / "file" / "out")]) == 4
    error = capsys.readouterr().err
    assert f"error: {tmp_path / 'file' / 'out'} cannot be written: " in error
    assert "Traceback" not in error
    assert (tmp_path / "file").read_text() == "mine"
