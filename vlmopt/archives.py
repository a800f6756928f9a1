"""Reading ``.pt2`` files without running anything that whoever wrote them put there.

``torch.export.load`` trusts a file: it unpickles example inputs, constants and objects, evaluates
symbolic sizes as Python source (``sympy.sympify``), and imports the modules that a pytree names.
Here all parts of a file are looked at first, through the reader that torch uses too.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx
from torch.export.pt2_archive import PT2ArchiveReader
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions as symbolic

from vlmopt.errors import ArtifactError


def load_exported(path: Path) -> torch.export.ExportedProgram:
    """Read a file of ``torch.export.save`` whose parts are all plain data.

    Raises:
        ArtifactError: it is none, holds something that runs when it is read, or cannot be read by
            this version of torch.
    """
    # not torch.export.load: when this fails, it tries an older format, which is pickled
    from torch.export.pt2_archive._package import load_pt2

    if not path.is_file():
        raise ArtifactError(f"there is no file {path}")
    try:
        archive = PT2ArchiveReader(str(path))
        names = archive.get_file_names()
    except (RuntimeError, AssertionError, ValueError) as error:
        raise ArtifactError(
            f"{path} is no program saved by torch.export.save: {_first_line(error)}",
            hint="save it again with this version of torch, or copy it again",
        ) from error
    if _GRAPH not in names:
        raise ArtifactError(f"{path} holds no exported program called model")
    try:
        found = next(_dangers(archive, names), None)
    except (RuntimeError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ArtifactError(f"{path} is damaged: {_first_line(error)}") from error
    if found is not None:
        raise ArtifactError(
            f"{path} holds {found}, and reading that may run code of whoever wrote it",
            hint="save it again without (exported._example_inputs = None), or name a Python "
            "factory: vlmopt diff pkg.mod:factory -p PIPELINE",
        )
    try:
        exported = load_pt2(str(path)).exported_programs["model"]
    except Exception as error:  # the loader raises what its code happens to run into
        raise ArtifactError(
            f"{path} cannot be read by torch {torch.__version__}: {_first_line(error)}",
            hint=_reading_hint(archive),
        ) from error
    _refuse_function_arguments(exported, path)
    exported._guards_code = []  # Python source, run by ExportedProgram.module()
    return exported


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"


def _reading_hint(archive: PT2ArchiveReader) -> str:
    written_by = json.loads(archive.read_bytes(_GRAPH)).get("torch_version")
    if written_by == torch.__version__:
        return "copy it again, or write it anew"
    return f"it was written by torch {written_by}: read it with that version, or write it anew"


# -- parts -------------------------------------------------------------------------------------

_GRAPH = "models/model.json"
_PLAIN = re.compile(
    r"archive_format|archive_version|byteorder|(\.data/)?(version|serialization_id)"
    r"|data/weights/weight_\d+|data/constants/tensor_\d+|extra/.*"
)
_PAYLOAD = re.compile(r"(weight|tensor)_\d+")


def _dangers(archive: PT2ArchiveReader, names: list[str]) -> Iterator[str]:
    """What is not plain data, in words."""
    for name in names:
        if _PLAIN.fullmatch(name):
            continue
        data = archive.read_bytes(name)
        if re.fullmatch(r"models/\w+\.json", name):
            yield from _dangers_of_graph(data)
        elif re.fullmatch(r"data/(weights|constants)/\w+_config\.json", name):
            for entry in json.loads(data)["config"].values():
                if entry["use_pickle"] or not _PAYLOAD.fullmatch(entry["path_name"]):
                    yield f"a pickled object ({entry['path_name']})"
        elif re.fullmatch(r"data/sample_inputs/\w+\.pt", name):
            if data and not _is_plain(data):
                yield "example inputs that are not plain tensors"
        else:
            yield f"a part called {name}"


def _is_plain(data: bytes) -> bool:
    """Whether torch's restricted reader, which runs no code, is enough."""
    try:
        torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, AttributeError, KeyError):
        return False
    return True


# -- the graph ---------------------------------------------------------------------------------


def _dangers_of_graph(data: bytes) -> list[str]:
    found: list[str] = []
    checked: set[str] = set()

    def look(entry: dict[str, Any]) -> dict[str, Any]:
        size = entry.get("expr_str")
        if size is not None and (not isinstance(size, str) or size not in checked):
            if not isinstance(size, str) or not is_size(size):
                found.append(f"a size that is no arithmetic ({str(size)[:60]})")
            else:
                checked.add(size)
        if any(_imports(entry[key]) for key in ("in_spec", "out_spec") if key in entry):
            found.append("a pytree that imports modules")
        return entry

    json.loads(data, object_hook=look)
    return found


def _imports(spec: str) -> bool:
    """Whether reading a pytree imports modules: for enum keys, and factories of defaultdict."""
    found = []

    def look(entry: dict[str, Any]) -> dict[str, Any]:
        found.append(bool(entry.keys() & {"__enum__", "default_factory_module"}))
        context = entry.get("context")
        if isinstance(context, str):
            with contextlib.suppress(ValueError):  # of a type that reads it by itself
                json.loads(context, object_hook=look)
        return entry

    json.loads(spec, object_hook=look)
    return any(found)


_ARITHMETIC = (
    ast.Expression,
    ast.Constant,
    ast.Name,
    ast.Load,
    ast.Call,
    ast.keyword,
    ast.UnaryOp,
    ast.USub,
    ast.UAdd,
    ast.BinOp,
    ast.operator,
    ast.Compare,
    ast.cmpop,
)


def is_size(text: str) -> bool:
    """Whether a symbolic size, in the form that sympy reads, is arithmetic and nothing else.

    Calls are of sympy's and torch's expression classes only, and the only strings are the names of
    symbols: ``Add(Mul(Integer(8), Symbol('s16', positive=True, integer=True)), Integer(8))``.
    """
    if not re.fullmatch(r"[\w\s().,'=<>+*/%-]*", text, re.ASCII) or "\n" in text:
        return False  # sympy preprocesses the rest
    try:
        tree = ast.parse(text, mode="eval")
    except (SyntaxError, ValueError, RecursionError):
        return False
    names = set()
    for node in ast.walk(tree):
        if not isinstance(node, _ARITHMETIC):
            return False
        if isinstance(node, ast.Call):
            if not isinstance(node.func, ast.Name) or not _is_expression_class(node.func.id):
                return False
            if node.func.id == "Symbol" and node.args:
                names.add(node.args[0])
    strings = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and not isinstance(node.value, int | float)
    ]
    return all(
        node in names and isinstance(node.value, str) and node.value.isidentifier()
        for node in strings
    )


def _is_expression_class(name: str) -> bool:
    kind = getattr(symbolic, name, None) or getattr(sympy, name, None)
    return isinstance(kind, type) and issubclass(kind, sympy.Basic)


def _refuse_function_arguments(exported: torch.export.ExportedProgram, path: Path) -> None:
    """Higher-order operators call their arguments; torch checks only what nodes call themselves."""
    operators = (torch._ops.OpOverload, torch._ops.HigherOrderOperator, fx.Node)
    for module in exported.graph_module.modules():
        for node in getattr(module, "graph", fx.Graph()).nodes:
            for value in pytree.tree_leaves((node.args, node.kwargs)):
                if callable(value) and not isinstance(value, operators):
                    raise ArtifactError(
                        f"{path} calls {getattr(value, '__name__', value)}, which is no operator",
                        node=node,
                    )
