"""Verifiers: pure functions from a completion to a score, or None when it cannot be scored.

None is kept for what is not the model's fault (a reference answer that is no number, a missing
token count); a wrong or unreadable completion is 0. Model text is parsed, never evaluated, and
every parser here takes linear time.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Sequence
from fractions import Fraction
from typing import Literal

Extract = Literal["whole", "marker", "tag", "boxed", "last_number"]
MAX_NUMBER_CHARS = 200  # longer is not a number; bounds the work of parsing
MAX_EXPONENT = 1000


def extract_answer(text: str, how: Extract) -> str | None:
    """The answer inside a completion, stripped; None when there is none.

    ``whole``: the whole text; ``marker``: the line after the last ``Answer:``; ``tag``: inside
    the last ``<answer>...</answer>``; ``boxed``: inside the last ``\\boxed{...}``, braces
    balanced; ``last_number``: the last token that reads as a number.
    """
    if how == "whole":
        return text.strip()
    if how == "marker":
        _, found, tail = text.rpartition("Answer:")
        return tail.strip().split("\n", 1)[0].strip() if found else None
    if how == "tag":
        head, found, _ = text.rpartition("</answer>")
        _, opened, inside = head.rpartition("<answer>")
        return inside.strip() if found and opened else None
    if how == "boxed":
        return _last_boxed(text)
    return next((t for t in reversed(_number_tokens(text)) if parse_number(t) is not None), None)


def _last_boxed(text: str) -> str | None:
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 1, start + len("\\boxed{")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin:i].strip()
    return None


def _number_tokens(text: str) -> list[str]:
    """Words without the punctuation that prose puts around numbers."""
    return [t for w in re.split(r"[\s=]+", text) if (t := _bare(w))]


def _bare(word: str) -> str:
    """LaTeX keeps its braces and what stands before its backslash's word."""
    opening, closing = "([{\"'`*:;?!", ")]}\"'`*:;?!.,"
    word = word.strip("*`").rstrip(".,;:!?")
    if word.lstrip("$").startswith("\\"):
        return word.rstrip("*`'\"")
    return word.lstrip(opening).rstrip(closing)


def parse_number(text: str) -> Fraction | None:
    """An exact rational from ``-1,234.5``, ``3/4``, ``50%``, ``1e-3``, ``$12``, LaTeX fractions.

    Thousands separators must separate groups of three digits. None when it is not a number.
    """
    if len(text) > MAX_NUMBER_CHARS:
        return None
    text = text.strip().strip("$").replace("\\,", "").replace("\\!", "").replace("\u2212", "-")
    boxed = _last_boxed(text)
    if boxed is not None:
        return parse_number(boxed)
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-").strip() if text[:1] in "+-" and text[1:2] not in "+-" else text
    text = text.strip("$").strip()
    percent = text.endswith("%")
    if percent:
        text = text.removesuffix("%").removesuffix("\\").strip()
    value = _latex_fraction(text) if text.startswith("\\") else _ratio(text)
    if value is None:
        return None
    return sign * value / (100 if percent else 1)


def _latex_fraction(text: str) -> Fraction | None:
    for command in ("\\frac", "\\dfrac", "\\tfrac"):
        if text.startswith(command + "{") and text.endswith("}"):
            top, middle, bottom = text[len(command) + 1 : -1].partition("}{")
            a, b = _signed_decimal(top), _signed_decimal(bottom)
            return a / b if middle and a is not None and b else None
    return None


def _ratio(text: str) -> Fraction | None:
    top, slash, bottom = text.partition("/")
    a = _decimal(top.strip())
    if not slash:
        return a
    b = _signed_decimal(bottom.strip())
    return a / b if a is not None and b else None


def _signed_decimal(text: str) -> Fraction | None:
    value = _decimal(text[1:] if text[:1] in "+-" and text else text)
    return value if value is None or text[:1] != "-" else -value


