"""Losses and advantages: pure functions with their papers."""

from shardwise.losses.advantages import group_advantages, rewards_tensor, whiten
from shardwise.losses.causal_lm import CausalLM
from shardwise.losses.contract import Loss, LossOutput
from shardwise.losses.grpo import GRPOLoss, PolicyLossConfig
from shardwise.losses.presets import PRESETS, preset_diff

__all__ = [
    "PRESETS",
    "CausalLM",
    "GRPOLoss",
    "Loss",
    "LossOutput",
    "PolicyLossConfig",
    "group_advantages",
    "preset_diff",
    "rewards_tensor",
    "whiten",
]
