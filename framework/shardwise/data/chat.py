"""Conversations as tokens, with a mask of what the assistant must learn.

Templates come from strangers, so they run only in Jinja's immutable sandbox: no attribute of
Python's internals, no mutation of arguments, no imports, no files.

The mask is found by prefix rendering, which needs no marks in the template: the text before an
assistant's turn is the rendering of the earlier messages with a generation prompt, exactly what the
model is given when it generates. Each piece between two such borders is encoded on its own, so the
ids of a prompt are always the first ids of the whole conversation, and what the model generated is
never re-tokenised together with its prompt.
"""

from __future__ import annotations

import datetime
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from shardwise.data.conversation import Message, check_messages
from shardwise.data.fast_tokenizer import Tokenizer
from shardwise.errors import DataError

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

# What templates are told when they ask for the date (``strftime_now``): always this day, the one
# that Llama 3's own template falls back to. Data must not depend on when it was encoded.
TODAY = datetime.datetime(2024, 7, 26)


class _Generation(Extension):
    """``{% generation %}`` marks assistant text in some templates; here it is transparent."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@functools.lru_cache(maxsize=32)
def _compile(source: str) -> jinja2.Template:
    env = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    env.filters["tojson"] = _tojson
    env.globals["raise_exception"] = _raise_exception
    env.globals["strftime_now"] = TODAY.strftime
    try:
        return env.from_string(source)
    except jinja2.TemplateError as error:
        raise DataError(f"the chat template does not parse: {error}") from error


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The conversation as text, by the tokenizer's template (ChatML when it has none).

    ``variables`` reach the template. Raises DataError when the template refuses, fails, or tries
    what the sandbox forbids.
    """
    template = _compile(tokenizer.chat_template or CHATML)
    bos = "" if tokenizer.bos_id is None else tokenizer.token_of(tokenizer.bos_id)
    names = {"bos_token": bos, "eos_token": tokenizer.token_of(tokenizer.eos_id), "tools": None}
    copies = [dict(m) for m in messages]
    try:
        return template.render(
            messages=copies,
            add_generation_prompt=add_generation_prompt,
            **{**names, **variables},
        )
    except Exception as error:  # a stranger's template may fail in any way
        raise DataError(f"the chat template failed: {type(error).__name__}: {error}") from error


def encode_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> tuple[list[int], list[bool]]:
    """(ids, loss_mask) of a conversation; both of one length.

    The mask covers each assistant turn's content and the token that ends it, not what the template
    puts after that. If the template ends the last turn with no stop token, EOS is added, so that
    stopping is learned. With ``add_generation_prompt`` the ids end where the model goes on. Raises
    DataError for messages that hold control tokens anywhere (content, role, or another field that
    a template may write), and for a template that rewrites earlier turns.
    """
    checked = check_messages(messages)
    _refuse_control_tokens(tokenizer, checked)

    def draw(part: Sequence[Message], prompt: bool) -> str:
        return render(tokenizer, part, add_generation_prompt=prompt, **variables)

    full = draw(checked, add_generation_prompt)
    ids: list[int] = []
    mask: list[bool] = []
    done = ""  # the part of `full` that is already encoded

    def encode_until(text: str, learn: bool, turn: int) -> None:
        nonlocal done
        if not (text.startswith(done) and full.startswith(text)):
            raise DataError(
                f"the chat template renders message {turn} otherwise once more messages follow, so "
                "its loss cannot be located; train on one assistant turn at a time"
            )
        piece = tokenizer.encode(text[len(done) :], allow_special=True)
        ids.extend(piece)
        mask.extend(_learned(piece, tokenizer.stop_ids) if learn else [False] * len(piece))
        if learn and turn == len(checked) - 1 and not set(piece) & set(tokenizer.stop_ids):
            ids.append(tokenizer.eos_id)
            mask.append(True)
        done = text

    for i, message in enumerate(checked):
        if message["role"] == "assistant":
            encode_until(draw(checked[:i], True), False, i)
            encode_until(draw(checked[: i + 1], False), True, i)
    encode_until(full, False, len(checked) - 1)
    return ids, mask


def _learned(piece: Sequence[int], stop_ids: Sequence[int]) -> list[bool]:
    """True up to the last stop token of an assistant's turn; all True when there is none."""
    stops = [i for i, token in enumerate(piece) if token in stop_ids]
    end = stops[-1] + 1 if stops else len(piece)
    return [i < end for i in range(len(piece))]


def _refuse_control_tokens(tokenizer: Tokenizer, messages: Sequence[Message]) -> None:
    tokens = [token for token in tokenizer.special_tokens if token]
    for i, message in enumerate(messages):
        for field, value in message.items():
            for text in (field, *_texts(value)):
                if found := next((token for token in tokens if token in text), None):
                    raise DataError(
                        f"message {i} contains the control token {found!r} in its {field}, which "
                        "would end or forge a turn; remove it from the data"
                    )


def _texts(value: Any) -> Iterator[str]:
    """Every string inside plain data, the keys of mappings too."""
    waiting = [value]
    while waiting:
        match waiting.pop():
            case str() as text:
                yield text
            case Mapping() as mapping:
                waiting += [*mapping.keys(), *mapping.values()]
            case list() | tuple() as items:
                waiting += items
