"""Fields of rows that nothing reads: named once with counts, or refused."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence

from shardwise.errors import DataError

log = logging.getLogger(__name__)

_said: set[str] = set()  # a source is read several times in a process; this is said once


class Unused:
    """Counts the fields of a source's rows that nothing reads.

    With ``strict`` the first one is an error (``data.strict_fields``). ``ignore``: fields that are
    knowingly not read.
    """

    def __init__(self, label: str, strict: bool = False, ignore: Sequence[str] = ()) -> None:
        self.label, self.strict, self.ignore = label, strict, ignore
        self.counts: Counter[str] = Counter()

    def add(self, where: str, fields: Iterable[str], rows: int = 1) -> None:
        """``fields`` of ``rows`` rows at ``where``."""
        fields = [name for name in fields if name not in self.ignore]
        if fields and self.strict:
            raise DataError(
                f"{where}: nothing reads the fields {', '.join(fields)}, and data.strict_fields is "
                "set; leave them out, or list them under the source's ignore"
            )
        self.counts.update(dict.fromkeys(fields, rows))

    def say(self) -> None:
        """Name them in one warning, once a process."""
        named = ", ".join(f"{field} ({n} rows)" for field, n in sorted(self.counts.items()))
        if named:
            warn_once(f"{self.label}: fields that nothing reads: {named}")


def warn_once(message: str) -> None:
    """Log a warning about a source, once a process."""
    if message not in _said:
        _said.add(message)
        log.warning("%s", message)


def say_once(message: str) -> None:
    """Log a notice about a source, once a process."""
    if message not in _said:
        _said.add(message)
        log.info("%s", message)
