"""A server whose engines two ranks share: the answers of one, and an end in order."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

import shardwise
from shardwise.errors import UserError
from shardwise.serve.api import serve
from tests.serve.support import write_adapter, write_model
from tests.support.pool import free_port


def test_two_ranks_serve_as_one(tmp_path: Path) -> None:
    write_model(model := tmp_path / "model")
    write_adapter(adapter := tmp_path / "adapter")
    sky = [{"role": "user", "content": "the sky"}]
    sampling = {"max_new_tokens": 6, "greedy": True}
    [[base]] = shardwise.generate(model, [sky], sampling=sampling)
    [[other]] = shardwise.generate(model, [sky], sampling=sampling, adapters={"pet": adapter})
    assert base.text != other.text
    url, port = "http://127.0.0.1", free_port()
    options = ["--tp", "2", "--adapter", f"pet={adapter}", "--port", str(port)]
    server = subprocess.Popen(
        [sys.executable, "-m", "shardwise", "serve", str(model), *options],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with httpx.Client(base_url=f"{url}:{port}/v1", timeout=60) as client:
            while not _listens(client):
                assert server.poll() is None, server.communicate()
                time.sleep(0.05)
            for name, wanted in (("base", base.text), ("pet", other.text)):
                asked = {"model": name, "messages": sky, "max_tokens": 6, "temperature": 0}
                [choice] = client.post("/chat/completions", json=asked).json()["choices"]
                assert choice["message"]["content"] == wanted
        server.send_signal(signal.SIGTERM)
        _, err = server.communicate(timeout=60)
        assert server.returncode == 0, err
    finally:
        server.kill()
        server.wait()


def _listens(client: httpx.Client) -> bool:
    try:
        return client.get("/models").status_code == 200
    except httpx.ConnectError:
        return False


def test_torchrun_starts_as_many_ranks_as_share_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="--tp 1: torchrun has started 2 ranks; give --tp 2"):
        serve(tmp_path)
