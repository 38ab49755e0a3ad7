"""Row 21 of the fault matrix: a hostile completion is unscorable; the trainer is unharmed."""

# ruff: noqa: E501 (tables)
from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwise.errors import ConfigError
from shardwise.rewards import user
from shardwise.rewards.user import UserReward, UserRewardConfig
from tests.support.module_python import module_python

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
        if reward.sandbox.lacking:
            pytest.skip(f"this system lacks {reward.sandbox.lacking}")
        found = reward.score(items)
        assert [s.value for s in found[::2]] == [1.0] * (len(attacks) + 1)
        for attack, result in zip(attacks, found[1::2], strict=True):
            assert result.value is None, attack
            assert re.search(attacks[attack], result.reason), (attack, result.reason)
        assert reward.score([item("secret")])[0].value == 0.0
        assert reward.num_replaced == 4  # hang, sleep, exit, segfault
        worker = reward.workers[0]
        assert worker is not None
        pid = worker.pid
    assert not canary.exists() and precious.read_text() == "data"
    assert threading.active_count() == threads
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_workers_find_the_libraries_of_a_module_python(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", module_python(tmp_path))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    monkeypatch.setenv("SHARDWISE_TEST_SECRET", "hunter2")
    with UserReward(config(path)) as reward:
        assert [s.value for s in reward.score([item("4"), item("secret")])] == [1.0, 0.0]


def test_the_batch_has_a_time_limit(path: Path) -> None:
    with UserReward(config(path, timeout_s=30, batch_timeout_s=0.5)) as reward:
        found = reward.score([item("4"), item("sleep"), item("4"), item("4")])
    assert [s.value for s in found] == [1.0, None, None, None]
    assert all("timed out" in s.reason for s in found[1:])


def test_the_time_limit_of_a_batch_may_grow_with_it(path: Path) -> None:
    fixed = config(path, num_workers=2)
    assert fixed.seconds_for(10_000) == 60.0
    grows = config(path, num_workers=2, batch_timeout_s=None)
    assert [grows.seconds_for(n) for n in (0, 3, 2047)] == [60.0, 60.0, 1024.0]
    with UserReward(grows) as reward:
        assert reward.score([item("4")])[0].value == 1.0


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
        ("def reward(completions): return 1", r"takes \(completions\): it is called as"),
        ("async def reward(*a): return 1", "is async"),
        ("def reward(*a): yield 1", "yields"),
        ("reward = 3", "is a int, not a function"),
        ("raise KeyboardInterrupt", "KeyboardInterrupt"),
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


def test_a_system_that_cannot_close_the_sandbox_is_refused_unless_told_otherwise(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker's own files, on a system without seccomp."""
    for name in ("worker.py", "confine.py", "seccomp.py"):
        text = Path(user.__file__).with_name(name).read_text()
        if name == "seccomp.py":
            text = text.replace('"x86_64": (', '"pdp10": (').replace('"aarch64": (', '"pdp11": (')
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(user, "__file__", str(tmp_path / "user.py"))
    path = tmp_path / "mine" / "plain.py"
    path.parent.mkdir()
    path.write_text("def reward(question, completion, answer, meta): return 1.0")
    with pytest.raises(ConfigError, match=r"cannot close .*seccomp.*sandbox=best_effort"):
        UserReward(config(path))
    with caplog.at_level(logging.WARNING), UserReward(config(path, sandbox="best_effort")) as r:
        assert "does without" in caplog.text and "seccomp" in caplog.text
        assert r.score([item("x")])[0].value == 1.0


def test_a_worker_that_cannot_start_again_stops_nothing(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with UserReward(config(path)) as reward:
        with monkeypatch.context() as broken:
            broken.setattr(sys, "executable", "/nonexistent/python")
            reward.sandbox.kill()
            found = reward.score([item("4"), item("4")])
        assert [s.value for s in found] == [None, None]
        assert "no worker could be started" in found[-1].reason
        assert [s.value for s in reward.score([item("4")])] == [1.0], "the next batch has one"


LATE = """
import json
import helper
DATA = json.loads(open(__file__.replace("late.py", "data.json")).read())
calls = []
def reward(question, completion, answer, meta):
    calls.append(completion)
    if completion == "helper":
        return helper.two() + DATA["one"]
    if completion == "import":
        import colorsys
        return 1.0
    if completion == "read":
        return float(len(open(__file__).read()) > 9)
    if completion == "numpy":
        import numpy as np
        return np.float32(np.linalg.norm(np.ones(4)) + np.median([1, 2, 3]))
    if completion == "sleep":
        import time
        time.sleep(0.01)
    return float(len(calls))
"""


@pytest.fixture(scope="module")
def late(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("late") / "late.py"
    path.write_text(LATE)
    path.with_name("helper.py").write_text("def two(): return 2.0")
    path.with_name("data.json").write_text('{"one": 1.0}')
    return path


def test_imports_and_files_are_for_loading_unless_reads_are_allowed(late: Path) -> None:
    wanted = [item(n) for n in ("helper", "import", "read", "sleep")]
    with UserReward(config(late)) as reward:
        helper, imported, read, sleep = reward.score(wanted)
    assert helper.value == 3.0 and sleep.value == 4.0, "one process serves them all"
    for refused in (imported, read):
        assert refused.value is None and "refused by the sandbox" in refused.reason
        assert "`preload`" in refused.reason, "with the mend"
    with UserReward(config(late, preload=["colorsys", "numpy"], memory_mb=2048)) as reward:
        assert [s.value for s in reward.score([item("import"), item("numpy")])] == [1.0, 4.0]
    with UserReward(config(late, reads=True, memory_mb=2048)) as reward:
        found = reward.score([*wanted, item("numpy")])
        assert [s.value for s in found] == [3.0, 1.0, 1.0, 4.0, 4.0]
    with pytest.raises(ConfigError, match="no_such_module"):
        UserReward(config(late, preload=["no_such_module"]))


def test_a_fresh_process_for_every_completion(late: Path) -> None:
    with UserReward(config(late, fresh_process=True, num_workers=2)) as reward:
        assert [s.value for s in reward.score([item("")] * 6)] == [1.0] * 6
        assert reward.num_replaced == 0


@pytest.mark.parametrize(
    ("text", "value", "reason"),
    [
        ("True", 1.0, ""), ("-0.0", 0.0, ""), ("fractions.Fraction(1, 4)", 0.25, ""),
        ("Odd(0.5)", 0.5, ""), ("'0.5'", None, "returned a str: '0.5'"), ("[1.0]", None, "TypeError"),
        ("b'1'", None, "returned a bytes"), ("1j", None, "TypeError"), ("(i for i in 'a')", None, "TypeError"),
        ("{}", None, "TypeError"), ("10**400", None, "OverflowError"), ("1e300", None, "scale it"),
        ("float('-inf')", None, "returned -inf"), ("exit(3)", None, "SystemExit: 3"),
        ("fail(KeyboardInterrupt())", None, "KeyboardInterrupt"), ("fail(Worst())", None, "Worst"),
        ("fail(ValueError('\\ud800\\x1b[31m\\n' + 'é' * 999))", None, r"ValueError: .ud800.x1b"),
        ("fail(GeneratorExit())", None, "GeneratorExit"), ("[0][1]", None, "IndexError"),
        ("os.close(3)", None, "crashed"), ("sys.setrecursionlimit(10**6) or deep()", None, "crashed|Recursion|memory|timed out"),
        ("meta.clear() or 1.0", 1.0, ""), ("fail(type('E', (Exception,), {})())", None, "E$"),
    ],
)  # fmt: skip
def test_odd_answers_have_a_reason(
    odd: UserReward, text: str, value: float | None, reason: str
) -> None:
    given = item(text, kept=1)
    found, after = odd.score([given, item("0.5")])
    assert found.value == value and re.search(reason, found.reason), found
    assert found.reason.isprintable() and (value is None or str(found.value) == str(value))
    assert after.value == 0.5 and given["meta"] == {"kept": 1}


@pytest.fixture(scope="module")
def odd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[UserReward]:
    path = tmp_path_factory.mktemp("odd") / "odd.py"
    path.write_text(
        "import fractions, os, sys\n"
        "class Odd:\n    def __init__(self, x): self.x = x\n    def __float__(self): return self.x\n"
        "class Worst(BaseException):\n    def __str__(self): raise SystemExit\n"
        "def fail(e): raise e\ndef deep(): return deep()\n"
        "def reward(question, completion, answer, meta): return eval(completion)\n"
    )
    with UserReward(config(path)) as reward:
        yield reward
