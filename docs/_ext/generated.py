"""Pages that are made of the program: keys of a recipe, commands, exit codes.

A page holds ``<!-- generated: NAME ARGUMENTS -->``; what stands here in `GENERATORS` under that
name is put in its place, as Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from shardwise.config import reference
from shardwise.errors import EXIT_CODES

if TYPE_CHECKING:
    from sphinx.application import Sphinx

MARK = re.compile(r"^<!-- generated: (\S+) ?(.*?) -->$", re.MULTILINE)
# A section is told on the page of the longest of these that its path begins with.
PAGES = {
    "": "run",
    "model": "model",
    "tokenizer": "run",
    "engine": "engine",
    "logging": "run",
    "resilience": "run",
    "stages": "stages",
    "stages.optimizer": "optimizer",
    "stages.adapter": "adapter",
    "evaluations": "evaluations",
    "callbacks": "callbacks",
}


def page_of(path: str) -> str:
    """The page of the reference on which a section is told."""
    above = [root for root in PAGES if not root or f"{path}.".startswith(f"{root}.")]
    return PAGES[max(above, key=len)]


def keys(page: str) -> str:
    """Every section of one page, key by key."""
    parts = [_section(b) for b in reference.blocks() if page_of(b.path) == page]
    return "\n".join(line for part in parts for line in part)


def _section(block: reference.Block) -> Iterator[str]:
    depth = "###" if block.path.count(".") > 1 else "##"
    yield f"({_anchor(block.path)})="
    yield f"{depth} {f'`{block.path}`' if block.path else 'The whole recipe'}\n"
    yield f"{_prose(block.meaning)}\n"
    if block.example:
        yield f"```yaml\n# {block.path}\n{block.example}```\n"
    if block.kinds:
        links = (f"[`{kind}`](#{_anchor(f'{block.path}.{kind}')})" for kind in block.kinds)
        yield f"Kinds: {', '.join(links)}. All of them have:\n"
    for key in block.keys:
        yield from _key(key)


def _key(key: reference.Key) -> Iterator[str]:
    words = f"[{key.type}](#{_anchor(key.section)})" if key.section else key.type
    words = _prose(words)
    if key.default is None:
        words += " · **required**"
    elif key.default:
        words += f" · default `{key.default}`"
    shown = " with ".join(f"`{line}`" for line in key.example.splitlines())
    yield f"```{{key}} {key.path}"
    yield f"{_prose(key.meaning[:1].upper() + key.meaning[1:])}\n"
    yield f"{words} · e.g. {shown}"
    yield "```\n"


def _anchor(path: str) -> str:
    return f"keys-{path.replace('.', '-').replace('_', '-')}" if path else "keys"


def _prose(text: str) -> str:
    """Without what Markdown would take for marks, but for code and links."""
    parts = re.split(r"(`+[^`]*`+|\[[^\]]*\]\(#[^)]*\))", text)
    return "".join(p if i % 2 else re.sub(r"([*_<>|\\])", r"\\\1", p) for i, p in enumerate(parts))


def commands(_: str) -> str:
    """Every command of the program, with its arguments and options."""
    from typer.main import get_command

    from shardwise.cli.main import app

    return "\n".join(_command(get_command(app), "shardwise"))


def _command(command: Any, name: str) -> Iterator[str]:
    inner = getattr(command, "commands", {})
    if not inner:
        ctx = command.make_context(name, [], resilient_parsing=True)
        rows = [p.get_help_record(ctx) for p in command.params]
        rows = [(re.sub(r" <[^>]*>$", "", name), told) for name, told in filter(None, rows)]
        arguments = [word for word, _ in rows if not word.startswith("-")]
        yield f"(command-{name.replace(' ', '-')})="
        yield f"## {name}\n"
        yield f"{_prose(command.help or '')}\n"
        yield f"```text\n{' '.join([name, *arguments, '[OPTIONS]'])}\n```\n"
        yield "| argument or option | |\n|---|---|"
        yield from (f"| `{word}` | {_prose(told)} |" for word, told in rows)
        yield ""
    for word, child in inner.items():
        yield from _command(child, f"{name} {word}")


def exit_codes(_: str) -> str:
    """The table of exit codes."""
    rows = (f"| {code} | {meaning} |" for code, meaning in EXIT_CODES.items())
    return "\n".join(["| exit code | meaning |", "|---|---|", *rows])


def profile(_: str) -> str:
    """Every key of a cluster's profile."""
    from shardwise.launch.profile import ClusterProfile

    return "\n".join(["| key | meaning | default |", "|---|---|---|", *_rows(ClusterProfile, "")])


def _rows(section: Any, above: str) -> Iterator[str]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _rows(inner, f"{above}{name}.")
            continue
        default = "**required**" if field.is_required() else f"`{json.dumps(field.default)}`"
        default = "" if default == "`null`" else default
        yield f"| `{above}{name}` | {_prose(field.description)} | {default} |"


def _section_of(annotation: Any) -> Any:
    """The section that an optional key holds, or None."""
    for part in getattr(annotation, "__args__", ()):
        if hasattr(part, "model_fields"):
            return part
    return None


GENERATORS = {"profile": profile, "keys": keys, "commands": commands, "exit-codes": exit_codes}


def fill(text: str) -> str:
    """A page's text with what its marks stand for."""
    return MARK.sub(lambda found: GENERATORS[found[1]](found[2]), text)


def _fill(app: Sphinx, document: str, content: list[str]) -> None:
    content[0] = fill(content[0])


def _signature(env: Any, path: str, node: Any) -> str:
    """A key under its whole path, of which the last part is what is read."""
    from sphinx import addnodes

    above, dot, name = path.rpartition(".")
    node += [addnodes.desc_addname(above + dot, above + dot), addnodes.desc_name(name, name)]
    return path


def setup(app: Sphinx) -> dict[str, bool]:
    """For Sphinx."""
    app.add_object_type("key", "key", objname="recipe key", parse_node=_signature)
    app.connect("source-read", _fill)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
