"""Slots: no two share a core or a GPU, and nobody gets what is not there."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import ConfigError
from shardwise.sweep.config import SlotsConfig
from shardwise.sweep.slots import slots

counts = st.integers(1, 8)
cores_there = st.sets(st.integers(0, 99), min_size=1)


@given(counts, st.none() | counts, st.none() | st.integers(0, 8), cores_there, st.integers(0, 8))
def test_slots_share_nothing(
    number: int, cores: int | None, gpus: int | None, there: set[int], devices: int
) -> None:
    config = SlotsConfig(number=number, cores=cores, gpus=gpus)
    names = [f"GPU-{i}" for i in range(devices)]
    try:
        found = slots(config, sorted(there), names)
    except ConfigError as error:
        assert number * (cores or 1) > len(there) or number * (gpus or 1) > devices
        assert "slots" in str(error)
        return
    assert len(found) == number
    used = [core for slot in found for core in slot.cores]
    assert len(used) == len(set(used)) and set(used) <= there
    assert all(len(slot.cores) == (cores or len(there) // number) for slot in found)
    seen = [gpu for slot in found for gpu in slot.gpus or ()]
    assert len(seen) == len(set(seen)) and set(seen) <= set(names)
    if devices:  # what a slot has not, its trial may not see
        each = devices // number if gpus is None else gpus
        assert all(len(slot.gpus or ()) == each for slot in found)
    else:
        assert all(slot.gpus is None for slot in found)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"number": 3}, "slots: 3 of 1 core are 3, and this process may use 2 cores; lower"),
        ({"number": 2, "cores": 2}, "slots: 2 of 2 cores are 4"),
        ({"number": 1, "gpus": 5}, "slots: 1 of 5 GPUs are 5, and this process may use 4 GPUs"),
    ],
)
def test_what_is_not_there_is_said(config: dict[str, int], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        slots(SlotsConfig(**config), [0, 1], ["0", "1", "2", "3"])


def test_gpus_are_not_left_aside_in_silence() -> None:
    with pytest.raises(ConfigError, match="say gpus: 0 for trials on cores alone"):
        slots(SlotsConfig(number=2), [0, 1], ["0"])
    assert slots(SlotsConfig(number=2, gpus=0), [0, 1], ["0"])[1].gpus == ()


def test_a_slot_says_its_cores() -> None:
    [slot] = slots(SlotsConfig(), [0, 1, 2, 5, 7, 8], ["3", "4"])
    assert str(slot) == "cores 0-2, 5, 7-8, GPUs 3, 4"
