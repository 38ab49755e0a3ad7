"""Prose, Markdown, HTML and LaTeX made plain, so that the numbers in them can be read.

Every rule takes linear time: texts come from a model. What has a value that is not read here (a
root, pi, a sum) becomes `VALUE`, so that no number beside it is taken for the answer.
"""

# ruff: noqa: RUF001 (how people spell numbers is the point)
from __future__ import annotations

import functools
import html
import re
import unicodedata

VALUE = "\x01"  # stands for something with a value that is no plain number
UNKNOWN = "\x02"  # stands for a LaTeX command that is not known here

_SUPERSCRIPTS = {c: str(i) for i, c in enumerate("⁰¹²³⁴⁵⁶⁷⁸⁹")} | {"⁻": "-", "⁺": "+"}
_SINGLE = (
    dict.fromkeys("\u2212\u2013\u2010\u2011\u2012\ufe63\uff0d", "-")
    | dict.fromkeys("×⋅·∙✕✖∗", "×")
    | dict.fromkeys("\u2044\u2215\uff0f", "/")
    | dict.fromkeys("‘’ʼ′", "'")
    | {"٪": "%", "٫": ".", "٬": ",", "π": VALUE, "√": VALUE, "∞": VALUE, "∑": VALUE, "∫": VALUE}
)


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)[^<>]*>")
_INLINE = _words("b i em strong span u code font mark small tt kbd")
_COMMENT = re.compile(r"<!--[^<]*-->")
_STRUCK = re.compile(r"~~[^~\n]{1,200}~~")
_LINK = re.compile(r"\]\([^()\s]*\)")
_URL = re.compile(r"https?://\S+")
_FOOTNOTE = re.compile(r"\[\^[^\]\s]{1,20}\]")

# LaTeX. Commands that only say how their argument looks, or that stand between numbers and words.
_WRAPPERS = _words(
    "text textbf textit textrm texttt textsf textnormal mathrm mathbf mathit mathsf mathtt mathbb "
    "mbox hbox boxed fbox framebox underline emph operatorname bm boldsymbol ensuremath "
    "displaystyle textstyle left right big Big bigl bigr Bigl Bigr bf it rm large Large LARGE "
    "huge small boldmath"
)
_SPACES = _words(
    "therefore implies Rightarrow rightarrow Longrightarrow longrightarrow to gets mapsto iff "
    "Leftrightarrow because approx approxeq sim simeq cong equiv eq quad qquad degree circ deg "
    "blacksquare square Box qed newline hline noindent centering par item leq le geq ge lt gt "
    "ldots dots cdots checkmark bullet begin end space enspace thinspace medskip bigskip "
    "colon euro pounds textdollar"
)
_DROPPED = _words("begin end tag label ref eqref cite hspace vspace color textcolor")
_SIGNS = {"times": "×", "cdot": "×", "ast": "×", "div": "÷", "pm": "±", "mp": "±"}
_VALUES = _words(
    "sqrt pi infty sum prod int binom log ln lg exp sin cos tan cot sec csc arcsin arccos arctan "
    "frac dfrac tfrac cfrac phi theta alpha beta gamma lambda mu sigma omega epsilon"
)
_COMMAND = re.compile(r"\\([A-Za-z]+)\*?[ ]?")
_BARE_FRACTION = re.compile(r"\\([dtc]?frac)\s?(\d)\s?(\d)")
_FRACTION = re.compile(r"\\[dtc]?frac\s?\{\s?([-+]?[\d.,]+)\s?\}\s?\{\s?([-+]?[\d.,]+)\s?\}")
_DEGREES = re.compile(r"\^\s?(?:\{\s?\\circ\s?\}|\\circ|\\degree)")
_EXPONENT = re.compile(r"\^\s?(?:\{\s?([-+]?\d{1,9})\s?\}|([-+]?\d{1,9}))")
_ESCAPED = re.compile(r"\\([$%#&_{}])")
_THIN = re.compile(r"\\[,!]|\{,\}")


@functools.lru_cache(maxsize=65536)
def _plain(char: str) -> str:
    """An ASCII spelling of one character, or the character."""
    if char in _SINGLE:
        return _SINGLE[char]
    kind = unicodedata.category(char)
    if kind == "Nd":
        return str(unicodedata.decimal(char))
    if kind == "Cf":
        return ""
    if kind == "Zs":
        return " "
    if kind == "Sc":
        return "$"
    spelt = unicodedata.normalize("NFKC", char)
    if kind == "No" and "\u2044" in spelt:  # one half
        return spelt.replace("\u2044", "/")
    return spelt if len(spelt) == 1 and spelt.isascii() else char


