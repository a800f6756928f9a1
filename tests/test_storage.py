"""Programs on disk: what is written is what is read, and nothing that could run code is read."""

from __future__ import annotations

import hashlib
import itertools
import json
import zipfile
from collections.abc import Iterator
from functools import cache
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
from vlmopt.program import Program, Role, fetch_attr

ADD = torch.ops.aten.add.Tensor
PIPELINE = "v2drop{layers=1,3 keep=0.5} | fold-constants"


@cache
def captured(family: str) -> Program:
    """To be read only: tests rewrite clones."""
    return vlmopt.capture(zoo.build(family), zoo.inputs(family, batch=2))


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
    program = captured(family).clone()
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


def test_sizes_stay_symbolic(tmp_path: Path) -> None:
    """The decode stage runs on any number of past tokens, before and after, with its bounds."""
    program = captured("qwen2_5_vl")
    program.save(tmp_path / "p")
    read = vlmopt.load(tmp_path / "p")
    read.save(tmp_path / "again")
    ranges = []
    for one in (program, read, vlmopt.load(tmp_path / "again")):
        environment = one["decode"].fake_mode().shape_env
        assert environment is not None
        past = one["decode"].placeholder(one["decode"].find_inputs(Role.KEY)[0])
        ranges.append(environment.var_to_range[past.meta["val"].shape[2].node.expr])
    assert ranges[0] == ranges[1] == ranges[2]
    assert read["decode"].fake_mode() is not program["decode"].fake_mode()
    inputs = dict(
        zip(
            [port.name for port in program["decode"].inputs],
            random_inputs(program["decode"]),
            strict=True,
        )
    )
    for port in program["decode"].inputs:
        value = inputs[port.name]
        if port.role in (Role.KEY, Role.VALUE):
            inputs[port.name] = torch.cat([value, value], 2)
        if port.role is Role.ATTENTION_MASK and value.ndim == 2:
            inputs[port.name] = torch.cat([value, value[:, 1:]], 1)
    with torch.no_grad():
        wanted, got = (one["decode"].graph_module(*inputs.values()) for one in (program, read))
    assert all(torch.equal(a, b) for a, b in zip(wanted, got, strict=True))


def test_shared_weights_are_written_once_and_stay_shared(tmp_path: Path) -> None:
    program = captured("llava")
    program.save(tmp_path / "p")
    stored = load_file(tmp_path / "p" / "weights.safetensors")
    weights = program.named_weights()
    assert set(stored) == set(weights)
    assert all(torch.equal(stored[key], weights[key]) for key in stored)
    read = vlmopt.load(tmp_path / "p")
    assert len(read.named_weights()) == len(weights)
    assert _shared(read) == _shared(program) > 10


