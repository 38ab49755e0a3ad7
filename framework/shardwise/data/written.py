"""Conversations as documents: written out by a chat template, for pre-training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from shardwise.data.chat import check_use, write_out
from shardwise.data.conversation import read_conversation
from shardwise.data.conversions import as_conversation
from shardwise.data.fast_tokenizer import ByteTokenizer, Tokenizer
from shardwise.data.readers import Document
from shardwise.data.unused import Unused
from shardwise.errors import DataError


def written(
    name: str,
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    unused: Unused,
    tokenizer: Tokenizer | None = None,
) -> Iterator[Document]:
    """Each conversation of a format's rows as the text that the template makes of it.

    All of it is learned. What begins a document is left out of the text, for rows have a start
    token of their own. Raises DataError with the place of a row that cannot be written.
    """
    tokenizer = tokenizer or ByteTokenizer()
    for where, row in rows:
        try:
            said = read_conversation(as_conversation(name, row))
            redundant = check_use(tokenizer, said.messages, said.variables)
            text = write_out(tokenizer, said.messages, **said.variables)
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        unused.add(where, (*said.unused, *redundant))
        yield Document(where, text, special=True)
    unused.say()
