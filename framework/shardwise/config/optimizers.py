"""Optimizers as a recipe names them: a kind, the keys that all kinds have, and its own.

No ``kind`` means adamw. What a kind computes, with its sources: `shardwise.optim`. Nothing here
imports torch; another package registers a kind of its own by the entry-point group
``shardwise.optimizers``, see `shardwise.optim.registry`.
"""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationInfo, model_validator

from shardwise.config import registry
from shardwise.config.section import BelowOne, Epsilon, NonNegativeFloat, Rate, Section, shown

SMALL_RATE = 3e-4
# Sizes that some elements or tensors of a small model are below and others above: of gradients,
# clipped to `verify.shrink.SMALL_NORM`, of their mean squares, and of weights.
SMALL_GRADIENT, SMALL_SQUARE, SMALL_WEIGHT = 1e-5, 2.5e-9, 1e-2
# At 1, every matrix's update is cut to it, and what all of it is multiplied by leaves no trace.
SMALL_UPDATE = 1.1


class ParameterGroup(Section):
    """Parameters with a rate or a decay of their own; of several that match, the first counts."""

    model_config = shown(match="embed.*", weight_decay=0.0)

    match: Annotated[str, Field(min_length=1)] = Field(
        description="pattern of parameter names, e.g. layers.*.attn.*", examples=["layers.*.attn.*"]
    )
    lr: Rate | None = Field(
        None, description="peak rate, in place of optimizer.lr", examples=[1e-4]
    )
    lr_scale: Annotated[float, Field(ge=0.0, le=1e6)] | None = Field(
        None, description="peak rate over optimizer.lr; 0: the group stands still", examples=[0.5]
    )
    weight_decay: NonNegativeFloat | None = Field(
        None,
        description="in place of optimizer.weight_decay; what no_decay names has none",
        examples=[0.0],
    )

    @model_validator(mode="after")
    def _says_something_once(self) -> Self:
        if self.lr is not None and self.lr_scale is not None:
            raise ValueError("lr and lr_scale say the same thing; give one")
        if self.lr is None and self.lr_scale is None and self.weight_decay is None:
            raise ValueError("changes nothing; give lr, lr_scale or weight_decay")
        return self


class OptimizerConfig(Section):
    """The update rule; what every kind of optimizer has.

    Kinds derive from it, fix ``kind`` and register.
    """

    in_backward: ClassVar[bool] = False  # whether weights move in the backward pass

    kind: str = Field(description="which update rule")
    lr: Rate = Field(3e-4, description="peak learning rate")
    weight_decay: NonNegativeFloat = Field(
        0.1, description="pull towards 0, in units of the learning rate"
    )
    no_decay: list[str] = Field(
        default_factory=lambda: ["*norm*", "*bias", "*embed*"],
        description="name patterns without weight decay",
    )
    groups: list[ParameterGroup] = Field(
        default=[], description="parameters with a rate or decay of their own"
    )

    def group_of(self, name: str) -> ParameterGroup | None:
        """The first group that a parameter's name matches."""
        return next((g for g in self.groups if fnmatchcase(name, g.match)), None)

    def lr_scale_of(self, name: str) -> float:
        """A parameter's rate over that of the optimizer, which schedules move."""
        group = self.group_of(name)
        if group is None:
            return 1.0
        if group.lr is not None:
            return group.lr / self.lr
        return 1.0 if group.lr_scale is None else group.lr_scale

    def decay_of(self, name: str) -> float:
        """A parameter's weight decay."""
        if any(fnmatchcase(name, pattern) for pattern in self.no_decay):
            return 0.0
        group = self.group_of(name)
        own = None if group is None else group.weight_decay
        return self.weight_decay if own is None else own

    def unmatched(self, names: Iterable[str]) -> list[str]:
        """Patterns of groups to which none of all trainable parameters belongs."""
        used = {id(self.group_of(name)) for name in names}
        return [group.match for group in self.groups if id(group) not in used]

    def with_rate(self, lr: float) -> Self:
        """The same at another peak rate; what groups have keeps its proportion."""
        groups = [
            g if g.lr is None else g.model_copy(update={"lr": g.lr * lr / self.lr})
            for g in self.groups
        ]
        return self.model_copy(update={"lr": lr, "groups": groups})

    def shrunk(self) -> Self:
        """For a few steps of a small model, whose gradients meet each bound that a kind has."""
        # A smaller rate moves nothing that bf16 shows within a few steps.
        return self.with_rate(max(self.lr, SMALL_RATE))


class MomentsConfig(OptimizerConfig):
    """What Adam and its kin have: means of gradients and of their squares."""

    beta1: BelowOne = Field(0.9, description="how slowly the mean of gradients forgets")
    beta2: BelowOne = Field(0.95, description="how slowly the mean of their squares forgets")
    eps: Epsilon = Field(1e-8, description="added to the root of the second moment")

    def shrunk(self) -> Self:
        """See `OptimizerConfig`."""
        return super().shrunk().model_copy(update={"eps": max(self.eps, SMALL_GRADIENT)})


class AdamWConfig(MomentsConfig):
    """Adam with decoupled decay: Loshchilov and Hutter 2019, algorithm 2."""

    kind: Literal["adamw"] = "adamw"
    fused: Literal["auto", "apex"] = Field(
        "auto",
        description="auto: torch's fused update where it works; apex: NVIDIA's, on GPUs that have "
        "it, else as auto",
    )


