"""The exceptions a user meets. Each carries the exit code that the command line returns for it."""

from __future__ import annotations

import enum


class ExitCode(enum.IntEnum):
    """Every exit code but 128 + n; README's table is held to this one by a test."""

    DONE = 0
    FAILED = 1
    USAGE = 2
    DIVERGED = 3
    MOSTLY_SKIPPED = 4
    BUG = 70
    REQUEUE = 85


EXIT_CODES: dict[str, str] = {
    str(int(ExitCode.DONE)): "done",
    str(int(ExitCode.FAILED)): "a check failed, or training broke",
    str(int(ExitCode.USAGE)): "bad usage, config or data: the message says what to mend",
    str(
        int(ExitCode.DIVERGED)
    ): "diverged: gradients stayed non-finite, or a metric is out of bounds",
    str(int(ExitCode.MOSTLY_SKIPPED)): "a stage ended, but most of its updates were skipped",
    str(int(ExitCode.BUG)): "a bug in shardwise",
    str(int(ExitCode.REQUEUE)): "stopped by a signal and saved: run the same command again",
    "128 + n": "stopped by signal n, not saved",
}


def exit_code_of_signal(number: int) -> int:
    """The exit code of a process that signal ``number`` stopped before it could save."""
    return 128 + number


class ShardwiseError(Exception):
    """Root of all errors that shardwise raises on purpose; the message names the mend."""

    exit_code: int = ExitCode.FAILED


class UserError(ShardwiseError, ValueError):
    """Bad usage: a wrong config, a missing file, an impossible layout. Nothing was started."""

    exit_code = ExitCode.USAGE


class ConfigError(UserError):
    """A configuration that cannot be; the message names key, source, what is allowed."""


class DataError(UserError):
    """Input data that cannot be read; the message names the file and the offset."""


class DivergedError(ShardwiseError):
    """Training went where it must not; the weights are those of the last good update."""

    exit_code = ExitCode.DIVERGED


class CheckpointError(ShardwiseError):
    """A checkpoint that is damaged, incomplete, or does not fit; nothing was loaded."""


class CheckFailed(ShardwiseError):  # noqa: N818 (the check failed, not the program)
    """A check that the user asked for did not hold (exit code 1)."""


class Stopped(ShardwiseError):  # noqa: N818 (asked to, not at fault)
    """A signal ended the run; the message says what is saved (exit code 85, or 128 + n)."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code