def _spell(run: re.Match[str]) -> str:
    out = ""
    before = run.string[run.start() - 1 : run.start()]
    raised = False
    for char in run.group():
        if char in _SUPERSCRIPTS:
            out += ("" if raised else "^") + _SUPERSCRIPTS[char]
        else:
            spelt = _plain(char)
            out += _apart(out or before, spelt) if len(spelt) > 1 else spelt
        raised = char in _SUPERSCRIPTS
    return out


def _apart(before: str, fraction: str) -> str:
    """A fraction as it stands after ``before``: a mixed number keeps its parts apart."""
    return f" {fraction} " if before[-1:].isdigit() else f"{fraction} "


def _tag(found: re.Match[str]) -> str:
    closing, name = found[1], found[2].lower()
    if name == "sup":
        return "}" if closing else "^{"
    if name == "sub":
        return "}" if closing else "_{"
    return "" if name in _INLINE else " "


def _latex(text: str) -> str:
    """Commands gone: kept by what they wrap, by a space, by a sign or by a mark."""
    text = _ESCAPED.sub(r"\1", _THIN.sub(lambda m: "," if m.group() == "{,}" else "", text))
    text = _DEGREES.sub(" ", text)
    text = _BARE_FRACTION.sub(r"\\frac{\2}{\3}", text)
    text = _FRACTION.sub(
        lambda m: _apart(m.string[max(m.start() - 1, 0) : m.start()], f"{m[1]}/{m[2]}"), text
    )
    out: list[str] = []
    at = 0
    while found := _COMMAND.search(text, at):
        out.append(text[at : found.start()])
        name, at = found[1], found.end()
        if name in _SIGNS:
            out.append(_SIGNS[name])
        elif name in _DROPPED:
            at = _after_group(text, at)
            out.append(" ")
        elif name in _SPACES:
            out.append(" ")
        elif name not in _WRAPPERS:
            out.append(VALUE if name in _VALUES else UNKNOWN)
            at = _after_arguments(text, at)
    out.append(text[at:])
    return re.sub(r"\\[()\[\];: \\]", " ", "".join(out))


def _after_group(text: str, at: int, opening: str = "{", closing: str = "}") -> int:
    """The place after the group that begins at ``at``; ``at`` itself if none does."""
    if text[at : at + 1] != opening:
        return at
    depth = 0
    for i in range(at, len(text)):
        depth += (text[i] == opening) - (text[i] == closing)
        if depth == 0:
            return i + 1
    return len(text)


def _after_arguments(text: str, at: int) -> int:
    """The place after a command's arguments, indices and powers."""
    while True:
        start = at
        at = _after_group(text, at, "[", "]")
        if text[at : at + 1] in ("_", "^"):
            at += 1
            at = _after_group(text, at) if text[at : at + 1] == "{" else at + 1
        at = _after_group(text, at)
        if at == start:
            return at


def plain_text(text: str) -> str:
    """The text with its decorations gone; digits, signs, powers (``^3``) and words remain."""
    if "&" in text:
        text = html.unescape(text)
    if "<" in text:
        text = _TAG.sub(_tag, _COMMENT.sub(" ", text))
    if not text.isascii():
        text = re.sub(r"[^\x00-\x7f]+", _spell, text)
    if "~" in text:
        text = _STRUCK.sub(" ", text).replace("~", " ")
    if "://" in text or "](" in text or "[^" in text:
        text = _FOOTNOTE.sub(" ", _URL.sub(" ", _LINK.sub("] ", text)))
    if "\\" in text or "{,}" in text:
        text = _latex(text)
    if "^" in text:
        text = _EXPONENT.sub(lambda m: f"^{m[1] or m[2]}", text)
    text = text.replace("{", "").replace("}", "").replace("`", "")
    if "*" in text:
        text = re.sub(r"(?<=\d)\*\*(?=\d)", "^", text)
        text = re.sub(r"(?<=[\d)])( ?)\*\1(?=[\d(])", "×", text).replace("*", "")
    if "_" in text:
        text = re.sub(r"(?<![A-Za-z0-9])_+|_+(?![A-Za-z0-9])", "", text)
    return text
