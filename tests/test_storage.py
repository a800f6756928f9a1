"""Programs on disk: what is written is what is read, and nothing that could run code is read."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import load_file, save_file
from torch._subclasses import FakeTensor

import vlmopt
from tests.toys import decoder
from vlmopt.errors import ArtifactError
from vlmopt.graph.compare import random_inputs
from vlmopt.graph.text import stage_text
from vlmopt.graph.verify import verify_program
from vlmopt.lowering.onnx import export_program
from vlmopt.pipeline.manager import run_pipeline
from vlmopt.program import Program

PIPELINE = "v2drop{layers=1,3 keep=0.5} | fold-constants"


def _texts(program: Program) -> dict[str, str]:
    return {stage.name: stage_text(stage) for stage in program}


def _stamps(program: Program) -> dict[tuple[str, str], Any]:
    return {
        (stage.name, node.name): (node.meta.get("custom") or None, node.meta.get("stack_trace"))
        for stage in program
        for node in stage.graph.nodes
    }


@pytest.mark.parametrize("family", zoo.FAMILIES)
def test_a_program_is_read_as_it_was_written(family: str, tmp_path: Path) -> None:
    program = vlmopt.capture(zoo.build(family), zoo.inputs(family, batch=2))
    program.save(tmp_path / "before")
    rewritten = vlmopt.load(tmp_path / "before")
    assert _texts(rewritten) == _texts(program)
    for one in (program, rewritten):
        run_pipeline(one, PIPELINE, verify="full")
    program.save(tmp_path / "after")
    read = vlmopt.load(tmp_path / "after")
    verify_program(read, "full")
    assert _texts(read) == _texts(rewritten) == _texts(program)
    assert _stamps(read) == _stamps(program)
    assert (read.passes, read.model_type) == (program.passes, program.model_type)
    assert [stage.cuts for stage in read] == [stage.cuts for stage in program]
    for stage in program:
        inputs = random_inputs(stage)
        with torch.no_grad():
            wanted = stage.graph_module(*inputs)
            got = read[stage.name].graph_module(*inputs)
        assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_shared_weights_are_written_once_and_stay_shared(tmp_path: Path) -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    program.save(tmp_path / "p")
    stored = load_file(tmp_path / "p" / "weights.safetensors")
    weights = program.named_weights()
    assert set(stored) == set(weights)
    assert all(torch.equal(stored[key], weights[key]) for key in stored)
    assert len(vlmopt.load(tmp_path / "p").named_weights()) == len(weights)


def test_tensors_that_share_memory(tmp_path: Path) -> None:
    class Views(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            whole = torch.randn(4, 4)
            self.register_buffer("whole", whole)
            self.register_buffer("part", whole[1:3])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.whole + self.part.sum()  # type: ignore[operator]

    program = vlmopt.capture(Views(), (torch.ones(2, 4),))
    program.save(tmp_path / "p")
    x = torch.randn(2, 4)
    wanted, got = program["model"], vlmopt.load(tmp_path / "p")["model"]
    assert torch.equal(wanted.graph_module(x)[0], got.graph_module(x)[0])


def test_without_weights_everything_but_running_works(tmp_path: Path) -> None:
    program = vlmopt.capture(zoo.build("llava"), zoo.inputs("llava"))
    program.save(tmp_path / "p")
    read = vlmopt.load(tmp_path / "p", weights=False)
    assert read.metadata["weights"] is False
    assert all(isinstance(weight, FakeTensor) for weight in read.named_weights().values())
    for one in (program, read):
        run_pipeline(one, PIPELINE)
    assert _texts(read) == _texts(program)


def test_a_program_captured_without_weights(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = zoo.build("llava")
    program = vlmopt.capture(model, zoo.inputs("llava"))
    program.save(tmp_path / "p")
    assert not list((tmp_path / "p").glob("*.safetensors"))
    read = vlmopt.load(tmp_path / "p")
    assert read.metadata["weights"] is False
    assert _texts(read) == _texts(program)


def test_bfloat16_and_export_of_a_program_that_was_read(tmp_path: Path) -> None:
    inputs = zoo.inputs("llava")
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    program = vlmopt.capture(zoo.build("llava").bfloat16(), inputs)
    program.save(tmp_path / "p")
    weights = vlmopt.load(tmp_path / "p").named_weights()
    assert {key: value.dtype for key, value in weights.items()} == {
        key: value.dtype for key, value in program.named_weights().items()
    }
    decoder(layers=2).save(tmp_path / "toy")
    report = export_program(vlmopt.load(tmp_path / "toy"), tmp_path / "onnx")
    assert report.examples > 0


def test_a_stage_is_an_ordinary_exported_program(tmp_path: Path) -> None:
    program = decoder(layers=2)
    program.save(tmp_path / "p")
    exported = torch.export.load(tmp_path / "p" / "model.pt2")
    weights = load_file(tmp_path / "p" / "weights.safetensors")
    places = json.loads((tmp_path / "p" / "program.json").read_text())["stages"][0]["weights"]
    x = torch.randn(1, 6, 16)
    given = [weights[place["key"]] for place in places.values()]
    (got,) = exported.module()(*given, x)
    assert torch.equal(got, program["model"].graph_module(x)[0])


def test_nothing_that_is_not_a_program_folder_is_replaced(tmp_path: Path) -> None:
    program = decoder()
    target = tmp_path / "p"
    program.save(target)
    with pytest.raises(ArtifactError, match=r"p exists\n  try: choose another folder"):
        program.save(target)
    program.save(target, overwrite=True)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "a.txt").write_text("mine")
    with pytest.raises(
        ArtifactError, match=r"is not replaced: it is no folder with a program\.json"
    ):
        program.save(notes, overwrite=True)
    assert [path.name for path in notes.iterdir()] == ["a.txt"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes", "p"]


def test_a_failed_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch.export, "save", fail)
    with pytest.raises(OSError, match="no space left"):
        decoder().save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    decoder().save(tmp_path / "p")
    return tmp_path / "p"


def _edit(folder: Path, **changes: Any) -> None:
    path = folder / "program.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_damage_is_named(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere is no program folder: it holds no program"):
        vlmopt.load(folder / "nowhere")
    _edit(folder, format=99)
    with pytest.raises(ArtifactError, match=r"has format 99, and this version.*reads format 1"):
        vlmopt.load(folder)
    _edit(folder, format=1)
    (folder / "weights.safetensors").rename(folder / "elsewhere")
    with pytest.raises(ArtifactError, match=r"lacks its file weights\.safetensors"):
        vlmopt.load(folder)
    (folder / "weights.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ArtifactError, match=r"weights\.safetensors cannot be read"):
        vlmopt.load(folder)
    weights = load_file(folder / "elsewhere")
    first = next(iter(weights))
    save_file({**weights, first: weights[first].double()}, folder / "weights.safetensors")
    with pytest.raises(ArtifactError, match=rf"weight {first} in .* is torch\.float64"):
        vlmopt.load(folder)
    (folder / "elsewhere").rename(folder / "weights.safetensors")
    graph = folder / "model.pt2"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match=r"model\.pt2 has \d+ bytes, where the manifest says"):
        vlmopt.load(folder)
    graph.write_bytes(whole)
    (folder / "program.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"program\.json is no JSON"):
        vlmopt.load(folder)


def test_an_incomplete_manifest_is_named(folder: Path) -> None:
    _edit(folder, stages=[{"name": "model"}])
    with pytest.raises(ArtifactError, match=r"program\.json is damaged: KeyError: 'file'"):
        vlmopt.load(folder)


@pytest.mark.parametrize("name", ["../model.pt2", "/etc/passwd", "a/b.pt2"])
def test_files_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    stages = json.loads((folder / "program.json").read_text())["stages"]
    stages[0]["file"] = name
    _edit(folder, stages=stages)
    with pytest.raises(ArtifactError, match="names a file outside its folder"):
        vlmopt.load(folder)


def test_pickled_parts_are_refused(folder: Path) -> None:
    graph = folder / "model.pt2"
    with zipfile.ZipFile(graph) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    config = next(name for name in parts if name.endswith("model_constants_config.json"))
    evil = {"config": {"c": {"path_name": "opaque_obj_0", "use_pickle": True}}}
    for change in (
        {config: json.dumps(evil).encode()},
        {config.replace("model_constants_config.json", "opaque_obj_0"): b"cos\nsystem\n."},
        {next(name for name in parts if "sample_inputs" in name): b"cos\nsystem\n(S'true'\ntR."},
    ):
        with zipfile.ZipFile(graph, "w") as archive:
            for name, data in {**parts, **change}.items():
                archive.writestr(name, data)
        stages = json.loads((folder / "program.json").read_text())["stages"]
        stages[0]["bytes"] = graph.stat().st_size
        _edit(folder, stages=stages)
        with pytest.raises(ArtifactError, match=r"may run code of whoever wrote it"):
            vlmopt.load(folder)
