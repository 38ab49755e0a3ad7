"""Each rule finds its fault in synthetic curves, and is silent on healthy ones over many seeds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from shardwise.config.metrics import Metric, Rule
from shardwise.metrics import declared
from shardwise.report import diagnosis as d
from shardwise.report.series import EMPTY, Floats, Series

SEEDS = range(40)


def series(values: Floats | list[float], every: int = 1) -> Series:
    array = np.asarray(values, np.float64)
    return Series(np.arange(1, len(array) + 1) * every, array)


def healthy_loss(seed: int, n: int = 400, noise: float = 0.03) -> Floats:
    """Power-law fall with noise that is proportional to the loss, sometimes heavy-tailed."""
    rng = np.random.default_rng(seed)
    t = np.arange(1, n + 1)
    shape = rng.standard_normal(n) if seed % 2 else rng.standard_t(6, n)
    return (2.0 + 6.5 * t**-0.45) * (1 + noise * shape)


def cosine(n: int, floor: float = 0.1) -> Series:
    return series(floor + (1 - floor) * 0.5 * (1 + np.cos(np.pi * np.arange(n) / n)))


RULES: dict[str, Callable[[Floats], d.Check]] = {
    "never falls": lambda v: d.never_falls(series(v)),
    "spikes": lambda v: d.spikes(series(v)),
    "oscillates": lambda v: d.oscillates(series(v)),
    "stalls": lambda v: d.stalls(series(v), cosine(len(v))),
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [100, 400, 3000])
def test_silent_on_healthy_losses(rule: str, n: int) -> None:
    answers = [RULES[rule](healthy_loss(seed, n)) for seed in SEEDS]
    assert [a.status for a in answers] == ["clear"] * len(SEEDS), [
        a.message for a in answers if a.status != "clear"
    ]


@pytest.mark.parametrize("rule", RULES)
def test_too_short_says_so(rule: str) -> None:
    for n in (0, 1, 5, 20):
        answer = RULES[rule](healthy_loss(0, n))
        assert answer.status == "too_short" and answer.numbers["points"] == n


def test_never_falls() -> None:
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        flat = 8.3 + 0.05 * rng.standard_normal(200)
        assert d.never_falls(series(flat)).status == "found"
        assert d.never_falls(series(np.linspace(8.3, 9.5, 200))).status == "found"
    answer = d.never_falls(series(np.full(50, 4.0)))
    assert answer.numbers["start"] == answer.numbers["end"] == 4.0
    assert "4" in answer.message and answer.advice


@pytest.mark.parametrize("height", [0.5, 3.0])
def test_spike_is_found_where_it_is(height: float) -> None:
    for seed in SEEDS:
        loss = healthy_loss(seed)
        loss[250:253] *= 1 + height
        answer = d.spikes(series(loss, every=10))
        assert answer.status == "found"
        assert answer.numbers["spikes"] == 1
        assert answer.numbers["worst_step"] in (2510, 2520, 2530)
        assert "came back" in answer.message


def test_spike_without_recovery() -> None:
    loss = healthy_loss(1)
    loss[300:] += 4.0
    answer = d.spikes(series(loss))
    assert answer.status == "found" and "has not come back" in answer.message


@pytest.mark.parametrize("period", [4, 10, 25])
def test_oscillation_and_its_period(period: int) -> None:
    for seed in SEEDS:
        n = 400
        loss = healthy_loss(seed, n) * (1 + 0.12 * np.sin(2 * np.pi * np.arange(n) / period))
        answer = d.oscillates(series(loss, every=5))
        assert answer.status == "found", answer.message
        # the autocorrelation may peak at a multiple of the period
        turns = answer.numbers["period_steps"] / (5 * period)
        assert turns == pytest.approx(round(turns), abs=0.26)


def test_stall_needs_a_high_learning_rate() -> None:
    found = 0
    for seed in SEEDS:
        loss = healthy_loss(seed)
        rng = np.random.default_rng(seed)
        loss[120:] = 3.0 + 0.03 * rng.standard_normal(len(loss) - 120)
        constant = series(np.full(len(loss), 1e-3))
        found += d.stalls(series(loss), constant).status == "found"
        assert d.stalls(series(loss), cosine(len(loss), 0.0)).status == "clear"
    assert found >= 0.9 * len(SEEDS)  # a lucky slope of pure noise may pass for a fall


def test_over_fitting() -> None:
    t = np.linspace(0, 1, 20)
    train = series(5 - 3 * np.linspace(0, 1, 400))
    turning = Series(np.arange(1, 21) * 20, 3.0 + 2 * (t - 0.4) ** 2)
    answer = d.overfits(turning, train)
    assert answer.status == "found"
    assert answer.numbers["best_step"] == pytest.approx(160, abs=20)
    assert answer.numbers["rise"] == pytest.approx(0.24, abs=0.01)
    rising_both = series(5 + np.linspace(0, 1, 400))
    assert d.overfits(turning, rising_both).status == "clear"  # that is divergence
    assert d.overfits(Series(turning.steps[:3], turning.values[:3]), train).status == "too_short"


def test_silent_on_healthy_validation() -> None:
    for seed in SEEDS:
        rng = np.random.default_rng(seed)
        values = (2.0 + 3 * np.exp(-4 * np.linspace(0, 1, 15))) * (
            1 + 0.004 * rng.standard_normal(15)
        )
        train = series(healthy_loss(seed))
        validation = Series(np.arange(1, 16) * 26, values)
        assert d.overfits(validation, train).status == "clear"


def test_nonfinite_is_counted() -> None:
    loss = Series(np.array([1, 3]), np.array([1.0, 2.0]), num_nonfinite=2)
    answer = d.nonfinite(loss, EMPTY)
    assert answer.status == "found" and answer.numbers == {"loss": 2.0, "grad_norm": 0.0}
    assert d.nonfinite(series([1.0]), EMPTY).status == "clear"


def reward(seed: int, start: float, end: float, n: int = 160) -> Series:
    rng = np.random.default_rng(seed)
    curve = start + (end - start) * (1 - np.exp(-3 * np.arange(n) / n)) / (1 - np.exp(-3))
    return series(curve + 0.05 * rng.standard_normal(n))


def test_reward_rises_or_not() -> None:
    for seed in SEEDS:
        assert d.reward_never_rises(reward(seed, 0.3, 0.6)).status == "clear"
        assert d.reward_never_rises(reward(seed, 0.95, 0.95)).status == "clear"
        assert d.reward_never_rises(reward(seed, 0.5, 0.4)).status == "found"
    flat = [d.reward_never_rises(reward(s, 0.3, 0.3)).status for s in SEEDS]
    assert flat.count("found") >= 0.9 * len(SEEDS)


def test_reward_hacking() -> None:
    falling = Series(np.array([20, 160]), np.array([0.5, 0.3]))
    rising = Series(np.array([20, 160]), np.array([0.5, 0.8]))
    longer = series(np.linspace(20, 90, 160))
    constant = series(np.full(160, 20.0))
    for seed in SEEDS:
        up = reward(seed, 0.3, 0.8)
        answer = d.reward_hacking(up, falling, longer)
        assert answer.status == "found"
        assert "accuracy fell by 0.200" in answer.message and "as long" in answer.message
        assert d.reward_hacking(up, EMPTY, longer).status == "found"
        assert d.reward_hacking(up, rising, longer).status == "clear"  # longer and better
        assert d.reward_hacking(up, rising, constant).status == "clear"
        shorter = series(np.linspace(20, 9, 160))
        more = series(np.linspace(0.2, 0.9, 160))  # they learn to stop
        assert d.reward_hacking(up, EMPTY, shorter, more).status == "clear"
        assert d.reward_hacking(up, EMPTY, shorter).status == "clear"  # nobody knows why
        assert d.reward_hacking(up, rising, shorter, constant).status == "clear"
        answer = d.reward_hacking(up, EMPTY, shorter, constant)
        assert answer.status == "found" and "shrank" in answer.message
        assert d.reward_hacking(up, falling, constant, num_problems=series([512])).status == "found"
        assert (
            d.reward_hacking(up, falling, constant, num_problems=series([8])).status == "clear"
        )  # chance
        assert d.reward_hacking(reward(seed, 0.5, 0.5), falling, longer).status == "clear"


def test_entropy_collapse() -> None:
    rng = np.random.default_rng(0)
    collapse = series(1.5 * np.exp(-6 * np.linspace(0, 1, 160)))
    calm = series(1.5 - np.linspace(0, 0.9, 160) + 0.02 * rng.standard_normal(160))
    for seed in SEEDS:
        low, done = reward(seed, 0.3, 0.5), reward(seed, 0.3, 0.98)
        assert d.entropy_collapse(collapse, low).status == "found"
        assert d.entropy_collapse(collapse, done).status == "clear"  # nothing left to explore
        assert d.entropy_collapse(calm, low).status == "clear"


def test_degenerate_groups() -> None:
    many, few = series(np.linspace(0.2, 0.97, 160)), series(np.linspace(0.1, 0.5, 160))
    answer = d.degenerate_groups(many, reward(0, 0.02, 0.05))
    assert answer.status == "found" and "easier" in answer.advice
    assert "harder" in d.degenerate_groups(many, reward(0, 0.5, 0.95)).advice
    assert d.degenerate_groups(few, reward(0, 0.3, 0.6)).status == "clear"


def asked(kind: str, **curves: Series) -> dict[str, d.Check]:
    """The answers by rule for a stage of ``kind`` that has logged ``curves``."""
    metrics = declared.of({"stages": [{"kind": kind}]})[kind].values()
    return {c.rule: c for c in d.diagnose(metrics, lambda name: curves.get(name, EMPTY))}


def test_rules_are_those_that_the_stage_declares() -> None:
    loss, validation = series(healthy_loss(0)), series([3.0, 2.0])
    supervised = asked("pretrain", loss=loss, val_loss=validation)
    assert {"loss never falls", "over-fitting", "non-finite values"} <= set(supervised)
    assert "over-fitting" not in asked("pretrain", loss=loss)
    rewards = reward(0, 0.3, 0.6)
    policy = asked("grpo", loss=loss, reward_mean=rewards, entropy_estimate=loss)
    assert set(policy) == {
        *("non-finite values", "reward never rises", "reward hacking", "entropy collapse")
    }
    assert asked("grpo") == {}


def test_every_rule_has_a_stage_that_asks_it() -> None:
    kinds = [{"kind": k} for k in ("pretrain", "dpo", "grpo", "ppo")]
    table = declared.of({"stages": kinds}).values()
    named = {rule.name for metrics in table for m in metrics.values() for rule in m.rules}
    assert named == set(d.RULES)


def loud(curve: Series, other: Series) -> d.Check:
    """A rule of another package."""
    return d.Check("too loud", "found", f"{len(curve)} and {len(other)} points")


def broken(curve: Series) -> str:
    return "no check"


def test_rules_of_another_package_and_those_that_are_not_there() -> None:
    here = __name__
    rules = (
        Rule(f"{here}:loud", {"other": "b"}),
        Rule(f"{here}:broken"),
        Rule("gone.away:rule"),
        Rule("never_heard_of"),
        Rule(f"{here}:loud", {"other": "b"}, unless="b"),
    )
    curves = {"a": series([1.0, 2.0]), "b": series([3.0])}
    metrics = [Metric("a", "a", rules=rules), Metric("c", "c", rules=rules)]
    answers = d.diagnose(metrics, lambda name: curves.get(name, EMPTY))
    assert [(a.rule, a.status) for a in answers] == [
        ("too loud", "found"),
        *((r.name, "too_short") for r in rules[1:4]),
    ]
    assert answers[0].message == "2 and 1 points" and "not a Check" in answers[1].message


def test_rolling_median_is_of_the_past() -> None:
    values = np.array([5.0, 1.0, 9.0, 2.0, 8.0, 3.0])
    expected = [5.0, 5.0, 3.0, 5.0, 2.0, 8.0]
    np.testing.assert_array_equal(d._rolling_median(values, 3), expected)


@pytest.mark.parametrize("n", [60, 200])
def test_a_loss_of_zero_has_no_percentages(n: int) -> None:
    """A memorised corpus ends at exactly 0; noise of 1e-9 there is no spike, and no swing."""
    values = np.concatenate([np.linspace(3, 0, n // 3), np.zeros(n - n // 3)])
    values[-5] = 1e-9
    assert d.spikes(series(values)).status == "clear"
    assert d.oscillates(series(values)).status == "clear"
    values[-5] = 2.0
    assert d.spikes(series(values)).status == "found"


def test_both_log_probabilities_falling_is_named() -> None:
    rng = np.random.default_rng(0)
    noise = 0.5 * rng.standard_normal((2, 100))
    down, up = -12.0 * np.linspace(0, 1, 100), 6.0 * np.linspace(0, 1, 100)
    found = d.both_fall(series(0.5 * down + noise[0]), series(down + noise[1]))
    assert found.status == "found" and "less likely" in found.message and found.advice
    for chosen in (up, 0.0 * up):
        assert d.both_fall(series(chosen + noise[0]), series(down + noise[1])).status == "clear"
    assert d.both_fall(series(down[:9]), series(down[:9])).status == "too_short"
    logps = {"logps_chosen": series(0.5 * down), "logps_rejected": series(down)}
    rule = "both log-probabilities fall"
    assert asked("dpo", **logps)[rule].status == "found"
    drifts = {"drift_chosen": series(up), "drift_rejected": series(down)}  # tell more
    assert asked("dpo", **logps, **drifts)[rule].status == "clear"
