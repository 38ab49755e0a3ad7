"""A trial that runs: a process of its own, bound to its slot, that does not outlive the sweep."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from shardwise.resilience import process
from shardwise.resilience.ending import EXIT_FILE, clear_ending, write_ending
from shardwise.sweep.slots import Slot
from shardwise.sweep.trial import LOG_FILE, Trial, last_line, override_words

# What a rank of some other run left in the environment would make the trial one of its ranks.
_OF_A_RANK = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def command_of(recipe: Path, trial: Trial) -> list[str]:
    """What runs a trial; the same command goes on with it."""
    words = override_words(trial.overrides)
    return [
        sys.executable, "-m", "shardwise", "train", str(recipe), *words, "--nproc",
        str(trial.ranks),
    ]  # fmt: skip


class Running:
    """One trial in one slot. All that it prints goes to ``trial.log``."""

    def __init__(self, trial: Trial, slot: Slot, command: Sequence[str]) -> None:
        self.trial, self.slot = trial, slot
        self.began = time.monotonic()
        self.burnt: float | None = None  # processor seconds, once it has ended
        self.pruned = self._killed = False
        clear_ending(trial.folder)  # it has not ended
        environment = {k: v for k, v in os.environ.items() if k not in _OF_A_RANK}
        if slot.gpus is not None:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(slot.gpus)
        with (trial.folder / LOG_FILE).open("ab") as log:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                process_group=0,  # Ctrl-C reaches the sweep alone, which lets its trials save
                preexec_fn=functools.partial(_enter, os.getpid(), slot.cores),
            )

    def poll(self) -> int | None:
        """Its exit code, 128 + n for a signal; None while it runs. Says how it ended, if it
        could not itself."""
        if self._process.returncode is None:
            try:
                pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            except ChildProcessError:
                return self._ended(self._process.wait())
            if not pid:
                return None
            self._process.returncode = os.waitstatus_to_exitcode(status)
            self.burnt = usage.ru_utime + usage.ru_stime  # of its ranks too, which it waited for
        return self._ended(self._process.returncode)

    def _ended(self, code: int) -> int:
        code = code if code >= 0 else 128 - code
        folder = self.trial.folder
        if not (folder / EXIT_FILE).exists() and not self._killed:
            said = last_line(folder / LOG_FILE)
            write_ending(folder, code or 1, said or f"ended with code {code}, and said nothing")
        return code

    @property
    def seconds(self) -> float:
        """Since its start."""
        return time.monotonic() - self.began

    def signal(self, number: int) -> None:
        """Send a signal unless it has ended."""
        if self._process.returncode is None:
            os.kill(self._process.pid, number)

    def prune(self) -> None:
        """Tell it to save and end, for good."""
        self.pruned = True
        self.signal(signal.SIGUSR1)

    def kill(self) -> None:
        """End it at once; it is open, and goes on from its last checkpoint another time."""
        self._killed = True
        self.signal(signal.SIGKILL)
        self._process.wait()


def _enter(sweep: int, cores: Sequence[int]) -> None:
    """In the new process, before it is the trial."""
    process.die_with(sweep)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, cores)
