"""Options of passes: conversion from text and Python, constraints, and the words of each error."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from vlmopt.errors import OptionError
from vlmopt.pipeline.options import OptionType, option, option_from_text, option_types
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.program import Program


class Base(Pass):
    family = "tests"
    phase = Phase.CLEANUP
    semantics = Semantics.EXACT

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(changed=False, matches=0)


@dataclass(frozen=True, kw_only=True)
class Many(Base):
    """One option of every type."""

    name = "many"
    count: int = option(1, "a count", ge=1, lt=10)
    share: float = option(0.5, "a share", gt=0, le=1)
    fast: bool = option(False, "whether to hurry")
    mode: str = option("mean", "how to merge", choices=("mean", "sum"))
    layers: tuple[int, ...] = option((1, 2), "layers", increasing=True, min_items=1)
    keep: tuple[float | int, ...] = option((0.5,), "what to keep", ge=0)
    names: tuple[str, ...] = option((), "names")
    scales: tuple[float, ...] = option((), "scales")


@dataclass(frozen=True, kw_only=True)
class Bare(Base):
    """No options."""

    name = "bare"


@dataclass(frozen=True, kw_only=True)
class Odd(Base):
    """An option of a type that no option can have."""

    name = "odd"
    point: complex = option(0j, "a point")


@dataclass(frozen=True, kw_only=True)
class Pair(Base):
    """A tuple of fixed length."""

    name = "pair"
    ends: tuple[int, int] = option((0, 1), "two ends")


@pytest.mark.parametrize(
    ("name", "items", "value"),
    [
        ("count", ["3"], 3),
        ("count", ["+3"], 3),
        ("share", ["1"], 1.0),
        ("share", ["1e-3"], 0.001),
        ("share", [".5"], 0.5),
        ("fast", None, True),
        ("fast", ["false"], False),
        ("mode", ["sum"], "sum"),
        ("layers", ["3", "17"], (3, 17)),
        ("keep", ["0.5", "2", "2.0"], (0.5, 2, 2.0)),
        ("names", ["1", "true"], ("1", "true")),
        ("names", [], ()),
        ("scales", ["2"], (2.0,)),
    ],
)
def test_text_becomes_the_annotated_type(name: str, items: list[str] | None, value: Any) -> None:
    read = option_from_text(Many, name, items)
    assert read == value
    read_items, items_wanted = (read, value) if isinstance(value, tuple) else ((read,), (value,))
    assert [type(item) for item in read_items] == [type(item) for item in items_wanted]


@pytest.mark.parametrize(
    ("name", "items", "what"),
    [
        ("count", ["1.0"], "is '1.0', not an integer"),
        ("count", ["one"], "is 'one', not an integer"),
        ("count", ["1", "2"], "has 2 values; it takes one, an integer"),
        ("count", [], "has no value; it takes one, an integer"),
        ("count", None, "has no value; write count=..."),
        ("share", ["nan"], "is 'nan', not a number"),
        ("fast", ["1"], "is '1', not true or false"),
        ("keep", ["0.5", "x"], "is 'x', not a number"),
        ("layers", ["0.5"], "is '0.5', not an integer"),
    ],
)
def test_text_of_another_type_is_refused(name: str, items: list[str] | None, what: str) -> None:
    with pytest.raises(OptionError) as caught:
        option_from_text(Many, name, items)
    assert str(caught.value).split("\n")[0] == f"many: option {name} {what}"


@pytest.mark.parametrize(
    ("name", "value", "what"),
    [
        ("count", 0, "is 0, but must be at least 1"),
        ("count", 10, "is 10, but must be less than 10"),
        ("count", True, "is True, not an integer"),
        ("count", 2.0, "is 2.0, not an integer"),
        ("share", 0, "is 0.0, but must be greater than 0"),
        ("share", 1.5, "is 1.5, but must be at most 1"),
        ("share", float("nan"), "is nan, not a finite number"),
        ("fast", 1, "is 1, not true or false"),
        ("mode", "median", "is 'median', not one of mean, sum"),
        ("mode", None, "is None, not text"),
        ("layers", (), "has 0 values, but needs at least 1"),
        ("layers", (3, 3), "must increase, but 3 comes after 3"),
        ("layers", (1, "2"), "is '2', not an integer"),
        ("keep", (1, -1), "is -1, but must be at least 0"),
    ],
)
def test_values_given_in_python_are_checked(name: str, value: Any, what: str) -> None:
    with pytest.raises(OptionError) as caught:
        Many(**{name: value})
    assert str(caught.value).split("\n")[0] == f"many: option {name} {what}"


def test_an_error_says_what_the_option_is_for() -> None:
    with pytest.raises(OptionError) as caught:
        Many(count=0)
    assert str(caught.value) == (
        "many: option count is 0, but must be at least 1\n  try: count stands for: a count"
    )


def test_a_choice_is_suggested() -> None:
    with pytest.raises(OptionError) as caught:
        Many(mode="means")
    assert str(caught.value) == ("many: option mode is 'means', not one of mean, sum\n  try: mean")


def test_python_shorthand_is_made_regular() -> None:
    shorthand: dict[str, Any] = {"layers": 3, "keep": [1, 0.5], "share": 1}
    one = Many(**shorthand)
    assert (one.layers, one.keep) == ((3,), (1, 0.5))
    assert type(one.share) is float


def test_unknown_option() -> None:
    with pytest.raises(OptionError) as caught:
        option_from_text(Many, "layer", ["1"])
    assert str(caught.value) == (
        "many has no option layer\n  try: layers; the options of many are count, share, fast, "
        "mode, layers, keep, names, scales"
    )
    with pytest.raises(OptionError) as caught:
        option_from_text(Bare, "layer", ["1"])
    assert str(caught.value) == "bare has no options, so not layer"


def test_types_are_read_from_annotations() -> None:
    assert option_types(Many)["keep"] == OptionType(frozenset({int, float}), is_list=True)
    assert list(option_types(Bare)) == []


@pytest.mark.parametrize(
    ("cls", "what"),
    [
        (Odd, r"option Odd.point: no option can have the type <class 'complex'>"),
        (Pair, r"option Pair.ends: a list is annotated as tuple\[type, ...\]"),
    ],
)
def test_other_annotations_are_an_error_of_the_author(cls: type[Pass], what: str) -> None:
    with pytest.raises(TypeError, match=what):
        cls()
