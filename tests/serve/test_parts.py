"""The server's parts by themselves: texts, privacy, rates, tokens, the log on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.redact import HIDDEN
from shardwise.data.fast_tokenizer import byte_alphabet
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import DataError, UserError
from shardwise.rollout.sequences import Completion
from shardwise.serve import log as logs
from shardwise.serve.answers import Answer
from shardwise.serve.clients import Rates, is_loopback, match, read_tokens
from shardwise.serve.errors import ApiError
from shardwise.serve.log import LogWriter, read
from shardwise.serve.privacy import private
from shardwise.serve.texts import TextStream
from shardwise.serve.worker import Piece

# ----- texts -----


@given(
    st.text("abé🎈c", max_size=30),
    st.lists(st.text("abé🎈", min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_pieces_are_the_text_up_to_the_stop(text: str, stops: list[str], data: Any) -> None:
    tokenizer = ByteTokenizer()
    ids = tokenizer.encode(text)
    stream, pieces, at = TextStream(tokenizer.decode, stops), [], 0
    while at < len(ids):
        size = data.draw(st.integers(1, 4))
        at += size
        pieces.append(stream.push(ids[at - size : at], last=at >= len(ids)))
    met = [(i + len(s), i) for s in stops if (i := text.find(s)) >= 0]
    assert "".join(pieces) == text[: min(met, default=(0, len(text)))[1]]
    assert all("\ufffd" not in piece for piece in pieces)


class OneAsk:
    """What an answer asks of a request."""

    chat, num_choices, logprobs, prompt_tokens = True, 1, True, ()

    def __init__(self, stops: list[str]) -> None:
        self.stops = tuple(stops)


@given(
    st.lists(
        st.one_of(st.text("abé🎈c", max_size=9).map(str.encode), st.binary(max_size=2)), max_size=5
    ),
    st.lists(st.text("abé🎈", min_size=1, max_size=4), max_size=2),
    st.data(),
)
def test_log_probabilities_are_of_the_text_that_was_sent(
    said: list[bytes], stops: list[str], data: Any
) -> None:
    """In a stream as in the whole; a token's is its own (here, its number)."""
    tokenizer = ByteTokenizer()
    ids = [tokenizer.id_of(byte_alphabet()[b]) for b in b"".join(said)]
    if data.draw(st.booleans()):
        ids.append(tokenizer.eos_id)
    answer = Answer(OneAsk(stops), "", "", 0, tokenizer)  # type: ignore[arg-type]
    text, sent, at = "", [], 0
    done = Completion(0, 0, (), ids, [-float(i) for i in range(len(ids))], [], "stop")
    while not answer.ended:
        new = ids[at : at + data.draw(st.integers(1, 3))]
        logprobs = done.logprobs[at : at + len(new)]
        at += len(new)
        end = done if at >= len(ids) else None
        for chunk in answer.chunks(Piece(0, new, "w", end, logprobs=logprobs)):
            [choice] = chunk["choices"]
            text += choice["delta"].get("content", "")
            sent += (choice["logprobs"] or {"content": []})["content"]
            assert text.encode().startswith(b"".join(bytes(t["bytes"]) for t in sent))
    [whole] = answer.document()["choices"]
    assert whole["message"]["content"] == text and whole["logprobs"]["content"] == sent
    told = b"".join(bytes(t["bytes"]) for t in sent)
    held = answer.choices[0].stream.stopped or told == text.encode()
    assert held and text.encode().startswith(told)
    assert [t["logprob"] for t in sent] == [-float(i) for i in range(len(sent))]
    if "\ufffd" not in text:  # each byte is a token, and a character is sent with its last one
        assert [t["bytes"] for t in sent] == [[b] for b in text.encode()]


# ----- privacy -----


@pytest.mark.parametrize(
    "secret",
    [
        "ada.lovelace+x@mail.example.org", "+49 (0)30 1234-5678", "+1 415 555 2671", "415-555-2671",
        "(415) 555-2671", "4111 1111 1111 1111", "5500-0000-0000-0004", "378282246310005",
        "DE89 3704 0044 0532 0130 00", "GB29NWBK60161331926819", "sk-proj-abcdefgh12345678",
        "0049 30 12345678", "hf_aB3dE5gH7jK9mN1pQ3",
    ],
)  # fmt: skip
def test_what_is_private_is_hidden(secret: str) -> None:
    for text in (secret, f"call {secret}.", f"({secret})", f"a\n{secret}\nb"):
        assert secret not in private(text) and HIDDEN in private(text), private(text)


