"""Pipelines as text: the grammar, printing, and the words and carets of its errors."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmopt.errors import OptionError, PipelineSyntaxError, UnknownPassError
from vlmopt.pipeline import registry
from vlmopt.pipeline.options import OptionType, option, option_types
from vlmopt.pipeline.passes import Pass, PassContext, PassResult, Phase, Semantics
from vlmopt.pipeline.registry import find_pass, known_passes, register_pass
from vlmopt.pipeline.spec import format_pipeline, parse_pipeline
from vlmopt.program import Program


@dataclass(frozen=True, kw_only=True)
class Everything(Pass):
    """One option of every type."""

    name = "everything"
    family = "tests"
    phase = Phase.CLEANUP
    semantics = Semantics.EXACT
    count: int = option(1, "a count")
    share: float = option(0.5, "a share")
    fast: bool = option(False, "whether to hurry")
    careful: bool = option(True, "whether to look twice")
    label: str = option("plain", "a label")
    keep: tuple[float | int, ...] = option((0.5,), "what to keep")
    names: tuple[str, ...] = option(("a",), "names")
    flags: tuple[bool, ...] = option((), "flags")

    def run(self, program: Program, ctx: PassContext) -> PassResult:
        return PassResult(changed=False, matches=0)


@dataclass(frozen=True, kw_only=True)
class Needy(Everything):
    """An option without a default."""

    name = "needy"
    path: str


@pytest.fixture(autouse=True, scope="module")
def registered() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_registered", {})
        register_pass("everything", Everything)
        register_pass("needy", Needy)
        yield


def _scalars(kind: OptionType, limits: Any) -> st.SearchStrategy[Any]:
    if "choices" in limits:
        return st.sampled_from(limits["choices"])
    low, high = limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))
    strategies: dict[type, Any] = {
        bool: st.booleans(),
        str: st.text(),
        int: st.integers(low, high),
        float: st.floats(low, high, allow_nan=False, allow_infinity=False),
    }
    outside = {limits.get("gt"), limits.get("lt")}
    made = st.one_of(*(strategies[scalar] for scalar in sorted(kind.scalars, key=str)))
    return made.filter(lambda value: type(value) is str or value not in outside)


def _values(kind: OptionType, limits: Any) -> st.SearchStrategy[Any]:
    scalar = _scalars(kind, limits)
    if not kind.is_list:
        return scalar
    increasing = bool(limits.get("increasing"))
    items = st.lists(scalar, min_size=limits.get("min_items", 0), max_size=4, unique=increasing)
    return items.map(lambda found: tuple(sorted(found) if increasing else found))


def _instances(cls: type[Pass]) -> st.SearchStrategy[Pass]:
    limits = {field.name: field.metadata for field in dataclasses.fields(cls)}
    values = {name: _values(kind, limits[name]) for name, kind in option_types(cls).items()}
    return st.fixed_dictionaries({}, optional=values).map(lambda given: cls(**given))


@pytest.mark.parametrize("name", [*known_passes(), "everything"])
def test_what_is_printed_parses_to_an_equal_pass(name: str) -> None:
    @settings(max_examples=100, deadline=None)
    @given(_instances(find_pass(name)))
    def check(one: Pass) -> None:
        (parsed,) = parse_pipeline(str(one))
        assert parsed == one
        assert str(parsed) == str(one)

    check()


@pytest.mark.parametrize("name", known_passes())
def test_examples_are_valid_and_name_the_pass(name: str) -> None:
    assert name in [one.name for one in parse_pipeline(find_pass(name).example)]


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("everything", "everything"),
        ("  everything {  }\n", "everything"),
        ("everything{count=1 share=0.50}", "everything"),
        ("everything{label=a.b-c/d:e count=2}", "everything{count=2 label=a.b-c/d:e}"),
        ('everything{label="plain text"}', 'everything{label="plain text"}'),
        ('everything{label="text"}', "everything{label=text}"),
        ('everything{label="" names="",b}', 'everything{label="" names="",b}'),
        ("everything{names= flags=true,false}", "everything{names= flags=true,false}"),
        ("everything{fast=true careful=false}", "everything{fast careful=false}"),
        ("everything{keep=1,1.0,1e-7}", "everything{keep=1,1.0,1e-07}"),
        ("everything|everything{fast}", "everything | everything{fast}"),
        ("everything{\n  fast\n}\n| everything", "everything{fast} | everything"),
    ],
)
def test_texts_are_printed_in_one_way(text: str, printed: str) -> None:
    assert format_pipeline(parse_pipeline(text)) == printed


_HINT = "\n  try: a pipeline looks like v2drop{layers=3 keep=0.5} | fold-constants"
_COMMA = "\n  try: write {a=1 b=2}; a comma separates the items of a list, as in {a=1,2}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "expected the name of a pass\n  ^"),
        ("a | ", "expected the name of a pass\n  a | \n      ^"),
        ("a{x=1", "this { is never closed\n  a{x=1\n   ^"),
        ("a}", "expected | before the next pass\n  a}\n   ^"),
        ("a b", "expected | before the next pass\n  a b\n    ^"),
        ("a{=1}", "expected the name of an option\n  a{=1}\n    ^"),
        ("a{x = 1}", "expected no space before =\n  a{x = 1}\n      ^"),
        ("a{x=1,}", "expected a value\n  a{x=1,}\n        ^"),
        ("a{x=1, 2}", "expected no space within a list\n  a{x=1, 2}\n        ^"),
        ('a{x="1}', 'this quote is never closed\n  a{x="1}\n      ^'),
        ('a{x="\\q"}', 'this escape is none of JSON\'s\n  a{x="\\q"}\n       ^'),
        ('a{x="1"y}', 'expected a space before the next option\n  a{x="1"y}\n         ^'),
        ("a |\nb c", "expected | before the next pass\n  b c\n    ^"),
        *(
            (
                text,
                f"options are separated by spaces, not by commas\n  {text}\n"
                f"  {' ' * text.index(',')}^{_COMMA}",
            )
            for text in ("a{x=1, y=2}", "a{x=1,y=2}", "a{x=1 ,y=2}", "a{x, y}", "a{,x}")
        ),
    ],
)
def test_syntax_errors_point_at_the_character(text: str, message: str) -> None:
    with pytest.raises(PipelineSyntaxError) as caught:
        parse_pipeline(text)
    assert str(caught.value) == (message if "try:" in message else message + _HINT)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "everything{count=1 count=2}",
            "everything: option count is given twice\n  try: give it once",
        ),
        (
            "v2drop{keeps=1}",
            "v2drop has no option keeps\n  try: keep; the options of v2drop are layers, keep, of, "
            "positions, metric",
        ),
        (
            "needy",
            "needy: option path is missing; it has no default\n  try: write needy{path=...}",
        ),
        (
            "v2drop{layers=0}",
            "v2drop: option layers is 0, but must be at least 1\n"
            "  try: layers stands for: layers whose input is cut, counted from 0",
        ),
    ],
)
def test_wrong_options_are_refused(text: str, message: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse_pipeline(text)
    assert str(caught.value) == message


def test_unknown_passes_are_refused() -> None:
    with pytest.raises(UnknownPassError) as caught:
        parse_pipeline("everything | v2-drop")
    assert str(caught.value) == (
        "no pass is called 'v2-drop'\n  try: v2drop; vlmopt passes lists them"
    )
