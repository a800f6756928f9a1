"""Programs on disk: a folder that is read without unpickling anything.

    program.json          what the program is: stages, ports, facts, cuts, passes, weights
    <stage>.pt2           the stage's graph, by ``torch.export.save``
    weights*.safetensors  every weight once, whichever stages read it

In a ``.pt2`` the weights are inputs, ahead of the stage's own: stages share their weights, and a
graph alone cannot be run by mistake on weights that are not there.
"""

from __future__ import annotations

import hashlib
import io
import json
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import fx
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

import vlmopt
from vlmopt.archives import load_exported
from vlmopt.errors import ArtifactError
from vlmopt.folders import new_folder
from vlmopt.program import Cut, Port, Program, Role, Stage, attach_attr, copy_graph, fetch_attr

FORMAT = 1
MANIFEST = "program.json"

_SHARD = "5GB"
_FILE = re.compile(r"[A-Za-z0-9_][\w.-]*")
_AGAIN = "copy the folder again, or write it anew"


def save(program: Program, directory: str | Path, *, overwrite: bool = False) -> None:
    """Write ``program`` as a folder, whole or not at all.

    A program captured without weights is written without weights.

    Args:
        overwrite: replace a program folder that is there; anything else is never replaced.

    Raises:
        ArtifactError: the folder exists or cannot be made, or the program holds something that
            the format cannot.
    """
    with new_folder(
        Path(directory), marker=MANIFEST, overwrite=overwrite, error=ArtifactError
    ) as folder:
        weights = program.named_weights()
        keys = {id(tensor): key for key, tensor in weights.items()}
        document = {
            "format": FORMAT,
            "vlmopt": vlmopt.__version__,
            "torch": torch.__version__,
            "model_type": program.model_type,
            "passes": list(program.passes),
            "metadata": program.metadata,
            "stages": [_write_stage(stage, keys, folder) for stage in program],
            "weights": _write_weights(weights, folder),
            "files": {path.name: _identity(path) for path in sorted(folder.iterdir())},
        }
        try:
            text = json.dumps(document, indent=1)
        except (TypeError, ValueError) as error:
            raise ArtifactError(
                f"the metadata or facts of the program cannot be written as JSON: {error}",
                hint="keep numbers, strings, lists and dicts with string keys there",
            ) from error
        (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def load(directory: str | Path, *, weights: bool = True) -> Program:
    """Read a program folder.

    Args:
        weights: ``False`` leaves the weights on disk: everything but running the program works.

    Returns:
        The program as it was saved: same node names, types, provenance, and values.

    Raises:
        ArtifactError: it is no program folder, is damaged, or was written by a newer version.
    """
    folder = Path(directory)
    document = _read_manifest(folder)
    try:
        files = _Files(folder, document["files"])
        tensors = _Weights(files, document["weights"], read=weights)
        program = Program(
            _read_stages(files, document["stages"], tensors),
            model_type=document["model_type"],
            passes=tuple(document["passes"]),
            metadata=dict(document["metadata"]),
        )
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise ArtifactError(
            f"{folder / MANIFEST} is damaged, or not of the files beside it: "
            f"{type(error).__name__}: {error}",
            hint="write the folder anew: vlmopt capture SOURCE -o DIR",
        ) from error
    program.metadata["weights"] = weights and program.metadata.get("weights", True)
    return program


# -- weights -----------------------------------------------------------------------------------


def _write_weights(weights: Mapping[str, torch.Tensor], folder: Path) -> dict[str, Any]:
    """Write the tensors that have values; returns where each is, with its type."""
    from huggingface_hub import split_state_dict_into_shards_factory
    from safetensors.torch import save_file

    real = _separate(
        {
            key: tensor.detach()
            for key, tensor in weights.items()
            if not isinstance(tensor, FakeTensor) and not tensor.is_meta
        }
    )
    split = split_state_dict_into_shards_factory(
        real,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="weights{suffix}.safetensors",
        max_shard_size=_SHARD,
    )
    where = {key: name for name, keys in split.filename_to_tensors.items() for key in keys}
    for name, keys in split.filename_to_tensors.items():
        if keys:
            save_file({key: real[key] for key in keys}, folder / name, metadata={"format": "pt"})
    return {
        key: {
            "file": where.get(key),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape),
            "parameter": isinstance(tensor, torch.nn.Parameter),
        }
        for key, tensor in weights.items()
    }


