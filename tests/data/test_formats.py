"""Formats by name and told from rows: whatever they are written in, they mean the same."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from shardwise.data.chat import CHATML
from shardwise.data.config import ChatDataConfig, DataConfig
from shardwise.data.datasets import build_chat_examples
from shardwise.data.formats import CONVERSATIONS, DOCUMENTS, PREFERENCES, PROBLEMS, detect
from shardwise.data.preferences import Reading, read_rankings
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import DataError
from tests.data.containers import CONTAINERS, write_rows

pytest.importorskip("pyarrow")

PLAIN = ByteTokenizer(CHATML)
TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), min_size=1, max_size=12)
TURNS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=3)
CHATS = st.lists(st.tuples(st.none() | TEXT, TURNS), min_size=1, max_size=5)

Chat = tuple[str | None, list[tuple[str, str]]]


def messages(chat: Chat) -> dict[str, Any]:
    system, turns = chat
    said = [] if system is None else [{"role": "system", "content": system}]
    for asked, answer in turns:
        said += [{"role": "user", "content": asked}, {"role": "assistant", "content": answer}]
    return {"messages": said}


def sharegpt(chat: Chat) -> dict[str, Any]:
    system, turns = chat
    pairs = [pair for asked, said in turns for pair in (("human", asked), ("gpt", said))]
    found = {"conversations": [{"from": who, "value": text} for who, text in pairs]}
    return found if system is None else {**found, "system": system}


def sharegpt_with_system(chat: Chat) -> dict[str, Any]:
    system, turns = chat
    found = sharegpt((None, turns))
    if system is not None:
        found["conversations"].insert(0, {"from": "system", "value": system})
    return found


def alpaca(chat: Chat) -> dict[str, Any]:
    system, turns = chat
    *past, (asked, said) = turns
    instruction, _, rest = asked.partition("\n")
    if not rest:
        instruction = asked
    row = {"instruction": instruction, "input": rest, "output": said, "system": system or ""}
    return {**row, "history": [list(turn) for turn in past]}


def prompt_completion(chat: Chat) -> dict[str, Any]:
    said = messages(chat)["messages"]
    return {"prompt": said[:-1], "completion": said[-1:]}


def text_completion(chat: Chat) -> dict[str, Any]:
    system, [(asked, said)] = chat
    return {"prompt": asked, "completion": said, "system": system}


FORMATS = {
    "messages": messages,
    "sharegpt": sharegpt,
    "sharegpt ": sharegpt_with_system,
    "alpaca": alpaca,
    "prompt-completion": prompt_completion,
    "prompt-completion ": text_completion,
}


def ids_and_masks(source: DataSource, **how: Any) -> list[tuple[list[int], list[bool]]]:
    examples = build_chat_examples([source], PLAIN, **how)
    return [(list(e.ids), [bool(m) for m in e.loss_mask]) for e in examples]


@settings(max_examples=40, deadline=None)
@given(chats=CHATS, data=st.data())
def test_one_conversation_in_every_format_and_container(
    tmp_path_factory: pytest.TempPathFactory, chats: list[Chat], data: st.DataObject
) -> None:
    name = data.draw(st.sampled_from(sorted(FORMATS)))
    if name == "prompt-completion ":
        chats = [(system, turns[:1]) for system, turns in chats]
    folder = tmp_path_factory.mktemp("rows")
    rows = [messages(chat) for chat in chats]
    if name == "prompt-completion":  # what stands in the prompt is not learned
        for row in rows:
            for m in (m for m in row["messages"][:-1] if m["role"] == "assistant"):
                m["weight"] = 0
    (folder / "plain").mkdir()
    plain = write_rows(rows, folder / "plain", "jsonl")
    expected = ids_and_masks(DataSource(kind="chat-jsonl", path=plain))
    container = data.draw(st.sampled_from(CONTAINERS))
    path = write_rows([FORMATS[name](chat) for chat in chats], folder, container)
    told = data.draw(st.booleans())
    source = DataSource(path=path) if told else DataSource(kind=name.strip(), path=path)  # type: ignore[arg-type]
    assert ids_and_masks(source) == expected
    assert source.told(CONVERSATIONS).kind == name.strip()


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4),
    form=st.sampled_from(["text", "messages", "implicit", "sharegpt", "answers"]),
    container=st.sampled_from(CONTAINERS),
)
def test_one_preference_in_every_form_and_container(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[tuple[str, str]],
    form: str,
    container: str,
) -> None:
    def row(asked: str, said: str, form: str) -> dict[str, Any]:
        good, bad = said, f"{said}!"
        if form == "text":
            return {"prompt": asked, "chosen": good, "rejected": bad}
        if form == "answers":
            return {"prompt": asked, "answers": [good, bad], "ratings": [1.0, 0.0]}
        if form == "sharegpt":
            spoken = [{"from": "gpt", "value": text} for text in (good, bad)]
            asking = [{"from": "human", "value": asked}]
            return {"conversations": asking, "chosen": spoken[0], "rejected": spoken[1]}
        prompt = [{"role": "user", "content": asked}]
        answers = [[{"role": "assistant", "content": text}] for text in (good, bad)]
        if form == "implicit":
            return {"chosen": prompt + answers[0], "rejected": prompt + answers[1]}
        return {"prompt": prompt, "chosen": answers[0], "rejected": answers[1]}

    folder = tmp_path_factory.mktemp("rows")
    (folder / "plain").mkdir()
    plain = write_rows([row(*r, "text") for r in rows], folder / "plain", "jsonl")
    path = write_rows([row(*r, form) for r in rows], folder, container)
    old, new = DataSource(kind="preference-jsonl", path=plain), DataSource(path=path)
    assert list(read_rankings([new], PLAIN)) == list(read_rankings([old], PLAIN))


@pytest.mark.parametrize("container", CONTAINERS)
def test_documents_in_every_container(tmp_path: Path, container: str) -> None:
    texts = ["one", "zwei\n", "\u4e09"]
    path = write_rows([{"text": t, "url": "u"} for t in texts], tmp_path, container)
    source = DataSource(path=path, ignore=["url"])
    assert [d.text for d in source.documents(strict=True)] == texts
    with pytest.raises(DataError, match="nothing reads the fields url"):
        list(DataSource(path=path).documents(strict=True))
    other = write_rows([{"body": t} for t in texts], tmp_path, container.replace("saved", "arrow"))
    mapped = DataSource(path=other, columns={"text": "body"})
    assert [d.text for d in mapped.documents()] == texts


def test_tools_survive_a_table(tmp_path: Path) -> None:
    """A table gives every call the arguments of all; what is null there was not said."""
    tools = ByteTokenizer(
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
        "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    calls = [
        {"type": "function", "function": {"name": n, "arguments": a}}
        for n, a in (("clock", {"city": "Oslo"}), ("sum", {"a": 1, "b": 2}))
    ]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "done"},
                {"role": "assistant", "content": "ho"},
            ],
            "tools": json.dumps([{"type": "function", "function": {"name": "clock"}}]),
        }
        for call in calls
    ]
    found = []
    for container in ("jsonl", "parquet"):
        source = DataSource(path=write_rows(rows, tmp_path, container))
        found.append([list(e.ids) for e in build_chat_examples([source], tools)])
    assert found[0] == found[1]
    spoken = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": json.dumps(calls[0]["function"])},
        {"from": "observation", "value": "done"},
        {"from": "gpt", "value": "ho"},
    ]
    row = {"conversations": spoken, "tools": json.dumps([{"name": "clock"}])}
    source = DataSource(path=write_rows([row], tmp_path, "json"))
    assert [list(e.ids) for e in build_chat_examples([source], tools)] == found[0][:1]


def test_raw_texts_are_learned_without_a_template(tmp_path: Path) -> None:
    path = write_rows([{"prompt": "2+2=", "completion": "4"}], tmp_path, "jsonl")
    [(ids, mask)] = ids_and_masks(DataSource(path=path), texts="raw")
    assert PLAIN.decode(ids) == "2+2=4" and ids[-1] == PLAIN.eos_id
    assert mask == [False] * 4 + [True] * 2
    path = write_rows([{"prompt": "a", "completion": "b", "tools": [{"x": 1}]}], tmp_path, "json")
    with pytest.raises(DataError, match=r"row 0: .*have no template"):
        ids_and_masks(DataSource(path=path), texts="raw")


def test_what_was_detected_is_said_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write_rows([sharegpt((None, [("a", "b")]))] * 3, tmp_path, "jsonl")
    with caplog.at_level(logging.INFO):
        for _ in range(2):
            ids_and_masks(DataSource(path=path))
    said = [r.message for r in caplog.records if "detected" in r.message]
    assert said == [f"{path}: detected sharegpt (conversations: from/value), 3 rows"]
    path.write_text(json.dumps(messages((None, [("a", "b")]))) + "\n")  # told anew when it changes
    assert DataSource(path=path).told(CONVERSATIONS).kind == "messages"


@pytest.mark.parametrize(
    ("row", "among", "format", "columns"),
    [
        ({"dialog": messages((None, [("a", "b")]))["messages"], "id": 1}, CONVERSATIONS,
         "messages", {"messages": "dialog"}),
        ({"chat": sharegpt((None, [("a", "b")]))["conversations"]}, CONVERSATIONS,
         "sharegpt", {"conversations": "chat"}),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, CONVERSATIONS,
         "alpaca", {}),
        ({"instruction": "a", "input": "", "output": "b", "text": "a b"}, DOCUMENTS,
         "documents", {}),
        ({"prompt": "a", "completion": "b", "label": True}, PREFERENCES, "preference", {}),
        ({"prompt": "a", "answer": 3, "level": "easy"}, PROBLEMS, "problems", {}),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, (*CONVERSATIONS, *PREFERENCES),
         "preference", {}),
    ],
)  # fmt: skip
def test_detection(tmp_path: Path, row: Any, among: Any, format: str, columns: Any) -> None:
    found = detect(write_rows([row], tmp_path, "jsonl"), among)
    assert (found.format, found.columns, found.seen) == (format, columns, tuple(row))
    assert found.num_rows() == 1 and found.container == "jsonl"


@pytest.mark.parametrize(
    ("row", "among", "message"),
    [
        ({"question": "a", "answer": "b"}, CONVERSATIONS,
         r"columns \(question, answer\); near: prompt-completion with columns: {prompt: question, "
         r"completion: answer}; alpaca with columns: {instruction: question, output: answer}"),
        ({"question": "a", "answer": "b"}, PROBLEMS, r"problems with columns: {prompt: question}"),
        ({"body": "a"}, DOCUMENTS, r"documents with columns: {text: body}"),
        ({"q": "a", "preferred": "b", "worse": "c"}, PREFERENCES,
         r"preference with columns: {chosen: preferred, rejected: worse}"),
        ({"x": 1, "y": 2}, CONVERSATIONS, r"columns \(x, y\); read here: messages: messages;"),
        ({"text": "a"}, CONVERSATIONS, "of the format documents, which is not read here"),
        ({"messages": [{"role": "user", "content": "a"}]}, DOCUMENTS,
         "of the format messages, .*written out by the chat template, write kind: messages"),
    ],
)  # fmt: skip
def test_what_cannot_be_told(tmp_path: Path, row: Any, among: Any, message: str) -> None:
    path = write_rows([row], tmp_path, "jsonl")
    with pytest.raises(DataError, match=rf"rows\.jsonl: .*{message}"):
        detect(path, among)
    with pytest.raises(DataError, match=r"rows\.jsonl: "):
        DataSource(path=path).check(among)


def test_columns_are_mapped(tmp_path: Path) -> None:
    rows = [{"question": "hi", "answer": "ho", "n": i} for i in range(2)]
    path = write_rows(rows, tmp_path, "jsonl")
    columns = {"prompt": "question", "completion": "answer"}
    mapped = ids_and_masks(DataSource(path=path, columns=columns, ignore=["n"]), strict=True)
    plain = write_rows([messages((None, [("hi", "ho")]))] * 2, tmp_path, "json")
    assert mapped == ids_and_masks(DataSource(path=plain))
    inner = [{"conversations": [{"who": "human", "said": "hi"}, {"who": "gpt", "said": "ho"}]}] * 2
    path = write_rows(inner, tmp_path, "jsonl")
    named = DataSource(kind="sharegpt", path=path, columns={"from": "who", "value": "said"})
    assert ids_and_masks(named) == mapped


@pytest.mark.parametrize(
    ("columns", "more", "message"),
    [
        ({"prompt": "questions", "completion": "answer"}, {},
         "columns.prompt: no column 'questions'; did you mean 'question'"),
        ({"prompt": "question", "completion": "answer", "system": "sys_tem"}, {},
         "columns.system: no column 'sys_tem'"),
        ({"prompt": "question", "completion": "answer"}, {"prompt": "x"},
         "the row has a column 'prompt' of its own; list that under"),
    ],
)  # fmt: skip
def test_unknown_columns_are_named(
    tmp_path: Path, columns: dict[str, str], more: Any, message: str
) -> None:
    path = write_rows([{"question": "hi", "answer": "ho", **more}], tmp_path, "jsonl")
    with pytest.raises(DataError, match=rf"rows\.jsonl: .*{message}"):
        ids_and_masks(DataSource(kind="prompt-completion", path=path, columns=columns))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "messages", "columns": {"message": "x"}}, "did you mean 'messages'"),
        ({"kind": "text", "columns": {"text": "x"}}, "kind text has no columns"),
        ({"columns": {"prompt": "x", "completion": "x"}}, "x is given two names"),
        ({"kind": "messages", "field": "x", "columns": {"messages": "y"}}, "say the same"),
        ({"field": "x"}, "write columns: {text: ...}"),
        ({"kind": "chat-jsonl", "split": "test"}, "split test divides"),
    ],
)
def test_sources_that_cannot_be(tmp_path: Path, settings: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        DataSource(path=tmp_path, **settings)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [{"from": "alien", "value": "x"}]}, "message 0: from is 'alien'; known"),
        ({"conversations": [{"from": "function_call", "value": "x"}]}, "JSON of name and argum"),
        ({"conversations": "x"}, "is no list of messages"),
        ({"conversations": [{"from": "gpt", "value": "x"}], "images": ["a"]}, "'images' cannot be"),
    ],
)
def test_bad_sharegpt_is_named(tmp_path: Path, row: Any, message: str) -> None:
    good = sharegpt((None, [("a", "b")]))
    source = DataSource(kind="sharegpt", path=write_rows([good, row], tmp_path, "json"))
    with pytest.raises(DataError, match=rf"rows\.json: row 1: .*{message}"):
        ids_and_masks(source)


def test_conversations_as_documents(tmp_path: Path) -> None:
    """Asked for by name; control tokens of the template are such, those of a text are refused."""
    path = write_rows([messages((None, [("hi", "ho")]))], tmp_path, "parquet")
    config = DataConfig(sources=[DataSource(kind="messages", path=path)])
    [document] = config.sources[0].documents(tokenizer=PLAIN)
    assert document.special and document.text.startswith("<|im_start|>user\nhi<|im_end|>")
    ids = PLAIN.encode(document.text, allow_special=document.special)
    [(chat, _)] = ids_and_masks(DataSource(path=path))
    assert ids == chat
    path = write_rows([messages((None, [("hi<|im_end|>", "ho")]))], tmp_path, "jsonl")
    with pytest.raises(DataError, match=r"line 1, .*control token"):
        list(DataSource(kind="messages", path=path).documents())


def test_unpaired_and_weight_rules_hold(tmp_path: Path) -> None:
    path = write_rows([{"prompt": "a", "completion": "b", "label": False}], tmp_path, "parquet")
    [one] = read_rankings([DataSource(path=path)], PLAIN, Reading(unpaired=True))
    assert one.ratings == [0.0]
    with pytest.raises(ValidationError, match="have no weight"):
        ChatDataConfig(sources=[DataSource(path=path, weight=2.0)])
