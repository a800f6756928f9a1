"""Packaging: what is installed is what is on disk, under one name."""

from __future__ import annotations

import ast
import importlib
import os
import re
import subprocess
import sys
import tomllib
from importlib.metadata import (
    PackageNotFoundError,
    distribution,
    packages_distributions,
)
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {
    "vlmopt": ROOT / "vlmopt",
    "vlmopt.passes": ROOT / "passes",
    "vlmopt.lowering": ROOT / "lowering",
}


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def packages_on_disk() -> dict[str, Path]:
    """Packages and their folders: those with Python files; links are not followed."""
    found = {}
    for package, folder in SOURCES.items():
        for place, folders, files in os.walk(folder):
            folders[:] = [name for name in folders if name != "__pycache__"]
            if any(name.endswith(".py") for name in files):
                name = ".".join((package, *Path(place).relative_to(folder).parts))
                found[name] = Path(place)
    return found


def test_the_package_list_is_complete(pyproject: dict[str, Any]) -> None:
    listed = pyproject["tool"]["setuptools"]["packages"]
    assert listed == sorted(packages_on_disk())
    mapped = pyproject["tool"]["setuptools"]["package-dir"]
    assert mapped == {name: folder.name for name, folder in SOURCES.items()}


def test_every_package_has_an_init() -> None:
    found = packages_on_disk()
    assert [name for name in found if not (found[name] / "__init__.py").is_file()] == []


FIRST = """
import os
import torch, transformers
import vlmopt
for name in vlmopt.__all__:
    if (child := os.fork()) == 0:
        getattr(vlmopt, name)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, name
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork, to import torch only once")
def test_any_public_name_may_be_the_first_to_be_used() -> None:
    """No module relies on another having been imported before."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FIRST],
        text=True,
        check=False,
        stderr=subprocess.PIPE,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["passes", "lowering"])
def test_the_links_are_relative(name: str) -> None:
    link = ROOT / "vlmopt" / name
    if not link.is_symlink() and link.is_file():
        pytest.skip("this checkout has text files in the place of links")
    assert link.readlink() == Path("..", name)


def test_entry_points_lead_somewhere(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    assert set(project["entry-points"]) == {"torch_dynamo_backends"}
    for target in (
        *project["scripts"].values(),
        *project["entry-points"]["torch_dynamo_backends"].values(),
    ):
        module, _, attribute = target.partition(":")
        assert callable(getattr(importlib.import_module(module), attribute)), target


def test_the_installed_entry_points_are_the_declared_ones(pyproject: dict[str, Any]) -> None:
    try:
        installed = distribution("vlmopt")
    except PackageNotFoundError:
        pytest.skip("vlmopt is not installed in this interpreter")
    project = pyproject["project"]
    wanted = {"console_scripts": project["scripts"], **project["entry-points"]}
    found: dict[str, dict[str, str]] = {}
    for point in installed.entry_points:
        found.setdefault(point.group, {})[point.name] = point.value
    assert found == wanted


def test_what_is_imported_is_declared(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    requirements = project["dependencies"] + [
        requirement
        for extra in ("diffusers", "openvino", "peers", "photographs", "triton", "video")
        for requirement in project["optional-dependencies"][extra]
    ]
    declared = {_plain(re.split(r"[^A-Za-z0-9_-]", text)[0]) for text in requirements}
    distributions = packages_distributions()
    undeclared = {
        name
        for name in imported_modules() - sys.stdlib_module_names - {"vlmopt"}
        if declared.isdisjoint(map(_plain, [name, *distributions.get(name, _ABSENT.get(name, []))]))
    }
    assert undeclared == set()


_ABSENT = {"skimage": ["scikit-image"], "sklearn": ["scikit-learn"]}
"""Distributions of optional packages, for where they are not installed."""


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def imported_modules() -> set[str]:
    """First parts of the names of all modules that vlmopt imports, anywhere in its code."""
    names = set()
    for path in {path for folder in SOURCES.values() for path in folder.rglob("*.py")}:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names.add(node.module)
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("name", ["passes", "lowering"])
def test_there_is_no_second_copy(name: str) -> None:
    with pytest.raises(ModuleNotFoundError) as caught:
        importlib.import_module(name)
    assert str(caught.value) == f"import vlmopt.{name}, not {name}"


def test_importing_vlmopt_loads_no_torch() -> None:
    code = "import sys, vlmopt; print(vlmopt.__version__, 'torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert run.stdout == "0.1.0 False\n"


def test_the_version_is_the_one_of_the_package(pyproject: dict[str, Any]) -> None:
    assert pyproject["project"]["version"] == importlib.import_module("vlmopt").__version__


@pytest.mark.skipif(os.name == "nt", reason="the tools are bash scripts")
@pytest.mark.parametrize("tool", ["demo", "test"])
def test_an_old_interpreter_is_refused(tool: str, tmp_path: Path) -> None:
    checkout = tmp_path / "checkout with spaces"
    (checkout / "tools").mkdir(parents=True)
    for name in (tool, "environment.sh"):
        (checkout / "tools" / name).write_bytes((ROOT / "tools" / name).read_bytes())
    old = tmp_path / "python3.10"
    old.write_text("#!/bin/sh\nexit 1\n", encoding="utf-8")  # what the check of the version gives
    old.chmod(0o755)
    run = subprocess.run(
        ["bash", str(checkout / "tools" / tool)],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr == (
        f"vlmopt needs Python 3.11 or newer, which {old} is not.\n"
        "Set PYTHON to the interpreter to use, such as PYTHON=/usr/bin/python3.12.\n"
    )
    assert not (checkout / ".venv").exists()
