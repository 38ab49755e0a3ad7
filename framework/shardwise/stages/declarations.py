"""Metrics that several stages log, declared once (see `shardwise.config.metrics`)."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

from shardwise.config.metrics import LOSS, VAL_LOSS, Metric, Plot, Rule
from shardwise.losses.config import STEP_PLACES, Aggregate

# --- stages that learn from their own completions -----------------------------------------------

POLICY_LOSS = replace(
    LOSS,
    label="policy loss",
    unit="surrogate loss",
    better=None,
    figure=False,
    rules=LOSS.rules[:1],  # it need not fall, but it must be finite
    plot=Plot("Policy loss", "Loss", caption="A policy's loss need not fall."),
)


def _plot(title: str) -> Plot:
    return Plot(title, "Reinforcement")


REWARD = Metric(
    "reward_mean",
    "reward",
    "mean reward",
    better="higher",
    format=".3f",
    line="reward",
    figure=True,
    plot=_plot("Reward"),
    rules=(
        Rule("reward_never_rises"),
        Rule(
            "reward_hacking",
            {
                "accuracy": "accuracy",
                "length": "completion_length",
                "stopped": "stopped_fraction",
                "num_problems": "num_problems",
            },
        ),
    ),
)
ROLLOUT = (
    REWARD,
    Metric(
        "reward_std", "spread of rewards", "standard deviation", plot=_plot("Spread of rewards")
    ),
    Metric("completion_length", "completion length", "tokens", plot=_plot("Completion length")),
    Metric("stopped_fraction", "completions that end by themselves", "share of completions"),
    Metric(
        "unscorable_fraction", "completions without a score", "share of completions", better="lower"
    ),
)
_REWARD_CURVE = {"reward": REWARD.name}
POLICY = (
    Metric(
        "entropy_estimate",
        "entropy",
        "nats per token",
        plot=_plot("Entropy"),
        rules=(Rule("entropy_collapse", _REWARD_CURVE),),
    ),
    Metric("approx_kl", "KL of the update", "nats per token", plot=_plot("KL of the update")),
    Metric("clip_fraction", "clipped tokens", "share of tokens", plot=_plot("Clipped tokens")),
    Metric("clip_low_fraction", "tokens clipped from below", "share of tokens"),
    Metric("clip_high_fraction", "tokens clipped from above", "share of tokens"),
    Metric("ratio_mean", "mean probability ratio"),
)
GROUPS = (
    Metric(
        "degenerate_fraction",
        "groups without contrast",
        "share of groups",
        better="lower",
        plot=_plot("Groups without contrast"),
        rules=(Rule("degenerate_groups", _REWARD_CURVE),),
    ),
    Metric("kl", "KL to the reference", "nats per token", plot=_plot("KL to the reference")),
    Metric("importance_mean", "mean importance weight"),
)
CRITIC = (
    Metric(
        "kl_response", "KL to the reference", "nats per response", plot=_plot("KL to the reference")
    ),
    Metric("kl_coef", "coefficient of the KL penalty"),
    Metric(
        "explained_variance",
        "explained variance of the critic",
        "1: it foresees the returns",
        better="higher",
        plot=_plot("Explained variance of the critic"),
    ),
    Metric("loss_value", "loss of the critic", "squared return"),
    Metric("critic_grad_norm", "gradient norm of the critic", "L2 norm"),
    Metric("value_mean", "mean value"),
    Metric("value_clip_fraction", "clipped values", "share of tokens"),
    Metric("return_mean", "mean return"),
    Metric("verifier_mean", "reward of the verifier", better="higher"),
    Metric("model_score_mean", "score of the reward model", better="higher"),
)

# --- stages that learn from a teacher -----------------------------------------------------------

TAUGHT = (
    *(replace(m, label=m.label.replace("loss", "divergence")) for m in (LOSS, VAL_LOSS)),
    Metric("top_mass", "student's mass on the teacher's words", "probability"),
    Metric("own_texts", "updates on the student's own texts", "share of updates"),
    *(m for m in ROLLOUT if m.name in ("completion_length", "stopped_fraction")),
)

# --- stages that compare answers ----------------------------------------------------------------

COMPARISON_LOSS = tuple(replace(m, unit="nats per comparison") for m in (LOSS, VAL_LOSS))


def with_validation(*metrics: Metric) -> tuple[Metric, ...]:
    """Each, and the same on held-out data."""
    return tuple(m for metric in metrics for m in (metric, metric.validated()))


def _sides(name: str, words: str, title: str, unit: str, unless: str = "") -> tuple[Metric, Metric]:
    """A figure of the chosen answers and of the rejected ones, in one chart."""
    chosen, rejected = (
        Metric(f"{name}_{side}", f"{words}, {side}", unit, plot=Plot(title, "Preferences"))
        for side in ("chosen", "rejected")
    )
    return replace(
        chosen, rules=(Rule("both_fall", {"rejected": rejected.name}, unless),)
    ), rejected


PAIR_ACCURACY = Metric(
    "pair_accuracy", "pairs in the right order", "share of pairs", better="higher", format=".3f"
)
PREFERENCES = (
    *_sides(
        "logps",
        "log-probability",
        "Log-probability of answers",
        "nats per answer",
        unless="drift_chosen",
    ),
    *_sides("drift", "drift", "Drift from the reference", "nats per answer"),
    *(
        replace(m, rules=())
        for m in _sides("rewards", "reward", "Implicit rewards", "beta times the log-ratio")
    ),
    Metric("margin", "margin of the implicit rewards", better="higher"),
    replace(PAIR_ACCURACY, label="pairs in the right order against the reference"),
    replace(PAIR_ACCURACY, name="ranking_accuracy", label="pairs in the right order by likelihood"),
    Metric("kl_baseline", "KTO's estimate of the KL", "nats per answer"),
)
_BY_PLACE = Plot("Accuracy by step", "Process rewards")
STEPS = (
    Metric(
        "step_accuracy", "steps on the right side", "share of steps", better="higher", format=".3f"
    ),
    Metric("step_score", "mean chance that is given to steps", "probability"),
    Metric("step_label", "mean label of steps", "probability"),
)
VALIDATED_STEPS = (
    Metric(
        "val_calibration_error",
        "calibration error",
        "probability",
        better="lower",
        plot=Plot("Calibration error", "Process rewards"),
    ),
    *(
        Metric(
            f"val_{name}",
            f"{'later steps' if end > 8 else f'step {end}'} on the right side",
            "share of steps",
            better="higher",
            plot=_BY_PLACE,
        )
        for name, _, end in STEP_PLACES
    ),
    *(
        Metric(
            f"val_answer_accuracy_{kind}",
            f"answers judged rightly by {kind}",
            "share of answers",
            better="higher",
            plot=Plot("Answers judged by their steps", "Process rewards"),
        )
        for kind in get_args(Aggregate)
    ),
)
RANKINGS = (
    PAIR_ACCURACY,
    Metric("score_gap", "gap between the scores", better="higher"),
    Metric("score_mean", "mean score"),
)
