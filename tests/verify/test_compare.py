"""How far two computations of the same thing may differ."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from shardwise.config.optimizers import AdamWConfig, LionConfig, SgdConfig
from shardwise.ops.regions import Region
from shardwise.verify.bounds import NOISE, bounds, is_rounded_away, like, losses
from shardwise.verify.compare import (
    Difference,
    compare,
    compare_scales,
    misdealt,
    origin,
    undeclared,
    unknown,
)
from shardwise.verify.notes import Notes, Reference
from shardwise.verify.walk import Walked


def vector(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def reference(folder: Path, exact: dict[str, Tensor]) -> Reference:
    notes = Notes()
    for name, value in exact.items():
        notes.note(*name.split("/", 1), value)
    notes.save(folder / "exact.safetensors")
    return Reference(folder / "exact.safetensors")


def walked(notes: Notes, **changes: Any) -> Walked:
    fields = {"scales": {}, "problems": [], "skipped": {}, "volumes": [], "asked": {}}
    given = {"found": notes.found, "dealt": notes.dealt, "touched": {}, "dtypes": {}}
    return Walked(**{**fields, **given, **changes})


def noted(exact: Reference, values: dict[str, Tensor]) -> Notes:
    notes = Notes(exact)
    for name, value in values.items():
        notes.note(*name.split("/", 1), value)
    return notes


def test_rounding_is_measured_on_a_values_like(tmp_path: Path) -> None:
    """What one process happens to lose nothing of is no more exact than the same a step later."""
    exact = reference(
        tmp_path,
        {"loss/update 1": vector(0.0), "loss/update 2": vector(1.0), "loss/x": vector(4.0)},
    )
    single = {"loss/update 1": vector(0.0), "loss/update 2": vector(1.5), "loss/x": vector(4.0)}
    found = bounds(exact, losses(noted(exact, single).found), "bf16")
    assert found["loss/update 1"] == pytest.approx(8 * 0.5)
    assert found["loss/update 2"] == pytest.approx(8 * 0.5)
    assert found["loss/x"] == pytest.approx(4.0 / 128)


def test_exact_bounds_know_no_likes(tmp_path: Path) -> None:
    exact = {"loss/update 1": vector(0.0), "loss/update 2": vector(1.0), "sample/a": vector(7.0)}
    found = bounds(reference(tmp_path, exact), None, "fp64")
    assert found["loss/update 1"] == pytest.approx(NOISE)
    assert found["loss/update 2"] == pytest.approx(1e-9 + NOISE)
    assert found["sample/a"] == 0.0


@pytest.mark.parametrize("moment,slack", [((1.0, 0.0), 2 * 3e-4), ((1.0, 1.0), 0.0)])
def test_adam_may_move_an_element_without_gradient_either_way(
    tmp_path: Path, moment: tuple[float, float], slack: float
) -> None:
    exact = {
        "learning rate/update 1": vector(3e-4)[0],
        "skipped/update 1": vector(0.0)[0],
        "weight/update 1 w": vector(1.0 + 3e-4, 1.0 - 1e-4),
        "moment/update 1 w exp_avg": 0.1 * vector(*moment),
        "moment/update 1 w exp_avg_sq": 0.05 * vector(*moment).square(),
    }
    rounded = {**exact, "moment/update 1 w exp_avg": 0.1 * vector(*moment) + 1e-7}
    known = reference(tmp_path, exact)
    lost = losses(noted(known, rounded).found)
    found = bounds(known, lost, "fp32", {"": AdamWConfig()})["weight/update 1 w"]
    base = float(exact["weight/update 1 w"].norm()) * 2.0**-23
    assert found == pytest.approx(base + slack, rel=1e-2, abs=1e-8)


def test_weights_that_may_be_elsewhere_are_in_the_next_gradient(tmp_path: Path) -> None:
    exact: dict[str, Tensor] = {}
    for update in (1, 2):
        exact |= {
            f"learning rate/update {update}": vector(3e-4)[0],
            f"skipped/update {update}": vector(0.0)[0],
            f"gradient/update {update} w": vector(3.0, 4.0),
            f"weight/update {update} w": vector(0.3, 0.4),
            f"moment/update {update} w exp_avg": vector(0.1, 0.0),
            f"moment/update {update} w exp_avg_sq": vector(0.05, 0.0),
        }
        exact[f"forward pass/step {update} sample 0"] = vector(3.0, 4.0)
    known, lost = reference(tmp_path, exact), dict.fromkeys(map(like, exact), 1e-7)
    narrow, wide = bounds(known, lost, "fp32"), bounds(known, lost, "fp32", {"": AdamWConfig()})
    more = {name: wide[name] - narrow[name] for name in exact}
    slack = more["weight/update 1 w"]
    assert slack == pytest.approx(2 * 3e-4, rel=1e-2)
    assert more["gradient/update 1 w"] == more["moment/update 1 w exp_avg"] == 0.0
    assert more["forward pass/step 1 sample 0"] == 0.0 < more["forward pass/step 2 sample 0"]
    assert more["gradient/update 2 w"] == pytest.approx(5.0 * slack / 0.5)
    assert more["moment/update 2 w exp_avg"] == pytest.approx(0.1 * slack / 0.5)


def test_parts_of_a_value_are_put_together(tmp_path: Path) -> None:
    exact = reference(tmp_path, {"weight/w": vector(1.0, 2.0, 3.0, 4.0)})
    halves = [
        {"weight/w": [Notes(exact)._noted("weight/w", Region((2 * r,), (2,)), part)]}
        for r, part in enumerate((vector(1.0, 2.0), vector(3.0, 4.5)))
    ]
    [found] = compare(exact, {"weight/w": 0.1}, halves, exact.order)
    assert found.is_bug and found.error == 0.5 and found.worst == (3,) and found.ranks == (1,)
    [gap] = compare(exact, {"weight/w": 0.1}, halves[:1], exact.order)
    assert gap.is_bug and gap.why == "some of it is on no rank"
    [none] = compare(exact, {"weight/w": 0.1}, [{}], exact.order)
    assert none.is_bug and none.why == "no rank has it"


@pytest.mark.parametrize(
    ("norm", "limit", "who", "told"),
    [
        (1.0, 0.05, (0, 1), True),
        (1.0, 9.0, (0, 1), False),  # noise: one process loses more than there is
        (1.0, 0.05, (0,), False),  # a part with few digits
    ],
)
def test_a_dtype_is_judged_of_a_whole_tensor_that_is_no_noise(
    tmp_path: Path, norm: float, limit: float, who: tuple[int, ...], told: bool
) -> None:
    name, bias = "gradient/update 1 w", "gradient/update 1 bias"
    values = {name: vector(norm)[None], bias: vector(norm)}
    exact = reference(tmp_path, values)
    found = {"": {("gradients", n): "it is bfloat16, declared float32" for n in ("w", "bias")}}
    notes = noted(exact, values)
    ranks = [walked(notes, dtypes=found if rank in who else {}) for rank in (0, 1)]
    limits = {name: limit, bias: limit}
    problems = [(d.name, d.ranks) for d in undeclared(exact, limits, ranks)]
    assert problems == ([("gradients w", who)] if told else [])


@pytest.mark.parametrize(
    ("name", "only_fp64"),
    [
        ("metric/update 1 accuracy", True),
        ("logged/step 2 clip_low_fraction", True),
        ("event/x", True),
        ("metric/update 1 score_gap", False),
    ],
)
def test_what_a_rounding_moves_across_a_threshold_is_for_fp64(name: str, only_fp64: bool) -> None:
    assert is_rounded_away(name) == only_fp64


def test_what_one_process_never_came_to_is_told(tmp_path: Path) -> None:
    exact = reference(tmp_path, {"loss/update 1": vector(1.0)})
    notes = noted(exact, {"loss/update 1": vector(1.0), "loss/update 2": vector(1.0)})
    [found] = unknown(exact, [walked(notes)])
    assert (found.kind, found.name) == ("loss", "update 2")


@pytest.mark.parametrize(
    ("ranks", "words"),
    [
        ({0: [0, 1], 1: [2, 3]}, None),
        ({0: [0, 1], 1: [2]}, "nobody learns from 3"),
        ({0: [0, 1], 1: [1, 2, 3]}, "learnt from twice: 1"),
        ({0: [0, 1, 2], 1: [3, 4]}, "not of this update: 4"),
    ],
)
def test_every_sample_is_dealt_once(ranks: dict[int, list[int]], words: str | None) -> None:
    one = walked(Notes(), dealt={"update 1": (0, [0, 1, 2, 3])})
    # Two tensor-parallel peers of each data rank.
    peers = [walked(Notes(), dealt={"update 1": (r, ids)}) for r, ids in ranks.items()] * 2
    found = misdealt(one, peers)
    assert [d.why for d in found] == ([] if words is None else [words])


@pytest.mark.parametrize(
    ("name", "own"),
    [("update 1", True), ("update 1 embed.weight", True), ("update 12 embed.weight", False)],
)
def test_of_which_update_a_value_is(name: str, own: bool) -> None:
    assert Difference("gradient", name, 2.0, 2.0, 1.0).is_of("update 1") == own


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
    [found] = compare_scales(one, [walked(Notes(), scales={"scale/x": torch.tensor(theirs)})])
    assert found.is_bug != same


def test_a_scale_of_a_whole_tensor_is_compared() -> None:
    rank = walked(Notes(), scales={"scale/x": torch.tensor([1.0])})
    [found] = compare_scales({"scale/x": torch.tensor([2e-6])}, [rank])
    assert found.is_bug


@pytest.mark.parametrize(
    ("factor", "told"),
    [(0.5, 0.5), (4.0, 4.0), (0.0, 0.0), (1.5, None), (-1.0, -1.0), (1e9, None), (1e200, None)],
)
def test_a_plain_factor_is_told(tmp_path: Path, factor: float, told: float | None) -> None:
    true = vector(1.0, 2.0, 3.0)
    exact = reference(tmp_path, {"gradient/w": true, "loss/l": vector(2.0)[0]})
    notes = noted(exact, {"gradient/w": factor * true, "loss/l": factor * vector(2.0)[0]})
    found = compare(exact, dict.fromkeys(exact.order, 1e-9), [notes.found], exact.order)
    assert [d.times for d in found] == [told, told]


def test_an_error_of_another_direction_is_no_factor(tmp_path: Path) -> None:
    exact = reference(tmp_path, {"gradient/w": vector(1.0, 2.0)})
    notes = noted(exact, {"gradient/w": vector(2.0, 4.001)})
    [found] = compare(exact, {"gradient/w": 1e-9}, [notes.found], exact.order)
    assert found.is_bug and found.times is None


def test_of_those_that_hold_a_value_the_wrong_ones_are_named(tmp_path: Path) -> None:
    exact = reference(tmp_path, {"learning rate/update 1": vector(1.0)[0]})
    ranks = [noted(exact, {exact.order[0]: torch.tensor(v)}).found for v in (1.0, 2.0, 1.0)]
    [found] = compare(exact, {exact.order[0]: 0.0}, ranks, exact.order)
    assert found.is_bug and found.ranks == (1,)


def test_what_lies_behind_the_first_wrong_gradient_and_is_in_parts_is_told(tmp_path: Path) -> None:
    names = ["output/update 1 layers.0 sample 0", "output/update 1 head sample 0"]
    gradient = "output gradient/update 1 layers.0 sample 0"
    right, wrong = vector(1.0, 2.0)[None], vector(1.0, 3.0)[None]
    exact = reference(tmp_path, dict.fromkeys((*names, gradient), right))
    said = origin(exact, [walked(noted(exact, {names[0]: right, gradient: wrong}))])
    assert said.startswith("it begins at the output gradient of update 1 layers.0 sample 0")
    assert said.endswith("; behind it, head cannot be compared")


def trained(folder: Path, gradients: dict[str, Tensor], kind: str = "exp_avg") -> Reference:
    """Two updates with the same gradients, each with what a stage computes before it."""
    exact: dict[str, Tensor] = {}
    for update in (1, 2):
        exact |= {
            f"values/step {update}": vector(3.0, 4.0),
            f"extra/critic update {update} sample 0 values": vector(3.0, 4.0),
            f"learning rate/critic update {update}": vector(3e-4)[0],
            f"skipped/critic update {update}": vector(0.0)[0],
        }
        for name, gradient in gradients.items():
            where = f"critic update {update} {name}"
            exact |= {
                f"gradient/{where}": gradient,
                f"moment/{where} {kind}": 0.1 * gradient,
                f"weight/{where}": vector(0.3, 0.4),
            }
            if kind == "exp_avg":
                exact[f"moment/{where} exp_avg_sq"] = 0.05 * gradient.square()
    return reference(folder, exact)


def test_what_a_stage_computes_by_weights_that_may_be_elsewhere(tmp_path: Path) -> None:
    """A critic's values, which no engine's call is named after."""
    exact = trained(tmp_path, {"w": vector(1.0, 1e-9)})
    lost = dict.fromkeys(map(like, exact.order), 1e-7)
    narrow, wide = (
        bounds(exact, lost, "fp32"),
        bounds(exact, lost, "fp32", {"critic": AdamWConfig()}),
    )
    for name in ("values/step {}", "extra/critic update {} sample 0 values"):
        first, second = name.format(1), name.format(2)
        assert narrow[first] == wide[first] and wide[second] > 10 * narrow[second]
    exactly = {"critic": AdamWConfig()}
    assert bounds(exact, None, "fp64", exactly)["values/step 2"] < 1e-8


def test_rounding_noise_of_a_gradient_that_is_zero_is_a_fraction_of_all(tmp_path: Path) -> None:
    """Of which one process loses nothing, where terms that cancel out are rounded alike."""
    exact = trained(tmp_path, {"w": vector(3.0, 4.0), "bias": vector(1e-18, 0.0)})
    lost = dict.fromkeys(map(like, exact.order), 0.0)
    found = bounds(exact, lost, "bf16", {"critic": AdamWConfig()})
    whole = 5.0 * 2.0**0.5
    assert found["gradient/critic update 1 bias"] == pytest.approx(whole / 128)
    assert found["gradient/critic update 1 w"] == pytest.approx(5.0 / 128)
    assert found["moment/critic update 1 bias exp_avg"] == pytest.approx(0.1 * whole / 128)
    # Its weight goes anywhere; what is learnt does not see it.
    assert found["weight/critic update 1 bias"] >= 2 * 3e-4
    plain = bounds(exact, lost, "bf16")
    assert found["gradient/critic update 2 w"] < 1.5 * plain["gradient/critic update 2 w"]
    assert bounds(exact, None, "fp64")["gradient/critic update 1 bias"] < 1e-10


def test_gradient_descent_moves_a_weight_by_as_much_as_its_gradient_is_off(tmp_path: Path) -> None:
    exact = trained(tmp_path, {"w": vector(3.0, 4.0)}, "momentum_buffer")
    lost = dict.fromkeys(map(like, exact.order), 0.0) | {like("gradient/critic update 1 w"): 0.1}
    name = "weight/critic update 1 w"
    config: dict[str, Any] = {"critic": SgdConfig(kind="sgd", momentum=0.0)}
    more = bounds(exact, lost, "fp32", config)[name] - bounds(exact, lost, "fp32")[name]
    assert more == pytest.approx(3e-4 * 0.8, rel=1e-2)


def test_rows_that_nothing_met_stay_where_they_are(tmp_path: Path) -> None:
    """The words that no batch has are most of an embedding."""
    exact = trained(tmp_path, {"w": vector(1.0, 0.0)})
    lost = dict.fromkeys(map(like, exact.order), 1e-7)
    name = "weight/critic update 1 w"
    slack = bounds(exact, lost, "fp32", {"critic": LionConfig(kind="lion")})[name]
    assert slack == bounds(exact, lost, "fp32")[name]
    met = trained(tmp_path, {"w": vector(1.0, 1e-9)})
    slack = bounds(met, lost, "fp32", {"critic": LionConfig(kind="lion")})[name]
    assert slack == pytest.approx(2 * 3e-4, rel=1e-2)