def _decimal(text: str) -> Fraction | None:
    """An unsigned decimal, with thousands separators and an exponent."""
    mantissa, e, exponent = text.lower().partition("e")
    whole, _, rest = mantissa.partition(".")
    if "," in whole:
        first, *groups = whole.split(",")
        if not 1 <= len(first) <= 3 or any(len(g) != 3 for g in groups):
            return None
        whole = first + "".join(groups)
    digits = whole + rest
    if not (digits.isascii() and digits.isdigit()):
        return None
    power = 0
    if e:
        unsigned = exponent[1:] if exponent[:1] in ("+", "-") else exponent
        if not (unsigned.isascii() and unsigned.isdigit()) or int(unsigned) > MAX_EXPONENT:
            return None
        power = -int(unsigned) if exponent[0] == "-" else int(unsigned)
    return Fraction(int(digits)) * Fraction(10) ** (power - len(rest))


def exact_match(got: str | None, want: str, *, ignore_case: bool = False) -> float:
    """1 when both texts are equal after Unicode NFC and collapsing white space."""
    if got is None:
        return 0.0

    def normal(text: str) -> str:
        text = " ".join(unicodedata.normalize("NFC", text).split())
        return text.casefold() if ignore_case else text

    return float(normal(got) == normal(want))


def numeric_match(
    got: str | None, want: str, *, rel_tol: float = 1e-6, abs_tol: float = 0.0
) -> float | None:
    """1 when both read as numbers and |got - want| <= max(rel_tol * |want|, abs_tol).

    None when the reference is no number.
    """
    target = parse_number(want)
    if target is None:
        return None
    value = parse_number(got) if got is not None else None
    if value is None:
        return 0.0
    bound = max(Fraction(rel_tol) * abs(target), Fraction(abs_tol))
    return float(abs(value - target) <= bound)


def template_match(text: str, template: str) -> float:
    """1 when the text is the template with each ``{}`` replaced by something not blank.

    The fixed pieces must come in order, exactly once each, with nothing outside; white space is
    ignored. Example: ``<think>{}</think><answer>{}</answer>``. No regular expressions, hence no
    slow ones.
    """
    compact, plan = "".join(text.split()), "".join(template.split())
    pieces = plan.split("{}")
    position = 0
    for i, piece in enumerate(pieces):
        found = compact.find(piece, position) if piece else position
        if piece and (found < 0 or compact.count(piece) != plan.count(piece)):
            return 0.0
        # Every piece but the first follows a hole, which must be filled.
        if piece and (found > position) != (i > 0):
            return 0.0
        position = found + len(piece)
    return float((len(compact) > position) == (len(pieces) > 1 and not pieces[-1]))


# Unicode scripts, as `unicodedata.name` spells them, by language code.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "ar": ("ARABIC",),
    "de": ("LATIN",),
    "el": ("GREEK",),
    "en": ("LATIN",),
    "es": ("LATIN",),
    "fr": ("LATIN",),
    "he": ("HEBREW",),
    "hi": ("DEVANAGARI",),
    "it": ("LATIN",),
    "ja": ("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"),
    "ko": ("HANGUL",),
    "pt": ("LATIN",),
    "ru": ("CYRILLIC",),
    "th": ("THAI",),
    "uk": ("CYRILLIC",),
    "zh": ("CJK",),
}


@functools.lru_cache(maxsize=65536)
def _script(char: str) -> str:
    return unicodedata.name(char, "?").split(" ", 1)[0]


def language_consistency(text: str, scripts: Sequence[str]) -> float:
    """Share of the letters that belong to ``scripts``; 1 for a text without letters.

    In the spirit of DeepSeek-R1 (arXiv 2501.12948, section 2.3.2), by letter instead of word.
    """
    letters = [c for c in unicodedata.normalize("NFKC", text) if c.isalpha()]
    if not letters:
        return 1.0
    wanted = frozenset(scripts)
    return sum(_script(c) in wanted for c in letters) / len(letters)


def overlong_penalty(num_tokens: int | None, max_tokens: int, buffer_tokens: int) -> float | None:
    """Soft overlong punishment of DAPO (arXiv 2503.14476, equation 13), in [-1, 0].

    0 up to ``max_tokens - buffer_tokens``, then linear down to -1 at ``max_tokens``.
    """
    if num_tokens is None:
        return None
    excess = num_tokens - (max_tokens - buffer_tokens)
    return -min(max(excess, 0) / buffer_tokens, 1.0)
