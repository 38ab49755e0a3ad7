"""Numbers in prose: read through any decoration, and never an earlier one for the last."""

# ruff: noqa: RUF001, E501 (how people spell numbers is the point)
from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.rewards.numerals import MAX_NUMBER_CHARS, last_number, parse_number
from shardwise.rewards.verifiers import Extract, extract_answer, numeric_match

# How an answer may be dressed: {} is the number. Currencies take their sign outside or inside.
INSIDE = (
    "{}", "**{}**", "*{}*", "__{}__", "_{}_", "`{}`", "***{}***", "<b>{}</b>", "({})", '"{}"',
    "<span class='n9'>{}</span>", "${}$", "\\({}\\)", "\\[ {} \\]", "\\mathbf{{{}}}", "\\text{{{}}}",
    "\\boxed{{{}}}", "$\\boxed{{{}}}$", "\\fbox{{{}}}", "\\left({}\\right)", "\u200b{}", "[{}]",
    "[{}](http://host/1)", "{}[^3]", "\\underline{{{}}}", "<td>{}</td>", "\\boxed{{{}\\text{{ cm}}}}",
)  # fmt: skip
UNITS = (
    "", " apples", "kg", " kg", " cm^2", " m²", "m2", " m<sup>2</sup>", "°", " °C", "^\\circ", "€", " USD",
    "$", "\\$", " euros", "th", " km/h", " m/s^2", "-year", " kg of CO2", "%", "\\%", " percent",
    "\u00a0km", "\\,\\text{cm}", " \\mathrm{m}^{2}", "\u00a3", "個", "!", " (in total)", "—that is it",
)  # fmt: skip
LEADS = (
    "", "The answer is ", "#### ", "= ", "x = ", "x=", "so ~", "≈ ", "≈", "about ", "-> ", "=> ",
    "> ", "1. ", "3 + 4 = ", "7, then ", "5 boxes: ", "on 12/31/2024: ", "\\therefore ", "| ",
    "H2O: ", "x^2 = ", "€4 and then ", "\\implies x = ", "it was ~~9~~ ", "in km^2: ",
)  # fmt: skip
TAILS = ("", ".", ",", " .", "!", "\n", " |", ";", ":", "?", "...", " as asked.")
MONEY = ("$", "€", "£", "₹", "USD ", "US$", "R$", "Rs.", "CHF", "zł", "\\$", "¥", "£ ")
# What holds digits and has no value that can be read for certain.
UNREADABLE = (
    "3 + {}", "3+{}", "3 × {}", "3 \\times {}", "3*{}", "{}/0", "{}/{}/2024", "{}:30", "3-{}", "±{}",
    "5 ± {}", "x^{}", "√{}", "\\sqrt{{{}}}", "\\sqrt {}", "{}\\pi", "{}π", "{}x", "K{}Q", "1.{}.3",
    "\\frac{{\\sqrt{{3}}}}{{{}}}", "\\log {}", "{},5,", "0x{}", "COVID-{}", "{}_000", "{} x 5",
)  # fmt: skip

values = st.integers(2, 10**7).filter(lambda n: n % 10 not in (0, 5))


@st.composite
def dressed(draw: st.DrawFn) -> tuple[str, int]:
    """A text whose last number is known."""
    value = draw(values)
    sign = draw(st.sampled_from(["", "-", "\u2212", "–"]))
    spelt = draw(st.sampled_from([str(value), f"{value:,}", f"{value}.0", f"{value:,}.00"]))
    if draw(st.booleans()):
        money = draw(st.sampled_from(MONEY))
        core, unit = sign + money + spelt, ""
    else:
        core, unit = sign + spelt, draw(st.sampled_from(UNITS))
    text = draw(st.sampled_from(INSIDE)).format(core) + unit
    text = draw(st.sampled_from(LEADS)) + text + draw(st.sampled_from(TAILS))
    return text, -value if sign else value


@given(dressed(), st.integers(1, 9))
@settings(max_examples=120, deadline=None)
def test_any_dress_is_read_and_a_wrong_answer_stays_wrong(case: tuple[str, int], off: int) -> None:
    text, value = case
    got = last_number(text)
    assert numeric_match(got, str(value), rel_tol=0.0) == 1.0, (text, got)
    assert numeric_match(got, str(value + off), rel_tol=0.0) == 0.0, (text, got)


@given(values, dressed(), st.sampled_from(["\n", ", but then ", ". So "]))
@settings(max_examples=80, deadline=None)
def test_an_earlier_number_is_never_taken(right: int, case: tuple[str, int], link: str) -> None:
    text, value = case
    for before in (f"It was {right}", f"\\boxed{{{right}}}", f"Answer: {right}"):
        score = numeric_match(last_number(before + link + text), str(right), rel_tol=0.0)
        assert score == float(value == right), (before, text)


