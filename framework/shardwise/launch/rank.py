"""One rank process of a local launch: its environment, its log, its last words.

Two ways lead here: a fork of the launcher (see `shardwise.launch.local` for when that is safe), or
``python -m shardwise.launch.rank`` with the job as JSON in the environment.
"""

from __future__ import annotations

import dataclasses
import faulthandler
import importlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardwise import terminal
from shardwise.config.redact import redact
from shardwise.errors import ShardwiseError, exit_code_of_signal
from shardwise.resilience import ending, process
from shardwise.storage.durable import explain

JOB = "SHARDWISE_JOB"  # in the environment: anybody may read a process's arguments


@dataclasses.dataclass(frozen=True)
class Job:
    """What every rank calls (``module:function``, its JSON arguments) and where it reports."""

    target: str
    args: tuple[Any, ...]
    logs: str

    def log(self, rank: int) -> Path:
        """All that the rank wrote to stdout and stderr (rank 0: its traceback only)."""
        return Path(self.logs) / f"rank_{rank}.log"

    def error(self, rank: int) -> Path:
        """The exception that ended the rank, as JSON; absent when it died without one."""
        return Path(self.logs) / f"rank_{rank}.error.json"

    def done(self, rank: int) -> Path:
        """Made when the target has returned; a rank that ends without it has not done its work."""
        return Path(self.logs) / f"rank_{rank}.done"

    def dumps(self) -> str:
        """As JSON, for the environment of a rank."""
        return json.dumps(dataclasses.asdict(self))


def run(job: Job, environment: Mapping[str, str], launcher: int) -> int:
    """Be the rank that ``environment`` says; returns the exit code."""
    os.environ.update(environment)
    rank = int(environment["RANK"])
    process.die_with(launcher)
    if rank > 0:
        _redirect(job.log(rank))
    faulthandler.enable()
    ending.last_words = lambda error: _report(error, job, rank)
    try:
        module, _, name = job.target.partition(":")
        getattr(importlib.import_module(module), name)(*job.args)
        job.done(rank).touch()
    except KeyboardInterrupt:
        return exit_code_of_signal(signal.SIGINT)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        return _report(error, job, rank)
    return 0


def _report(error: BaseException, job: Job, rank: int) -> int:
    code = error.exit_code if isinstance(error, ShardwiseError) else 1
    frames = traceback.extract_tb(error.__traceback__)
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""
    record = {
        "rank": rank,
        "time": time.time(),
        "type": type(error).__name__,
        "message": redact(str(error)),
        "place": place,
        "expected": isinstance(error, ShardwiseError),
        "exit_code": code,
    }
    text = redact("".join(traceback.format_exception(error)))
    if rank > 0:
        terminal.say(text, sys.stderr)
    try:
        if rank == 0:  # it owns the terminal, where the launcher will say it in one line
            job.log(rank).write_text(text)
        partial = job.error(rank).with_suffix(".partial")
        partial.write_text(json.dumps(record))
        partial.replace(job.error(rank))
    except OSError as failure:  # a full disk must not hide the reason
        terminal.say(f"{text}{explain(failure, job.logs)}", sys.stderr)
    return code


def _redirect(log: Path) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)


if __name__ == "__main__":
    terminal.log_to_stderr()
    given = json.loads(os.environ.pop(JOB))
    job = Job(given["target"], tuple(given["args"]), given["logs"])
    code = run(job, os.environ, int(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of a broken process group could keep the interpreter from ending
