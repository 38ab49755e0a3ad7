"""Local launches: they meet, they fail cleanly, they leave nothing behind."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from shardwise.errors import ShardwiseError, UserError
from shardwise.launch import local
from shardwise.launch import rank as rank_room
from shardwise.metrics.meters import num_cores
from tests.support.daily import daily
from tests.support.pool import CONTEXT

REPOSITORY = Path(__file__).parents[2]


class Launcher:
    """A process that calls `launch_local`, forked from one that has imported torch already."""

    def __init__(
        self,
        target: str,
        folder: Path,
        *args: object,
        nproc: int = 2,
        fresh: bool = False,
        module: str = "tests.launch.targets",
    ) -> None:
        self.folder = folder
        target = f"{module}:{target}"
        self.process = CONTEXT.Process(
            target=_launch, args=(target, [str(folder), *args], folder, nproc, fresh)
        )
        self.process.start()

    def finish(self) -> tuple[int | None, str, str]:
        self.process.join(90)
        out, err = (self.folder / name for name in ("stdout", "stderr"))
        return self.process.exitcode, out.read_text(), err.read_text()


def _launch(target: str, args: list[object], folder: Path, nproc: int, fresh: bool) -> None:
    for fd, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), fd)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as `nohup` does
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also where `&` has it ignored
    os.environ.pop("OMP_NUM_THREADS", None)
    os.environ["PYTHONPATH"] = str(REPOSITORY)
    if fresh:
        local._fork_is_safe = lambda: False
    try:
        local.launch_local(target, args, nproc, folder / "logs", grace_s=60.0)
    except ShardwiseError as error:
        print(error, file=sys.stderr, flush=True)
        os._exit(error.exit_code)


def pids(folder: Path, count: int) -> list[int]:
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        files = [folder / f"{rank}.pid" for rank in range(count)]
        if all(f.exists() and f.read_text() for f in files):
            return [int(f.read_text()) for f in files]
        time.sleep(0.02)
    raise AssertionError("the ranks did not start")


def alive(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rsplit(")", 1)[1].split()[0] != "Z"


@pytest.mark.parametrize("fresh", daily([False, True], 0), ids=["forked", "fresh"])
def test_ranks_meet_and_only_rank_0_speaks(tmp_path: Path, fresh: bool) -> None:
    code, out, err = Launcher("write_sum", tmp_path, nproc=2, fresh=fresh).finish()
    assert code == 0, err
    results = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert [r["sum"] for r in results] == [3, 3]
    assert {r["threads"] for r in results} == {str(max(1, num_cores() // 2))}
    assert out == "hello from 0\n"
    assert (tmp_path / "logs" / "rank_1.log").read_text().startswith("hello from 1\n")
    assert not any(alive(r["pid"]) for r in results)


@pytest.mark.parametrize(
    ("how", "rank", "code", "message"),
    [
        ("raise", 1, 1, "rank 1 of 2 failed: RuntimeError: the cat ate it (targets.py:"),
        ("raise", 0, 1, "rank 0 of 2 failed: RuntimeError: the cat ate it (targets.py:"),
        ("user error", 1, 2, "books.jsonl:7: not JSON; mend the line"),
        ("_exit", 1, 7, "rank 1 of 2 failed: exited with code 7"),
        ("sys.exit", 1, 9, "rank 1 of 2 failed: exited with code 9"),
        ("done early", 1, 1, "rank 1 of 2 failed: exited with code 0 before its work was done"),
        ("SIGKILL", 1, 137, "rank 1 of 2 failed: killed by SIGKILL"),
        ("SIGSEGV", 1, 139, "rank 1 of 2 failed: killed by SIGSEGV"),
        ("SIGABRT", 0, 134, "rank 0 of 2 failed: killed by SIGABRT"),
    ],
)
def test_a_failed_rank_ends_the_run_and_is_named(
    tmp_path: Path, how: str, rank: int, code: int, message: str
) -> None:
    got, _, err = Launcher("fail", tmp_path, rank, how).finish()
    assert got == code, err
    assert err.count(message) == 1, err
    assert "closed by peer" not in err  # the survivor's complaint is not the cause
    assert not any(alive(pid) for pid in pids(tmp_path, 2))
    if how == "raise":
        assert "Traceback" in (tmp_path / "logs" / f"rank_{rank}.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_ranks(tmp_path: Path, number: signal.Signals) -> None:
    launcher = Launcher("linger", tmp_path)
    ranks = pids(tmp_path, 2)
    for pid in (*ranks, launcher.process.pid or 0):
        ignored = Path(f"/proc/{pid}/status").read_text().partition("SigIgn:")[2].split()[0]
        assert int(ignored, 16) >> (signal.SIGHUP - 1) & 1, "as the launcher was started"
    os.kill(launcher.process.pid or 0, number)
    code, _, err = launcher.finish()
    assert code == 128 + number
    assert f"stopped by {number.name}" in err
    assert not any(alive(pid) for pid in ranks)


def test_an_echo_of_a_signal_is_no_second_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a hang-up both the shell and the kernel send one; who presses Ctrl-C twice means it."""
    monkeypatch.setattr(local, "ECHO_SECONDS", 60.0)
    numbers = [signal.SIGHUP, signal.SIGHUP, signal.SIGINT, signal.SIGINT]
    heeded = {signal.SIGHUP: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    old = {n: signal.signal(n, handler) for n, handler in heeded.items()}
    try:
        with local._signals([]) as received:
            for number in numbers:
                signal.raise_signal(number)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
    assert received == numbers[1:]


def test_no_orphans_when_the_launcher_is_killed(tmp_path: Path) -> None:
    launcher = Launcher("linger", tmp_path)
    ranks = pids(tmp_path, 2)
    launcher.process.kill()
    launcher.process.join()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in ranks) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(alive(pid) for pid in ranks)


def test_two_launches_at_once_do_not_collide(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    launchers = [Launcher("write_sum", folder) for folder in folders]
    assert [launcher.finish()[0] for launcher in launchers] == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_secrets_stay_out_of_what_a_failed_rank_leaves(tmp_path: Path, rank: int) -> None:
    code, _, err = Launcher("fail", tmp_path, rank, "secret").finish()
    assert code == 1 and "cannot reach https://<redacted>@example.org" in err
    logs = [p.read_text() for p in (tmp_path / "logs").iterdir()]
    assert any("Traceback" in text for text in logs)
    assert not any("very-secret-value" in text for text in (err, *logs))


def test_a_reason_that_cannot_be_stored_is_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The disk of the logs is full, or gone."""
    job = rank_room.Job("x:y", (), str(tmp_path / "gone"))
    assert rank_room._report(UserError("the reason"), job, 0) == 2
    said = capfd.readouterr().err
    assert "the reason" in said and "gone: cannot be written" in said