def _separate(weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous tensors of which no two share memory, as safetensors demands."""
    separate, seen = {}, set()
    for key, tensor in weights.items():
        whole = tensor.contiguous()
        storage = whole.untyped_storage().data_ptr()
        separate[key] = whole.clone() if storage in seen else whole
        seen.add(storage)
    return separate


class _Weights:
    """The weights of a folder, each read when it is first asked for."""

    def __init__(self, files: _Files, entries: Mapping[str, Any], *, read: bool) -> None:
        self.files = files
        self.entries = entries
        self.read = read
        self.mode = FakeTensorMode()
        self.opened: dict[str, Any] = {}
        self.seen: dict[str, torch.Tensor] = {}

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self.seen:
            entry = self.entries[key]
            tensor = self._tensor(key, entry)
            if entry["parameter"]:
                tensor = torch.nn.Parameter(tensor, requires_grad=False)
            self.seen[key] = tensor
        return self.seen[key]

    def _tensor(self, key: str, entry: Mapping[str, Any]) -> torch.Tensor:
        dtype, shape = getattr(torch, entry["dtype"]), entry["shape"]
        if entry["file"] is None or not self.read:
            with self.mode:
                return torch.empty(shape, dtype=dtype)
        try:
            tensor: torch.Tensor = self._open(entry["file"]).get_tensor(key)
        except SafetensorError as error:
            raise ArtifactError(
                f"weight {key} cannot be read from {entry['file']}: {error}", hint=_AGAIN
            ) from error
        if tensor.dtype != dtype or list(tensor.shape) != shape:
            raise ArtifactError(
                f"weight {key} in {entry['file']} is {tensor.dtype} {list(tensor.shape)}, "
                f"where the manifest says {dtype} {shape}",
                hint="the files do not belong together: write the folder anew",
            )
        # off the file, which may change, to where allocators put tensors: alignment picks the
        # kernel of a matmul, and with it the last bit
        return tensor.clone()

    def _open(self, name: str) -> Any:
        if name not in self.opened:
            path = self.files.find(name)
            try:
                self.opened[name] = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise ArtifactError(f"{path} cannot be read: {error}", hint=_AGAIN) from error
        return self.opened[name]


# -- stages ------------------------------------------------------------------------------------


def _write_stage(stage: Stage, keys: Mapping[int, str], folder: Path) -> dict[str, Any]:
    name = f"{stage.name}.pt2"
    if not _FILE.fullmatch(name):
        raise ArtifactError(
            f"stage {stage.name!r} cannot be a file",
            hint="name stages by letters, digits, - and _",
        )
    archive = io.BytesIO()
    try:
        torch.export.save(_exported(stage), archive)
    except Exception as error:  # torch raises what its code happens to run into
        raise ArtifactError(
            f"stage {stage.name} cannot be written by torch.export.save: "
            f"{type(error).__name__}: {error}",
            hint="operators must be ATen, or be registered by torch.library; vlmopt verify says "
            "which are not",
        ) from error
    (folder / name).write_bytes(archive.getvalue())
    weights = {
        node.name: {
            "path": str(node.target),
            "key": keys[id(fetch_attr(stage.graph_module, str(node.target)))],
        }
        for node in stage.graph.find_nodes(op="get_attr")
    }
    return {
        "name": stage.name,
        "file": name,
        "inputs": [asdict(port) for port in stage.inputs],
        "outputs": [asdict(port) for port in stage.outputs],
        "facts": stage.facts,
        "cuts": [asdict(cut) for cut in stage.cuts],
        "weights": weights,
    }


def _exported(stage: Stage) -> torch.export.ExportedProgram:
    """The stage as an ``ExportedProgram`` without state: weights are its first inputs."""
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
    from torch.export.graph_signature import (
        ExportGraphSignature,
        InputKind,
        InputSpec,
        OutputKind,
        OutputSpec,
        TensorArgument,
    )

    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    inputs = [*stage.graph.find_nodes(op="get_attr"), *stage.graph.find_nodes(op="placeholder")]
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta = {"val": node.meta["val"]}
    for node in stage.graph.nodes:
        if node not in mapping:
            mapping[node] = graph.node_copy(node, mapping.__getitem__)
            mapping[node].meta = dict(node.meta)
    for node, copied in mapping.items():
        copied.name = node.name
    results: Any = graph.output_node().args[0]
    signature = ExportGraphSignature(
        [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs],
        [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results],
    )
    call = ModuleCallSignature(
        inputs=[],
        outputs=[],
        in_spec=pytree.tree_flatten(((0,) * len(inputs), {}))[1],
        out_spec=pytree.tree_flatten((0,) * len(results))[1],
        forward_arg_names=[node.name for node in inputs],
    )
    root = fx.GraphModule(torch.nn.Module(), graph)
    root.meta["custom"] = {"vlmopt": {"nodes": list(map(_node_entry, stage.graph.nodes))}}
    return torch.export.ExportedProgram(
        root=root,
        graph=root.graph,
        graph_signature=signature,
        state_dict={},
        range_constraints=_range_constraints(stage),
        module_call_graph=[ModuleCallEntry(fqn="", signature=call)],
    )


def _node_entry(node: fx.Node) -> dict[str, Any]:
    """What ``.pt2`` loses: order, names of ``getitem`` nodes, and where other nodes come from."""
    entry: dict[str, Any] = {"name": node.name}
    if node.op != "call_function" or node.target is operator.getitem:
        for key in ("custom", "stack_trace"):
            if node.meta.get(key):
                entry[key] = node.meta[key]
        if node.meta.get("nn_module_stack"):
            entry["nn_module_stack"] = [
                (key, path, kind if isinstance(kind, str) else f"{kind.__module__}.{kind.__name__}")
                for key, (path, kind) in node.meta["nn_module_stack"].items()
            ]
    if node.target is operator.getitem:
        entry["of"], entry["index"] = node.args[0].name, node.args[1]  # type: ignore[union-attr]
    return entry


def _range_constraints(stage: Stage) -> dict[Any, Any]:
    environment = stage.fake_mode().shape_env
    if environment is None:
        return {}
    symbols = {
        symbol
        for node in stage.graph.nodes
        for value in pytree.tree_leaves(node.meta.get("val"))
        for symbol in _symbols(value)
    }
    return {symbol: environment.var_to_range[symbol] for symbol in symbols}


def _symbols(value: Any) -> Iterator[Any]:
    sizes = value.shape if isinstance(value, torch.Tensor) else (value,)
    for size in sizes:
        if isinstance(size, torch.SymInt):
            yield from size.node.expr.free_symbols


def _read_stages(files: _Files, entries: Any, weights: _Weights) -> dict[str, Stage]:
    stages = [_read_stage(files, entry, weights) for entry in entries]
    by_name = {stage.name: stage for stage in stages}
    if len(by_name) < len(stages):
        raise ValueError("two stages have the same name")
    return by_name


def _read_stage(files: _Files, entry: Mapping[str, Any], weights: _Weights) -> Stage:
    path = files.find(entry["file"])
    exported = load_exported(path)
    stage = Stage(
        entry["name"],
        _flat_module(exported, entry["weights"], weights),
        tuple(_port(port) for port in entry["inputs"]),
        tuple(_port(port) for port in entry["outputs"]),
        dict(entry["facts"]),
        tuple(_cut(cut) for cut in entry["cuts"]),
    )
    names = [node.name for node in stage.graph.find_nodes(op="placeholder")]
    results: Any = stage.graph.output_node().args[0]
    if names != [port.name for port in stage.inputs] or len(results) != len(stage.outputs):
        raise ArtifactError(
            f"the inputs or outputs of {path.name} are not those of its stage in {MANIFEST}",
            hint="the files do not belong together: write the folder anew",
        )
    return stage


def _flat_module(
    exported: torch.export.ExportedProgram, places: Mapping[str, Any], weights: _Weights
) -> fx.GraphModule:
    """The stage's graph in its own order and names, with weights as ``get_attr``."""
    entries = exported.graph_module.meta["custom"]["vlmopt"]["nodes"]
    source = _counterparts(exported.graph, entries)
    if not places.keys() <= source.keys():
        raise ValueError("the graph does not read all weights of its stage")
    root = torch.nn.Module()
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for entry in entries:
        name = entry["name"]
        node = source[name]
        if name in places:
            path = places[name]["path"]
            attach_attr(root, path, weights[places[name]["key"]])
            copied = graph.get_attr(path)
        else:
            copied = graph.node_copy(node, mapping.__getitem__)
        copied.name = name
        copied.meta = {
            **{key: node.meta[key] for key in _METADATA if key in node.meta},
            **{key: entry[key] for key in _METADATA if key in entry},
        }
        if "nn_module_stack" in entry:
            copied.meta["nn_module_stack"] = {
                key: (path, kind) for key, path, kind in entry["nn_module_stack"]
            }
        mapping[node] = copied
    graph = copy_graph(graph)  # names given later depend on the names that are there, on no others
    graph.lint()
    return fx.GraphModule(root, graph)


_METADATA = ("val", "custom", "stack_trace", "nn_module_stack")


def _counterparts(graph: fx.Graph, entries: list[dict[str, Any]]) -> dict[str, fx.Node]:
    """Nodes as loaded, by the names that they had."""
    found = {node.name: node for node in graph.find_nodes(op="placeholder")}
    parts = {
        (node.args[0], node.args[1]): node
        for node in graph.find_nodes(op="call_function", target=operator.getitem)
    }
    whole = [
        node
        for node in graph.nodes
        if node.op != "placeholder" and node.target is not operator.getitem
    ]
    names = [e["name"] for e in entries if "of" not in e and e["name"] not in found]
    found.update(zip(names, whole, strict=True))
    for entry in entries:
        if "of" in entry:
            found[entry["name"]] = parts[found[entry["of"]], entry["index"]]
    return found


# -- the manifest ------------------------------------------------------------------------------


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(
            f"{folder} is no program folder: it holds no {MANIFEST}",
            hint="vlmopt capture SOURCE -o DIR writes one",
        )
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} cannot be read as JSON: {error}", hint=_AGAIN) from error
    version = document.get("format") if isinstance(document, dict) else None
    if version != FORMAT:
        newer = isinstance(version, int) and version > FORMAT
        raise ArtifactError(
            f"{folder} has format {version}, and vlmopt {vlmopt.__version__} reads format {FORMAT}",
            hint=f"update vlmopt to {document.get('vlmopt')} or later"
            if newer
            else "write the folder anew",
        )
    return document  # type: ignore[no-any-return]


