"""Weights & Biases as a listener; the only file that imports it (extra ``watch``).

Offline mode writes into the run's folder and opens no connection. What W&B collects by itself
(command line, git remote, environment, console output, system statistics) is switched off: any
of it may hold a secret. What we hand over goes through `redact` first.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from shardwise.errors import ConfigError


def require() -> None:
    """Raise ConfigError when wandb is not installed."""
    if find_spec("wandb") is None:
        raise ConfigError(
            "logging.wandb is on, but wandb is not installed; "
            "pip install 'shardwise[watch]' or set logging.wandb=off"
        )


class WandbListener:
    """Logs scalars as ``<stage>/<name>`` over ``<stage>/step`` to one W&B run.

    A resumed run continues under the same id, kept in ``run_dir``/wandb/run-id.
    """

    def __init__(
        self,
        run_dir: Path,
        mode: Literal["offline", "online"],
        project: str,
        name: str,
        config: Mapping[str, Any],
    ) -> None:
        require()
        import wandb

        id_file = run_dir / "wandb" / "run-id"
        id_file.parent.mkdir(parents=True, exist_ok=True)
        run_id = id_file.read_text().strip() if id_file.exists() else secrets.token_hex(4)
        id_file.write_text(run_id)
        settings = wandb.Settings(
            console="off",
            silent=True,
            save_code=False,
            disable_code=True,
            disable_git=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_disable_machine_info=True,
            x_disable_stats=True,
        )
        self._run: Any = wandb.init(
            project=project,
            name=name,
            id=run_id,
            resume="allow" if mode == "online" else None,
            mode=mode,
            dir=str(run_dir),
            config=dict(config),
            settings=settings,
        )
        self._known: set[str] = set()

    def log(self, stage: str, step: int, kind: str, scalars: Mapping[str, float]) -> None:
        """Log finite scalars of one step."""
        if stage not in self._known:
            self._known.add(stage)
            self._run.define_metric(f"{stage}/step", hidden=True)
            self._run.define_metric(f"{stage}/*", step_metric=f"{stage}/step")
        self._run.log({f"{stage}/step": step, **{f"{stage}/{k}": v for k, v in scalars.items()}})

    def rewind(self, stage: str, step: int) -> None:
        """Nothing: W&B cannot unwrite; repeated steps are drawn over the earlier ones."""

    def close(self) -> None:
        """Finish the W&B run."""
        self._run.finish()
