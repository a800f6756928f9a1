"""Which passes there are, by name.

Names map to ``module:Class``, and a module is imported when its pass is first used: listing the
names stays cheap, and a broken plug-in cannot break pipelines that do not name it. Packages of
third parties add passes through the entry point group ``vlmopt.passes``.
"""

from __future__ import annotations

import difflib
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points

from vlmopt.errors import UnknownPassError
from vlmopt.passes import PASSES
from vlmopt.pipeline.passes import Pass

ENTRY_POINTS = "vlmopt.passes"

_registered: dict[str, str | type[Pass]] = {}


def known_passes() -> list[str]:
    """Names of all passes, sorted; imports none of them."""
    return sorted({*_installed(), *_registered})


def find_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        UnknownPassError: nobody registered the name.
        TypeError, ValueError: what stands behind the name is no pass, or one of another name.
    """
    entry = _registered.get(name) or _installed().get(name)
    if entry is None:
        near = difflib.get_close_matches(name, known_passes(), 1)
        hint = "vlmopt passes lists them"
        raise UnknownPassError(
            f"no pass is called {name!r}", hint=f"{near[0]}; {hint}" if near else hint
        )
    return _load(name, entry) if isinstance(entry, str) else entry


def register_pass(name: str, cls_or_path: type[Pass] | str) -> None:
    """Add a pass for this process.

    Args:
        cls_or_path: the class, or ``module:Class`` to import it on first use.

    Raises:
        ValueError: the name is taken, or is not the name of the class.
        TypeError: it is no pass class.
    """
    if name in known_passes():
        raise ValueError(f"a pass called {name} is registered already")
    if isinstance(cls_or_path, str):
        if not all(cls_or_path.partition(":")):
            raise ValueError(f"pass {name}: {cls_or_path!r} is not of the form module:Class")
        _registered[name] = cls_or_path
    else:
        _registered[name] = _check_class(name, cls_or_path)


@cache
def _installed() -> dict[str, str]:
    """Built-in passes and those of installed packages."""
    found = dict(PASSES)
    for point in entry_points(group=ENTRY_POINTS):
        # an installation seen twice (such as an editable one and its wheel) is no conflict
        if found.setdefault(point.name, point.value) != point.value:
            raise ValueError(
                f"two packages register a pass called {point.name}: {found[point.name]} and "
                f"{point.value}"
            )
    return found


@cache
def _load(name: str, path: str) -> type[Pass]:
    module, _, attribute = path.partition(":")
    return _check_class(name, getattr(import_module(module), attribute))


def _check_class(name: str, cls: object) -> type[Pass]:
    if not isinstance(cls, type) or not issubclass(cls, Pass):
        raise TypeError(f"pass {name}: {cls!r} is not a subclass of Pass")
    if cls.name != name:
        raise ValueError(f"{cls.__qualname__} is registered as {name} but calls itself {cls.name}")
    return cls