def _identity(path: Path) -> dict[str, Any]:
    """Size in bytes and, of graphs, the hash; weights are large, and may be trained further."""
    identity: dict[str, Any] = {"bytes": path.stat().st_size}
    if path.suffix == ".pt2":
        identity["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    return identity


class _Files:
    """The files of a folder, each compared with the manifest when it is asked for."""

    def __init__(self, folder: Path, identities: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identities = identities

    def find(self, name: str) -> Path:
        """The path of a file; names that lead elsewhere are refused."""
        if not _FILE.fullmatch(name):
            raise ArtifactError(f"{self.folder / MANIFEST} names a file outside its folder: {name}")
        path, wanted = self.folder / name, self.identities[name]
        if not path.is_file():
            raise ArtifactError(
                f"{self.folder} lacks its file {name}", hint="copy the folder again"
            )
        size = path.stat().st_size
        if size != wanted["bytes"]:
            raise ArtifactError(
                f"{path} has {size} bytes, where the manifest says {wanted['bytes']}", hint=_AGAIN
            )
        if _identity(path) != wanted:
            raise ArtifactError(
                f"{path} is not the file that was written: its hash differs", hint=_AGAIN
            )
        return path


def _port(entry: Mapping[str, Any]) -> Port:
    return Port(entry["name"], Role(entry["role"]), entry["layer"], entry["kept"])


def _cut(entry: Mapping[str, Any]) -> Cut:
    visual = tuple((before, after) for before, after in entry["visual"])
    before, after = entry["tokens"]
    return Cut(
        entry["layer"],
        (before, after),
        visual,
        entry["kept"],
        entry["made_by"],
        entry["renumbered"],
        tuple(entry["slots"]),
        entry["until"],
        entry.get("fillers", False),  # folders of before have none
    )
