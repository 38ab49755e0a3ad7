"""Rows of conversations: every field is used, refused, or named; nothing is dropped unsaid."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from shardwise.data.chat import CHATML
from shardwise.data.conversation import read_conversation
from shardwise.data.datasets import build_chat_examples
from shardwise.data.preferences import Reading, read_rankings
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.errors import DataError

ASK = {"role": "user", "content": "hi"}
SAY = {"role": "assistant", "content": "ho"}
CHAT = [ASK, SAY]
CALL = {"id": "7", "type": "function", "function": {"name": "clock", "arguments": {"city": "Oslo"}}}
CALLS = [
    ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "noon", "tool_call_id": "7", "name": "clock"},
    SAY,
]
TOOLS = [{"type": "function", "function": {"name": "clock"}}]
USING = ByteTokenizer(
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = ByteTokenizer(CHATML)


def source(tmp_path: Path, *rows: Any, kind: str = "chat-jsonl", **more: Any) -> DataSource:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return DataSource(kind=kind, path=file, **more)  # type: ignore[arg-type]


def texts(tokenizer: ByteTokenizer, *args: Any, **how: Any) -> list[tuple[str, str]]:
    """(whole text, learned text) of each example."""
    found = build_chat_examples(args[:1], tokenizer, *args[1:], **how)
    return [
        (
            tokenizer.decode(e.ids, skip_special=False),
            tokenizer.decode([i for i, m in zip(e.ids, e.loss_mask) if m], skip_special=False),
        )
        for e in found
    ]


def test_tools_and_calls_reach_the_template(tmp_path: Path) -> None:
    rows = {"messages": CALLS, "tools": TOOLS}, {"messages": CALLS, "tools": json.dumps(TOOLS)}
    [(text, learned), other] = texts(USING, source(tmp_path, *rows))
    assert json.dumps(TOOLS) in text and other == (text, learned)
    assert learned == json.dumps(CALL["function"]) + "<|im_end|>ho<|im_end|>"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": CHAT, "tools": TOOLS}, "does not use 'tools' of the row"),
        ({"messages": CALLS}, "template"),
        ({"messages": [{**ASK, "name": "Bo"}, SAY]}, "does not use 'name' of message 0"),
        ({"messages": CHAT, "documents": [{"text": "t"}]}, "does not use 'documents'"),
        ({"messages": [ASK, {**SAY, "reasoning_content": "hm"}]}, "'reasoning_content' of mess"),
        ({"messages": CHAT, "images": ["x.png"]}, "'images' cannot be used: pictures"),
        ({"messages": CHAT, "chosen": CHAT}, "'chosen' cannot be used"),
        ({"messages": CHAT, "weight": 2.0}, "'weight' cannot be used"),
        ({"messages": CHAT, "system": "be brief"}, "'system' cannot be used: write it as the fir"),
        ({"messages": CHAT, "prompt": "another"}, "'prompt' cannot be used"),
        ({"prompt": "hi", "completion": "ho"}, "'messages' is missing.*lists of messages"),
        ({"messages": [{"from": "human", "value": "hi"}]}, "kind sharegpt"),
        ({"messages": [ASK, {**SAY, "weight": 0.5}]}, "message 1: weight must be 0 or 1"),
        ({"messages": [{**ASK, "train": True}, SAY]}, "message 0: only an assistant's turn"),
        ({"messages": [ASK, {**SAY, "train": True, "weight": 0}]}, "contradict each other"),
        ({"messages": [ASK, {**SAY, "function_call": {}}]}, "'function_call', which cannot"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAY]},
            "part 0 of its content is .image_url.: pictures",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}, SAY]},
            "template",
        ),
        ({"messages": CHAT, "chat_template_kwargs": {"messages": []}}, "not the row's to say"),
        ({"messages": [ASK, {**SAY, "weight": 0}]}, "no assistant turn to learn"),
    ],
)
def test_what_cannot_be_used_is_refused(row: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=rf"rows\.jsonl: line 2, byte \d+: .*{message}"):
        texts(PLAIN, source(tmp_path, {"messages": CHAT}, row))


def test_messages_that_a_template_skips_are_refused(tmp_path: Path) -> None:
    some = "for message in messages if message.role != 'system'"
    skipping = ByteTokenizer(CHATML.replace("for message in messages", some))
    row = {"messages": [{"role": "system", "content": "hi"}, *CHAT]}
    with pytest.raises(DataError, match=r"leaves out message 0 \(of system\)"):
        texts(skipping, source(tmp_path, row))
    assert len(texts(PLAIN, source(tmp_path, row))) == 1


def test_results_out_of_the_order_of_their_calls_need_a_template_that_names_them(
    tmp_path: Path,
) -> None:
    two = [
        ASK,
        {"role": "assistant", "content": "", "tool_calls": [CALL, {**CALL, "id": "8"}]},
        {"role": "tool", "content": "a", "tool_call_id": "7"},
        {"role": "tool", "content": "b", "tool_call_id": "8"},
        SAY,
    ]
    texts(USING, source(tmp_path, {"messages": two}))
    two[2], two[3] = two[3], two[2]
    with pytest.raises(DataError, match="does not use 'tool_call_id' of message 2"):
        texts(USING, source(tmp_path, {"messages": two}))


def test_weights_choose_the_turns(tmp_path: Path) -> None:
    chat = [ASK, {**SAY, "weight": 0}, ASK, {**SAY, "content": "he", "weight": 1}, ASK, SAY]
    [(_, learned)] = texts(PLAIN, source(tmp_path, {"messages": chat}))
    assert learned == "he<|im_end|>ho<|im_end|>"
    apart = texts(PLAIN, source(tmp_path, {"messages": chat}), "apart")
    assert [learned for _, learned in apart] == ["he<|im_end|>", "ho<|im_end|>"]


def test_prompt_and_completion_of_messages(tmp_path: Path) -> None:
    row = {"prompt": [ASK, SAY, ASK], "completion": [{**SAY, "content": "he"}]}
    [(text, learned)] = texts(PLAIN, source(tmp_path, row))
    assert learned == "he<|im_end|>" and text.count("<|im_end|>") == 4
    said_twice = {"prompt": "hi", "prompt_id": "x", "messages": CHAT}
    assert read_conversation(said_twice).unused == ("prompt_id",)


def test_template_switches_of_a_row(tmp_path: Path) -> None:
    switching = ByteTokenizer("{{ mood }}" + CHATML)
    row = {"messages": CHAT, "chat_template_kwargs": {"mood": "calm"}}
    assert texts(switching, source(tmp_path, row))[0][0].startswith("calm<|im_start|>")


def test_labels_are_named_once_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    chat = [{**ASK, "ts": 3}, SAY]
    rows = [{"messages": chat, "id": i, "images": None} for i in range(3)]
    data = source(tmp_path, *rows, {"messages": CHAT, "url": "x"})
    with caplog.at_level(logging.WARNING):
        assert len(texts(PLAIN, data)) == len(texts(PLAIN, data)) == 4
    [said] = [r.message for r in caplog.records if "nothing reads" in r.message]
    assert said.endswith("id (3 rows), messages[].ts (3 rows), url (1 rows)")
    with pytest.raises(DataError, match=r"line 1, .*the fields id, messages.*strict_fields"):
        texts(PLAIN, data, strict=True)
    ignoring = source(tmp_path, *rows, ignore=["id", "messages[].ts"])
    assert len(texts(PLAIN, ignoring, strict=True)) == 3


def rankings(tmp_path: Path, row: Any, **how: Any) -> Any:
    data = source(tmp_path, row, kind="preference-jsonl")
    return list(read_rankings([data], PLAIN, Reading(**how)))


def test_forms_of_preferences_say_the_same(tmp_path: Path) -> None:
    forms = [
        {"prompt": "hi", "chosen": "ho", "rejected": "no"},
        {"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "no"}]},
        {"chosen": CHAT, "rejected": [ASK, {**SAY, "content": "no"}]},
        {"prompt": "hi", "chosen": CHAT, "rejected": [ASK, {**SAY, "content": "no"}],
         "messages": CHAT},
        {"prompt": "hi", "answers": ["ho", "no"], "ratings": [1, 0]},
        {"messages": [ASK], "chosen": SAY, "rejected": {**SAY, "content": "no"}},
        {"question": "hi", "chosen": "ho", "rejected": "no"},
        {"instruction": "hi", "chosen_response": "ho", "rejected_response": "no"},
    ]  # fmt: skip
    assert len({str(rankings(tmp_path, form)) for form in forms}) == 1
    told = {"system": "be", "question": "hi", "chosen": "ho", "rejected": "no"}
    [system] = [{"role": "system", "content": "be"}]
    whole = {"prompt": [system, ASK], "chosen": "ho", "rejected": "no"}
    assert rankings(tmp_path, told) == rankings(tmp_path, whole)


def test_unpaired_rows_are_read_where_they_are_asked_for(tmp_path: Path) -> None:
    row = {"prompt": "hi", "completion": "ho", "label": True}
    [pair] = rankings(tmp_path, {"prompt": "hi", "chosen": "ho", "rejected": "no"})
    for label in (True, False):
        [one] = rankings(tmp_path, {**row, "label": label}, unpaired=True)
        assert one.prompt == pair.prompt and one.answers == pair.answers[:1]
        assert one.ratings == [float(label)]
    assert rankings(tmp_path, {"prompt": [ASK], "completion": [SAY], "label": True}, unpaired=True)
    for more, how, words in (
        ({}, False, "loss.kind kto"),
        ({"label": 1}, True, "must be true or false, not 1"),
        ({"label": None}, True, "must be true or false"),
        ({"chosen": "ho", "rejected": "no"}, True, "unpaired rows are for"),
        ({"rejected": "no"}, True, "keep one form"),
    ):
        with pytest.raises(DataError, match=rf"line 1, byte 0: .*{words}"):
            rankings(tmp_path, {**row, **more}, unpaired=how)


def test_raw_texts_stand_as_they_are(tmp_path: Path) -> None:
    forms = [
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        {"chosen": "The sky is blue.", "rejected": "The sky is green."},  # an implicit prompt
    ]
    for form in forms:
        [found] = rankings(tmp_path, form, raw=True)
        assert PLAIN.decode(found.prompt) == "The sky is"
        assert [PLAIN.decode(a) for a in found.answers] == [" blue.", " green."]
        assert {a[-1] for a in found.answers} == {PLAIN.eos_id}
    with pytest.raises(DataError, match="no template"):
        rankings(tmp_path, {**forms[0], "system": "x"}, raw=True)
    with pytest.raises(DataError, match="prompt is empty"):
        rankings(tmp_path, {"chosen": "a", "rejected": "b"}, raw=True)
    chat = {"prompt": [ASK], "chosen": [SAY], "rejected": [{**SAY, "content": "no"}]}
    assert rankings(tmp_path, chat, raw=True) == rankings(tmp_path, chat)


def test_prompts_are_cut_from_the_left_and_answers_never(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"prompt": "0123456789", "chosen": "yes", "rejected": "no"}
    with caplog.at_level(logging.WARNING):
        [found] = rankings(tmp_path, row, raw=True, max_prompt=4, max_tokens=8)
        assert PLAIN.decode(found.prompt) == "6789" and PLAIN.decode(found.answers[0]) == "yes"
        assert rankings(tmp_path, row, raw=True, max_tokens=8, drop=True) == []
    assert "1 prompts cut from the left to 4 tokens" in caplog.text
    assert "1 rows of over 8 tokens left out" in caplog.text
    with pytest.raises(DataError, match=r"line 1, byte 0: .*has 14 tokens, batch.seq_len is 8"):
        rankings(tmp_path, row, raw=True, max_tokens=8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"images": ["x"]}, "'images' cannot be used"),
        ({"score_chosen": 4.0}, "'score_chosen' cannot be used: write margin"),
        ({"tools": TOOLS}, "does not use 'tools'"),
        ({"ratings": [1, 0]}, "'ratings' goes with answers"),
        ({"answers": ["a", "b"]}, "'chosen' goes with chosen and rejected"),
        ({"chosen": "no"}, "the same tokens; nothing is preferred"),
        ({"question": "hi"}, "says the same twice"),
        ({"chosen": [ASK]}, "must end with the assistant's"),
        ({"chosen": "long " * 40}, "has [0-9]+ tokens, batch.seq_len is 99"),
        ({"chosen": "cut \ud83d"}, "a lone surrogate is no text"),
    ],
)
def test_preferences_are_held_to_the_same(more: Any, message: str, tmp_path: Path) -> None:
    row = {"prompt": "hi", "chosen": "ho", "rejected": "no", **more}
    with pytest.raises(DataError, match=rf"rows\.jsonl: line 1, byte 0: .*{message}"):
        rankings(tmp_path, row, max_tokens=99)
    with pytest.raises(DataError, match="fields id"):
        rankings(tmp_path, {"prompt": "hi", "chosen": "ho", "rejected": "no", "id": 1}, strict=True)


def test_half_a_surrogate_pair_is_no_text(tmp_path: Path) -> None:
    for row in ({"messages": [{**ASK, "content": "cut \ud83d"}, SAY]}, {"x": [{"\udc00": 1}]}):
        with pytest.raises(DataError, match=r"line 2, byte \d+: character \d: a lone surrogate"):
            texts(PLAIN, source(tmp_path, {"messages": CHAT}, {"messages": CHAT} | row))
    whole = {"messages": [{**ASK, "content": "\U0001f600"}, SAY]}
    assert "\U0001f600" in texts(PLAIN, source(tmp_path, whole))[0][0]
