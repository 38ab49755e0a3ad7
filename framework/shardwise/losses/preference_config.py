"""Settings of preference losses: a union by ``kind``, each with its own keys alone. No torch here.

What the keys mean is said in `shardwise.losses.preference`, where the papers are.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from shardwise.config.schema import Fraction, NonNegativeFloat, PositiveFloat, Section
from shardwise.config.section import beside
from shardwise.losses.presets import PREFERENCE_PRESETS

Flipped = Annotated[float, Field(ge=0.0, lt=0.5)]
SomeFlipped = Annotated[float, Field(gt=1e-12, lt=0.5)]
Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
_FLIPPED = "chance that a preference is the wrong way round"


class PreferenceConfig(Section):
    """The loss of a preference; what every kind has.

    ``paired``: learns from a better answer beside a worse one.

    ``with_reference``: compares with a reference model.
    """

    paired: ClassVar[bool] = True
    with_reference: ClassVar[bool] = True

    kind: str = Field(description="which loss")
    preset: (
        Literal[
            "dpo_paper", "trl_default", "iterative_rpo", "discopop", "simpo_llama3", "orpo_paper",
            "cpo_paper", "kto_paper",
        ]
        | None
    ) = Field(None, description="published settings, see shardwise.losses.presets")  # fmt: skip

    @property
    def scale(self) -> float:
        """Reward, in units of the log-ratio (or log-probability)."""
        return float(getattr(self, "beta", 1.0))


class _Paired(PreferenceConfig):
    """``sft_weight``: of -log p(chosen) beside the preference (RPO's alpha, CPO's NLL)."""

    sft_weight: NonNegativeFloat = Field(
        0.0, description="of -log p(chosen); 0: no such term", examples=[1.0]
    )
    sft_aggregation: Literal["token_mean", "seq_mean_token_mean", "seq_mean_token_sum"] = Field(
        "token_mean", description="what that term is a mean of"
    )


class _Ratio(_Paired):
    """Kinds that look at the difference of two scores alone."""

    beta: PositiveFloat = Field(0.1, description="how dear it is to leave the reference")
    divergence: Divergence = Field("reverse_kl", description="from the reference: f-DPO")
    divergence_alpha: Annotated[float, Field(ge=0.0, le=100.0)] | None = Field(
        None,
        description="divergence alpha: its order; 1 is reverse_kl",
        examples=[0.5],
        json_schema_extra=beside(divergence="alpha"),
    )
    ld_alpha: Fraction | None = Field(
        None,
        description="LD-DPO: weight of tokens beyond the shorter answer; null: 1",
        examples=[0.5],
    )

    @model_validator(mode="after")
    def _order_is_given(self) -> _Ratio:
        if (self.divergence == "alpha") != (self.divergence_alpha is not None):
            raise ValueError("divergence_alpha goes with divergence: alpha, and it needs one")
        return self


class SigmoidConfig(_Ratio):
    """DPO."""

    kind: Literal["sigmoid"] = "sigmoid"
    label_smoothing: Flipped = Field(0.0, description=_FLIPPED, examples=[0.1])
    length_normalised: bool = Field(False, description="scores a token (TRL: sigmoid_norm)")


class RobustConfig(_Ratio):
    """Robust DPO."""

    kind: Literal["robust"]
    label_smoothing: Flipped = Field(0.1, description=_FLIPPED)


class IpoConfig(_Ratio):
    """IPO; ``beta`` is the paper's tau."""

    kind: Literal["ipo"]


class HingeConfig(_Ratio):
    """A hinge on the scaled log-ratio."""

    kind: Literal["hinge"]


class ExoConfig(_Ratio):
    """EXO."""

    kind: Literal["exo"]
    label_smoothing: SomeFlipped = Field(1e-3, description=_FLIPPED)


class DiscopopConfig(_Ratio):
    """DiscoPOP."""

    kind: Literal["discopop"]
    tau: PositiveFloat = Field(0.05, description="temperature of the blend")


class ApoConfig(_Paired):
    """APO: ``apo_zero`` where the chosen are better than the model's, ``apo_down`` where worse."""

    kind: Literal["apo_zero", "apo_down"]
    beta: PositiveFloat = Field(0.1, description="how dear it is to leave the reference")


class SlicConfig(_Paired):
    """SLiC-HF."""

    with_reference = False
    kind: Literal["slic"]
    margin: PositiveFloat = Field(1.0, description="demanded gap of the log-probabilities")


class SimpoConfig(_Paired):
    """SimPO."""

    with_reference = False
    kind: Literal["simpo"]
    beta: PositiveFloat = Field(2.0, description="scale of the gap a token")
    margin: NonNegativeFloat = Field(1.0, description="the paper's gamma, not over beta")
    label_smoothing: Flipped = Field(0.0, description=_FLIPPED, examples=[0.1])


class OrpoConfig(_Paired):
    """ORPO; ``beta`` is the paper's lambda."""

    with_reference = False
    kind: Literal["orpo"]
    beta: PositiveFloat = Field(0.1, description="weight of the log odds ratio")
    sft_weight: NonNegativeFloat = 1.0


class CpoConfig(_Paired):
    """CPO."""

    with_reference = False
    kind: Literal["cpo"]
    beta: PositiveFloat = Field(0.1, description="scale of the gap")
    label_smoothing: Flipped = Field(0.0, description=_FLIPPED, examples=[0.1])
    sft_weight: NonNegativeFloat = 1.0


class KtoConfig(PreferenceConfig):
    """KTO: answers one by one, each desirable or not."""

    paired = False
    kind: Literal["kto"]
    beta: PositiveFloat = Field(0.1, description="how dear it is to leave the reference")
    desirable_weight: PositiveFloat = Field(1.0, description="of desirable answers")
    undesirable_weight: PositiveFloat = Field(1.0, description="of undesirable answers")


_Kinds = (
    SigmoidConfig | RobustConfig | IpoConfig | HingeConfig | ExoConfig | DiscopopConfig
    | ApoConfig | SlicConfig | SimpoConfig | OrpoConfig | CpoConfig | KtoConfig
)  # fmt: skip


def _filled(data: Any) -> Any:
    """What a preset says goes under what is said; no kind is sigmoid."""
    if not isinstance(data, dict):
        return data
    preset = PREFERENCE_PRESETS.get(str(data.get("preset")))
    return {"kind": "sigmoid", **(preset.settings if preset else {}), **data}


AnyPreference = Annotated[Annotated[_Kinds, Field(discriminator="kind")], BeforeValidator(_filled)]
