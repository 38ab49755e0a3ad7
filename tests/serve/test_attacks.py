"""What a hostile client can try, and what the server makes of it."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from shardwise.adapters.peft import CONFIG, WEIGHTS
from tests.serve.support import LIMITS, Running, running, until, write_adapter, write_model

TOKEN, OTHER, ADMIN = "a" * 20, "b" * 20, "z" * 20
CHAT = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
QUICK = dataclasses.replace(LIMITS, read_timeout=0.3, send_timeout=0.3)


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def served(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    log = tmp_path_factory.mktemp("serve") / "log.jsonl"
    with running(ckpt, log=log, limits=QUICK) as found:
        yield found


@pytest.fixture(scope="module")
def guarded(ckpt: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "out").mkdir()
    with running(
        ckpt, adapters={"own": folder / "out"}, log=folder / "log.jsonl",
        tokens=(TOKEN, OTHER), admin=(ADMIN,),
    ) as found:  # fmt: skip
        yield found


@contextlib.contextmanager
def connected(served: Running) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as found:
        yield found


def answers(served: Running) -> bool:
    return httpx.post(f"{served.url}/v1/chat/completions", json=CHAT).status_code == 200


def post(served: Running, content: bytes | str, path: str = "chat/completions", **headers: str):  # type: ignore[no-untyped-def]
    headers = {"content-type": "application/json"} | {
        k.replace("_", "-"): v for k, v in headers.items()
    }
    return httpx.post(f"{served.url}/v1/{path}", content=content, headers=headers)


@pytest.mark.parametrize(
    "body",
    [
        "", "{", "nonsense", "[]", "null", "1", '"text"', b"\xff\xfe", "[" * 3000, '{"a":' * 700,
        '{"messages": "hi"}', '{"messages": [1]}', '{"messages": [{"role": "user"}]}',
        '{"messages": [{"role": "user", "content": null}]}', '{"model": 3}', "{}",
        '{"messages": [{"role": "user", "content": "\\ud800"}]}', '{"n": ' + "9" * 4000 + "}",
        '{"messages": [{"role": "user", "content": "x"}], "max_tokens": -1}',
        '{"messages": [{"role": "user", "content": "x"}], "max_tokens": true}',
        '{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        '{"messages": [{"role": "user", "content": "x"}], "temperature": Infinity}',
        '{"messages": [{"role": "user", "content": "x", "tool_calls": []}]}',
        '{"messages": [{"role": "user", "content": "x"}], "seed": 1e3}',
        '{"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}',
    ],
    ids=str,
)  # fmt: skip
def test_what_is_no_request_is_told_so(served: Running, body: bytes | str) -> None:
    found = post(served, body)
    assert found.status_code == 400
    error = found.json()["error"]
    assert error["type"] == "invalid_request_error" and error["message"]
    assert "Traceback" not in found.text


def test_huge_bodies_are_not_read(served: Running) -> None:
    assert post(served, b"x" * 5000).status_code == 413
    with connected(served) as line:  # what is announced is enough
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                     b"application/json\r\nContent-Length: 99999999999999\r\n\r\n")  # fmt: skip
        assert b"413" in line.recv(4096)
    with connected(served) as line:  # and what is not
        line.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: "
                     b"application/json\r\nTransfer-Encoding: chunked\r\n\r\n")  # fmt: skip
        with contextlib.suppress(OSError):
            for _ in range(50):
                line.sendall(b"400\r\n" + b"x" * 1024 + b"\r\n")
        assert b"413" in line.recv(4096)
    assert answers(served)


def test_header_floods_end_the_connection(served: Running) -> None:
    many = {f"x-{i}": "y" * 100 for i in range(120)}
    assert httpx.get(f"{served.url}/v1/models", headers=many).status_code in (200, 400, 431)
    many = {f"x-{i}": "y" * 100 for i in range(400)}
    assert httpx.get(f"{served.url}/v1/models", headers=many).status_code in (400, 431)
    with connected(served) as line, contextlib.suppress(OSError):
        line.sendall(b"GET /v1/models HTTP/1.1\r\n")
        for i in range(100_000):
            line.sendall(b"x-%d: yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy\r\n" % i)
        raise AssertionError("headers without end were taken")
    assert answers(served)


def closed(line: socket.socket) -> bool:
    """Whether the other side has given up: at the latest when its keep-alive ends, after 5 s."""
    line.settimeout(20)
    try:
        while line.recv(4096):
            pass
    except TimeoutError:
        return False
    except OSError:
        pass
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET /v1/mod",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX-A: b\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        b"Content-Length: 50\r\n\r\n{",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\nGET /heal",
    ],
)
def test_slow_clients_are_let_go(served: Running, sent: bytes) -> None:
    with connected(served) as line:
        line.sendall(sent)
        assert closed(line)
    assert answers(served)


def test_who_never_reads_does_not_hold_a_sequence(ckpt: Path) -> None:
    limits = dataclasses.replace(QUICK, in_flight=1, in_flight_per_client=1)
    with running(ckpt, limits=limits) as served:
        body = json.dumps(CHAT | {"stream": True, "max_tokens": 60}).encode()
        with connected(served) as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
            line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            line.sendall(b"Content-Type: application/json\r\n")
            line.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body)
            until(lambda: answers(served))


def test_who_leaves_releases_its_sequence(ckpt: Path, tmp_path: Path) -> None:
    with running(ckpt, log=tmp_path / "log.jsonl") as served:
        served.engine().pause = 0.02
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        long = {**CHAT, "max_tokens": 64, "seed": 5, "n": 2}
        stream = client.chat.completions.create(**long, stream=True)
        next(stream)
        assert served.service.worker.in_flight == 2
        stream.close()
        until(lambda: not served.engine().flying)
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.1).chat.completions.create(**long)
        until(lambda: not served.engine().flying)
        assert served.service.rates._busy == 0
        assert len(served.service.log.file.read_text().splitlines()) == 1  # type: ignore[union-attr]


def test_an_answer_ends_at_its_deadline(ckpt: Path) -> None:
    with running(ckpt, limits=dataclasses.replace(LIMITS, deadline=0.3)) as served:
        served.engine().pause = 0.05
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        said = client.chat.completions.create(**CHAT | {"max_tokens": 64, "seed": 1})
        assert said.choices[0].finish_reason == "length"
        assert 0 < said.usage.completion_tokens < 60


def test_requests_are_limited_in_rate_and_in_flight(ckpt: Path) -> None:
    limits = dataclasses.replace(LIMITS, per_minute=3, in_flight_per_client=1)
    with running(ckpt, limits=limits) as served:
        served.engine().pause = 0.3
        slow = threading.Thread(target=answers, args=(served,))
        slow.start()
        until(lambda: served.service.worker.in_flight)
        assert not answers(served)
        slow.join()
        httpx.get(f"{served.url}/v1/models")
        refused = httpx.get(f"{served.url}/v1/models")
        assert refused.status_code == 429 and int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        assert httpx.get(f"{served.url}/health").status_code == 200


def test_a_page_in_a_browser_reaches_nothing(served: Running) -> None:
    assert post(served, json.dumps(CHAT), content_type="text/plain").status_code == 415
    assert post(served, json.dumps(CHAT), host="evil.example").status_code == 403
    assert post(served, json.dumps(CHAT), host="localhost:99").status_code == 200
    asked = httpx.options(f"{served.url}/v1/chat/completions", headers={"origin": "https://evil"})
    assert "access-control-allow-origin" not in asked.headers


def test_tokens(guarded: Running) -> None:
    url = f"{guarded.url}/v1/chat/completions"

    def status(header: str | bytes | None, where: str = url) -> int:
        return httpx.post(
            where, json=CHAT, headers={} if header is None else {"authorization": header}
        ).status_code  # fmt: skip

    assert status(f"Bearer {TOKEN}") == status(f"bearer {OTHER}") == 200
    for wrong in (None, "", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}",
                  f"Bearer {ADMIN}", b"Bearer \xff"):  # fmt: skip
        assert status(wrong) == 401
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="wrong", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="no valid token"):
        client.models.list()
    text = guarded.service.log.file.read_text()  # type: ignore[union-attr]
    assert TOKEN not in text and "127.0.0.1" not in text


def test_nobody_rates_the_answers_of_others(guarded: Running) -> None:
    def ask(token: str, path: str, body: dict) -> httpx.Response:  # type: ignore[type-arg]
        headers = {"authorization": f"Bearer {token}"}
        return httpx.post(f"{guarded.url}/v1/{path}", json=body, headers=headers)

    said = ask(TOKEN, "chat/completions", CHAT).json()
    assert ask(OTHER, "feedback", {"id": said["id"], "rating": -1}).status_code == 404
    assert ask(TOKEN, "feedback", {"id": said["id"], "rating": 1}).status_code == 200


def test_the_admin_alone_swaps_weights_and_names_no_path(guarded: Running, tmp_path: Path) -> None:
    outside = write_adapter(tmp_path / "outside")
    assert {CONFIG, WEIGHTS} <= {p.name for p in outside.iterdir()}

    def update(token: str, **body: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {token}"}
        return httpx.post(f"{guarded.url}/admin/update_weights", json=body, headers=headers)

    assert update(TOKEN, model="own").status_code == 403
    assert update(ADMIN, model="own").json()["version"] == "base"
    assert update(ADMIN, model="other").status_code == 404
    for version in (str(outside), "../outside", "versions/x", ".", "", "base/..", "0" * 32):
        found = update(ADMIN, model="own", version=version)
        assert found.status_code == 409, version
        assert "stay as they are" in found.json()["error"]["message"]
    assert update(ADMIN, model="own", folder=str(outside)).status_code == 400


def test_the_log_cannot_be_written_is_no_answer(ckpt: Path, tmp_path: Path) -> None:
    with running(ckpt, log=tmp_path / "log.jsonl") as served:
        writer = served.service.log
        assert writer is not None

        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        writer._rotate_bytes = -1
        writer._rotate = full  # type: ignore[method-assign]
        found = post(served, json.dumps(CHAT))
        assert found.status_code == 503 and "log" in found.json()["error"]["message"]


def test_an_engine_that_breaks_is_told_and_goes_on(ckpt: Path) -> None:
    with running(ckpt) as served:
        engine = served.engine()
        whole = engine.step
        engine.step = lambda: 1 / 0  # type: ignore[assignment]
        found = post(served, json.dumps(CHAT))
        assert found.status_code == 500
        assert found.json()["error"]["message"] == "the engine failed: ZeroDivisionError"
        engine.step = whole  # type: ignore[method-assign]
        assert answers(served) and time.monotonic() > 0