@pytest.mark.parametrize(
    "text",
    [
        "what is 12 * 34?", "in 1999 and 2024", "3.14159265358979", "version 1.2.3.4", "a@b",
        "1234 5678 9012 3456", "x = 0.1234567890123456", "Count the letter a: b a c a",
        "the year 2000-01-01 12:30:00", "f(x) = (12) 3 + 4",
        "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12",
    ],
)  # fmt: skip
def test_what_is_not_stays(text: str) -> None:
    assert private(text) == text


def test_long_texts_cost_their_length() -> None:
    for text in ("a" * 200_000, "1 " * 100_000, "a@" * 100_000, "+1 " * 70_000, "AB12 " * 40_000):
        private(text)


# ----- clients -----


def test_rates_refill_and_places_come_back() -> None:
    now = [0.0]
    rates = Rates(60, 1, 2, lambda: now[0])
    for _ in range(60):
        rates.count("a")
    with pytest.raises(ApiError, match="60 requests in a minute") as refused:
        rates.count("a")
    assert refused.value.retry_after == pytest.approx(1.0)
    rates.count("b")
    now[0] = 1.0
    rates.count("a")
    rates.enter("a")
    with pytest.raises(ApiError, match="yours"):
        rates.enter("a")
    rates.enter("b")
    with pytest.raises(ApiError, match="all clients"):
        rates.enter("c")
    rates.leave("a")
    rates.enter("c")


def test_a_flood_of_names_is_forgotten() -> None:
    rates = Rates(60, 1, 9999)
    rates.enter("held")
    for i in range(5000):
        rates.count(f"{i}")
    assert len(rates._uses) <= 4097
    rates.leave("held")


def test_tokens_come_from_files_and_the_environment(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# mine\n{'a' * 20}\n\n{'b' * 30}\n")
    with pytest.raises(UserError, match="chmod 600"):
        read_tokens(file, "X", {})
    file.chmod(0o600)
    tokens = read_tokens(file, "X", {"X": "c" * 20})
    assert tokens == ("a" * 20, "b" * 30)
    assert (
        read_tokens(None, "X", {"X": "c" * 20}) == ("c" * 20,) and read_tokens(None, "X", {}) == ()
    )
    assert match(f"Bearer {'a' * 20}", tokens) == "a" * 20
    assert match(None, tokens) is None and match("Bearer ", ()) is None
    for text in ("short\n", "", "with space in it, long\n"):
        file.write_text(text)
        with pytest.raises(UserError, match=str(file)) as refused:
            read_tokens(file, "X", {})
        assert not text.strip() or text.strip() not in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_tokens(tmp_path / "none", "X", {})


def test_loopback() -> None:
    assert all(map(is_loopback, ("localhost", "127.0.0.1", "127.9.9.9", "::1")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "localhost.evil.example", "")))


# ----- the log -----


def answer(number: int, text: str = "fine", **fields: Any) -> dict[str, Any]:
    choice = {"text": text, "token_ids": [1], "logprobs": [-0.5], "weights": [[0, "w"]]}
    return {
        "id": f"cmpl-{number:024x}", "time": 1.0, "client": "c", "model": "base",
        "prompt": [{"role": "user", "content": f"question {number}"}], "sampling": {}, "seed": 0,
        "choices": [{**choice, "finish_reason": "stop"}], **fields,
    }  # fmt: skip


def test_records_come_back_in_order_over_rotations(tmp_path: Path) -> None:
    file = tmp_path / "log[1].jsonl"
    for start in (0, 10):  # two lives of a server
        writer = LogWriter(file, rotate_bytes=1000)
        for i in range(start, start + 10):
            writer.answer(answer(i))
        writer.feedback({"id": "x", "choice": 0, "time": 2.0, "client": "c", "rating": 1})
        writer.close()
    assert len(logs.parts(file)) > 3 and file.stat().st_mode & 0o077 == 0
    records = [r for _, r in read(file)]
    assert [r["id"] for r in records if r["kind"] == "answer"] == [
        answer(i)["id"] for i in range(20)
    ]
    assert all(p.read_text().startswith('{"kind": "shardwise-log"') for p in logs.parts(file))


