"""Pipelines as text: ``v2drop{layers=3,17 keep=0.33} | fold-constants``.

Passes are separated by ``|``, the options of a pass by spaces, the items of a list by commas. An
option without ``=`` is a flag that is set; ``key=`` is an empty list. A text is quoted, as in
JSON, only where it is empty or holds a space, a backslash, or one of ``{}|,="'``. Printing a pass
leaves out the options that equal their default, and parsing what was printed gives an equal pass.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Any, NoReturn, TypeVar

from vlmopt.errors import OptionError, PipelineSyntaxError
from vlmopt.pipeline.options import Configurable, check_names, option_from_text, option_types
from vlmopt.pipeline.passes import Pass
from vlmopt.pipeline.registry import find_pass

C = TypeVar("C", bound=Configurable)

_SPACE = re.compile(r"\s*")
_WORD = re.compile(r"""[^\s{}|,="'\\]+""")
_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')


def parse_pipeline(text: str) -> tuple[Pass, ...]:
    """The passes of a pipeline, in order.

    Raises:
        PipelineSyntaxError: the text does not follow the grammar.
        UnknownPassError: a pass is unknown.
        OptionError: an option is unknown, repeated, missing, or has a wrong value.
    """
    return tuple(_build(find_pass(name), options) for name, options in _Parser(text).pipeline())


def parse_choice(text: str, classes: Sequence[type[C]], *, what: str, example: str) -> C:
    """One of some classes by name, with its options, such as ``uniform{interval=4}``.

    Args:
        what: what the classes are, with its article: ``a policy``.
        example: a text that is right.

    Raises:
        PipelineSyntaxError: the text does not follow the grammar.
        OptionError: there is no such class, or an option is unknown, repeated, missing, or has a
            wrong value.
    """
    parser = _Parser(text, what=what, example=f"{what} looks like {example}")
    name, options = parser.call()
    if parser.at < len(text):
        parser.fail("expected nothing more")
    for cls in classes:
        if cls.name == name:
            return _build(cls, options)
    known = ", ".join(cls.name for cls in classes)
    raise OptionError(f"{name} is not {what}", hint=f"choose one of {known}")


def format_pipeline(passes: Sequence[Pass]) -> str:
    """The text of a pipeline, such that :func:`parse_pipeline` gives equal passes."""
    return " | ".join(map(format_pass, passes))


def format_pass(one: Pass) -> str:
    """The text of a pass; options that equal their default are left out."""
    options = []
    for field in dataclasses.fields(one):
        value = getattr(one, field.name)
        if field.name not in option_types(type(one)) or value == field.default:
            continue
        if value is True:
            options.append(field.name)
        else:
            items = value if isinstance(value, tuple) else (value,)
            options.append(f"{field.name}={','.join(map(_format_item, items))}")
    return one.name + (f"{{{' '.join(options)}}}" if options else "")


def _format_item(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _WORD.fullmatch(value) else json.dumps(value, ensure_ascii=False)
    return repr(value)


_Options = list[tuple[str, list[str] | None]]


def _build(cls: type[C], options: _Options) -> C:
    name = cls.name
    values: dict[str, Any] = {}
    for key, items in options:
        check_names(cls, [key])
        if key in values:
            raise OptionError(f"{name}: option {key} is given twice", hint="give it once")
        values[key] = option_from_text(cls, key, items)
    for field in dataclasses.fields(cls):
        if field.init and field.name not in values and _is_required(field):
            raise OptionError(
                f"{name}: option {field.name} is missing; it has no default",
                hint=f"write {name}{{{field.name}=...}}",
            )
    return cls(**values)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing


_EXAMPLE = "a pipeline looks like v2drop{layers=3 keep=0.5} | fold-constants"


class _Parser:
    """Recursive descent over one text; ``at`` is the next character."""

    def __init__(self, text: str, *, what: str = "a pass", example: str = _EXAMPLE) -> None:
        self.text = text
        self.what = what
        self.example = example
        self.at = 0

    def pipeline(self) -> list[tuple[str, _Options]]:
        calls = [self.call()]
        while self.at < len(self.text):
            if not self.take("|"):
                self.fail("expected | before the next pass")
            calls.append(self.call())
        return calls

    def call(self) -> tuple[str, _Options]:
        self.skip_space()
        name = self.word(f"expected the name of {self.what}")
        self.skip_space()
        options: _Options = []
        opened = self.at
        if self.take("{"):
            self.skip_space()
            while not self.take("}"):
                if self.at == len(self.text):
                    self.at = opened
                    self.fail("this { is never closed")
                options.append(self.option())
            self.skip_space()
        return name, options

    def option(self) -> tuple[str, list[str] | None]:
        if self.peek() == ",":
            self.fail_comma()
        key = self.word("expected the name of an option")
        items = self.items() if self.take("=") else None
        before = self.at
        self.skip_space()
        if self.peek() == "=":
            self.fail("expected no space before =")
        if self.at == before and self.peek() not in ("}", ""):
            if self.peek() == ",":
                self.fail_comma()
            self.fail("expected a space before the next option")
        return key, items

    def items(self) -> list[str]:
        if self.peek() in ("}", "") or self.peek().isspace():
            return []
        items = [self.item()]
        while self.peek() == ",":
            comma = self.at
            self.at += 1
            self.skip_space()
            start = self.at
            word = _WORD.match(self.text, start)
            if word and self.text[word.end() :].lstrip().startswith("="):
                self.at = comma
                self.fail_comma()
            if start > comma + 1:
                self.at = comma + 1
                self.fail("expected no space within a list")
            items.append(self.item())
        return items

    def item(self) -> str:
        quoted = _QUOTED.match(self.text, self.at)
        if quoted is None:
            if self.peek() == '"':
                self.fail("this quote is never closed")
            return self.word("expected a value")
        try:
            value = json.loads(quoted[0], strict=False)
        except json.JSONDecodeError as error:
            self.at += error.pos
            self.fail("this escape is none of JSON's")
        self.at = quoted.end()
        return str(value)

    def word(self, expected: str) -> str:
        match = _WORD.match(self.text, self.at)
        if match is None:
            self.fail(expected)
        self.at = match.end()
        return match[0]

    def take(self, character: str) -> bool:
        if self.peek() != character:
            return False
        self.at += 1
        return True

    def peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def skip_space(self) -> None:
        match = _SPACE.match(self.text, self.at)
        assert match is not None
        self.at = match.end()

    def fail_comma(self) -> NoReturn:
        self.fail(
            "options are separated by spaces, not by commas",
            hint="write {a=1 b=2}; a comma separates the items of a list, as in {a=1,2}",
        )

    def fail(self, what: str, *, hint: str | None = None) -> NoReturn:
        """Raise, with the line in question and a caret under the character."""
        start = self.text.rfind("\n", 0, self.at) + 1
        line = self.text[start:].split("\n", 1)[0].replace("\t", " ")
        raise PipelineSyntaxError(
            f"{what}\n  {line}\n  {' ' * (self.at - start)}^".replace("\n  \n", "\n"),
            hint=hint or self.example,
        )
