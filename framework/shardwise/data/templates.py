"""Chat templates: the Jinja environment in which transformers renders them, and no more.

Templates come from strangers, so they run only in Jinja's immutable sandbox: no attribute of
Python's internals, no mutation of arguments, no imports, no files.

Names, filters and tags are those of ``transformers.utils.chat_template_utils`` (5.23), so that a
template gives the same text here as there; but for ``strftime_now``, which always says one day.
"""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

# What templates are told when they ask for the date (``strftime_now``): always this day, the one
# that Llama 3's own template falls back to. Data must not depend on when it was encoded.
TODAY = datetime.datetime(2024, 7, 26)

# Put around what ``{% generation %}`` encloses, and taken out again. Halves of surrogate pairs,
# which no conversation can hold.
_OPEN, _CLOSE = "\udc01", "\udc02"
REASONING = ("reasoning_content", "thinking", "reasoning")


class Rendered(NamedTuple):
    """A conversation as text, and [start, end) of what ``{% generation %}`` marks in it."""

    text: str
    marked: list[tuple[int, int]]


class _Generation(Extension):
    """``{% generation %}``: encloses what a model writes."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{_OPEN}{caller()}{_CLOSE}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


class _Dict:
    """``dict``: the function, without the class's attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """``namespace``: takes no name with an underscore in front."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a variable may be called self
        self, args = args[0], args[1:]
        variables = dict(*args, **kwargs)
        for name in variables:
            _Namespace._check(name)
        jinja2.utils.Namespace.__init__(self, variables)

    def __setitem__(self, name: str, value: Any) -> None:
        _Namespace._check(name)
        super().__setitem__(name, value)

    @staticmethod
    def _check(name: Any) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")


@functools.lru_cache(maxsize=32)
def compile_template(source: str) -> jinja2.Template:
    """Raises jinja2.TemplateError, or whatever a hostile source makes Python's compiler raise."""
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = TODAY.strftime
    env.globals["dict"] = _Dict()
    env.globals["namespace"] = _Namespace
    return env.from_string(source)


def render_template(
    source: str, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any]
) -> Rendered:
    """The text that transformers' ``apply_chat_template`` makes, before it is encoded.

    As there, keys of a message whose value is None are left out, and a thought is known by all of
    its names.
    """
    template = compile_template(source)
    said = {"tools": None, "documents": None, "add_generation_prompt": False, **variables}
    text = template.render(messages=[_message(m) for m in messages], **said)
    parts = re.split(f"({_OPEN}|{_CLOSE})", text)
    marked: list[tuple[int, int]] = []
    at = depth = start = 0
    for part in parts:
        if part == _OPEN:
            start, depth = (start if depth else at), depth + 1
        elif part == _CLOSE:
            depth -= 1
            if not depth:
                marked.append((start, at))
        else:
            at += len(part)
    return Rendered("".join(p for p in parts if p not in (_OPEN, _CLOSE)), marked)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in message.items() if value is not None}
    thought = next((found[key] for key in REASONING if key in found), None)
    if thought is not None:
        found = {"thinking": thought, **found, "reasoning_content": thought}
    return found
