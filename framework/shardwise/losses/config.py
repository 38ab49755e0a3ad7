"""Settings of the losses. No torch here: recipes are read without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from shardwise.config.presets import Preset
from shardwise.config.schema import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Section
from shardwise.config.section import beside, shown
from shardwise.losses.presets import PPO_PRESETS, PRESETS

# Metrics of a step's accuracy by its place in the answer (from 0): name, first, end.
STEP_PLACES: tuple[tuple[str, int, int], ...] = (
    *((f"step_accuracy_{n + 1}", n, n + 1) for n in range(8)),
    ("step_accuracy_later", 8, 1 << 31),
)

AdvantageKind = Literal["group_std", "group", "rloo", "reinforce_pp"]
Aggregate = Literal["min", "product", "last", "mean"]
Aggregation = Literal[
    "token_mean", "token_sum", "seq_mean_token_mean", "seq_mean_token_sum", "constant"
]


class SurrogateConfig(Section):
    """Clipping and aggregation. A preset fills what is not given."""

    presets: ClassVar[Mapping[str, Preset]]

    clip_low: Fraction = Field(0.2, description="the ratio's lower bound is 1 - clip_low")
    clip_high: NonNegativeFloat = Field(0.2, description="its upper bound is 1 + clip_high")
    dual_clip: Annotated[float, Field(gt=1.0, le=1e12)] | None = Field(
        None,
        description="bound of the loss for negative advantages, in units of -A",
        examples=[3.0],
    )
    aggregation: Aggregation = Field(
        "token_mean",
        description="how tokens' losses become one: a mean or a sum over all tokens, the mean of "
        "sequences' means or sums, or a sum over a constant",
    )
    length_constant: PositiveInt | None = Field(
        None,
        description="aggregation constant: the longest response allowed, in tokens",
        examples=[1024],
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_from_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("preset") in cls.presets:
            return {**cls.presets[data["preset"]].settings, **data}
        return data


class PolicyLossConfig(SurrogateConfig):
    """The policy's loss: advantage, ratio, clipping and KL."""

    presets = PRESETS

    preset: (
        Literal["grpo_deepseekmath", "dapo_paper", "dr_grpo", "gspo", "trl_default", "verl_default"]
        | None
    ) = Field(None, description="published settings, see shardwise.losses.presets")
    advantage: AdvantageKind = Field(
        "group_std",
        description="what a reward is held against: the group's mean (and over its std), the mean "
        "of the group's others, or the batch's",
    )
    advantage_eps: NonNegativeFloat = Field(1e-6, description="added to a group's std")
    ratio: Literal["token", "sequence", "cispo"] = Field(
        "token",
        description="of new and old probabilities: by token, by sequence (GSPO), or as a clipped "
        "weight without gradient (CISPO)",
    )
    kl: Literal["none", "k1", "k2", "k3"] = Field(
        "none",
        description="estimator in the loss; k2 has the on-policy gradient of the KL",
        json_schema_extra=beside(kl_coef=0.001),
    )
    kl_coef: NonNegativeFloat = Field(
        0.0,
        description="weight of the KL from the reference; 0: no reference",
        examples=[0.001],
        json_schema_extra=beside(kl="k3"),
    )
    importance_cap: PositiveFloat | None = Field(
        None,
        description="truncate trainer/sampler importance weights here; null: no correction",
        examples=[2.0],
    )
    importance_level: Literal["token", "sequence"] = Field(
        "token", description="by token or by sequence"
    )

    @model_validator(mode="after")
    def _kl_is_whole(self) -> PolicyLossConfig:
        if self.kl_coef > 0 and self.kl == "none":
            raise ValueError("kl_coef is set but kl is none; choose kl: k1, k2 or k3")
        if self.kl != "none" and self.kl_coef == 0:
            raise ValueError(f"kl is {self.kl} but kl_coef is 0; set kl_coef, or kl: none")
        return self


class PpoLossConfig(SurrogateConfig):
    """Losses of actor and critic: rewards, advantages, objective and clipping."""

    presets = PPO_PRESETS

    preset: Literal["ziegler_2019", "trl_default", "verl_default", "openrlhf_default"] | None = (
        Field(None, description="published settings, see shardwise.losses.presets")
    )
    objective: Literal["clip", "kl_penalty"] = Field(
        "clip",
        description="clipped ratios (section 3 of the paper), or a penalty on the KL (section 4)",
    )
    penalty_coef: PositiveFloat = Field(1.0, description="kl_penalty: weight of KL(old || new)")
    penalty_target: PositiveFloat | None = Field(
        None,
        description="kl_penalty: adapt the weight to this KL a token; null: fixed",
        examples=[0.01],
    )
    value_clip: PositiveFloat | None = Field(0.2, description="null: values are not clipped")
    gamma: Fraction = Field(1.0, description="discount of a reward a token")
    lam: Fraction = Field(
        0.95, description="GAE's lambda: 1 trusts returns alone, 0 the critic alone"
    )
    kl: Literal["k1", "k2", "k3"] = Field("k1", description="estimator in the reward")
    kl_coef: NonNegativeFloat = Field(0.05, description="0: no reference model")
    kl_target: PositiveFloat | None = Field(
        None,
        description="adapt kl_coef to this KL a response, in nats; null: fixed",
        examples=[6.0],
    )
    kl_gain: PositiveFloat = Field(0.1, description="how fast kl_coef adapts")
    whiten_advantages: bool = Field(True, description="scale advantages to mean 0 and variance 1")
    whiten_rewards: bool = Field(False, description="scale rewards to unit variance, keep the mean")
    missing_eos_penalty: NonNegativeFloat = Field(
        0.0,
        description="taken off the score of a completion that did not stop by itself",
        examples=[1.0],
    )

    @model_validator(mode="after")
    def _consistent(self) -> PpoLossConfig:
        if self.kl_target is not None and self.kl_coef == 0:
            raise ValueError("kl_target adapts kl_coef, which is 0; give it a start")
        return self


class StepScoresConfig(Section):
    """How a process reward model scores a completion."""

    separator: str = Field(
        "\n", description="ends a step, as data.separator of its stage; empty: each token does"
    )
    aggregate: Aggregate = Field(
        "min", description="how the steps' chances of being right become one score"
    )


class RankingLossConfig(Section):
    """How scores are held against a ranking."""

    model_config = shown(objective="pairs", margin=1.0)

    objective: Literal["pairs", "plackett_luce"] = Field(
        "pairs", description="all pairs of a ranking (Bradley-Terry), or the ranking as a whole"
    )
    margin: NonNegativeFloat = Field(
        0.0, description="pairs: demanded gap, times the difference of the ratings", examples=[1.0]
    )
    label_smoothing: Annotated[float, Field(ge=0.0, lt=0.5)] = Field(
        0.0,
        description="pairs: the chance that a preference is the wrong way round",
        examples=[0.1],
    )
    centring: NonNegativeFloat = Field(
        0.0,
        description="weight of the squared sum of a pair's scores, which pulls them around 0",
        examples=[0.01],
    )

    @model_validator(mode="after")
    def _pairs_only(self) -> RankingLossConfig:
        if self.objective == "plackett_luce" and (self.margin or self.label_smoothing):
            raise ValueError("margin and label_smoothing are for objective: pairs")
        return self