@given(values, values, st.sampled_from(UNREADABLE))
@settings(max_examples=80, deadline=None)
def test_what_cannot_be_read_for_certain_is_no_number_and_hides_no_other(
    right: int, other: int, form: str
) -> None:
    text = f"It was {right}, now it is {form.format(other, other)}"
    assert last_number(text) is None
    assert parse_number(form.format(other, other)) is None


@given(values, st.sampled_from(["boxed", "marker", "tag"]), st.sampled_from(UNITS))
@settings(max_examples=100, deadline=None)
def test_answers_in_their_place(value: int, how: Extract, unit: str) -> None:
    unit = unit.replace("^\\circ", "^{\\circ}")
    form = {
        "boxed": "\\boxed{%s}.",
        "marker": "**Answer:** %s\nbye 3",
        "tag": "<answer>%s</answer>",
    }
    for spelt in (f"{value}{unit}", f"x = {value}{unit}", f"{value:,}{unit}"):
        text = f"First {value + 1}. {form[how] % spelt}"
        assert numeric_match(extract_answer(text, how), str(value), rel_tol=0.0) == 1.0, text
        assert numeric_match(extract_answer(text, how), str(value + 1), rel_tol=0.0) == 0.0, text
    for two in (f"{value} or {value + 1}", f"{value}, {value + 1}", f"{value}x + {value + 1}"):
        got = extract_answer(form[how] % two, how)
        assert numeric_match(got, str(value + 1), rel_tol=0.0) == 0.0, "two answers are none"


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("5 million", "5000000"), ("$5M", "5e6"), ("2.5k views", "2500"), ("3 dozen eggs", "36"),
        ("7 and a half", "7.5"), ("3 1/2", "3.5"), ("3½ cups", "3.5"), ("-½", "-0.5"),
        (r"3\frac{1}{2}", "3.5"), (r"-\frac12", "-0.5"), (r"\dfrac{3}{4}", "0.75"), ("7 / 2", "3.5"),
        ("2 × 10^3", "2000"), ("2x10⁻³", "0.002"), ("10<sup>3</sup>", "1000"), ("2**10", "1024"),
        ("5 ft 6 in", "5.5"), ("1 hour and 30 minutes", "1.5"), ("5 dollars and 50 cents", "5.5"),
        ("$5 and 50 cents", "5.5"), ("1'234.5", "1234.5"), ("1 234 567", "1234567"),
        ("1{,}234", "1234"), (r"12\,345", "12345"), ("１，２３４", "1234"), ("٧", "7"), ("…5", "5"),
        ("x = - 3", "-3"), ("- 3 apples", "3"), ("$-5", "-5"), ("1,2,3", "3"), ("3–4=-1", "-1"),
        ("₹12,34,567", "1234567"), ("&minus;7&nbsp;kg", "-7"),
    ],
)  # fmt: skip
def test_spellings(text: str, want: str) -> None:
    assert numeric_match(last_number(text), want) == 1.0
    assert numeric_match(last_number("20 of 50, or 5: " + text), "50") == 0.0


@pytest.mark.parametrize(
    ("got", "want", "score"),
    [("50%", "50", 1), ("50%", "0.5", 1), ("0.5", "50%", 1), ("50", "50 %", 1), ("50%", "50%", 1),
     ("0.5%", "50%", 0), ("5 million", "5", 0), ("7 (3 each)", "7", 1), ("7, as 3 + 4 is 7", "7", 1),
     ("7 of 10", "10", 0)],
)  # fmt: skip
def test_how_numbers_are_compared(got: str, want: str, score: float) -> None:
    assert numeric_match(got, want) == score


@pytest.mark.parametrize(
    "piece",
    ["1,", "1 ", "{", r"\frac{", "<a", "~~", "^{", "1-", "a1", "1e", "](", " (", "1/2 ", r"\x[", "_",
     "*", "9", "1 and 1/", "&amp;", "1'", r"\boxed{", "Answer:"],
)  # fmt: skip
def test_no_long_text_takes_long(piece: str) -> None:
    """In linear time these are milliseconds; where a rule takes more, the test hangs."""
    text = piece * (20_000 // len(piece))
    for how in ("marker", "boxed", "last_number"):
        extract_answer(text, how)  # type: ignore[arg-type]
    assert parse_number("9" * (MAX_NUMBER_CHARS + 1)) is None
