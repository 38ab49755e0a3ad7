"""What the curves of a run say is wrong: pure rules over series, each with its numbers.

A rule takes curves and answers with a `Check`: ``clear``, ``found`` or ``too_short`` to say.
Rules are tuned to be silent on healthy noise; thresholds are named constants, so that a reader
can see what was looked for. "Robust sigma" is 1.4826 times the median absolute deviation, which
equals the standard deviation for normal noise but ignores outliers.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from shardwise.config.metrics import Metric
from shardwise.report.series import EMPTY, Floats, Series

Status = Literal["clear", "found", "too_short"]

MIN_POINTS = 30
FALL_SHARE = 0.02  # a loss that falls by less than 2 % of its start has not fallen
SPIKE_SIGMA, SPIKE_SHARE, SPIKE_WINDOW = 10.0, 0.10, 25
PERIOD_CORRELATION, SWING_SHARE = 0.5, 0.02
STALL_TAIL, STALL_SHARE, STALL_LR = 0.4, 0.005, 0.2
OVERFIT_RISE, OVERFIT_POINTS = 0.02, 5
REWARD_RISE, ACCURACY_DROP, LENGTH_FACTOR, STOPPED_RISE = 0.10, 0.02, 1.5, 0.05
SATURATED_REWARD = 0.9
ENTROPY_SHARE = 0.1
DEGENERATE_SHARE = 0.8
BOTH_FALL = 1.0  # nats an answer


@dataclass(frozen=True)
class Check:
    """A rule's answer for one stage. ``message`` says what was found, or what was looked at."""

    rule: str
    status: Status
    message: str
    numbers: dict[str, float] = field(default_factory=dict)
    advice: str = ""


def robust_sigma(values: Floats) -> float:
    """1.4826 * median absolute deviation from the median."""
    return float(1.4826 * np.median(np.abs(values - np.median(values)))) if len(values) else 0.0


def noise_sigma(values: Floats) -> float:
    """Noise of a curve from its neighbours' differences, so that a trend does not count."""
    return robust_sigma(np.diff(values)) / float(np.sqrt(2)) if len(values) > 2 else 0.0


def ends(values: Floats, share: float = 0.2) -> tuple[float, float, float]:
    """Mean of the first and of the last ``share`` of a curve, and their difference's noise.

    The noise is the standard error of the difference, from `noise_sigma`.
    """
    k = max(1, int(len(values) * share))
    error = noise_sigma(values) * float(np.sqrt(2 / k))
    return float(values[:k].mean()), float(values[-k:].mean()), error


def _too_short(rule: str, n: int, need: int = MIN_POINTS) -> Check:
    return Check(rule, "too_short", f"{n} points, the rule needs {need}", {"points": n})


