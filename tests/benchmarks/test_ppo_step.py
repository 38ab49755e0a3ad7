"""Self-check of the PPO benchmark: TRL and the stage agree on a replay, and a toy model races."""

from __future__ import annotations

import pytest

pytest.importorskip("datasets")

import ppo_step as bench
import rl


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.skipif(not (bench.FOLDER / "trl").is_dir(), reason="the benchmark installs TRL 1.12")
def test_agrees_then_races(precision: str) -> None:
    options = ["--tiny", "--turns", "2", "--warmup", "1", "--threads", "1"]
    result = bench.main([*options, "--precision", precision])
    assert len(result["replay"]) == 5
    assert max(result["replay"].values()) < rl.TOLERANCE
    assert result["ratio"] > 0 and set(result["seconds"]) == {bench.OURS, bench.TRL}
