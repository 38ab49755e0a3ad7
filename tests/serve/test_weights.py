"""Weights that change while the server answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import openai
import pytest

from shardwise.adapters.peft import WEIGHTS
from shardwise.errors import CheckpointError, UserError
from shardwise.serve import versions
from tests.serve.support import running, until, write_adapter, write_model

ADMIN = "z" * 20
ASK = {"model": "own", "messages": [{"role": "user", "content": "hi"}], "temperature": 0}


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model"))


def commit(out: Path, version: str, seed: int, *, accepted: bool = True) -> Path:
    made = write_adapter(out / "work" / version, seed)
    return versions.commit(out, made, {"version": version}, accepted=accepted)


def test_a_swap_drops_no_request_and_says_who_drew_what(ckpt: Path, tmp_path: Path) -> None:
    with running(ckpt, adapters={"own": tmp_path}, admin=(ADMIN,)) as served:
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        engine = served.engine("own")
        base = engine.checksum
        assert base == served.engine().checksum  # before there is a version
        before = client.chat.completions.create(**ASK, max_tokens=60)
        engine.pause = 0.2  # so that the answer outlasts the swap on a busy machine, too
        stream = iter(client.chat.completions.create(**ASK, max_tokens=60, stream=True))
        chunks = [next(stream) for _ in range(3)]
        commit(tmp_path, "1" * 32, 1)  # as `learn` does; the pointer is followed
        while engine.checksum == base:
            chunks.append(next(stream))
        engine.pause = 0.0
        chunks += list(stream)
        first, second = engine.checksum, chunks[-1].system_fingerprint
        spans = chunks[-1].choices[0].model_dump()["weights"]
        assert [w for _, w in spans] == [base, first] and first == second != base
        text = "".join(c.choices[0].delta.content or "" for c in chunks)
        start = spans[1][0]
        assert 0 < start < 60 and len(text) > 0
        after = client.chat.completions.create(**ASK, max_tokens=60)
        assert after.system_fingerprint == first
        said = [before.choices[0].message.content, text, after.choices[0].message.content]
        assert len(set(said)) == 3

        def admin(**body: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {ADMIN}"}
            return httpx.post(f"{served.url}/admin/update_weights", json=body, headers=headers)

        assert admin(model="own").json()["version"] == "1" * 32
        assert admin(model="base", version="1" * 32).status_code == 409
        assert served.engine().checksum == base  # an adapter's weights are its own


def test_a_damaged_version_is_not_served(ckpt: Path, tmp_path: Path) -> None:
    commit(tmp_path, "1" * 32, 1)
    with running(ckpt, adapters={"own": tmp_path}) as served:
        good = served.engine("own").checksum
        place = commit(tmp_path, "2" * 32, 2)
        data = bytearray((place / WEIGHTS).read_bytes())
        until(lambda: served.engine("own").checksum != good)
        two = served.engine("own").checksum
        third = write_adapter(tmp_path / "work" / "3", 3)
        data = bytearray((third / WEIGHTS).read_bytes())
        place = versions.commit(tmp_path, third, {"version": "3" * 32}, accepted=False)
        data[-1] ^= 1
        (place / WEIGHTS).write_bytes(bytes(data))
        place.rename(tmp_path / "versions" / ("3" * 32))
        (tmp_path / versions.POINTER).write_text('{"version": "' + "3" * 32 + '"}')
        with pytest.raises(CheckpointError, match="damaged"):
            versions.folder(tmp_path, "3" * 32)
        client = openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)
        assert client.chat.completions.create(**ASK, max_tokens=2).system_fingerprint == two


def test_a_refused_version_moves_no_pointer(tmp_path: Path) -> None:
    place = commit(tmp_path, "1" * 32, 1, accepted=False)
    assert place.parent.name == "refused" and versions.current(tmp_path) is None
    one = commit(tmp_path, "2" * 32, 2)
    assert versions.current(tmp_path) == "2" * 32
    shutil.copytree(one, tmp_path / "again")
    assert (
        versions.commit(tmp_path, tmp_path / "again", {"version": "2" * 32}, accepted=True) == one
    )
    with pytest.raises(UserError, match="32 digits"):
        versions.folder(tmp_path, "../refused/" + "1" * 32)
    for text in ("nonsense", "[]", "{}", '{"version": "../x"}', '{"version": 3}', "[" * 9999):
        (tmp_path / versions.POINTER).write_text(text)
        with pytest.raises(CheckpointError, match=versions.POINTER[:7]):
            versions.current(tmp_path)
