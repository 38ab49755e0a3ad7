"""`shardwise.train`: start the ranks if need be, run the recipe, write the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise import terminal
from shardwise.config.load import load_config
from shardwise.launch.local import LaunchError, launch_local
from shardwise.report.api import report
from shardwise.report.summary import summary_lines
from shardwise.resilience import process
from shardwise.resilience.attempts import attempt_id
from shardwise.resilience.ending import write_ending
from shardwise.stages.run import preflight, read_samples, run_rank
from shardwise.stages.skipped import SkippedError
from shardwise.storage.durable import told
from shardwise.storage.lock import RunLock


def train(
    config: str | Path | Mapping[str, Any],
    overrides: Sequence[str] = (),
    nproc: int | None = None,
) -> dict[str, Any]:
    """Run every stage of a recipe; returns the summary that ``<run_dir>/summary.json`` holds.

    Under torchrun this process is one rank. Otherwise ``nproc`` ranks are started on this machine
    (None or 1: this process alone). Raises ConfigError before anything is started, LockedError
    before anything is written if another run lives in its directory.
    """
    if (nproc or 1) == 1 or "RANK" in os.environ:
        return train_rank(config, overrides)
    loaded = load_config(config, overrides)
    run = loaded.config
    preflight(run, nproc or 1, loaded.provenance)
    recipe = str(config) if isinstance(config, str | Path) else dict(config)
    target = f"{__name__}:{train_rank.__name__}"
    read_samples(run)
    logs, grace = run.directory / "logs", run.resilience.grace_s
    with RunLock(run.directory) as lock, told(run.directory):
        args = [recipe, list(overrides), lock.token]
        try:
            launch_local(target, args, nproc or 1, logs, grace)
        except LaunchError as error:
            write_ending(run.directory, error.exit_code, f"{error}", attempt_id(lock.token))
            raise
    summary: dict[str, Any] = json.loads((run.directory / "summary.json").read_text())
    return summary


def train_rank(
    config: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), token: str = ""
) -> dict[str, Any]:
    """One rank of a run; rank 0 writes the report and prints the summary.

    ``token``: see `run_rank`.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun leaves its ranks behind when it is killed
        process.die_with(os.getppid())
    loaded = load_config(config, overrides)
    skipped: SkippedError | None = None
    try:
        with told(loaded.config.directory):
            summary = run_rank(loaded, token)
    except SkippedError as error:
        skipped, summary = error, error.summary
    if int(os.environ.get("RANK", "0")) == 0:
        with told(loaded.config.directory):
            page = report(loaded.config.directory)
        terminal.say("\n".join([*summary_lines(summary), f"report: {page}"]), secrets=True)
    if skipped is not None:
        raise skipped
    return summary
