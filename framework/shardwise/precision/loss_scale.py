"""Dynamic loss scaling for fp16 as a state machine over plain numbers.

Small gradients underflow in fp16, so the loss is multiplied by a scale before the backward pass
and the gradients are divided by it before the update (Micikevicius et al. 2018, "Mixed Precision
Training", section 3.2). The scale shrinks when a gradient overflows, in which case the update is
skipped, and grows after a run of good steps. Whether a step overflowed must be the same answer on
every rank: the engine reduces that flag over all ranks before it calls `update`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from shardwise.errors import CheckpointError, ShardwiseError


@dataclasses.dataclass
class DynamicLossScale:
    """``value`` multiplies the loss; ``good_steps`` counts finite steps since it last changed.

    ``growth`` and ``backoff`` default to powers of two, so scaling itself never rounds.
    """

    init: float = 2.0**16
    growth: float = 2.0
    interval: int = 2000
    backoff: float = 0.5
    minimum: float = 2.0**-14
    maximum: float = 2.0**24

    def __post_init__(self) -> None:
        if not 0 < self.minimum <= self.init <= self.maximum:
            raise ValueError(
                f"loss scale: need 0 < minimum <= init <= maximum, got minimum={self.minimum}, "
                f"init={self.init}, maximum={self.maximum}"
            )
        if not (self.growth > 1 and 0 < self.backoff < 1 and self.interval >= 1):
            raise ValueError(
                "loss scale: need growth > 1, 0 < backoff < 1 and interval >= 1, got "
                f"growth={self.growth}, backoff={self.backoff}, interval={self.interval}"
            )
        self.value = self.init
        self.good_steps = 0
        self.num_skipped = 0

    def update(self, found_nonfinite: bool) -> None:
        """Advance by one step.

        Raises ShardwiseError when a step overflows although the scale is at its minimum: then
        the model itself, not the scaling, produces the infinities.
        """
        if found_nonfinite:
            self.good_steps = 0
            self.num_skipped += 1
            if self.value <= self.minimum:
                raise ShardwiseError(
                    f"gradients are not finite even at the smallest loss scale {self.minimum}: "
                    "the model diverged; lower optimizer.lr, or set engine.precision to bf16"
                )
            self.value = max(self.value * self.backoff, self.minimum)
            return
        self.good_steps += 1
        if self.good_steps >= self.interval:
            self.value = min(self.value * self.growth, self.maximum)
            self.good_steps = 0

    def state_dict(self) -> dict[str, float | int]:
        """All that a resume needs, as JSON values."""
        return {
            "scale": self.value,
            "good_steps": self.good_steps,
            "num_skipped": self.num_skipped,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()`. Raises CheckpointError, unchanged, if it does not fit."""
        try:
            scale = float(state["scale"])
            good, skipped = int(state["good_steps"]), int(state["num_skipped"])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"loss-scale state is damaged ({error!r}): {state}") from error
        if not (self.minimum <= scale <= self.maximum and good >= 0 and skipped >= 0):
            raise CheckpointError(
                f"loss-scale state {dict(state)} lies outside [{self.minimum}, {self.maximum}]"
            )
        self.value, self.good_steps, self.num_skipped = scale, good, skipped
