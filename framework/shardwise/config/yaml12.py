"""YAML as data only: 1.2 core schema, line numbers kept, tags refused, aliases bounded.

PyYAML resolves YAML 1.1, where ``1e-3`` is text and ``off`` a boolean. Here the plain scalars of
the YAML 1.2 core schema (https://yaml.org/spec/1.2.2/#103-core-schema) are numbers, booleans and
null; everything else is text. Nothing is ever constructed but dict, list, str, int, float, bool
and None.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shardwise.config.source import Path, Problem, Source, Tree
from shardwise.errors import ConfigError

MAX_NODES = 100_000  # after aliases are expanded; a recipe has hundreds
MAX_DEPTH = 40

_TAG = "tag:yaml.org,2002:"
_CORE = [
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
]
_MENDS = {
    "'\\t'": "indent with spaces, not tabs",
    "mapping values are not allowed": "a value that contains ': ' needs quotes, "
    "or the line above is not finished",
    "expected ':'": "every key needs ': ' after it; check the indentation",
    "block end": "check the indentation: items of one mapping start in the same column",
    "',' or": "a flow list or mapping is not closed, or a comma is missing",
    "end of stream": "a quote or bracket is not closed",
    "quoted scalar": "a quote is not closed",
    "undefined alias": "define the anchor (&name) above its use",
    "another document": "keep one document in a file: remove the '---' between them",
    "more than": "a recipe has hundreds; is it one?",
    "cannot start any token": "put the value in quotes",
}


class _Loader(yaml.SafeLoader):
    """Composes nodes only; never constructs an object from a tag."""

    yaml_implicit_resolvers: dict[str, Any] = {}
    _count = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self._count += 1
        if self._count > MAX_NODES:  # the rest may take minutes
            raise yaml.composer.ComposerError(
                None, None, f"more than {MAX_NODES} values", event.start_mark
            )
        if getattr(event, "tag", None) is not None:
            raise yaml.composer.ComposerError(
                None, None, f"the tag {event.tag!r} is not allowed", event.start_mark
            )
        return super().compose_node(parent, index)  # type: ignore[no-untyped-call]


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as anything but text."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_BREAKS = re.compile("[\x85\u2028\u2029\ufeff]")  # Unicode's, which unquoted YAML would fold


def _text(dumper: _Dumper, text: str) -> ScalarNode:
    style = '"' if _BREAKS.search(text) else None
    return dumper.represent_scalar(_TAG + "str", text, style)


_Dumper.add_representer(str, _text)
for _name, _pattern, _first in _CORE:
    for _cls in (_Loader, _Dumper):
        _cls.add_implicit_resolver(
            _TAG + _name, re.compile(f"^(?:{_pattern})$"), ["" if c == "\0" else c for c in _first]
        )


def dump(data: Any) -> str:
    """Plain data as YAML that `parse` reads back as the same data."""
    return str(yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100))


class _Readable(_Dumper):
    """Text of several lines as lines; PyYAML quotes it where they would not come back."""


def _lines(dumper: _Readable, text: str) -> ScalarNode:
    if "\n" in text and not _BREAKS.search(text):
        return dumper.represent_scalar(_TAG + "str", text, "|")
    return _text(dumper, text)


_Readable.add_representer(str, _lines)


def readable(data: Any) -> str:
    """As `dump`, with scripts and the like as people write them."""
    return str(yaml.dump(data, Dumper=_Readable, sort_keys=False, allow_unicode=True, width=10**6))


class _Inline(_Dumper):
    """On one line, with the shortest form of each number."""


def _number(dumper: _Inline, number: float) -> ScalarNode:
    short = re.sub(r"(?:\.0)?e([-+])0*", r"e\1", repr(number))
    if not math.isfinite(number):
        return dumper.represent_float(number)
    return dumper.represent_scalar(_TAG + "float", short.replace("e+", "e"))


def _line(dumper: _Inline, text: str) -> ScalarNode:
    style = '"' if re.search("[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]", text) else None
    return dumper.represent_scalar(_TAG + "str", text, style)


_Inline.add_representer(float, _number)
_Inline.add_representer(str, _line)


def inline(data: Any) -> str:
    """Plain data as YAML on one line, mappings and lists in brackets."""
    [node] = yaml.dump(
        [data], Dumper=_Inline, sort_keys=False, allow_unicode=True, width=math.inf,
        default_flow_style=True,
    ).splitlines()  # fmt: skip
    return str(node[1:-1])


def parse(text: str, origin: str, source: Source | None = None) -> Tree:
    """Read YAML ``text``; places take their source from ``source``, or ``origin`` and their line.

    Raises ConfigError with line, column and the mend when it is not YAML. Duplicate keys and the
    like are collected in the tree's ``problems``.
    """
    try:
        loader = _Loader(text)
        node = loader.get_single_node()  # type: ignore[no-untyped-call]
    except yaml.MarkedYAMLError as error:
        raise ConfigError(_unreadable(error, origin)) from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        column = error.position - (text.rfind("\n", 0, error.position) + 1) + 1
        raise ConfigError(
            f"{origin}:{line}:{column}: not readable as YAML: the character "
            f"U+{ord(text[error.position]):04X} is not allowed; remove it"
        ) from None
    except RecursionError:
        raise ConfigError(f"{origin}: nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:  # PyYAML's scanner, on escapes beyond Unicode
        raise ConfigError(f"{origin}: not readable as YAML: {error}; check the escapes") from None
    builder = _Builder(origin, source)
    data = builder.build(node, (), 0) if node is not None else None
    return Tree(data, builder.sources, builder.problems)


def _unreadable(error: yaml.MarkedYAMLError, origin: str) -> str:
    mark = error.problem_mark or error.context_mark
    place = f"{origin}:{mark.line + 1}:{mark.column + 1}" if mark else origin
    what = " ".join(p for p in (error.context, error.problem) if p)
    mend = next(
        (mend for sign, mend in _MENDS.items() if sign in what),
        "write plain data: text, numbers, lists and mappings"
        if "tag" in what
        else "check the indentation and the quotes here",
    )
    return f"{place}: not readable as YAML: {what}; {mend}"


class _Builder:
    """Turns composed nodes into plain data, noting where each came from."""

    def __init__(self, origin: str, source: Source | None) -> None:
        self.origin = origin
        self.fixed = source
        self.sources: dict[Path, Source] = {}
        self.problems: list[Problem] = []
        self.count = 0

    def at(self, node: Node) -> Source:
        return self.fixed or Source("file", self.origin, node.start_mark.line + 1)

    def build(self, node: Node, path: Path, depth: int) -> Any:
        self.sources.setdefault(path, self.at(node))
        self.count += 1
        if depth > MAX_DEPTH or self.count > MAX_NODES:
            limit = f"{MAX_DEPTH} levels" if depth > MAX_DEPTH else f"{MAX_NODES} values"
            raise ConfigError(
                f"{self.at(node)}: more than {limit} once aliases (*name) are expanded; "
                "write it without aliases"
            )
        if isinstance(node, MappingNode):
            return self._mapping(node, path, depth)
        if isinstance(node, SequenceNode):
            return [self.build(n, (*path, i), depth + 1) for i, n in enumerate(node.value)]
        assert isinstance(node, ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: MappingNode, path: Path, depth: int) -> dict[str, Any]:
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, ScalarNode):
                self._problem(path, key_node, "a key must be a name, not a list or a mapping")
                continue
            key = self._text(key_node, path)
            if key is None:
                continue
            here = (*path, key)
            if key in result:
                first = self.sources[here]
                self._problem(here, key_node, f"given twice, first at {first}; keep one")
                continue
            self.sources[here] = self.at(key_node)
            result[key] = self.build(value_node, here, depth + 1)
        return result

    def _scalar(self, node: ScalarNode, path: Path) -> Any:
        text = self._text(node, path)
        if text is None:
            return None
        try:
            match node.tag.removeprefix(_TAG):
                case "null":
                    return None
                case "bool":
                    return text.lower() == "true"
                case "int":
                    return int(text, 0 if text[:2] in ("0x", "0o") else 10)
                case "float":
                    return float(re.sub(r"\.(?=inf|nan)", "", text.lower()))
        except ValueError:
            self._problem(path, node, f"the number has {len(text)} digits; write a smaller one")
            return None
        return text

    def _text(self, node: ScalarNode, path: Path) -> str | None:
        """Its text; JSON's escapes write a character beyond U+FFFF as two halves, joined here."""
        try:
            return str(node.value).encode("utf-16", "surrogatepass").decode("utf-16")
        except UnicodeDecodeError:
            self._problem(path, node, "holds half a character (a lone surrogate); remove it")
            return None

    def _problem(self, path: Path, node: Node, text: str) -> None:
        self.problems.append(Problem(path, self.at(node), text))
