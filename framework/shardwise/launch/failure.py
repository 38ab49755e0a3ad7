"""Which rank failed first, and how to say it in one line."""

from __future__ import annotations

import dataclasses
import json
import signal
from collections.abc import Sequence
from pathlib import Path

from shardwise.errors import ExitCode, exit_code_of_signal
from shardwise.launch.rank import Job
from shardwise.resilience.ending import CONSEQUENCE


@dataclasses.dataclass(frozen=True)
class Failure:
    """How one rank ended. ``expected``: a ShardwiseError, whose message stands by itself."""

    rank: int
    exit_code: int
    time: float  # seconds since the epoch
    text: str
    log: Path
    expected: bool = False
    consequence: bool = False

    @staticmethod
    def read(rank: int, code: int | None, ended: float, job: Job) -> Failure:
        """From a rank's exit status (negative: a signal) and, if it left one, its report."""
        status = code or 0
        report = job.error(rank)
        if report.exists():
            record = json.loads(report.read_text())
            message = record["message"].strip()
            last = message.splitlines()[-1] if message else ""
            place = f" ({record['place']})" if record["place"] else ""
            return Failure(
                rank,
                int(record["exit_code"]) or 1,
                float(record["time"]),
                message if record["expected"] else f"{record['type']}: {last}{place}",
                job.log(rank),
                bool(record["expected"]),
                bool(CONSEQUENCE.search(message)),
            )
        if status < 0:
            text = f"killed by {signal.Signals(-status).name}"
            return Failure(rank, exit_code_of_signal(-status), ended, text, job.log(rank))
        text = f"exited with code {status}" + ("" if status else " before its work was done")
        return Failure(rank, status or ExitCode.FAILED, ended, text, job.log(rank))

    def sentence(self, world: int) -> str:
        """One line for the terminal."""
        if self.expected:
            return self.text
        log = f"; log: {self.log}" if self.log.exists() else ""
        return f"rank {self.rank} of {world} failed: {self.text}{log}"


def root_cause(failures: Sequence[Failure]) -> Failure:
    """The first failure that is not the consequence of another rank's."""
    return min(failures, key=lambda f: (f.consequence, f.time, f.rank))
