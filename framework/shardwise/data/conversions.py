"""Rows of other formats as rows of messages, or of a prompt and its completion.

Each function takes a row under the names of its format (`formats.FORMATS`) and leaves what it does
not know to the reader, who uses, refuses or names it.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from typing import Any

from shardwise.errors import DataError

_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "model", "chatgpt", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}


def as_conversation(name: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """A row as `conversation.read_conversation` takes it; DataError names the field."""
    found = {k: v for k, v in row.items() if v is not None}
    if name == "sharegpt":
        return _sharegpt(found)
    if name == "alpaca":
        return _alpaca(found)
    if name == "prompt-completion":
        return _prompt_completion(found)
    return found


def from_sharegpt(messages: Any) -> Any:
    """Messages of {from, value} as those of {role, content}; what is neither stays as it is."""
    if isinstance(messages, Mapping):  # axolotl's: one message
        return from_sharegpt([messages])
    if not isinstance(messages, list):
        return messages
    return [
        _spoken(m, i) if isinstance(m, Mapping) and "from" in m and "role" not in m else m
        for i, m in enumerate(messages)
    ]


def _spoken(message: Mapping[str, Any], i: int) -> dict[str, Any]:
    rest = {k: v for k, v in message.items() if k not in ("from", "value")}
    who, value = message["from"], message.get("value")
    role = _ROLES.get(who) if isinstance(who, str) else None
    if role is None:
        raise DataError(f"message {i}: from is {who!r}; known: {', '.join(_ROLES)}")
    if who != "function_call":
        return {"role": role, "content": value, **rest}
    called: Any = value
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            called = json.loads(value)
    calls = called if isinstance(called, list) else [called]
    if not calls or not all(isinstance(c, Mapping) and "name" in c for c in calls):
        raise DataError(f"message {i}: the value of a function_call is JSON of name and arguments")
    tool_calls = [{"type": "function", "function": dict(c)} for c in calls]
    return {"role": role, "content": None, "tool_calls": tool_calls, **rest}


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    said = row.pop("conversations", None)
    if not isinstance(said, list):
        have = ", ".join(sorted(row)) or "none"
        raise DataError(f"field 'conversations' is no list of messages; other fields: {have}")
    messages = _with_system(row, from_sharegpt(said))
    tools = row.get("tools")
    if isinstance(tools, str):
        with contextlib.suppress(ValueError, RecursionError):
            tools = json.loads(tools)
    if isinstance(tools, list):
        row["tools"] = [
            t if not isinstance(t, Mapping) or "type" in t else {"type": "function", "function": t}
            for t in tools
        ]
    return {"messages": messages, **row}


def _alpaca(row: dict[str, Any]) -> dict[str, Any]:
    asked = said_text(row, "instruction")
    if more := row.pop("input", ""):
        asked += f"\n{_text(more, 'input')}"
    past: list[dict[str, Any]] = []
    for turn in row.pop("history", []):
        if not isinstance(turn, list) or len(turn) != 2:
            raise DataError("field 'history' is no list of pairs of instruction and output")
        past += [_said("user", _text(turn[0], "history"))]
        past += [_said("assistant", _text(turn[1], "history"))]
    messages = [*past, _said("user", asked), _said("assistant", said_text(row, "output"))]
    return {"messages": _with_system(row, messages), **row}


def _prompt_completion(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("prompt", "completion"):
        if name not in row:
            have = ", ".join(sorted(row)) or "none"
            raise DataError(f"field {name!r} is missing; fields: {have}")
    prompt, completion = row.pop("prompt"), row.pop("completion")
    if isinstance(prompt, str):
        prompt = _with_system(row, [_said("user", prompt)])
    if isinstance(completion, str):
        completion = [_said("assistant", completion)]
    return {"prompt": from_sharegpt(prompt), "completion": from_sharegpt(completion), **row}


def _with_system(row: dict[str, Any], messages: list[Any]) -> list[Any]:
    """The messages, the row's ``system`` text first; taken out of the row."""
    system = row.pop("system", "")
    return [_said("system", _text(system, "system")), *messages] if system else messages


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def said_text(row: dict[str, Any], name: str) -> str:
    """A row's text ``name``, taken out of it; DataError where there is none."""
    if name not in row:
        raise DataError(f"field {name!r} is missing; fields: {', '.join(sorted(row)) or 'none'}")
    return _text(row.pop(name), name)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"field {name!r} is not a text but {type(value).__name__}")
    return value
