"""Files of ``torch.export.save`` from anywhere: read, or refused before anything in them runs."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from vlmopt.archives import is_size, load_exported
from vlmopt.errors import ArtifactError

GRAPH = "models/model.json"
EXAMPLES = "data/sample_inputs/model.pt"
CONSTANTS = "data/constants/model_constants_config.json"


class Module(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.linear(x).relu() * self.scale + x.shape[0]
        return result


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("archives") / "original.pt2"
    rows = {"x": {0: torch.export.Dim("rows", min=2, max=64)}}
    exported = torch.export.export(Module(), (torch.ones(4, 3),), dynamic_shapes=rows)
    torch.export.save(exported, path)
    return path


def _parts(path: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(path) as archive:
        return {i.filename.partition("/")[2]: archive.read(i) for i in archive.infolist()}


def _write(path: Path, parts: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in parts.items():
            archive.writestr(f"archive/{name}", data)
    return path


@pytest.fixture
def altered(original: Path, tmp_path: Path) -> Callable[..., Path]:
    """The original with some parts replaced, or its graph edited as JSON."""

    def make(
        parts: dict[str, bytes] | None = None, edit: Callable[[Any], None] | None = None
    ) -> Path:
        found = {**_parts(original), **(parts or {})}
        if edit is not None:
            document = json.loads(found[GRAPH])
            edit(document)
            found[GRAPH] = json.dumps(document).encode()
        return _write(tmp_path / "altered.pt2", found)

    return make


def test_an_ordinary_file_is_read(original: Path) -> None:
    exported = load_exported(original)
    x = torch.randn(7, 3)
    assert exported.module()(x).shape == (7, 3)
    assert exported._guards_code == []


def _relu(document: Any) -> dict[str, Any]:
    nodes: list[dict[str, Any]] = document["graph_module"]["graph"]["nodes"]
    return next(node for node in nodes if node["target"] == "torch.ops.aten.relu.default")


def _signature(document: Any) -> dict[str, Any]:
    signature: dict[str, Any] = document["graph_module"]["module_call_graph"][0]["signature"]
    return signature


def test_sizes_that_are_code_do_not_run(altered: Callable[..., Path], tmp_path: Path) -> None:
    """torch gives them to sympy.sympify, which evaluates them."""
    ran = tmp_path / "ran"
    text = f"__import__('pathlib').Path({str(ran)!r}).touch() or 4"

    def edit(document: Any) -> None:
        values = document["graph_module"]["graph"]["tensor_values"]["x"]
        values["sizes"][0]["as_expr"]["expr_str"] = text

    path = altered(edit=edit)
    with pytest.raises(ArtifactError, match=r"holds a size that is no arithmetic \(__import__"):
        load_exported(path)
    assert not ran.exists()
    torch.export.load(path)
    assert ran.exists()  # the danger is real


def test_pytrees_that_import_modules_are_refused(
    altered: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "imported_by_a_file.py").write_text(
        "from pathlib import Path\nPath(__file__).with_name('ran').touch()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    key = {"__enum__": True, "fqn": "imported_by_a_file:X", "name": "Y"}
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    factory = {
        "default_factory_module": "imported_by_a_file",
        "default_factory_name": "X",
        "dict_context": [],
    }
    for spec in (
        {"type": "builtins.dict", "context": json.dumps([key]), "children_spec": [leaf]},
        {"type": "collections.defaultdict", "context": factory, "children_spec": [leaf]},
    ):
        path = altered(edit=lambda d, s=spec: _signature(d).update(out_spec=json.dumps([1, s])))
        with pytest.raises(ArtifactError, match="holds a pytree that imports modules"):
            load_exported(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "target", ["torch.os.system", "torch.ops.load_library", "torch.hub.load", "builtins.print"]
)
def test_only_operators_are_called(altered: Callable[..., Path], target: str) -> None:
    path = altered(edit=lambda document: _relu(document).update(target=target))
    with pytest.raises(ArtifactError, match="cannot be read by torch"):
        load_exported(path)


def test_operators_that_call_are_given_operators(
    altered: Callable[..., Path], tmp_path: Path
) -> None:
    ran = tmp_path / "ran"

    def edit(document: Any) -> None:
        arguments = [{"as_operator": "torch.os.system"}, {"as_string": f"touch {ran}"}]
        _relu(document).update(
            name="called",
            target="torch.ops.higher_order.wrap",
            inputs=[{"name": "", "arg": argument, "kind": 1} for argument in arguments],
        )

    with pytest.raises(ArtifactError, match="calls system, which is no operator"):
        load_exported(altered(edit=edit))
    assert not ran.exists()


def test_guards_are_dropped(altered: Callable[..., Path]) -> None:
    path = altered(edit=lambda document: document.update(guards_code=["evil()"]))
    assert load_exported(path)._guards_code == []


@pytest.mark.parametrize(
    ("parts", "found"),
    [
        ({EXAMPLES: b"cos\nsystem\n(S'true'\ntR."}, "example inputs that are not plain tensors"),
        ({"data/constants/opaque_obj_0": b"cos\nsystem\n."}, "a part called data/constants/opaque"),
        ({"data/weights/model.pt": b"cos\nsystem\n."}, r"a part called data/weights/model\.pt"),
        ({"data/aotinductor/model/a.so": b"\x7fELF"}, "a part called data/aotinductor/model/a"),
        (
            {CONSTANTS: b'{"config": {"c": {"path_name": "tensor_0", "use_pickle": true}}}'},
            r"a pickled object \(tensor_0\)",
        ),
        (
            {CONSTANTS: b'{"config": {"c": {"path_name": "custom_obj_0", "use_pickle": false}}}'},
            r"a pickled object \(custom_obj_0\)",
        ),
    ],
)
def test_pickled_and_compiled_parts_are_refused(
    altered: Callable[..., Path], parts: dict[str, bytes], found: str
) -> None:
    with pytest.raises(ArtifactError, match=rf"holds {found}.* may run code of whoever wrote it"):
        load_exported(altered(parts))


def test_an_older_format_is_not_tried(tmp_path: Path) -> None:
    """torch.export.load falls back to files of torch 2.7, whose weights are pickled."""
    path = tmp_path / "old.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.8")
        archive.writestr("serialized_state_dict.pt", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(ArtifactError, match=r"is no program saved by torch\.export\.save"):
        load_exported(path)


def test_what_is_no_archive(tmp_path: Path, altered: Callable[..., Path], original: Path) -> None:
    with pytest.raises(ArtifactError, match="there is no file"):
        load_exported(tmp_path / "nothing.pt2")
    text = tmp_path / "text.pt2"
    text.write_text("hello")
    with pytest.raises(ArtifactError, match=r"is no program saved by torch\.export\.save"):
        load_exported(text)
    parts = _parts(original)
    parts["models/other.json"] = parts.pop(GRAPH)
    with pytest.raises(ArtifactError, match="holds no exported program called model"):
        load_exported(_write(text, parts))
    with pytest.raises(ArtifactError, match=r"is damaged: JSONDecodeError"):
        load_exported(altered({GRAPH: b"{"}))


def test_the_version_that_wrote_it_is_named(altered: Callable[..., Path]) -> None:
    def edit(document: Any) -> None:
        document["torch_version"] = "9.9.0"
        document["schema_version"]["major"] = 99

    with pytest.raises(ArtifactError, match=r"written by torch 9\.9\.0: read it with that version"):
        load_exported(altered(edit=edit))


@pytest.mark.parametrize(
    "text",
    [
        "s16",
        "4",
        "-s0 + 2*u1",
        "Add(Mul(Integer(8), Symbol('s16', positive=True, integer=True)), Integer(8))",
        "Max(1, FloorDiv(s0, 2))",
        "Eq(Mod(s0, 4), 0)",
        "s0 <= 4",
    ],
)
def test_sizes(text: str) -> None:
    assert is_size(text)


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "sympify('x')",
        "S('x')",
        "Symbol('print(1)')",
        "Symbol(name='a b')",
        "Symbol('a', integer='b')",
        "exit()",
        "lambdify(x, x)",
        "(lambda: 1)()",
        "S.__class__",
        "[1]",
        "x[0]",
        "1 if x else 2",
        "1 # comment",
        "1\n+ exit()",
        "",
    ],
)
def test_no_sizes(text: str) -> None:
    assert not is_size(text)
