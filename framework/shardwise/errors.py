"""The exceptions a user meets. Each carries the exit code that the command line returns for it."""

from __future__ import annotations


class ShardwiseError(Exception):
    """Root of all errors that shardwise raises on purpose; the message names the mend."""

    exit_code = 1


class UserError(ShardwiseError, ValueError):
    """Bad usage: a wrong config, a missing file, an impossible layout. Nothing was started."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration that cannot be; the message names key, source, what is allowed."""


class DataError(UserError):
    """Input data that cannot be read; the message names the file and the offset."""


class CheckpointError(ShardwiseError):
    """A checkpoint that is damaged, incomplete, or does not fit; nothing was loaded."""


class CheckFailed(ShardwiseError):  # noqa: N818 (the check failed, not the program)
    """A check that the user asked for did not hold (exit code 1)."""
