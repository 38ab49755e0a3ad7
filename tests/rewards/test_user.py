"""Row 21 of the fault matrix: a hostile completion is unscorable; the trainer is unharmed."""

from __future__ import annotations

import logging
import os
import sys
import threading
from pathlib import Path

import pytest

from shardwise.errors import ConfigError
from shardwise.rewards.user import UserReward, UserRewardConfig

# The completion names the attack; the function under test carries it out.
HOSTILE = """
import ctypes, os, socket, subprocess, time
from pathlib import Path

def reward(question, completion, answer, meta):
    print("noise that must not reach the protocol")
    if completion == "hang":
        while True: pass
    if completion == "sleep":
        time.sleep(60)
    if completion == "raise":
        raise ValueError("bad text")
    if completion == "exit":
        os._exit(3)
    if completion == "segfault":
        ctypes.string_at(0)
    if completion == "memory":
        return len(bytearray(1 << 33))
    if completion == "fork":
        for _ in range(10000): os.fork()
    if completion == "spawn":
        subprocess.run(["true"])
    if completion == "network":
        socket.socket()
    if completion == "kill":
        os.kill(os.getppid(), 9)
    if completion == "write":
        Path(meta["canary"]).write_text("x")
    if completion == "delete":
        Path(meta["precious"]).unlink()
    if completion == "flood":
        raise ValueError("x" * 10_000_000)
    if completion == "secret":
        return float("SHARDWISE_TEST_SECRET" in os.environ)
    if completion == "nan":
        return float("nan")
    if completion == "none":
        return None
    if completion == "text":
        return "much"
    return float(completion == answer) + meta.get("bonus", 0)
"""


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reward") / "hostile.py"
    path.write_text(HOSTILE)
    return path


def config(path: Path, **changes: object) -> UserRewardConfig:
    fields = {"function": f"{path}:reward", "timeout_s": 1.0, "memory_mb": 512}
    return UserRewardConfig.model_validate(fields | changes)


def item(completion: str, **meta: object) -> dict[str, object]:
    return {"question": "q", "completion": completion, "answer": "4", "meta": meta}


def test_scores_in_order_over_several_workers(path: Path) -> None:
    items = [item("4" if i % 3 else "5", bonus=i) for i in range(40)]
    with UserReward(config(path, num_workers=2)) as reward:
        found = [s.value for s in reward.score(items)]
        assert found == [float(bool(i % 3)) + i for i in range(40)]
        assert reward.score([]) == []
        assert reward.num_replaced == 0


def test_hostile_items_are_unscorable_and_the_others_are_scored(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDWISE_TEST_SECRET", "hunter2")
    precious = tmp_path / "precious"
    precious.write_text("data")
    canary = tmp_path / "canary"
    attacks = {
        "hang": "timed out",
        "sleep": "timed out",
        "raise": "bad text",
        "exit": "crashed.*exit code 3",
        "segfault": "crashed.*signal 11",
        "memory": "out of memory",
        "fork": "Error",
        "spawn": "Error",
        "network": "PermissionError",
        "kill": "PermissionError",
        "write": "PermissionError",
        "delete": "PermissionError",
        "flood": "ValueError: x+$",
        "nan": "returned nan",
        "none": "returned None",
        "text": "returned a str: 'much'",
    }
    items = [item("4")]
    for attack in attacks:
        items += [item(attack, canary=str(canary), precious=str(precious)), item("4")]
    threads = threading.active_count()
    with UserReward(config(path)) as reward:
        if "signals" not in reward.workers[0].limits:
            pytest.skip("no seccomp on this system")
        found = reward.score(items)
        assert [s.value for s in found[::2]] == [1.0] * (len(attacks) + 1)
        for attack, result in zip(attacks, found[1::2], strict=True):
            assert result.value is None, attack
            assert __import__("re").search(attacks[attack], result.reason), (attack, result.reason)
        assert reward.score([item("secret")])[0].value == 0.0
        assert reward.num_replaced == 4  # hang, sleep, exit, segfault
        pid = reward.workers[0].process.pid
    assert not canary.exists() and precious.read_text() == "data"
    assert threading.active_count() == threads
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_the_batch_has_a_time_limit(path: Path) -> None:
    with UserReward(config(path, timeout_s=30, batch_timeout_s=0.5)) as reward:
        found = reward.score([item("4"), item("sleep"), item("4"), item("4")])
    assert [s.value for s in found] == [1.0, None, None, None]
    assert all("timed out" in s.reason for s in found[1:])


def test_permissions_can_be_given(path: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    allowed = config(path, processes=True, network=True, writes=True)
    with UserReward(allowed) as reward:
        found = reward.score([item("spawn"), item("network"), item("write", canary=str(canary))])
    assert [s.value for s in found] == [0.0] * 3
    assert canary.read_text() == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import nothing_of_this_name\ndef reward(*a): return 1", "ModuleNotFoundError"),
        ("def other(*a): return 1", "no attribute 'reward'"),
        ("import os; os._exit(1)", "did not start"),
        ("while True: pass", "did not start"),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        UserReward(config(path, start_timeout_s=2.0))


def test_bad_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        UserReward(config(tmp_path / "absent.py"))
    for function in ("reward", "a.py", "a.txt:reward", "a.py:x.y"):
        with pytest.raises(ValueError, match=r"path\.py:name"):
            UserRewardConfig(function=function)


def test_missing_limits_are_said(
    path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from shardwise.rewards import user

    monkeypatch.setattr(user, "_LIMITS_WANTED", {"memory", "gravity"})
    with caplog.at_level(logging.WARNING), UserReward(config(path)):
        assert "cannot limit gravity" in caplog.text


def test_a_worker_that_cannot_start_again_stops_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with UserReward(config(path)) as reward:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/nonexistent/python")
            found = reward.score([item("exit"), item("4"), item("4")])
        assert [s.value for s in found] == [None, None, None]
        assert "no worker could be started" in found[-1].reason
        assert [s.value for s in reward.score([item("4")])] == [1.0], "the next batch has one"
