"""Ranks here and elsewhere."""

from __future__ import annotations

import pytest
import torch

from shardwise.errors import UserError
from shardwise.metrics.meters import total_memory
from shardwise.recipes.machine import GIB, find_machine


@pytest.fixture
def without_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("without_gpu")
def test_ranks_on_cores_share_the_memory() -> None:
    one, four = find_machine(), find_machine(4)
    assert (one.device, one.ranks, one.here) == ("cpu", 1, True)
    assert one.bytes_a_rank == total_memory() == 4 * four.bytes_a_rank
    assert 0 <= four.budget < four.bytes_a_rank
    assert "4 ranks" in four.words


def test_gpus_elsewhere_have_what_is_said() -> None:
    found = find_machine(8, 80.0)
    assert (found.device, found.ranks, found.here, found.precision) == ("cuda", 8, False, "bf16")
    assert found.bytes_a_rank == 80 * GIB
    assert found.with_ranks(16).bytes_a_rank == found.bytes_a_rank
    assert find_machine(None, 24.0).ranks == 1


def test_gpus_here_are_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        total_memory = 40 * GIB

    for name, value in {
        "is_available": True, "device_count": 4, "get_device_name": "A100",
        "get_device_properties": Properties, "is_bf16_supported": True,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, _v=value, **__: _v)
    found = find_machine()
    assert (found.ranks, found.here, found.bytes_a_rank) == (4, True, 40 * GIB)
    more = find_machine(8)
    assert not more.here and "4 of them here" in more.words


@pytest.mark.parametrize("said", [(0, None), (1, 0.0), (None, -1.0)])
def test_what_is_no_machine(said: tuple[int | None, float | None]) -> None:
    with pytest.raises(UserError, match=r"--ranks 0|--gpu-memory"):
        find_machine(*said)
