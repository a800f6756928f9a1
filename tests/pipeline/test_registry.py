"""The registry: what is known, when it is imported, and what may not be registered."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import EntryPoint
from typing import Any

import pytest

from vlmopt.errors import UnknownPassError
from vlmopt.passes import PASSES
from vlmopt.passes.tokens.random_drop import RandomDrop
from vlmopt.passes.tokens.v2drop import V2Drop
from vlmopt.pipeline import registry
from vlmopt.pipeline.registry import find_pass, known_passes, register_pass


class Renamed(V2Drop):
    """A pass of another name."""

    name = "renamed"


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(registry, "_registered", {})
    registry._installed.cache_clear()
    yield
    registry._installed.cache_clear()


def _install(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    found = [
        EntryPoint(name, value, registry.ENTRY_POINTS)
        for name, value in ((name.replace("_", "-"), value) for name, value in points.items())
    ]
    monkeypatch.setattr(registry, "entry_points", lambda group: found)


@pytest.mark.parametrize("name", PASSES)
def test_every_pass_can_be_found(name: str) -> None:
    assert find_pass(name).name == name


def test_names_are_sorted() -> None:
    names = known_passes()
    assert names == sorted(names)
    assert {"v2drop", "random-drop", "fold-constants"} <= set(names)


def test_listing_imports_no_pass() -> None:
    code = (
        "import sys; from vlmopt.pipeline.registry import known_passes; known_passes(); "
        "print([name for name in sys.modules if name.startswith('vlmopt.passes.')])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("v2drp", "v2drop; vlmopt passes lists them"),
        ("zzz", "vlmopt passes lists them"),
    ],
)
def test_unknown_names(name: str, hint: str) -> None:
    with pytest.raises(UnknownPassError) as caught:
        find_pass(name)
    assert str(caught.value) == f"no pass is called '{name}'\n  try: {hint}"


def test_classes_and_paths_can_be_registered() -> None:
    register_pass("renamed", Renamed)
    assert find_pass("renamed") is Renamed
    assert "renamed" in known_passes()
    with pytest.raises(ValueError, match="a pass called renamed is registered already"):
        register_pass("renamed", Renamed)
    with pytest.raises(ValueError, match="a pass called v2drop is registered already"):
        register_pass("v2drop", "vlmopt.passes.tokens.v2drop:V2Drop")


def test_a_path_is_imported_on_use() -> None:
    register_pass("later", "no_such_module:Later")
    assert "later" in known_passes()
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        find_pass("later")


def test_names_must_agree() -> None:
    with pytest.raises(ValueError, match="Renamed is registered as other but calls itself renamed"):
        register_pass("other", Renamed)
    register_pass("alias", "vlmopt.passes.tokens.random_drop:RandomDrop")
    with pytest.raises(ValueError, match="RandomDrop is registered as alias but calls itself"):
        find_pass("alias")


def test_only_passes_can_be_registered() -> None:
    with pytest.raises(TypeError, match="pass number: <class 'int'> is not a subclass of Pass"):
        register_pass("number", int)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'Later' is not of the form module:Class"):
        register_pass("later", "Later")


def test_installed_packages_add_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    path = PASSES["random-drop"]
    # the same entry twice, as after an editable install over a wheel, is no conflict
    _install(monkeypatch, random_drop=path)
    assert find_pass("random-drop") is RandomDrop
    registry._installed.cache_clear()
    _install(monkeypatch, theirs="their_package:Theirs")
    assert "theirs" in known_passes()


def test_two_packages_cannot_share_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    _install(monkeypatch, v2drop="their_package:Mine")
    with pytest.raises(ValueError, match=r"two packages register a pass called v2drop: .*Mine"):
        known_passes()
