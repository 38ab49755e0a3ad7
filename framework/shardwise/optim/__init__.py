"""Optimizers with decay groups, learning-rate schedules and the batch ramp."""

from shardwise.optim.build import build_optimizer, ensure_state, optimizer_tensors, set_lr
from shardwise.optim.local import local_step
from shardwise.optim.schedules import consumed_before, global_batch_at, lr_factor

__all__ = [
    "build_optimizer",
    "consumed_before",
    "ensure_state",
    "global_batch_at",
    "local_step",
    "lr_factor",
    "optimizer_tensors",
    "set_lr",
]
