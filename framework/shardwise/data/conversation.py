"""What a row says about a conversation, before any template has seen it.

A row is what TRL, transformers and OpenAI's fine-tuning take:

    {"messages": [...], "tools": [...], "documents": [...], "chat_template_kwargs": {...}}
    {"prompt": [...], "completion": [...]}    learned: the completion's messages

A message has a role and a content: a text, a list of text parts, or null beside ``tool_calls``. Its
``weight`` (0 or 1) or ``train`` says whether it is learned. Whatever else it holds (``name``,
``tool_calls``, ``tool_call_id``, ``reasoning_content``, ...) the template gets, as in transformers.

Fields that mean something in these formats and cannot be used here are refused. What means nothing
(ids, sources) is left to the caller to name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.errors import DataError

Message = Mapping[str, Any]

# What a row says to the template, by the name that it has there.
VARIABLES = ("tools", "documents")
KWARGS = "chat_template_kwargs"
_RESERVED = ("messages", "add_generation_prompt", *VARIABLES)
# Fields of a message that say something; others are labels.
SAYING = ("name", "tool_calls", "tool_call_id", "reasoning_content", "thinking", "reasoning")

MEDIA = "pictures, sound and film cannot be learned here; leave the row out"
_SHAREGPT = "messages of from and value are of kind sharegpt; name the source's kind so"
_PAIRS = "a row of preferences belongs into a source of kind preference"
# Fields that mean something elsewhere and cannot be used here, with the mend.
_REFUSED = {
    **dict.fromkeys(("images", "image", "videos", "video", "audio", "audios"), MEDIA),
    **dict.fromkeys(("chosen", "rejected", "margin", "label"), _PAIRS),
    **dict.fromkeys(
        ("weight", "train"), "rows have no weight; give the messages one, or repeat the row"
    ),
    "prompt": "write prompt and completion, or messages, not both",
    "completion": "write prompt and completion, or messages, not both",
    "system": "write it as the first message, with the role system",
    **dict.fromkeys(("functions", "function_call"), "write them as tools and tool_calls"),
}
_REFUSED_IN_MESSAGE = {
    **dict.fromkeys(("images", "image", "videos", "video", "audio"), MEDIA),
    "function_call": "write it as tool_calls",
    "refusal": "write what was said as the content",
}


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A row's messages, which of them are learned, what else its template gets, unused fields."""

    messages: list[dict[str, Any]]
    learn: list[bool]
    variables: dict[str, Any]
    unused: tuple[str, ...]


def read_conversation(row: Mapping[str, Any], field: str = "messages") -> Conversation:
    """A row's conversation.

    Raises DataError, naming field and mend, for what is no conversation, and for fields that would
    change what is learned and cannot be used.
    """
    said = {k: v for k, v in row.items() if v not in (None, [], {})}
    if field not in row and isinstance(said.get("prompt"), list) and "completion" in said:
        prompt = _messages(said.pop("prompt"), "prompt")
        messages = [*prompt, *_messages(said.pop("completion"), "completion")]
        first = len(prompt)
    else:
        if field not in row:
            have = ", ".join(sorted(row)) or "none"
            hint = ""
            if "prompt" in said and "completion" in said:
                hint = (
                    "; prompt and completion must be lists of messages, or the source of kind "
                    "prompt-completion"
                )
            raise DataError(f"field {field!r} is missing; fields: {have}{hint}")
        messages, first = _messages(row[field], field), 0
        said.pop(field, None)
        if said.get("prompt") == next((m["content"] for m in messages if m["role"] == "user"), 0):
            del said["prompt"]  # says again how the conversation begins
    for i, message in enumerate(messages):
        if not isinstance(message.get("tool_calls", []), list):
            raise DataError(f"message {i}: tool_calls must be a list of objects")
    learn = [_learns(m, i) and i >= first for i, m in enumerate(messages)]
    variables = take_variables(said)
    refuse_fields(said)
    labels = {
        f"{field}[].{k}" for m in messages for k in m if k not in ("role", "content", *SAYING)
    }
    return Conversation(messages, learn, variables, (*sorted(said), *sorted(labels)))


def refuse_fields(said: Mapping[str, Any]) -> None:
    """Raise DataError for fields that mean something elsewhere and cannot be used here."""
    for name in said:
        if name in _REFUSED:
            raise DataError(
                f"field {name!r} cannot be used: {_REFUSED[name]}, or list it under the source's "
                "ignore"
            )


def _messages(value: Any, field: str) -> list[dict[str, Any]]:
    try:
        return check_messages(value)
    except DataError as error:
        raise DataError(f"field {field!r}: {error}") from error


def check_messages(messages: Any) -> list[dict[str, Any]]:
    """``messages`` as a list of dicts with role and content; DataError says what is not so."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("a conversation is a non-empty list of messages")
    return [_checked(message, i) for i, message in enumerate(messages)]


def _checked(message: Any, i: int) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise DataError(f"message {i} is no object with role and content")
    found = {k: v for k, v in message.items() if v is not None}
    if "from" in found and "role" not in found:
        raise DataError(f"message {i}: {_SHAREGPT}")
    for name, mend in _REFUSED_IN_MESSAGE.items():
        if name in found:
            raise DataError(f"message {i} has the field {name!r}, which cannot be used: {mend}")
    content = found.get("content")
    if isinstance(content, list):
        _check_parts(content, i)
    elif content is None and found.get("role") == "assistant" and found.get("tool_calls"):
        found["content"] = None  # there is nothing but the call
    elif not isinstance(content, str) or not isinstance(found.get("role"), str):
        raise DataError(f"message {i} needs a role and a content, both strings")
    return found


def _check_parts(parts: list[Any], i: int) -> None:
    for k, part in enumerate(parts):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise DataError(f"message {i}: part {k} of its content is {kind or part!r}: {MEDIA}")


def _learns(message: dict[str, Any], i: int) -> bool:
    """Whether a message is learned; takes ``weight`` and ``train`` out of it."""
    assistant = message["role"] == "assistant"
    said = {}
    for name, kinds in (("weight", (bool, int, float)), ("train", (bool,))):
        if name in message:
            value = message.pop(name)
            if not isinstance(value, kinds) or value not in (0, 1):
                raise DataError(
                    f"message {i}: {name} must be "
                    + ("0 or 1: a turn is learned or not" if name == "weight" else "true or false")
                    + f", not {value!r}"
                )
            said[name] = bool(value)
    if len(set(said.values())) > 1:
        raise DataError(f"message {i}: weight and train contradict each other; keep one")
    if any(said.values()) and not assistant:
        raise DataError(f"message {i}: only an assistant's turn is learned; its weight must be 0")
    return assistant and all(said.values())


def take_variables(said: dict[str, Any]) -> dict[str, Any]:
    """What the template gets besides the messages; taken out of ``said``."""
    found: dict[str, Any] = {}
    for name in VARIABLES:
        if name in said:
            value = said.pop(name)
            if isinstance(value, str):  # tables keep nested values as JSON
                with contextlib.suppress(ValueError, RecursionError):
                    value = json.loads(value)
            if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
                raise DataError(f"field {name!r} must be a list of objects")
            found[name] = value
    kwargs = said.pop(KWARGS, {})
    if not isinstance(kwargs, Mapping):
        raise DataError(f"field {KWARGS!r} must be an object")
    for name in kwargs:
        if name in _RESERVED or name.endswith("_token"):
            raise DataError(f"field {KWARGS!r}: {name!r} is not the row's to say")
    return {**found, **kwargs}
