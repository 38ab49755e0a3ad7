"""What does not enter a log: secrets, and what names a person.

Secrets are those of `config.redact`; besides, e-mail addresses, telephone numbers, and numbers of
cards and accounts that pass their own checksum. Forms, not meanings: a name or a street stays.
"""

from __future__ import annotations

import re
from collections.abc import Callable

from shardwise.config.redact import HIDDEN, redact

# No form begins with a repeat that another could share, so that long texts cost their length.
_EMAIL = re.compile(
    r"(?<![\w.+%-])[\w.+%-]{1,64}@(?:[A-Za-z0-9-]{1,63}\.){1,8}[A-Za-z]{2,24}(?![\w-])"
)
_CARD = re.compile(r"(?<![\w.])\d(?:[ -]?\d){12,18}(?![\w]|\.\d)")
_IBAN = re.compile(r"(?<!\w)[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?(?!\w)")
_PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"(?:\+|00)\d{1,3}[ .()/-]{0,2}(?:\d[ .()/-]{0,2}){6,12}\d"  # international
    r"|\(\d{2,5}\)[ .-]?\d{2,4}[ .-]?\d{2,5}"  # (area) number
    r"|\d{3}[.-]\d{3}[.-]\d{4}"
    r")(?![\w])"
)


def private(text: str) -> str:
    """``text`` with `config.redact.HIDDEN` in place of what is secret or names a person."""
    for form, holds in _FORMS:
        text = form.sub(lambda m, holds=holds: HIDDEN if holds(m[0]) else m[0], text)  # type: ignore[misc]
    return redact(text)


def _luhn(said: str) -> bool:
    """The checksum of card numbers (ISO/IEC 7812-1, annex B)."""
    digits = [int(c) for c in said if c.isdigit()]
    doubled = [d if i % 2 == 0 else sum(divmod(2 * d, 10)) for i, d in enumerate(digits[::-1])]
    return any(digits) and sum(doubled) % 10 == 0


def _iban(said: str) -> bool:
    """The checksum of account numbers (ISO 13616: modulo 97)."""
    said = said.replace(" ", "")
    return int("".join(str(int(c, 36)) for c in said[4:] + said[:4])) % 97 == 1


_FORMS: list[tuple[re.Pattern[str], Callable[[str], bool]]] = [
    (_EMAIL, lambda _: True),
    (_IBAN, _iban),
    (_CARD, _luhn),
    (_PHONE, lambda _: True),
]
