"""Options of passes: how they are declared, and how values are converted and checked.

An option is a dataclass field made by :func:`option`. Its annotated type says how its text in a
pipeline is read; the constraints given to :func:`option` hold however an instance is made, from
text or in Python.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import types
import typing
from abc import ABC
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any, ClassVar

from vlmopt.errors import OptionError

_INTEGER = re.compile(r"[+-]?[0-9]+")
_NUMBER = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?")
_BOUNDS: dict[str, tuple[str, Callable[[Any, Any], bool]]] = {
    "gt": ("greater than", lambda value, bound: bool(value > bound)),
    "ge": ("at least", lambda value, bound: bool(value >= bound)),
    "lt": ("less than", lambda value, bound: bool(value < bound)),
    "le": ("at most", lambda value, bound: bool(value <= bound)),
}


def option(
    default: Any,
    help: str,
    *,
    gt: float | None = None,
    ge: float | None = None,
    lt: float | None = None,
    le: float | None = None,
    choices: Iterable[Any] | None = None,
    min_items: int | None = None,
    increasing: bool = False,
) -> Any:
    """Declare an option of a pass, as the value of a dataclass field.

    The field's annotation is ``str``, ``int``, ``float``, ``bool``, ``float | int``, or a tuple
    of any length of one of them, such as ``tuple[int, ...]``.

    Args:
        default: value when the pipeline leaves the option out.
        help: one phrase, without a full stop.
        gt, ge, lt, le: bounds of the value, or of each item of a list.
        choices: the only values allowed, or the only items.
        min_items: least number of items of a list.
        increasing: each item of a list is greater than the one before.
    """
    constraints = {
        "gt": gt,
        "ge": ge,
        "lt": lt,
        "le": le,
        "choices": tuple(choices) if choices is not None else None,
        "min_items": min_items,
        "increasing": increasing or None,
    }
    given = {name: value for name, value in constraints.items() if value is not None}
    return dataclasses.field(default=default, metadata={"help": help, **given})


def override(base: type[Any], name: str, default: Any, **changes: Any) -> Any:
    """The option ``name`` of a base class with another default, and perhaps other constraints."""
    field = next(field for field in dataclasses.fields(base) if field.name == name)
    return dataclasses.field(default=default, metadata={**field.metadata, **changes})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Configurable(ABC):
    """Base of whatever is chosen by name, with options: passes, and policies of other loops.

    Subclasses are frozen, keyword-only dataclasses whose fields are the options.
    """

    name: ClassVar[str]

    def __post_init__(self) -> None:
        """Convert and check the options; a subclass with a check of its own calls this first."""
        check_options(self)


@dataclasses.dataclass(frozen=True)
class OptionRow:
    """An option as documentation shows it: all texts, ``default`` as in a pipeline."""

    name: str
    default: str
    help: str


def option_rows(one: type[Configurable]) -> list[OptionRow]:
    """The options of a pass class, in order of declaration."""
    return [
        OptionRow(field.name, _default_text(field), str(field.metadata.get("help", "")))
        for field in dataclasses.fields(one)
    ]


def _default_text(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required"
    if isinstance(field.default, tuple):
        return ",".join(map(str, field.default))
    return str(field.default)


@dataclasses.dataclass(frozen=True)
class OptionType:
    """What an option's annotation means.

    Attributes:
        scalars: types of a value, or of an item: one, or ``{float, int}``.
        is_list: whether the value is a tuple of any length.
    """

    scalars: frozenset[type]
    is_list: bool = False

    def describe(self) -> str:
        """What an item is: ``an integer``, ``a number``, ``true or false``, ``text``."""
        if self.scalars == {int}:
            return "an integer"
        if self.scalars == {bool}:
            return "true or false"
        return "text" if self.scalars == {str} else "a number"


@cache
def option_types(cls: type[Configurable]) -> dict[str, OptionType]:
    """The options of a pass class by name, in order of declaration.

    Raises:
        TypeError: a field's annotation is none that :func:`option` lists.
    """
    hints = typing.get_type_hints(cls)
    return {
        field.name: _read_annotation(hints[field.name], f"{cls.__name__}.{field.name}")
        for field in dataclasses.fields(cls)
        if field.init
    }


def _read_annotation(annotation: Any, where: str) -> OptionType:
    is_list = typing.get_origin(annotation) is tuple
    if is_list:
        arguments = typing.get_args(annotation)
        if len(arguments) != 2 or arguments[1] is not Ellipsis:
            raise TypeError(f"option {where}: a list is annotated as tuple[type, ...]")
        annotation = arguments[0]
    union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
    scalars = frozenset(typing.get_args(annotation) if union else (annotation,))
    if scalars != {float, int} and (len(scalars) != 1 or not scalars <= {str, int, float, bool}):
        raise TypeError(f"option {where}: no option can have the type {annotation}")
    return OptionType(scalars, is_list)


def check_options(instance: Configurable) -> None:
    """Convert and check every option of a pass, in place (it is frozen, but not yet in use).

    Raises:
        OptionError: a value has the wrong type or breaks a constraint.
    """
    cls = type(instance)
    for field in dataclasses.fields(instance):
        kind = option_types(cls).get(field.name)
        if kind is None:
            continue
        value = getattr(instance, field.name)
        checked: Any
        if kind.is_list:
            # a list or a single value is what one writes in Python without thinking
            items = value if isinstance(value, (tuple, list)) else (value,)
            checked = tuple(_check_item(cls, field.name, item, kind) for item in items)
        else:
            checked = _check_item(cls, field.name, value, kind)
        _check_constraints(cls, field, checked, kind)
        object.__setattr__(instance, field.name, checked)


def check_names(cls: type[Configurable], names: Iterable[str]) -> None:
    """Raise :class:`~vlmopt.errors.OptionError` for the first name that is no option of ``cls``."""
    known = list(option_types(cls))
    for name in names:
        if name in known:
            continue
        hint = f"the options of {cls.name} are {', '.join(known)}" if known else None
        if near := difflib.get_close_matches(name, known, 1):
            hint = f"{near[0]}; {hint}"
        lacks = f"option {name}" if known else f"options, so not {name}"
        raise OptionError(f"{cls.name} has no {lacks}", hint=hint)


def option_from_text(cls: type[Configurable], name: str, items: Sequence[str] | None) -> Any:
    """The value of an option as written in a pipeline.

    Args:
        items: the texts between the commas, or ``None`` for an option without ``=``.

    Raises:
        OptionError: the option is unknown, or a text is none of its type.
    """
    check_names(cls, [name])
    kind = option_types(cls)[name]
    if items is None:
        if kind.scalars == {bool} and not kind.is_list:
            return True
        raise _error(cls, name, f"has no value; write {name}=...")
    if kind.is_list:
        return tuple(_read_item(cls, name, item, kind) for item in items)
    if len(items) != 1:
        found = f"has {len(items)} values" if items else "has no value"
        raise _error(cls, name, f"{found}; it takes one, {kind.describe()}")
    return _read_item(cls, name, items[0], kind)


def _read_item(cls: type[Configurable], name: str, text: str, kind: OptionType) -> Any:
    if kind.scalars == {str}:
        return text
    if kind.scalars == {bool}:
        if text in ("true", "false"):
            return text == "true"
    elif int in kind.scalars and _INTEGER.fullmatch(text):
        return int(text)
    elif float in kind.scalars and _NUMBER.fullmatch(text):
        return float(text)
    raise _error(cls, name, f"is {text!r}, not {kind.describe()}")


def _check_item(cls: type[Configurable], name: str, value: Any, kind: OptionType) -> Any:
    fits = any(
        # True is an int to isinstance, and an int serves as a float
        isinstance(value, scalar) and (scalar is bool) == isinstance(value, bool)
        for scalar in kind.scalars
    )
    if not fits and kind.scalars == {float} and type(value) is int:
        fits, value = True, float(value)
    if not fits:
        raise _error(cls, name, f"is {value!r}, not {kind.describe()}")
    if isinstance(value, float) and not math.isfinite(value):
        raise _error(cls, name, f"is {value!r}, not a finite number")
    return value


def _check_constraints(
    cls: type[Configurable], field: dataclasses.Field[Any], value: Any, kind: OptionType
) -> None:
    limits = field.metadata
    items = value if kind.is_list else (value,)
    for item in items:
        for key, (words, holds) in _BOUNDS.items():
            if key in limits and not holds(item, limits[key]):
                raise _error(cls, field.name, f"is {item!r}, but must be {words} {limits[key]}")
        if "choices" in limits and item not in limits["choices"]:
            shown = [str(choice) for choice in limits["choices"]]
            near = difflib.get_close_matches(str(item), shown, 1)
            raise _error(
                cls,
                field.name,
                f"is {item!r}, not one of {', '.join(shown)}",
                hint=near[0] if near else None,
            )
    if len(items) < limits.get("min_items", 0):
        least = limits["min_items"]
        raise _error(
            cls,
            field.name,
            f"has {len(items)} value{'s' if len(items) != 1 else ''}, but needs at least {least}",
        )
    if limits.get("increasing"):
        for first, second in pairwise(items):
            if not first < second:
                raise _error(
                    cls, field.name, f"must increase, but {second!r} comes after {first!r}"
                )


def _error(
    cls: type[Configurable], name: str, what: str, *, hint: str | None = None
) -> OptionError:
    field = next(field for field in dataclasses.fields(cls) if field.name == name)
    about = field.metadata.get("help")
    if hint is None and about:
        hint = f"{name} stands for: {about}"
    return OptionError(f"{cls.name}: option {name} {what}", hint=hint)
