"""What a recipe says of an adapter, and what follows from it."""

from __future__ import annotations

from typing import Any, get_args

import pytest
from pydantic import ValidationError

from shardwise.adapters.config import LowRankConfig
from shardwise.adapters.presets import ADAPTER_PRESETS
from shardwise.config import registry
from shardwise.config.adapters import FreezeConfig
from shardwise.config.optimizers import AdamWConfig
from shardwise.config.registry import discover
from tests.adapters.support import adapter


def low_rank(**keys: Any) -> LowRankConfig:
    found = adapter(**keys)
    assert isinstance(found, LowRankConfig)
    return found


def test_scalings() -> None:
    assert low_rank(rank=8, alpha=16.0).scaling == 2.0
    assert low_rank(rank=16, alpha=16.0, rslora=True).scaling == 4.0
    for rslora in (False, True):  # made small, it scales as before
        one = low_rank(rank=64, alpha=16.0, rslora=rslora)
        assert one.shrunk().rank < 8
        assert one.shrunk().scaling == pytest.approx(one.scaling)


def test_lora_plus_gives_b_a_rate_of_its_own() -> None:
    assert low_rank().groups() == []
    groups = low_rank(lr_ratio=16.0).groups()
    optimizer = AdamWConfig(groups=groups)
    assert optimizer.lr_scale_of("layers.0.attn.q.adapter.B") == 16.0
    assert optimizer.lr_scale_of("layers.0.attn.q.adapter.A") == 1.0


def test_what_says_nothing_is_refused() -> None:
    with pytest.raises(ValidationError, match="freezes nothing"):
        FreezeConfig()
    with pytest.raises(ValidationError, match="3 is odd"):
        low_rank(init="orthogonal", rank=3)
    with pytest.raises(ValidationError, match="targets"):
        low_rank(targets=[])


def test_presets_fill_what_is_not_said() -> None:
    discover()
    literal = next(a for a in get_args(LowRankConfig.model_fields["preset"].annotation) if a)
    assert set(get_args(literal)) == set(ADAPTER_PRESETS)
    for name, preset in ADAPTER_PRESETS.items():
        kind = registry.ADAPTER_CONFIGS[preset.settings["kind"]]
        found = kind.model_validate({"kind": preset.settings["kind"], "preset": name}).model_dump()
        assert {key: found[key] for key in preset.settings} == dict(preset.settings), name
    assert low_rank(preset="peft_default", rank=32).rank == 32


def test_a_preset_of_another_kind_is_refused() -> None:
    with pytest.raises(
        ValidationError, match="preset dora_paper is of kind dora, and kind is lora"
    ):
        adapter(kind="lora", preset="dora_paper")
