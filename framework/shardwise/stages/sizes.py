"""Sizes that no machine of a run can hold, refused before anything is allocated."""

from __future__ import annotations

import os

import torch

from shardwise.config.run import RunConfig
from shardwise.errors import ConfigError
from shardwise.metrics.meters import total_memory
from shardwise.models.common.config import DecoderConfig


def check_sizes(run: RunConfig, world_size: int) -> None:
    """Raise ConfigError when the weights alone, or one micro-batch's, exceed the memory.

    The least that a layout can ask for: weights in fp32, each on one rank only, and what the
    embedding gives for a micro-batch, shared by all ranks. What fits here may still be too much;
    what does not cannot be.
    """
    assert isinstance(run.model, DecoderConfig)
    local = min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    share, have = local / world_size, total_memory() or 2**50
    if torch.cuda.is_available():
        for device in range(torch.cuda.device_count()):
            have += torch.cuda.get_device_properties(device).total_memory
    sizes = {"model": 4 * run.model.num_parameters() * share}
    for i, stage in run.training_stages():
        tokens = stage.batch.micro_batch * stage.batch.seq_len
        sizes[f"stages.{i}.batch"] = 4 * tokens * run.model.hidden_size * share
    for key, size in sizes.items():
        if size > have:
            what = "its weights" if key == "model" else "micro_batch * seq_len * hidden_size values"
            raise ConfigError(
                f"{key}: {what} take {size / 2**30:,.0f} GiB in fp32 on this machine, which has "
                f"{have / 2**30:,.0f}; make it smaller, or use more machines"
            )
