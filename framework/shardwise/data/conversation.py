"""What a conversation is, before any template has seen it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.errors import DataError

Message = Mapping[str, Any]


def check_messages(messages: Any) -> list[dict[str, str]]:
    """``messages`` as a list of {role, content} with strings; DataError says what is not."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError("a conversation is a non-empty list of messages")
    for i, message in enumerate(messages):
        ok = isinstance(message, Mapping) and all(
            isinstance(message.get(k), str) for k in ("role", "content")
        )
        if not ok:
            raise DataError(f"message {i} needs a role and a content, both strings")
    return [dict(m) for m in messages]
