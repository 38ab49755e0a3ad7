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

from shardwise.rewards.numerals import last_number, read_number

Extract = Literal["whole", "marker", "tag", "boxed", "last_number"]


def extract_answer(text: str, how: Extract) -> str | None:
    """The answer inside a completion, stripped; None when there is none.

    ``whole``: the whole text; ``marker``: what follows the last ``Answer:``, to the end of its
    line; ``tag``: inside the last ``<answer>...</answer>``; ``boxed``: inside the last
    ``\\boxed{...}`` or ``\\fbox{...}``, braces balanced; ``last_number``: the last number, read
    through units, currencies, Markdown, HTML and LaTeX.

    An answer that was begun last and not finished, or a last number that cannot be read, is none:
    an earlier one never takes its place.
    """
    if how == "whole":
        return text.strip()
    if how == "marker":
        return _after_marker(text)
    if how == "tag":
        _, opened, inside = text.rpartition("<answer>")
        inside, closed, _ = inside.partition("</answer>")
        return inside.strip() if opened and closed else None
    if how == "boxed":
        return _last_boxed(text)
    return last_number(text)


_MARKER = re.compile(r"\banswer[*_`]{0,3} ?[:\uff1a]", re.IGNORECASE)


def _after_marker(text: str) -> str | None:
    *_, found = (None, *_MARKER.finditer(text))
    if found is None:
        return None
    # Emphasis may have been opened before the marker or behind it.
    tail = text[found.end() :].lstrip("*_` \t\r\n")
    line = tail.split("\n", 1)[0].strip().rstrip("*_`").strip()
    return line or None


_BOX = re.compile(r"\\f?(?:boxed|box)(?![A-Za-z])\s{0,3}")
_TEXT = re.compile(r"\\(?:text|mathrm|mathbf|textbf|mbox)\{([^{}]*)\}")


def _last_boxed(text: str) -> str | None:
    *_, found = (None, *_BOX.finditer(text))
    if found is None:
        return None
    begin = found.end()
    if text[begin : begin + 1] != "{":
        bare = re.compile(r"[^\s${}\\]+").match(text, begin)
        return bare.group().rstrip(".,;") if bare else None
    depth = 0
    for i in range(begin, len(text)):
        escaped = text[i - 1] == "\\"
        depth += (text[i] == "{" and not escaped) - (text[i] == "}" and not escaped)
        if depth == 0:
            inside = text[begin + 1 : i].strip()
            worded = _TEXT.fullmatch(inside)
            return worded[1].strip() if worded else inside
    return None


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

    Where only one of them is a percentage, 50% is 50 as well as 0.5. None when the reference is
    no number.
    """
    target = read_number(want)
    if target is None or target.value is None:
        return None
    value = read_number(got) if got is not None else None
    if value is None or value.value is None:
        return 0.0

    def near(a: Fraction, b: Fraction) -> bool:
        return abs(a - b) <= max(Fraction(rel_tol) * abs(b), Fraction(abs_tol))

    a, b = value.value, target.value
    if value.percent == target.percent:
        return float(near(a, b))
    return float(
        near(a, b) or near(100 * a, b) if value.percent else near(a, b) or near(a, 100 * b)
    )


def answer_match(text: str, want: str) -> float:
    """1 when a completion gives the answer, however it is marked.

    The answer is what stands in ``<answer>`` tags, or else in a box, or else behind ``Answer:``;
    of a completion without such marks, its last number where the reference is a number, else all
    of it. Numbers are compared as `numeric_match` does, texts without case.
    """
    way: Extract | None = (
        "tag" if "<answer>" in text else "boxed" if _BOX.search(text)
        else "marker" if _MARKER.search(text) else None
    )  # fmt: skip
    got = text if way is None else extract_answer(text, way)
    number = numeric_match(None if got is None else last_number(got), want)
    return exact_match(got, want, ignore_case=True) if number is None else number


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