def _shared(program: Program) -> int:
    """How many tensors prefill and decode have in common."""
    prefill, decode = (
        {
            id(fetch_attr(stage.graph_module, str(node.target)))
            for node in stage.graph.find_nodes(op="get_attr")
        }
        for stage in (program["language_model"], program["decode"])
    )
    return len(prefill & decode)


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(8, 4)
            self.head = torch.nn.Linear(4, 8, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.head(self.embed(ids))
            return result

    vlmopt.capture(Tied(), (torch.tensor([[1, 2]]),)).save(tmp_path / "p")
    assert len(load_file(tmp_path / "p" / "weights.safetensors")) == 1
    (weight,) = vlmopt.load(tmp_path / "p").named_weights().values()
    assert isinstance(weight, torch.nn.Parameter)
    assert weight.shape == (8, 4)


def test_large_weights_are_written_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vlmopt.storage._SHARD", 4000)
    program = decoder()
    program.save(tmp_path / "p")
    parts = sorted(path.name for path in (tmp_path / "p").glob("*.safetensors"))
    assert parts[0] == f"weights-00001-of-{len(parts):05d}.safetensors"
    assert len(parts) > 2
    _same_weights(vlmopt.load(tmp_path / "p"), program)


def test_weights_of_every_type_bit_by_bit(tmp_path: Path) -> None:
    class Buffers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            values = torch.randn(4, 6)
            self.register_buffer("transposed", values.t())
            self.register_buffer("a_scalar", torch.tensor(float("-inf")))
            self.register_buffer("a_half", values.half())
            self.register_buffer("a_float8", values.to(torch.float8_e4m3fn))
            self.register_buffer("mask", values > 0)
            self.register_buffer("ids", torch.tensor([0, 255], dtype=torch.uint8))
            self.register_buffer("a_complex", torch.randn(2, dtype=torch.complex64))
            self.register_buffer("none", torch.empty(0, 3))
            self.register_buffer("nothing", torch.empty(0, 3))

        def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
            return [buffer.to(torch.float32) + x for buffer in self.buffers()]

    program = vlmopt.capture(Buffers(), (torch.ones(1),))
    program.save(tmp_path / "p")
    assert len(program.named_weights()) == 9
    _same_weights(vlmopt.load(tmp_path / "p"), program)


def _same_weights(read: Program, program: Program) -> None:
    found, wanted = read.named_weights(), program.named_weights()
    assert list(found) == list(wanted)
    for key, value in wanted.items():
        assert found[key].dtype is value.dtype, key
        assert torch.equal(found[key], value), key


def test_weights_do_not_depend_on_the_file(tmp_path: Path) -> None:
    """Neither on what becomes of it, nor on where in it they stand: matmul kernels differ by that
    in their last bit."""
    program = decoder()
    program.save(tmp_path / "p")
    read = vlmopt.load(tmp_path / "p")
    file = tmp_path / "p" / "weights.safetensors"
    with file.open("r+b") as stream:
        stream.write(b"\xff" * file.stat().st_size)
    _same_weights(read, program)
    assert {weight.data_ptr() % 64 for weight in read.named_weights().values()} == {0}


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
    program = captured("llava").clone()
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


def test_a_failed_save_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("no space left")

    program = decoder()
    program.save(tmp_path / "p")
    before = (tmp_path / "p" / "program.json").read_text()
    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(ArtifactError, match=r"q cannot be written: no space left\n  try: choose"):
        program.save(tmp_path / "q")
    with pytest.raises(ArtifactError, match="p cannot be written: no space left"):
        program.save(tmp_path / "p", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["p"]
    assert (tmp_path / "p" / "program.json").read_text() == before


def test_what_the_format_cannot_hold(tmp_path: Path) -> None:
    program = decoder()
    program.metadata["made"] = {1, 2}
    with pytest.raises(ArtifactError, match="cannot be written as JSON: Object of type set"):
        program.save(tmp_path / "p")
    program = decoder()
    program["model"].name = "a/b"
    with pytest.raises(ArtifactError, match="stage 'a/b' cannot be a file"):
        program.save(tmp_path / "p")
    program = decoder()
    node = next(iter(program["model"].graph.find_nodes(op="call_function", target=ADD)))
    node.target = len
    with pytest.raises(ArtifactError, match=r"stage model cannot be written.*\n.*\n|len"):
        program.save(tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    decoder().save(tmp_path / "p")
    return tmp_path / "p"


def _manifest(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "program.json").read_text())
    return found


def _edit(folder: Path, **changes: Any) -> None:
    (folder / "program.json").write_text(json.dumps({**_manifest(folder), **changes}))


def _admit(folder: Path) -> None:
    """Make the manifest agree with the files, as someone would who means harm."""
    files = _manifest(folder)["files"]
    for name, identity in files.items():
        data = (folder / name).read_bytes()
        identity["bytes"] = len(data)
        if "sha256" in identity:
            identity["sha256"] = hashlib.sha256(data).hexdigest()
    _edit(folder, files=files)


def test_the_manifest_says_who_wrote_it(folder: Path) -> None:
    manifest = _manifest(folder)
    assert (manifest["format"], manifest["vlmopt"]) == (1, vlmopt.__version__)
    assert manifest["torch"] == torch.__version__
    assert set(manifest["files"]) == {"model.pt2", "weights.safetensors"}
    assert {path.name for path in folder.iterdir()} == {*manifest["files"], "program.json"}


def test_other_formats_are_named(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere is no program folder: it holds no program"):
        vlmopt.load(folder / "nowhere")
    _edit(folder, format=99, vlmopt="7.0")
    with pytest.raises(
        ArtifactError, match=r"has format 99, .* reads format 1\n  try: update vlmopt to 7\.0 or"
    ):
        vlmopt.load(folder)
    _edit(folder, format=None)
    with pytest.raises(ArtifactError, match=r"has format None.*\n  try: write the folder anew"):
        vlmopt.load(folder)
    (folder / "program.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"has format None"):
        vlmopt.load(folder)
    (folder / "program.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"program\.json cannot be read as JSON: Expecting"):
        vlmopt.load(folder)


def test_damaged_weights_are_named(folder: Path) -> None:
    file, elsewhere = folder / "weights.safetensors", folder / "elsewhere"
    file.rename(elsewhere)
    with pytest.raises(ArtifactError, match=r"lacks its file weights\.safetensors"):
        vlmopt.load(folder)
    file.write_bytes(elsewhere.read_bytes()[:-4])
    with pytest.raises(ArtifactError, match=r"safetensors has \d+ bytes, where the manifest says"):
        vlmopt.load(folder)
    _admit(folder)
    with pytest.raises(ArtifactError, match=r"weights\.safetensors cannot be read"):
        vlmopt.load(folder)
    weights = load_file(elsewhere)
    first = next(iter(weights))
    for changed, message in (
        ({**weights, first: weights[first].double()}, rf"weight {first} in .* is torch\.float64"),
        (
            {**weights, first: weights[first][:1]},
            rf"weight {first} in .* is torch\.float32 \[1, 16\]",
        ),
        ({key: weights[key] for key in weights if key != first}, rf"weight {first} cannot be read"),
    ):
        save_file(changed, file)
        _admit(folder)
        with pytest.raises(ArtifactError, match=message):
            vlmopt.load(folder)


def test_damaged_graphs_are_named(folder: Path) -> None:
    graph = folder / "model.pt2"
    whole = graph.read_bytes()
    graph.write_bytes(whole[:-100])
    with pytest.raises(ArtifactError, match=r"model\.pt2 has \d+ bytes, where the manifest says"):
        vlmopt.load(folder)
    middle = len(whole) // 2
    graph.write_bytes(whole[:middle] + b"?" + whole[middle + 1 :])
    with pytest.raises(ArtifactError, match=r"model\.pt2 is not the file that was written"):
        vlmopt.load(folder)
    for data in (b"", b"PK", whole[:middle], whole[:-30]):
        graph.write_bytes(data)
        _admit(folder)
        with pytest.raises(ArtifactError, match=r"model\.pt2 is no program saved by torch"):
            vlmopt.load(folder)


def test_graphs_of_something_else_are_named(folder: Path, tmp_path: Path) -> None:
    decoder(layers=1).save(tmp_path / "other")
    (tmp_path / "other" / "model.pt2").replace(folder / "model.pt2")
    _admit(folder)
    with pytest.raises(ArtifactError, match=r"program\.json is damaged, or not of the files"):
        vlmopt.load(folder)
    exported = torch.export.export(torch.nn.ReLU(), (torch.ones(2),))
    torch.export.save(exported, folder / "model.pt2")
    _admit(folder)
    with pytest.raises(ArtifactError, match=r"program\.json is damaged, or not of the files"):
        vlmopt.load(folder)


def test_ports_agree_with_the_graph(folder: Path) -> None:
    (stage,) = _manifest(folder)["stages"]
    port = stage["inputs"][0]
    wrong: list[dict[str, Any]] = [
        {"inputs": []},
        {"inputs": [{**port, "name": "y"}]},
        {"outputs": [*stage["outputs"], port]},
        {"outputs": []},
    ]
    for changes in wrong:
        _edit(folder, stages=[{**stage, **changes}])
        with pytest.raises(ArtifactError, match=r"the inputs or outputs of model\.pt2 are not"):
            vlmopt.load(folder)


def _places(value: Any, *path: Any) -> list[tuple[Any, ...]]:
    """Where the values of a JSON document are; of a list, or of many keys, the first two."""
    found = [path] if path else []
    items = list(value.items()) if isinstance(value, dict) else []
    items = list(enumerate(value)) if isinstance(value, list) else items
    for key, item in items if len(items) < 12 else items[:2]:
        found += _places(item, *path, key)
    return found


def test_any_value_of_the_manifest_may_be_wrong(folder: Path) -> None:
    """A wrong type or a missing key is named, or harmless; nothing else is raised."""
    good = (folder / "program.json").read_text()
    reached = 0
    others: Iterator[Any] = itertools.cycle([None, "junk", -1, [], {"a": 1}])
    for *path, last in _places(json.loads(good)):
        for junk in (..., next(others)):
            document = json.loads(good)
            place = document
            for key in path:
                place = place[key]
            if junk is ...:
                del place[last]
            else:
                place[last] = junk
            (folder / "program.json").write_text(json.dumps(document))
            try:
                program = vlmopt.load(folder)
            except ArtifactError:
                reached += 1
            else:
                assert all(len(stage.graph.nodes) > 10 for stage in program)
    assert reached > 40


@pytest.mark.parametrize("name", ["../model.pt2", "/etc/passwd", "a/b.pt2"])
def test_files_outside_the_folder_are_refused(folder: Path, name: str) -> None:
    (stage,) = _manifest(folder)["stages"]
    _edit(folder, stages=[{**stage, "file": name}])
    with pytest.raises(ArtifactError, match="names a file outside its folder"):
        vlmopt.load(folder)
    weights = _manifest(folder)["weights"]
    next(iter(weights.values()))["file"] = name
    _edit(folder, stages=[stage], weights=weights)
    with pytest.raises(ArtifactError, match="names a file outside its folder"):
        vlmopt.load(folder)


def test_what_could_run_is_refused(folder: Path) -> None:
    """The rest of this is in test_archives.py."""
    graph = folder / "model.pt2"
    with zipfile.ZipFile(graph) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(graph, "w") as archive:
        for name, data in parts.items():
            archive.writestr(name, b"cos\nsystem\n." if "sample_inputs" in name else data)
    with pytest.raises(ArtifactError, match=r"model\.pt2 has \d+ bytes"):
        vlmopt.load(folder)
    _admit(folder)
    with pytest.raises(ArtifactError, match=r"may run code of whoever wrote it"):
        vlmopt.load(folder)


def test_nothing_in_a_folder_is_pickled(tmp_path: Path) -> None:
    captured("llava").save(tmp_path / "p")
    for path in (tmp_path / "p").glob("*.pt2"):
        with zipfile.ZipFile(path) as archive:
            pickled = [i.filename for i in archive.infolist() if i.filename.endswith(".pt")]
            assert all(archive.read(name) == b"" for name in pickled)
            assert not [i for i in archive.infolist() if i.filename.endswith(".pkl")]