def test_what_was_redacted_is_not_told_by_its_tokens(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log")
    mail = "ada@mail.example"
    prompt = [{"role": "user", "content": f"write to {mail}"}]
    writer.answer(answer(0, f"dear {mail}", prompt=prompt))
    said = {"id": "x", "choice": 0, "time": 2.0, "client": "c"}
    writer.feedback({**said, "correction": f"to {mail}"})
    writer.close()
    assert mail not in (tmp_path / "log").read_text()
    (_, one), (_, two) = read(tmp_path / "log")
    assert one["choices"][0]["token_ids"] is None and one["choices"][0]["logprobs"] is None
    assert two["correction"] == f"to {HIDDEN}"


def test_clients_keep_their_names_over_restarts_and_hide_them(tmp_path: Path) -> None:
    names = []
    for _ in range(2):
        writer = LogWriter(tmp_path / "log")
        names.append(writer.client("token secret"))
        assert writer.client("other") != names[0]
        writer.close()
    assert names[0] == names[1] and "secret" not in names[0]


def test_one_server_a_log(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path / "log")
    with pytest.raises(UserError, match="another server writes this log"):
        LogWriter(tmp_path / "log")
    writer.close()
    LogWriter(tmp_path / "log").close()


@given(cut=st.integers(0, 400))
def test_a_crash_in_a_line_loses_that_line_alone(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    file = tmp_path_factory.mktemp("cut") / "log"
    writer = LogWriter(file)
    for i in range(2):
        writer.answer(answer(i))
    writer.close()
    data = file.read_bytes()
    file.write_bytes(data[: len(data) - min(cut, len(data))])
    kept = [r["id"] for _, r in read(file)]
    writer = LogWriter(file)
    writer.answer(answer(7))
    writer.close()
    assert [r["id"] for _, r in read(file)] == [*kept, answer(7)["id"]]


@pytest.mark.parametrize(
    "content", [b"hello", b"hello\n", b"\x00\xff" * 10, b"{}\n", b'{"kind": 3']
)
def test_another_file_is_no_log_and_stays(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "precious"
    file.write_bytes(content)
    for use in (LogWriter, lambda f: list(read(f))):
        with pytest.raises(DataError, match="line 1: no log of shardwise serve"):
            use(file)
    assert file.read_bytes() == content


@pytest.mark.parametrize(
    "line",
    [
        "nonsense", "[]", '{"kind": "other"}', '{"kind": "answer"}', '{"kind": "feedback"}',
        json.dumps({"kind": "answer", **answer(0), "prompt": 3}),
        json.dumps({"kind": "answer", **answer(0), "choices": [1]}),
        json.dumps({"kind": "answer", **answer(0), "client": None}),
        json.dumps({"kind": "answer", **answer(0), "more": 1}),
        '{"kind": "feedback", "id": "x", "choice": 0, "client": "c", "rating": 2}',
        '{"kind": "feedback", "id": "x", "choice": 0, "client": "c", "rating": true}',
        '{"kind": "feedback", "id": "x", "choice": 0, "client": "c"}',
        '{"kind": "feedback", "id": "x", "choice": 0, "client": "c", "rating": 1, '
        '"correction": "x"}',
        '{"kind": "feedback", "id": "x", "choice": "0", "client": "c", "rating": 1}',
        "[" * 100_000,
    ],
)  # fmt: skip
def test_a_line_that_no_server_wrote_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "log"
    writer = LogWriter(file)
    writer.answer(answer(0))
    writer.close()
    with file.open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises(DataError, match=f"{file}: line 3: "):
        list(read(file))


def test_no_log_and_no_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such log"):
        list(read(tmp_path / "none"))
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(DataError, match="FIFO"):
        list(read(tmp_path / "fifo"))
