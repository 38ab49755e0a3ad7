"""Learning-rate factors and the batch-size ramp as pure functions of the step.

``step`` counts updates from 0. No step is wasted at a learning rate of zero: warm-up starts at
1/warmup_steps, and a decay would reach ``min_ratio`` at the step after the last.

A stage that runs, or is finished, may be given more steps. Which samples a step sees, and the
batch ramp, do not depend on how many steps there are, so the data go on exactly. Of the learning
rate, every step to come has the factor that a stage of the new length has there:

- constant, cosine_restarts: the length is in no formula; the run equals an unbroken longer one.
- wsd: the same as long as the decay had not begun. What was decayed goes back to the peak, until
  the new length's own last ``decay_steps``.
- linear, cosine: the factor rises to where the longer, slower decay stands at that step, and falls
  from there to ``min_ratio`` at the new end.

The run says both numbers when it goes on.
"""

from __future__ import annotations

import functools
import itertools
import math

from shardwise.config.schema import BatchConfig, ScheduleConfig
from shardwise.errors import ConfigError


def lr_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Factor of the peak learning rate for update ``step`` of ``total_steps``, in [0, 1].

    The config has been held against ``total_steps`` (`ScheduleConfig.misfit`).
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.kind == "constant":
        return 1.0
    since = step - config.warmup_steps
    span = total_steps - config.warmup_steps
    if config.kind == "cosine_restarts":
        shape = _cosine(_cycle_progress(since, config.cycle_steps, config.cycle_factor))
    elif since >= span:
        shape = 0.0
    elif config.kind == "cosine":
        shape = _cosine(since / span)
    elif config.kind == "linear":
        shape = 1.0 - since / span
    else:  # WSD: Hu et al. 2024, "MiniCPM", section 4.2, with a linear last phase
        shape = min(1.0, (span - since) / config.decay_steps)
    return config.min_ratio + (1.0 - config.min_ratio) * shape


def _cosine(progress: float) -> float:
    """Half a cosine from 1 to 0: Loshchilov & Hutter 2017, "SGDR", equation 5."""
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def _cycle_progress(since: int, first: int, growth: float) -> float:
    """Position in [0, 1) within the current cycle; cycle i lasts round(first * growth**i) steps."""
    if growth == 1.0:
        return (since % first) / first
    for i in itertools.count():
        length = round(first * growth**i)
        if since < length:
            return since / length
        since -= length
    raise AssertionError("unreachable: every cycle is at least one step long")


def global_batch_at(config: BatchConfig, step: int, unit: int = 1) -> int:
    """Sequences in the global batch of update ``step``.

    A ramp grows linearly from ``ramp_start`` to ``global_batch`` over ``ramp_steps`` updates, each
    size rounded down to a multiple of ``unit`` (at least one unit). ``unit`` decides which samples
    a step sees, so take it from the config, never from the layout, if a run is to be resumed on
    another number of ranks. Raises ConfigError for a ramp that cannot be.
    """
    ramp = _ramp_sizes(config.global_batch, config.ramp_start, config.ramp_steps, unit)
    return ramp[step] if step < len(ramp) else config.global_batch


def consumed_before(config: BatchConfig, step: int, unit: int = 1) -> int:
    """Sequences consumed by the updates 0 to ``step`` - 1: an exact integer."""
    ramp = _ramp_sizes(config.global_batch, config.ramp_start, config.ramp_steps, unit)
    return sum(ramp[:step]) + max(step - len(ramp), 0) * config.global_batch


@functools.lru_cache(maxsize=64)
def _ramp_sizes(full: int, start: int | None, steps: int, unit: int) -> tuple[int, ...]:
    """The global batch of every update of the ramp."""
    if (start is None) != (steps == 0):
        raise ConfigError("batch: ramp_start and ramp_steps go together; give both or neither")
    if full % unit:
        raise ConfigError(f"batch.global_batch: {full} is not a multiple of {unit}")
    if start is None:
        return ()
    if start > full:
        raise ConfigError(f"batch.ramp_start: {start} exceeds batch.global_batch {full}")
    sizes = (start + (full - start) * step // steps for step in range(steps))
    return tuple(max(size // unit, 1) * unit for size in sizes)
