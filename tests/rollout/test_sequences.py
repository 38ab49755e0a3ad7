"""What is asked for, and stop strings: found with the token that completes them, and no later."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import UserError
from shardwise.rollout.sequences import Request, StopStrings, check_names, check_request


@pytest.mark.parametrize(
    ("request_", "before", "message"),
    [
        (Request(5, []), 0, "prompt 5 has no tokens"),
        (Request(5, [1] * 8), 0, "has 8 tokens, the model takes 8"),
        (Request(5, [1] * 4), 4, "has 8 tokens, the model takes 8"),
        (Request(5, [10]), 0, "outside the vocabulary of 10"),
        (Request(5, [-1]), 0, "outside the vocabulary"),
        (Request(5, [1], 0), 0, "num_samples"),
    ],
)
def test_impossible_requests(request_: Request, before: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_request(request_, before, 10, 8)


def test_a_sample_is_asked_for_once() -> None:
    check_names([Request(4, [1], 2), Request(4, [1], 1, 2), Request(5, [1])])
    with pytest.raises(UserError, match="prompt 4: sample 1 is asked for twice"):
        check_names([Request(4, [1], 2), Request(4, [1], 1, 1)])


@given(
    st.text("ab\u00e9\u20ac", min_size=1, max_size=12),
    st.lists(st.text("ab\u00e9\u20ac", min_size=1, max_size=3), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_stop_strings_are_found_as_in_the_whole_text(text: str, strings: list[str]) -> None:
    """Of a tokenizer of bytes: characters of several tokens."""
    tokenizer = ByteTokenizer()
    watched, tokens = StopStrings(strings, tokenizer.decode), tokenizer.encode(text)
    for i, token in enumerate(tokens):
        whole = tokenizer.decode(tokens[: i + 1])
        hit = watched.hit(token)
        assert hit == any(s in whole for s in strings)
        if hit:
            return


def test_words_have_spaces_between_them_and_none_before() -> None:
    """As those of SentencePiece: a token alone is decoded without its space."""

    def decode(ids: list[int]) -> str:
        return " ".join(map(str, ids))

    watched = StopStrings(["12 7"], decode)
    assert [watched.hit(t) for t in (5, 12, 17, 12, 7)] == [False] * 4 + [True]


def test_only_the_last_tokens_are_decoded() -> None:
    asked = []

    def decode(ids: list[int]) -> str:
        asked.append(len(ids))
        return "".join(map(chr, ids))

    watched = StopStrings(["zz"], decode)
    assert not any(watched.hit(97 + i % 20) for i in range(500))
    assert max(asked) <= 2 and len(watched.tail) == 1
