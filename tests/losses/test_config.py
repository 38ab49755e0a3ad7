"""The loss's config section and its presets."""

from __future__ import annotations

from typing import get_args

import pytest
from pydantic import ValidationError

from shardwise.launch.config_diff import config_diff
from shardwise.losses.config import PolicyLossConfig
from shardwise.losses.presets import PRESETS


def test_the_schema_knows_every_preset_and_each_is_whole() -> None:
    annotation = PolicyLossConfig.model_fields["preset"].annotation
    literal = next(a for a in get_args(annotation) if a is not type(None))
    assert set(get_args(literal)) == set(PRESETS)
    for name, preset in PRESETS.items():
        config = PolicyLossConfig(preset=name)  # type: ignore[arg-type]
        assert preset.source
        for key, value in preset.settings.items():
            assert getattr(config, key) == value


def test_what_is_given_wins_over_the_preset() -> None:
    config = PolicyLossConfig.model_validate({"preset": "dapo_paper", "clip_high": 0.5})
    assert (config.clip_low, config.clip_high, config.aggregation) == (0.2, 0.5, "token_mean")


def test_a_dumped_config_loads_to_itself() -> None:
    config = PolicyLossConfig.model_validate({"preset": "gspo", "clip_low": 0.01, "kl": "none"})
    assert PolicyLossConfig.model_validate(config.model_dump()) == config


def test_differences_between_presets() -> None:
    assert config_diff("dapo_paper", "dapo_paper").values == {}
    assert config_diff("grpo:trl_default", "verl_default").values == {
        "advantage_eps": (1e-4, 1e-6),
        "dual_clip": (None, 3.0),
    }


@pytest.mark.parametrize(
    "bad",
    [
        {"preset": "nonsense"},
        {"kl": "k3"},
        {"kl_coef": 0.1},
        {"dual_clip": 1.0},
        {"clip_low": -0.1},
        {"clip": 0.2},
        {"aggregation": "mean"},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        PolicyLossConfig.model_validate(bad)