class AdamConfig(AdamWConfig):
    """Kingma and Ba 2015; the decay is added to the gradient (L2)."""

    kind: Literal["adam"]  # type: ignore[assignment]


class SgdConfig(OptimizerConfig):
    """Stochastic gradient descent; the decay is added to the gradient (L2)."""

    kind: Literal["sgd"]
    momentum: BelowOne = Field(0.9, description="0: no state")
    nesterov: bool = Field(False, description="look ahead along the momentum")

    @model_validator(mode="after")
    def _nesterov_has_momentum(self) -> Self:
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("nesterov needs momentum above 0")
        return self


class LionConfig(OptimizerConfig):
    """Chen et al. 2023: a rate of a third to a tenth of AdamW's, its decay as much larger."""

    kind: Literal["lion"]
    lr: Rate = 1e-4
    beta1: BelowOne = Field(0.9, description="share of the momentum in the update's sign")
    beta2: BelowOne = Field(0.99, description="how slowly the momentum forgets")


class MuonConfig(MomentsConfig):
    """Jordan et al. 2024: matrices by orthogonalised momentum, all else by AdamW."""

    kind: Literal["muon"]  # type: ignore[assignment]
    momentum: BelowOne = Field(0.95, description="how slowly the momentum forgets")
    nesterov: bool = Field(True, description="look ahead along the momentum")
    ns_steps: Annotated[int, Field(ge=1, le=99)] = Field(5, description="of Newton-Schulz")
    scale: Literal["adamw", "spectral"] = Field(
        "adamw",
        description="of a matrix's update: 0.2 sqrt(max(rows, columns)), so that AdamW's rates "
        "fit (Liu et al. 2025), or sqrt(max(1, rows / columns))",
    )
    by_adamw: list[str] = Field(
        default_factory=lambda: ["*embed*", "head.*"],
        description="name patterns of matrices that AdamW updates, as it does all vectors",
    )


class FactoredConfig(OptimizerConfig):
    """Second moments by rows and columns: Shazeer and Stern 2018."""

    decay_power: Annotated[float, Field(ge=0.0, le=1.0)] = Field(
        0.8, description="second moments forget by 1 - step^-decay_power"
    )
    eps1: Epsilon = Field(1e-15, description="least root of a second moment")
    eps2: Epsilon = Field(1e-3, description="least size of a tensor, to which the rate is relative")
    clip_threshold: Annotated[float, Field(ge=1.0, le=1e12)] = Field(
        1.0, description="largest root mean square of an update"
    )

    def shrunk(self) -> Self:
        """See `OptimizerConfig`: some second moments, sizes and updates are beyond their bounds."""
        bounds = {
            "eps1": max(self.eps1, SMALL_SQUARE),
            "eps2": max(self.eps2, SMALL_WEIGHT),
            "clip_threshold": SMALL_UPDATE,
        }
        return super().shrunk().model_copy(update=bounds)


class AdafactorConfig(FactoredConfig):
    """Its rate is relative to each tensor's size, and at most 1 / sqrt(step)."""

    kind: Literal["adafactor"]
    lr: Rate = 1e-2


class LomoConfig(OptimizerConfig):
    """Lv et al. 2023: SGD within the backward pass; no state, no buffer of gradients."""

    in_backward: ClassVar[bool] = True

    kind: Literal["lomo"]
    lr: Rate = 1e-2


class AdaLomoConfig(FactoredConfig):
    """Lv et al. 2024: Adafactor within the backward pass; its rate is relative to tensors' size."""

    in_backward: ClassVar[bool] = True

    kind: Literal["adalomo"]
    lr: Rate = 5e-4


class AdamW8bitConfig(MomentsConfig):
    """AdamW with 8-bit moments: Dettmers et al. 2022."""

    kind: Literal["adamw8bit"]


class ScheduleFreeConfig(MomentsConfig):
    """Defazio et al. 2024: AdamW with an average in place of a decay; warm-up, then constant."""

    kind: Literal["schedule_free"]
    lr: Rate = 2.5e-3
    beta1: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        0.9, description="of the average, in where gradients are taken"
    )
    beta2: BelowOne = 0.999


# Once all kinds had all keys, and recipes written out in full hold them: at these values, which
# did nothing, they still load.
_ONCE_SHARED = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "momentum": 0.9, "nesterov": False}


def _optimizer(data: Any, info: ValidationInfo) -> Any:
    table, default = registry.OPTIMIZER_CONFIGS, registry.DEFAULT_OPTIMIZER
    if isinstance(data, dict) and data.get("kind", default) in ("adamw", "adam", "sgd"):
        own = table[data.get("kind", default)].model_fields
        data = {k: v for k, v in data.items() if k in own or (k, v) not in _ONCE_SHARED.items()}
    return registry.validate(data, info, "kind", table, OptimizerConfig, default)


# What a mapping without ``kind`` is must be known wherever a section is read.
registry.register_optimizer_config(registry.DEFAULT_OPTIMIZER, AdamWConfig)
AnyOptimizer = SerializeAsAny[Annotated[OptimizerConfig, BeforeValidator(_optimizer)]]
