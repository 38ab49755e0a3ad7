"""How far two computations of the same thing may differ."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shardwise.verify.compare import NOISE, bounds, compare_scales
from shardwise.verify.replay import Replayed


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_rounding_is_measured_on_a_values_like() -> None:
    """What one process happens to lose nothing of is no more exact than the same a step later."""
    exact = {"loss/update 1": vector(0.0), "loss/update 2": vector(1.0), "loss/x": vector(4.0)}
    single = {"loss/update 1": vector(0.0), "loss/update 2": vector(1.5), "loss/x": vector(4.0)}
    found = bounds(exact, single, "bf16")
    assert found["loss/update 1"] == pytest.approx(8 * 0.5)
    assert found["loss/update 2"] == pytest.approx(8 * 0.5)
    assert found["loss/x"] == pytest.approx(4.0 / 128)


def test_exact_bounds_know_no_likes() -> None:
    exact = {"loss/update 1": vector(0.0), "loss/update 2": vector(1.0)}
    found = bounds(exact, None, "fp64")
    assert found["loss/update 1"] == pytest.approx(NOISE)
    assert found["loss/update 2"] == pytest.approx(1e-9 + NOISE)


@pytest.mark.parametrize("moment,slack", [((1.0, 1e-9), 2 * 3e-4), ((1.0, 1.0), 0.0)])
def test_adam_may_move_an_element_without_gradient_either_way(
    moment: tuple[float, float], slack: float
) -> None:
    exact = {
        "initial/w": vector(1.0, 1.0),
        "weight/w": vector(1.0 + 3e-4, 1.0 - 1e-4),
        "moment/w exp_avg": vector(*moment),
    }
    rounded = {**exact, "moment/w exp_avg": vector(*moment) + 1e-3}
    found = bounds(exact, rounded, "bf16")["weight/w"]
    assert found == pytest.approx(float(exact["weight/w"].norm()) / 128 + slack)


@pytest.mark.parametrize(
    ("theirs", "same"),
    [
        ([2e-6, 3e-6, 1.0], True),
        ([2e-6, 3e-6, 1e-24], True),  # noise, where one process has a block of zeros
        ([2e-6, 3e-6, 0.0], True),
        ([2e-6, 3.000001e-6, 1.0], False),  # the last bits of a block that holds something
        ([2e-6, 1.0, 1.0], False),
        ([2e-6, 3e-6, 1e-9], False),
        ([2e-6, float("nan"), 1.0], False),
    ],
)
def test_scales_are_compared_but_for_blocks_of_nothing(theirs: list[float], same: bool) -> None:
    one = {"scale/x": torch.tensor([2e-6, 3e-6, 1.0])}
    rank = Replayed({}, {"scale/x": torch.tensor(theirs)}, {}, [])
    [found] = compare_scales(one, [rank])
    assert found.is_bug != same


def test_a_scale_of_a_whole_tensor_is_compared() -> None:
    rank = Replayed({}, {"scale/x": torch.tensor([1.0])}, {}, [])
    [found] = compare_scales({"scale/x": torch.tensor([2e-6])}, [rank])
    assert found.is_bug
