"""What `preflight` says of layouts, before anything is started."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardwise.config.load import load_config
from shardwise.errors import ConfigError
from shardwise.stages.run import preflight
from tests.stages.recipes import recipe


@pytest.mark.parametrize(
    ("layout", "world", "more"),
    [
        ("dp3", 2, []),  # another number of ranks
        ("tp4.sp", 6, []),
        ("dp2.hsdp2.tp4", 2, []),
        ("tp8", 8, []),  # more than there are heads
        ("pp4", 4, []),  # more than there are layers
        ("pp2.zbv", 2, ["engine.compile=true", "model.num_layers=4"]),
        # Every batch of a ramp counts.
        ("pp2.v2", 2, ["model.num_layers=4", "stages.0.batch.ramp_start=5",
                       "stages.0.batch.ramp_steps=3", "stages.0.batch.micro_batch=1"]),
    ],
)  # fmt: skip
def test_the_layout_that_is_offered_can_be_taken(
    tmp_path: Path, layout: str, world: int, more: list[str]
) -> None:
    config = recipe(tmp_path / "run", "pretrain")
    with pytest.raises(ConfigError) as caught:
        preflight(load_config(config, [f"engine.layout={layout}", *more]).config, world)
    offered = re.search(r"nearest: (engine\.layout=\S+)", str(caught.value))
    assert offered is not None, str(caught.value)
    preflight(load_config(config, [offered[1], *more]).config, world)
