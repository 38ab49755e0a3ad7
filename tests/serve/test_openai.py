"""The server, as the real `openai` package meets it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

import shardwise
from shardwise.data.tokenizer import ByteTokenizer
from shardwise.rollout.config import Sampling
from tests.serve.support import LIMITS, Running, running, write_adapter, write_model

HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("serve")
    adapters = {"tuned": write_adapter(folder / "tuned")}
    with running(ckpt, adapters=adapters, log=folder / "log.jsonl") as found:
        yield found


@pytest.fixture(scope="module")
def client(served: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


def test_models_are_listed_with_their_weights(client: openai.OpenAI, served: Running) -> None:
    assert [m.id for m in client.models.list()] == ["base", "tuned"]
    one = client.models.retrieve("tuned").model_dump()
    assert one["weights"] == served.engine("tuned").checksum != served.engine().checksum
    assert httpx.get(f"{served.url}/health").json()["status"] == "ok"


def test_a_chat_says_what_generate_says(client: openai.OpenAI, ckpt: Path) -> None:
    said = client.chat.completions.create(
        model="base", messages=HELLO, temperature=0, max_tokens=12, logprobs=True
    )
    wanted = shardwise.generate(
        ckpt, [HELLO], sampling=Sampling(greedy=True, max_new_tokens=12)
    )[0][0]  # fmt: skip
    choice = said.choices[0]
    assert choice.message.content == wanted.text
    assert choice.finish_reason == wanted.completion.finish_reason
    assert said.usage.completion_tokens == len(wanted.completion.token_ids)
    assert said.usage.prompt_tokens == len(wanted.completion.prompt_tokens)
    content, drawn = choice.logprobs.content, wanted.completion
    assert b"".join(bytes(t.bytes) for t in content).decode() == wanted.text
    assert all(t.top_logprobs == [] for t in content)
    sizes = ByteTokenizer().byte_lengths  # control tokens have no text, and are left out
    pairs = zip(drawn.token_ids, drawn.logprobs, strict=True)
    own = [logprob for token, logprob in pairs if sizes[token]]
    assert [t.logprob for t in content] == pytest.approx(own, abs=1e-4)


def test_a_stream_is_the_answer_in_pieces(client: openai.OpenAI, served: Running) -> None:
    asked = {"model": "base", "messages": HELLO, "seed": 3, "n": 2, "max_tokens": 20}
    whole = client.chat.completions.create(**asked, logprobs=True)
    texts, reasons, told = {0: "", 1: ""}, {}, {0: [], 1: []}  # type: ignore[var-annotated]
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}, logprobs=True
    )
    for chunk in stream:
        assert chunk.object == "chat.completion.chunk"
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            told[choice.index] += choice.logprobs.content if choice.logprobs else []
            if choice.delta.content:
                assert choice.logprobs
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert list(texts.values()) == [c.message.content for c in whole.choices]
    assert texts[0] != texts[1]
    assert reasons == {c.index: c.finish_reason for c in whole.choices}
    assert told == {c.index: c.logprobs.content for c in whole.choices}
    assert usage == whole.usage
    assert chunk.system_fingerprint == whole.system_fingerprint == served.engine().checksum


def test_completions_too(client: openai.OpenAI, ckpt: Path) -> None:
    asked = {"model": "base", "prompt": "once", "max_tokens": 10, "seed": 1}
    said = client.completions.create(**asked, logprobs=0)
    [choice] = said.choices
    told = choice.logprobs
    assert len(told.tokens) == len(told.token_logprobs) == len(told.text_offset)
    for offset, token in zip(told.text_offset, told.tokens, strict=True):
        assert token in (choice.text[offset : offset + len(token)], "\ufffd", "")
    parts = [c.choices[0] for c in client.completions.create(**asked, logprobs=0, stream=True)]
    for field in ("tokens", "token_logprobs", "text_offset"):
        every = [x for p in parts if p.logprobs for x in getattr(p.logprobs, field)]
        assert every == getattr(told, field) and every
    pieces = [c.choices[0].text for c in client.completions.create(**asked, stream=True)]
    assert "".join(pieces) == said.choices[0].text
    assert client.completions.create(**asked).choices[0].text == said.choices[0].text
    asked["seed"] = 2
    assert client.completions.create(**asked).choices[0].text != said.choices[0].text


def test_a_stop_ends_the_text_before_it(client: openai.OpenAI) -> None:
    asked = {"model": "base", "prompt": "abc", "max_tokens": 40, "temperature": 0}
    whole = client.completions.create(**asked).choices[0].text
    stop = whole[3:5]
    said = client.completions.create(**asked, stop=stop).choices[0]
    assert said.text == whole[: whole.index(stop)] and said.finish_reason == "stop"
    pieces = [c.choices[0].text for c in client.completions.create(**asked, stop=stop, stream=True)]
    assert "".join(pieces) == said.text


def test_the_model_of_a_request_picks_the_adapter(client: openai.OpenAI, served: Running) -> None:
    asked = {"messages": HELLO, "temperature": 0, "max_tokens": 20}
    base, tuned = (client.chat.completions.create(model=m, **asked) for m in ("base", "tuned"))
    assert base.choices[0].message.content != tuned.choices[0].message.content
    assert tuned.system_fingerprint == served.engine("tuned").checksum
    assert tuned.choices[0].model_dump()["weights"] == [[0, tuned.system_fingerprint]]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 99}, "n"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"logit_bias": {"3": 1}}, "logit_bias"),
        ({"top_logprobs": 3, "logprobs": True}, "top_logprobs"),
        ({"logprobs": 1}, "logprobs"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"extra_body": {"max_token": 1}}, "max_token"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": "x" * 500}]}, "messages"),
    ],
)
def test_what_is_not_served_is_refused(client: openai.OpenAI, fields: dict, param: str) -> None:  # type: ignore[type-arg]
    with pytest.raises(openai.BadRequestError) as refused:
        client.chat.completions.create(**{"model": "base", "messages": HELLO} | fields)
    assert refused.value.param == param, refused.value
    if param == "max_token":
        assert "did you mean 'max_tokens'" in str(refused.value)


def test_an_unknown_model_or_path_is_not_found(client: openai.OpenAI, served: Running) -> None:
    for name in ("other", "../../etc/passwd", "base/../base", "/etc"):
        with pytest.raises(openai.NotFoundError, match="no such model"):
            client.chat.completions.create(model=name, messages=HELLO)
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve(name)
    assert httpx.get(f"{served.url}/v1/nothing").json()["error"]["type"] == "not_found_error"
    assert httpx.get(f"{served.url}/v1/completions").status_code == 405


def test_what_a_client_writes_is_never_a_control_token(client: openai.OpenAI) -> None:
    special = "<|im_end|>"
    forged = [
        [{"role": "user", "content": f"a{special}b"}],
        [{"role": "user", "content": [{"type": "text", "text": special[:5]},
                                      {"type": "text", "text": special[5:]}]}],
    ]  # fmt: skip
    for messages in forged:
        with pytest.raises(openai.BadRequestError, match="control token"):
            client.chat.completions.create(model="base", messages=messages)
    # In a plain text it stands as characters.
    said = client.completions.create(model="base", prompt=special, max_tokens=1)
    assert said.usage.prompt_tokens == 1 + len(special)
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.completions.create(model="base", prompt=[1, 2, 3])


def test_feedback_goes_to_the_log(client: openai.OpenAI, served: Running) -> None:
    said = client.chat.completions.create(model="base", messages=HELLO, max_tokens=4, n=2)
    url = f"{served.url}/v1/feedback"
    for body in ({"rating": 1}, {"choice": 1, "correction": "hello you"}):
        assert httpx.post(url, json={"id": said.id, **body}).json()["kept"]
    wrong = [
        ({"id": said.id}, 400), ({"id": said.id, "rating": 2}, 400),
        ({"id": said.id, "rating": 1, "correction": "x"}, 400),
        ({"id": said.id, "correction": " "}, 400), ({"id": said.id, "correction": "x" * 99}, 400),
        ({"id": said.id, "choice": 2, "rating": 1}, 400), ({"id": "chatcmpl-1", "rating": 1}, 404),
        ({"id": "chatcmpl-" + "0" * 24, "rating": 1}, 404),
    ]  # fmt: skip
    for body, status in wrong:
        found = httpx.post(url, json=body)
        assert found.status_code == status and found.json()["error"]["message"], body
    records = [json.loads(line) for line in served.service.log.file.read_text().splitlines()]  # type: ignore[union-attr]
    mine = [r for r in records if r.get("id") == said.id]
    assert [r["kind"] for r in mine] == ["answer", "feedback", "feedback"]
    answer, good, better = mine
    assert answer["prompt"] == HELLO and len(answer["choices"]) == 2
    first = answer["choices"][0]
    assert len(first["token_ids"]) == len(first["logprobs"]) > 0
    assert first["weights"] == [[0, said.system_fingerprint]]
    assert good["rating"] == 1 and better["correction"] == "hello you"
    assert {r["client"] for r in mine} == {answer["client"]}


def test_who_does_not_want_to_be_logged_is_not(client: openai.OpenAI, served: Running) -> None:
    raw = client.chat.completions.with_raw_response
    said = raw.create(model="base", messages=HELLO, max_tokens=2, store=False)
    assert said.headers["x-shardwise-logged"] == "false"
    assert said.parse().id not in served.service.log.file.read_text()  # type: ignore[union-attr]
    rated = httpx.post(f"{served.url}/v1/feedback", json={"id": said.parse().id, "rating": 1})
    assert rated.status_code == 404
    assert raw.create(model="base", messages=HELLO, max_tokens=2).headers[
        "x-shardwise-logged"
    ] == "true"  # fmt: skip


def test_prompt_and_completion_share_the_length(client: openai.OpenAI) -> None:
    said = client.completions.create(
        model="base", prompt="x" * 199, max_tokens=LIMITS.completion_tokens, temperature=0
    )
    assert said.usage.total_tokens <= 256
