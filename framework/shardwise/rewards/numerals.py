"""The numbers in a text, each with its value, or with none where it cannot be read for certain.

What looks like a number but is not read (a date, a sum, ``x^2``, ``1.234,5``, ``K2Q``) is found
all the same: whoever wants the last number must not be handed an earlier one in its place. All
rules take linear time.
"""

# ruff: noqa: RUF001 (how people spell numbers is the point)
from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from fractions import Fraction

from shardwise.rewards.plaintext import UNKNOWN, VALUE, plain_text

MAX_NUMBER_CHARS = 200  # longer is not a number; bounds the work of parsing
MAX_EXPONENT = 1000
_ENOUGH = 2 * MAX_NUMBER_CHARS  # characters before the last digit that are looked at at least
_DIGITS = frozenset(f"0123456789{VALUE}")

_MAGNITUDES = {
    "dozen": 12, "hundred": 100, "thousand": 1000, "k": 1000, "lakh": 10**5, "million": 10**6,
    "mn": 10**6, "crore": 10**7, "billion": 10**9, "bn": 10**9, "trillion": 10**12,
}  # fmt: skip
_ATTACHED = {"K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}  # 5M; "5 M" has a unit
_PARTS = {"half": Fraction(1, 2), "third": Fraction(1, 3), "quarter": Fraction(1, 4)}
# Letters that are no units: 5x is no 5.
_VARIABLES = frozenset("abefijnoqrtuvwxyzDEGHIOPQRSUXYZ")
# Words with digits in them that are units and names, not numbers.
_NAME = re.compile(
    r"(?:(?:[kcmdn]?m|ft|in|yd|mi|s)(?:\^-?\d|[23])|(?:CO|NO|SO|SiO|O|N|H|Cl)2|H2O2?|O3|CH4|NH3)"
    r"(?![A-Za-z0-9^])"
)
_CODES = "USD EUR GBP JPY CNY RMB INR CHF CAD AUD NZD SEK NOK DKK PLN CZK HUF RUB TRY BRL MXN KRW"
_CODES = f"{_CODES} HKD SGD Rs Fr Ft kr zł"
_CURRENCY = re.compile(
    r"(?:(?:(?<![A-Za-z])(?:US|CA|AU|NZ|HK|NT|A|C|R|S))?\$|"
    rf"(?<![^\W\d_])(?:{_CODES.replace(' ', '|')})\.?) ?([-+]?)$"
)
_WHOLE = r"(?:\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+|(?:'\d{3})+)|\d{1,2}(?:,\d\d)+,\d{3}|\d+)(?!\d)"
_DIGIT = re.compile(f"[0-9{VALUE}]")
_DECIMAL = rf"(?:{_WHOLE}(?:\.\d+)?|\.\d+)"
_BODY = re.compile(
    rf"(?P<mixed>\d+ (?=\d+/\d))?(?P<top>{_DECIMAL})"
    rf"(?: ?/ ?(?P<bottom>[-+]?{_DECIMAL})| ?[×xX] ?10\^(?P<ten>[-+]?\d+)|[eE](?P<e>[-+]?\d+)"
    r"|\^(?P<power>[-+]?\d+))?"
)
# After a number: what makes it a part of something that is more than this number.
_JOIN = (
    rf"(?:[.,:'_]\d| ?[-+×÷*/^±] ?\$?[-+]?\.?\d| ?[xX] ?\d| ?[×÷^±*{VALUE}{UNKNOWN}]"
    r"|[-+][a-z]\b| [xyzn]\b(?!'))"
)
_GOES_ON = re.compile(rf"{_JOIN}| \+ ?[A-Za-z]\b")
_CLUSTER = re.compile(rf"(?:{_JOIN}|\d)+")
_POINT = re.compile(r"(?:^|[^\w.)])\.$")  # before digits: a decimal point, no full stop
_LIST = re.compile(rf"(?!{_WHOLE}(?![\d,]))\d+(?:,\d+){{2,}}(?![\d.,])")
_LETTERS_AFTER = re.compile(r"[^\W\d_]+")
_MAGNITUDE = re.compile(rf" ?({'|'.join(_MAGNITUDES)})\b", re.IGNORECASE)
_PERCENT = re.compile(r" ?%| ?(?:percent|per cent|pct)\b", re.IGNORECASE)
_AND_PART = re.compile(r" (?:and|&) (?:an? |one )?(half|third|quarter|\d+/\d+)\b(?!/)", re.I)
# Quantities in two units, "5 ft 11 in": how many of the smallest of its kind a unit is.
_KINDS: dict[str, tuple[str, int]] = {
    spelling: (kind, size)
    for kind, size, spellings in (
        ("time", 604800, "week weeks"), ("time", 86400, "day days d"),
        ("time", 3600, "hour hours hr hrs h"), ("time", 60, "minute minutes min mins"),
        ("time", 1, "second seconds sec secs s"), ("calendar", 12, "year years yr yrs"),
        ("calendar", 1, "month months mo"), ("feet", 12, "foot feet ft"),
        ("feet", 1, "inch inches in"), ("weight", 16, "pound pounds lb lbs"),
        ("weight", 1, "ounce ounces oz"), ("money", 100, "dollar dollars euro euros $"),
        ("money", 1, "cent cents"), ("length", 100000, "km kilometers kilometres"),
        ("length", 100, "m meter meters metre metres"), ("length", 1, "cm centimeters"),
        ("mass", 1000, "kg kilograms"), ("mass", 1, "g grams"),
    )
    for spelling in spellings.split()
}  # fmt: skip
_BETWEEN = re.compile(r"(?: ?((?!and )[A-Za-z]+)\.?)?,?(?: and)? ?")
_UNIT = re.compile(r" ?([A-Za-z]+)")


@dataclasses.dataclass(frozen=True)
class Number:
    """``text``: its own spelling; ``value``: None when it cannot be read for certain."""

    text: str
    value: Fraction | None
    percent: bool
    start: int
    end: int


def numbers(text: str) -> list[Number]:
    """All numbers of a text that `plain_text` has made, in order."""
    found: list[Number] = []
    for number in _single(text):
        whole = _joined(text, found[-1], number) if found else None
        if whole is not None:
            found[-1] = whole
        else:
            found.append(number)
    return found


def last_number(text: str) -> str | None:
    """The last number of a text as it is spelt there; None if it has none, or is not certain."""
    plain = plain_text(text)
    last = next((i for i in range(len(plain) - 1, -1, -1) if plain[i] in _DIGITS), 0)
    # No number reaches over the end of a line or a sentence.
    start = max(plain.rfind(end, 0, max(last - _ENOUGH, 0)) for end in ("\n", ". "))
    found = numbers(plain[start + 1 :])
    return found[-1].text if found and found[-1].value is not None else None


def read_number(text: str) -> Number | None:
    """The one number that a text gives as its answer; None when there is not exactly one.

    What follows the last ``=`` counts, what stands in brackets behind it does not, and the first
    number must be the last one's equal.
    """
    plain = plain_text(text)
    outside = re.sub(r" \([^()]*\)", " ", plain)
    if any(c.isdigit() for c in outside):
        plain = outside
    tail = plain.rpartition("=")[2]
    found = numbers(tail) or numbers(plain)
    if not found or found[-1].value is None:
        return None
    same = (found[0].value, found[0].percent) == (found[-1].value, found[-1].percent)
    return found[-1] if same else None


def parse_number(text: str) -> Fraction | None:
    """The exact value of `read_number`: -1,234.5, 3/4, 50%, 1e-3, $12, 5 million, LaTeX."""
    number = read_number(text)
    return None if number is None else number.value


def _single(text: str) -> Iterator[Number]:
    at = 0
    while found := _DIGIT.search(text, at):
        start = found.start()
        word = start
        while word > at and (text[word - 1].isalpha() or text[word - 1] in "^_"):
            word -= 1
        if name := _NAME.match(text, word):
            at = name.end()
            continue
        if text[start] == VALUE:
            number = _unread(text, start, start + 1)
        elif word < start and text[word:start] not in _CODES.split():
            number = _unread(text, start, start)
        elif items := _LIST.match(text, start):
            for item in re.finditer(r"\d+", items.group()):
                yield Number(item.group(), Fraction(int(item.group())), False, start, items.end())
            at = items.end()
            continue
        else:
            number = _read(text, start, at)
        yield number
        at = number.end


def _unread(text: str, start: int, end: int) -> Number:
    """Something with digits that is not read, to where it ends."""
    end = _alphanumeric(text, end)
    while (more := _CLUSTER.match(text, end)) and more.end() > end:
        end = _alphanumeric(text, more.end())
    if text[start] == VALUE and (operand := re.compile(r"[ (]*[\d.,]+").match(text, end)):
        end = operand.end()
    return Number(text[start:end], None, False, start, end)


def _alphanumeric(text: str, end: int) -> int:
    while end < len(text) and text[end].isalnum():
        end += 1
    return end


def _read(text: str, digit: int, floor: int) -> Number:
    """The number that begins at a digit; ``floor``: where the one before it ended."""
    start = digit - bool(_POINT.search(text, max(digit - 2, floor), digit))
    body = _BODY.match(text, start)
    assert body is not None
    sign = _sign(text[max(start - 12, 0) : start])
    value = None if sign is None or body.end() - start > MAX_NUMBER_CHARS else _value(body)
    if value is None or _GOES_ON.match(text, body.end()):
        return _unread(text, start, body.end())
    assert sign is not None
    end = body.end()
    if attached := _LETTERS_AFTER.match(text, end):
        word = attached.group()
        if word in _ATTACHED:
            value, end = value * _ATTACHED[word], attached.end()
        elif word in _VARIABLES or (
            text[attached.end() : attached.end() + 1].isdigit() and not _NAME.match(text, end)
        ):
            return _unread(text, start, end)
    while magnitude := _MAGNITUDE.match(text, end):
        value, end = value * _MAGNITUDES[magnitude[1].lower()], magnitude.end()
    if part := _AND_PART.match(text, end):
        value, end = value + _part(part[1].lower()), part.end()
    percent = _PERCENT.match(text, end)
    if percent:
        value, end = value / 100, percent.end()
    spelling = ("-" if sign < 0 else "") + text[start:end]
    return Number(spelling, sign * value, bool(percent), start, end)


def _sign(before: str) -> int | None:
    """1 or -1 by what stands before a number; None when it is an operand of something."""
    inner = ""
    if currency := _CURRENCY.search(before):
        before, inner = before[: currency.start()], currency[1]
    if before[-1:] in ("-", "+"):
        outer, rest = before[-1], before[:-1]
        if inner or rest[-1:].isalnum() or rest[-1:] in tuple(")]-+" + VALUE):
            return None
        return -1 if outer == "-" else 1
    near = before.rstrip(" ")
    if near[-1:] in ("-", "+") and near != before:
        rest = near[:-1].rstrip(" ")
        if rest[-1:] in tuple("=(:≈") and rest:
            return -1 if near[-1] == "-" else 1
        word = re.search(r"[^\W_]+$", rest)
        if rest[-1:] == ")" or (word and (near[-1] == "+" or len(word.group()) == 1)):
            return None
    elif near and near[-1] in f"×÷/^±{UNKNOWN}":
        return None
    return -1 if inner == "-" else 1


def _value(body: re.Match[str]) -> Fraction | None:
    """The value of what `_BODY` has matched."""
    value = _decimal(body["top"])
    if body["bottom"]:
        bottom = _decimal(body["bottom"].lstrip("+-"))
        if not bottom:
            return None
        value = value / (-bottom if body["bottom"].startswith("-") else bottom)
    for name in ("ten", "e"):
        if body[name]:
            if abs(power := int(body[name][:9])) > MAX_EXPONENT:
                return None
            value *= Fraction(10) ** power
    if body["power"]:
        power = int(body["power"][:9])
        if abs(power) > MAX_EXPONENT or (value == 0 and power < 0) or len(body["top"]) > 20:
            return None
        value = value**power
    if body["mixed"]:
        return value + int(body["mixed"]) if value < 1 else None
    return value


def _decimal(text: str) -> Fraction:
    whole, _, rest = re.sub("[, ']", "", text).partition(".")
    return Fraction(int(whole + rest), 10 ** len(rest))


def _part(word: str) -> Fraction:
    if word in _PARTS:
        return _PARTS[word]
    top, _, bottom = word.partition("/")
    return Fraction(int(top), int(bottom) or 1)


def _joined(text: str, first: Number, second: Number) -> Number | None:
    """Both as one quantity in the unit of the first, when they are that: 5 ft 11 in."""
    if first.value is None or second.value is None or not 0 <= second.start - first.end <= 20:
        return None
    between = _BETWEEN.fullmatch(text, first.end, second.start)
    unit = _UNIT.match(text, second.end)
    if not between or not unit:
        return None
    before = text[max(first.start - 1, 0) : first.start]
    big = _KINDS.get(between[1].lower() if between[1] else before)
    small = _KINDS.get(unit[1].lower())
    if big is None or small is None or big[0] != small[0] or big[1] <= small[1]:
        return None
    rest = second.value * Fraction(small[1], big[1])
    value = first.value - rest if first.value < 0 else first.value + rest
    start = first.start if between[1] else first.start - 1
    return Number(text[start : unit.end()], value, False, first.start, second.end)