def never_falls(loss: Series) -> Check:
    """Does the loss end at least 2 % (and three standard errors) below its start?"""
    rule, values = "loss never falls", loss.values
    if len(values) < MIN_POINTS:
        return _too_short(rule, len(values))
    start = float(np.median(values[: max(3, len(values) // 20)]))
    _, end, error = ends(values)
    numbers = {"start": start, "end": end, "standard_error": error}
    if start - end > max(FALL_SHARE * abs(start), 3 * error):
        return Check(rule, "clear", f"fell from {start:.4g} to {end:.4g}", numbers)
    return Check(
        rule,
        "found",
        f"the loss started at {start:.4g} and ends at {end:.4g}: not even "
        f"{FALL_SHARE:.0%} lower (standard error {error:.2g})",
        numbers,
        "Look at the learning rate first (ten times higher, ten times lower), then at a decoded "
        "batch with its loss mask: are the targets what you think they are?",
    )


def _rolling_median(values: Floats, window: int) -> Floats:
    """Median of the ``window`` values before each one (fewer at the start; itself at index 0)."""
    out = np.empty_like(values)
    if len(values) > window:
        blocks = np.lib.stride_tricks.sliding_window_view(values, window)
        out[window:] = np.median(blocks[: len(values) - window], axis=1)
    for i in range(min(window, len(values))):
        out[i] = np.median(values[:i]) if i else values[0]
    return out


def spikes(loss: Series) -> Check:
    """Points far above the median of the 25 before: 10 robust sigma and 10 %.

    Noise grows with the loss, so sigma is that of the excess over the median, in its share.
    """
    rule, values = "loss spikes", loss.values
    if len(values) < MIN_POINTS:
        return _too_short(rule, len(values))
    before = _rolling_median(values, SPIKE_WINDOW)
    # Near 0 a share says nothing: there the curve's own level is the measure.
    level = max(SPIKE_SHARE * float(np.abs(values).mean()), 1e-12)
    scale = np.maximum(np.abs(before), level)
    excess = (values - before) / scale
    sigma = max(robust_sigma(excess[SPIKE_WINDOW:]), 1e-12)
    limit = max(SPIKE_SIGMA * sigma, SPIKE_SHARE)
    high = np.flatnonzero(excess > limit)
    high = high[high >= 5]  # the first points have no past to compare with
    starts = high[np.diff(high, prepend=-100) > 5]  # what is that close is one spike
    numbers = {"spikes": float(len(starts)), "sigma": sigma}
    if not len(starts):
        return Check(rule, "clear", f"no point above {SPIKE_SIGMA:g} robust sigma", numbers)
    worst = int(high[np.argmax(excess[high])])
    _, end, _ = ends(values, 0.1)
    recovered = end <= before[worst] + limit * scale[worst]
    numbers |= {
        "worst_step": float(loss.steps[worst]),
        "worst_value": float(values[worst]),
        "before": float(before[worst]),
    }
    count = "one spike" if len(starts) == 1 else f"{len(starts)} spikes"
    at = "at" if len(starts) == 1 else "the worst at"
    return Check(
        rule,
        "found",
        f"{count}, {at} step {loss.steps[worst]}: {values[worst]:.4g} where the median of the "
        f"{SPIKE_WINDOW} points before was {before[worst]:.4g} "
        f"({excess[worst]:+.0%}, {excess[worst] / sigma:.0f} robust sigma); "
        + ("the loss came back" if recovered else "the loss has not come back"),
        numbers,
        "Look at that step's samples. If the data are sound: a longer warm-up, a lower learning "
        "rate, a smaller beta2, tighter clipping.",
    )


def oscillates(loss: Series) -> Check:
    """A period in what is left of the loss when its trend is taken away.

    Found when the autocorrelation has a peak of 0.5 or more and the swing is 2 % of the loss.
    """
    rule, n = "loss oscillates", len(loss)
    if n < 2 * MIN_POINTS:
        return _too_short(rule, n, 2 * MIN_POINTS)
    window = max(11, n // 8) | 1
    sums = np.cumsum(np.insert(loss.values - loss.values.mean(), 0, 0.0))
    trend = (sums[window:] - sums[:-window]) / window + loss.values.mean()
    rest = loss.values[window // 2 : n - window // 2] - trend
    rest = rest[len(rest) // 5 :]  # the steep start is not a period
    rest = rest - rest.mean()
    level = float(np.median(np.abs(loss.values[n // 2 :])))
    swing = float(rest.std())
    power = np.abs(np.fft.rfft(rest, 2 * len(rest))) ** 2
    correlation = np.fft.irfft(power)[: len(rest) // 3]
    correlation = correlation / max(float(correlation[0]), 1e-30)
    negative = np.flatnonzero(correlation < 0)
    peak, lag = 0.0, 0
    if len(negative) and negative[0] + 1 < len(correlation):
        lag = int(negative[0] + np.argmax(correlation[negative[0] :]))
        peak = float(correlation[lag])
    pace = float(np.median(np.diff(loss.steps)))
    numbers = {"correlation": peak, "period_steps": lag * pace, "swing": swing, "level": level}
    if peak < PERIOD_CORRELATION or swing <= SWING_SHARE * level or level == 0.0:
        return Check(rule, "clear", f"strongest period has correlation {peak:.2f}", numbers)
    return Check(
        rule,
        "found",
        f"the loss swings by {swing / level:.1%} with a period of about {lag * pace:.0f} steps "
        f"(autocorrelation {peak:.2f})",
        numbers,
        "If the period is that of the data (an epoch, a mixture's turn), shuffle better; else "
        "lower the learning rate or raise the batch size.",
    )


def stalls(loss: Series, lr: Series) -> Check:
    """Does the loss lie flat over its last 40 % although the learning rate is still high?"""
    rule, values = "loss stalls", loss.values
    need = 3 * MIN_POINTS
    if len(values) < need:
        return _too_short(rule, len(values), need)
    tail = values[-int(len(values) * STALL_TAIL) :]
    first, last, error = ends(tail, 0.3)
    fall = first - last
    rate = float(lr.values[-1] / max(lr.values.max(), 1e-30)) if len(lr) else 1.0
    numbers = {"fall": fall, "standard_error": error, "lr_over_peak": rate, "level": last}
    if fall > max(STALL_SHARE * abs(last), 2 * error):
        return Check(rule, "clear", f"still falling: {fall:.3g} in the last 40 %", numbers)
    if rate < STALL_LR:
        return Check(rule, "clear", "flat, but the learning rate has been run down", numbers)
    return Check(
        rule,
        "found",
        f"over its last 40 % the loss fell by {fall:.2g} of {last:.4g} (standard error "
        f"{error:.2g}) while the learning rate is at {rate:.0%} of its peak",
        numbers,
        "Decay the learning rate now, or, if the loss is far from what this size should reach, "
        "look for frozen parameters and a clipped gradient norm that never leaves its limit.",
    )


def overfits(validation: Series, train: Series) -> Check:
    """Is validation above its best by 2 % while training went on falling?"""
    rule, values = "over-fitting", validation.values
    if len(values) < OVERFIT_POINTS:
        return _too_short(rule, len(values), OVERFIT_POINTS)
    best = int(np.argmin(values))
    last = float(values[-1])
    rise = last / float(values[best]) - 1.0 if values[best] else 0.0
    numbers = {
        "best": float(values[best]),
        "best_step": float(validation.steps[best]),
        "last": last,
        "rise": rise,
    }
    after = train.values[train.steps >= validation.steps[best]]
    falling = True
    if len(after) >= 6:
        first_mean, last_mean, _ = ends(after, 0.3)
        numbers |= {"train_then": first_mean, "train_now": last_mean}
        falling = last_mean < first_mean
    if rise <= OVERFIT_RISE or best >= len(values) - 2 or not falling:
        return Check(rule, "clear", f"validation ends {rise:.1%} above its best", numbers)
    return Check(
        rule,
        "found",
        f"validation was best at step {validation.steps[best]} ({values[best]:.4g}) and ends "
        f"{rise:.1%} above it ({last:.4g}), while the training loss went on falling",
        numbers,
        "Use the checkpoint that was best by validation; then more data, fewer epochs, more "
        "weight decay or dropout.",
    )


def nonfinite(loss: Series, grad_norm: Series) -> Check:
    """Were there steps whose loss or gradient norm was NaN or infinite?"""
    rule = "non-finite values"
    numbers = {"loss": float(loss.num_nonfinite), "grad_norm": float(grad_norm.num_nonfinite)}
    if not any(numbers.values()):
        return Check(rule, "clear", "every loss and gradient norm was finite", numbers)
    return Check(
        rule,
        "found",
        f"{loss.num_nonfinite} losses and {grad_norm.num_nonfinite} gradient norms were NaN or "
        "infinite",
        numbers,
        "One or two skipped steps in fp16 are the loss scale finding its level. Otherwise: lower "
        "the learning rate, and look at that step's samples.",
    )


def reward_never_rises(reward: Series) -> Check:
    """Does the reward end above its start by three standard errors?"""
    rule = "reward never rises"
    if len(reward) < MIN_POINTS:
        return _too_short(rule, len(reward))
    first, last, error = ends(reward.values)
    numbers = {"first": first, "last": last, "standard_error": error}
    if last - first > 3 * error or first >= SATURATED_REWARD:
        return Check(rule, "clear", f"from {first:.3f} to {last:.3f}", numbers)
    return Check(
        rule,
        "found",
        f"the mean reward went from {first:.3f} to {last:.3f} (standard error {error:.2g})",
        numbers,
        "Is the start hopeless (reward near 0: no group has a winner) or done (near 1)? Choose "
        "easier or harder problems; otherwise a higher learning rate or more samples a prompt.",
    )


def reward_hacking(
    reward: Series,
    accuracy: Series,
    length: Series,
    stopped: Series = EMPTY,
    num_problems: Series = EMPTY,
) -> Check:
    """Does the reward rise while held-out accuracy falls, or while the length runs away?

    ``accuracy`` starts with what the stage began with. A fall counts when it is two standard
    errors of a difference between shares of ``num_problems``. Length explained by a gain in
    accuracy is no sign, nor are completions that get shorter because more of them end by
    themselves (``stopped``, a share; where it is not known, shorter is no sign).
    """
    rule = "reward hacking"
    if len(reward) < MIN_POINTS:
        return _too_short(rule, len(reward))
    first, last, error = ends(reward.values)
    gain = last - first
    numbers = {"reward_gain": gain, "standard_error": error}
    if gain <= max(REWARD_RISE, 3 * error):
        return Check(rule, "clear", f"the reward rose by {gain:.3f} only", numbers)
    signs = []
    if len(accuracy) >= 2:
        change = float(accuracy.values[-1] - accuracy.values[0])
        numbers["accuracy_change"] = change
        error_of_share = math.sqrt(0.5 / num_problems.last) if num_problems.last else 0.0
        if change < -max(ACCURACY_DROP, 2 * error_of_share):
            signs.append(f"held-out accuracy fell by {-change:.3f}")
    if len(length) >= MIN_POINTS:
        short, long, _ = ends(length.values)
        factor = long / short if short > 0 else 1.0
        numbers["length_factor"] = factor
        rewarded = len(accuracy) >= 2 and numbers["accuracy_change"] > ACCURACY_DROP
        if not rewarded and factor >= LENGTH_FACTOR:
            signs.append(f"completions became {factor:.1f} times as long")
        if not rewarded and factor <= 1 / LENGTH_FACTOR and len(stopped) >= MIN_POINTS:
            before, after, _ = ends(stopped.values)
            numbers["stopped_change"] = after - before
            if after - before < STOPPED_RISE:
                signs.append(
                    f"completions shrank to {factor:.2f} of their length, no more of them ending "
                    "by themselves"
                )
    if not signs:
        return Check(rule, "clear", f"the reward rose by {gain:.3f}, nothing else ran", numbers)
    return Check(
        rule,
        "found",
        f"the reward rose by {gain:.3f} while {' and '.join(signs)}",
        numbers,
        "Read a dozen highly rewarded completions. Then tighten the verifier, or raise the KL "
        "penalty.",
    )


def entropy_collapse(entropy: Series, reward: Series) -> Check:
    """Is the policy's entropy below a tenth of its start before the reward is high?"""
    rule = "entropy collapse"
    if len(entropy) < MIN_POINTS:
        return _too_short(rule, len(entropy))
    first, last, _ = ends(entropy.values, 0.1)
    level = ends(reward.values, 0.1)[1] if len(reward) else float("nan")
    numbers = {"first": first, "last": last, "reward": level}
    if last >= ENTROPY_SHARE * first:
        return Check(rule, "clear", f"from {first:.3g} to {last:.3g} nats", numbers)
    if level >= SATURATED_REWARD:
        return Check(rule, "clear", f"low, but so is what is left: reward {level:.2f}", numbers)
    return Check(
        rule,
        "found",
        f"entropy fell from {first:.3g} to {last:.3g} nats a token while the reward is only "
        f"{level:.2f}: the policy has stopped exploring",
        numbers,
        "Lower the learning rate, sample at a higher temperature, clip higher upwards than "
        "downwards, or take fewer updates a rollout.",
    )


def degenerate_groups(degenerate: Series, reward: Series) -> Check:
    """Are most groups without contrast (all completions rewarded alike) at the end?"""
    rule = "groups without contrast"
    if len(degenerate) < MIN_POINTS:
        return _too_short(rule, len(degenerate))
    _, last, _ = ends(degenerate.values)
    level = ends(reward.values)[1] if len(reward) else float("nan")
    numbers = {"share": last, "reward": level}
    if last <= DEGENERATE_SHARE:
        return Check(rule, "clear", f"{last:.0%} of the groups at the end", numbers)
    mend = "harder" if level > 0.5 else "easier"
    return Check(
        rule,
        "found",
        f"{last:.0%} of the groups had equal rewards at the end (mean reward {level:.2f}); they "
        "teach nothing",
        numbers,
        f"Choose {mend} problems, or more completions a prompt.",
    )


def both_fall(chosen: Series, rejected: Series) -> Check:
    """Do the log-probabilities of chosen and rejected answers both end lower than they began?

    By a nat an answer and three standard errors, each. ``chosen``, ``rejected``: the drift from the
    reference, or where there is none the log-probabilities themselves.
    """
    rule = "both log-probabilities fall"
    if min(len(chosen), len(rejected)) < MIN_POINTS:
        return _too_short(rule, min(len(chosen), len(rejected)))
    numbers: dict[str, float] = {}
    falls = []
    for name, series in (("chosen", chosen), ("rejected", rejected)):
        first, last, error = ends(series.values)
        numbers |= {f"{name}_first": first, f"{name}_last": last}
        falls.append(first - last > max(BOTH_FALL, 3 * error))
    told = ", ".join(
        f"{n} {numbers[f'{n}_first']:+.3g} to {numbers[f'{n}_last']:+.3g}"
        for n in ("chosen", "rejected")
    )
    if not all(falls):
        return Check(rule, "clear", f"nats an answer: {told}", numbers)
    return Check(
        rule,
        "found",
        f"chosen and rejected answers both became less likely (nats an answer: {told}): the margin "
        "grows by unlearning, and what gains is neither",
        numbers,
        "Look at samples. Then a term on the chosen answers (loss.sft_weight), a larger beta, a "
        "lower learning rate, or answers nearer to what the model writes itself (stage online_dpo, "
        "loss.kind apo_zero).",
    )


def fp8_sound(error: Series, underflow: Series, overflow: Series, fallbacks: Series) -> Check:
    """Did every FP8 layer that the sentinel looked at stay close to its unquantised shadow?"""
    rule = "FP8 layers"
    fallen = int(fallbacks.values[-1]) if len(fallbacks) else 0
    worst = {
        name: float(series.values.max())
        for name, series in (("error", error), ("underflow", underflow), ("overflow", overflow))
        if len(series)
    }
    seen = ", ".join(f"{name} {value:.2g}" for name, value in worst.items())
    numbers = {"fallbacks": float(fallen), "looks": float(len(error)), **worst}
    if not fallen:
        return Check(rule, "clear", f"{len(error)} looks, none fell back; worst {seen}", numbers)
    return Check(
        rule,
        "found",
        f"{fallen} layers fell back to unquantised products (see the events); worst {seen}",
        numbers,
        "Underflow or error with one scale for a tensor points to outlier channels: try "
        "engine.fp8.recipe=block or mxfp8, or leave those layers out by engine.fp8.modules. "
        "Overflow with delayed scaling: a shorter history, or a margin.",
    )


RULES: dict[str, Callable[..., Check]] = {
    rule.__name__: rule
    for rule in (
        both_fall,
        degenerate_groups,
        entropy_collapse,
        fp8_sound,
        never_falls,
        nonfinite,
        oscillates,
        overfits,
        reward_hacking,
        reward_never_rises,
        spikes,
        stalls,
    )
}


def diagnose(metrics: Iterable[Metric], get: Callable[[str], Series]) -> list[Check]:
    """What the rules of one stage's declared metrics say; ``get`` has a metric's curve by name.

    A metric that was not logged is not asked about. A rule of another package that is not there,
    or that fails, says so.
    """
    checks = []
    for metric in metrics:
        curve = get(metric.name)
        for rule in metric.rules if len(curve) or curve.num_nonfinite else ():
            if not rule.unless or not len(get(rule.unless)):
                others = {keyword: get(name) for keyword, name in rule.curves.items()}
                checks.append(_ask(rule.name, curve, others))
    return checks


def _ask(name: str, curve: Series, others: Mapping[str, Series]) -> Check:
    if name in RULES:
        return RULES[name](curve, **others)
    module, _, function = name.partition(":")
    try:
        answer = getattr(importlib.import_module(module), function)(curve, **others)
        if not isinstance(answer, Check):
            raise TypeError(f"gave a {type(answer).__name__}, not a Check")
        return answer
    except Exception as error:  # whatever another package raises: the others have their say
        return Check(name, "too_short", f"cannot be asked: {type(error).__name__}: {error}")
