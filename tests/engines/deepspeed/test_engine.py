"""Every layout of the deepspeed engine computes what the plain engine computes."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from shardwise import checkpoint
from shardwise.adapters.config import LoraConfig
from shardwise.adapters.targets import is_adapter
from shardwise.adapters.trained import Trained
from shardwise.config.optimizers import AdafactorConfig, SgdConfig
from shardwise.engines.base import Engine
from shardwise.engines.deepspeed.config import DeepSpeedConfig
from shardwise.engines.native import NativeEngine
from shardwise.ops.flat_shard import FlatShard
from shardwise.parallel.full_tensor import local_tensor
from shardwise.verify.marks import fill
from tests.support import toy
from tests.support.daily import daily
from tests.support.engines import LR, assert_near, assert_same, copies, engine, plain, train, update
from tests.support.pool import RankError, RankPool

pytest.importorskip("deepspeed")

MODEL = toy.llama(num_layers=3, tie_embeddings=True)
# As users' JSONs have it: many small buckets and sub-groups, nothing kept gathered.
SMALL_2 = {"overlap_comm": True, "contiguous_gradients": False, "reduce_bucket_size": 700}
SMALL_2 |= {"allgather_bucket_size": 500, "reduce_scatter": False}
SMALL_3 = {"sub_group_size": 3000, "stage3_param_persistence_threshold": 0}
SMALL_3 |= {"reduce_bucket_size": 700, "stage3_prefetch_bucket_size": 100, "overlap_comm": True}


def deepspeed(layout: str, model: Any = MODEL, setup: Any = None, **keys: Any) -> Engine:
    config = DeepSpeedConfig(kind="deepspeed", layout=layout, **keys)
    return engine(config, model, **(setup or {}))


def on_rank(layout: str, cuts: list[int] | None, keys: dict[str, Any]) -> dict[str, Any]:
    return train(deepspeed(layout, **keys), cuts)


@pytest.mark.parametrize(
    "layout,world,cuts,keys",
    daily(
        [
            ("dp1", 1, [3], {}),
            ("dp2.zero0", 2, [3, 3], {}),
            ("dp2.zero1", 2, [2, 2], {}),
            ("dp2.zero2", 2, [2, 2], {"recompute": "full"}),
            ("dp2.zero3", 2, [3, 3], {"max_grad_norm": 0.0}),
            ("dp4.zero2", 4, [1, 1, 1, 1], {}),
            ("zero2.cp2.ulysses", 2, [2], {}),
            ("dp2.zero2", 2, [2, 2], {"config": {"zero_optimization": SMALL_2}}),
            ("dp2.zero3", 2, [2, 2], {"config": {"zero_optimization": SMALL_3}}),
            ("dp2.zero3.cp2.ring", 4, [2, 2], {}),
            ("dp2.zero2", 2, [2, 2], {"offload_optimizer": "cpu"}),
            ("dp2.zero3", 2, [2, 2], {"offload_optimizer": "cpu", "offload_param": "cpu"}),
        ],
        *(1, 3, 6, 8, 11),
    ),
)
def test_layouts_equal_the_plain_engine(
    ranks: RankPool, layout: str, world: int, cuts: list[int], keys: dict[str, Any]
) -> None:
    oracle = plain(MODEL)
    if "max_grad_norm" in keys:
        oracle.config = oracle.config.model_copy(update={"max_grad_norm": keys["max_grad_norm"]})
    wanted = train(oracle)
    for mine in ranks.run(on_rank, layout, cuts, keys, world=world):
        assert_same(mine, wanted, 2e-5)


@pytest.mark.parametrize("layout", ["dp2.zero1", "dp2.zero2", "dp2.zero3"])
def test_in_bf16_masters_and_sums_are_wide(ranks: RankPool, layout: str) -> None:
    """What bf16 loses on one process, but no more: nothing else is rounded."""
    exact, one = train(plain(MODEL)), train(plain(MODEL, "bf16"))
    lost = max(
        float((one["weights"][n] - w).norm() / w.norm()) for n, w in exact["weights"].items()
    )
    for mine in ranks.run(on_rank, layout, [2, 2], {"precision": "bf16"}, world=2):
        assert_near(mine["weights"], exact["weights"], 4 * lost)


def of_sgd(layout: str) -> dict[str, Any]:
    it = deepspeed(layout, setup={"optimizer": SgdConfig(kind="sgd", lr=LR)})
    update(it, 0)
    it.step(LR)
    return {kind: copies(it, kind) for kind in ("weights", *it.optimizer_states())}


def test_sgd_has_its_own_state(ranks: RankPool) -> None:
    oracle = plain(MODEL, optimizer=SgdConfig(kind="sgd", lr=LR))
    update(oracle, 0)
    oracle.step(LR)
    for mine in ranks.run(of_sgd, "dp2.zero2", world=2):
        assert mine.keys() == {"weights", "momentum_buffer"}
        for kind, found in mine.items():
            assert_near(found, copies(oracle, kind), 2e-5)


# --- what is not finite -----------------------------------------------------------------------


def skips(layout: str, precision: str) -> list[Any]:
    it = deepspeed(layout, precision=precision)
    update(it, 0)
    it.step(LR)
    before = {kind: copies(it, kind) for kind in ("weights", "exp_avg")}
    update(it, 1)
    for name, gradient in it.held("grads"):
        if name == "embed.weight":
            fill(name, gradient, math.nan, last=True)
    norm = it.step(LR)
    stood = all(torch.equal(t, copies(it, k)[n]) for k, v in before.items() for n, t in v.items())
    update(it, 2)
    return [norm, stood, it.step(LR), it.state_dict().meta]


@pytest.mark.parametrize(
    "layout,precision",
    daily(
        [
            ("dp2.zero0", "fp32"),
            ("dp2.zero2", "fp32"),
            ("dp2.zero3", "fp32"),
            ("dp2.zero1", "bf16"),
        ],
        2,
    ),
)
def test_every_rank_leaves_out_an_update_that_is_not_finite_anywhere(
    ranks: RankPool, layout: str, precision: str
) -> None:
    for norm, stood, after, meta in ranks.run(skips, layout, precision, world=2):
        assert not math.isfinite(norm) and stood and math.isfinite(after)
        assert meta == {"updates": 3, "skipped": 1}


# --- state ------------------------------------------------------------------------------------


def parts_of(layout: str) -> list[tuple[str, int, int, bool]]:
    it = deepspeed(layout)
    return [
        (name, t.start, len(t.local), t.local.untyped_storage().nbytes() < 4 * t.numel())
        for name, t in it.held("weights")
        if isinstance(t, FlatShard)
    ]


@pytest.mark.parametrize("layout", ["dp2.zero1", "dp2.zero3"])
def test_ranks_hold_parts_of_masters(ranks: RankPool, layout: str) -> None:
    found = ranks.run(parts_of, layout, world=2)
    sizes = {n: p.numel() for n, p in plain(MODEL).parameters.items()}
    held = [sum(count for _, _, count, _ in rank) for rank in found]
    assert sum(held) == sum(sizes.values())
    assert max(held) < 0.6 * sum(sizes.values())


def written_from_outside(make: Callable[..., Engine], *how: Any, **keys: Any) -> bool:
    it = make(*how, **keys)
    for _, weight in it.held("weights"):
        local_tensor(weight).mul_(1.5)
    update(it, 0)
    copies_of = dict(it.held("copies"))
    return all(
        torch.equal(local_tensor(copies_of[n]), local_tensor(w))
        for n, w in it.held("weights")
        if n in copies_of
    )


@pytest.mark.parametrize("layout", ["dp2.zero2", "dp2.zero3"])
def test_what_is_written_into_masters_computes(ranks: RankPool, layout: str) -> None:
    assert all(ranks.run(written_from_outside, deepspeed, layout, world=2))


def resumes(folder: Path, make: Callable[..., Engine], *how: Any, **keys: Any) -> bool:
    """Three updates, and two, a save, a load into another engine, one."""
    it = make(*how, **keys)
    for step in range(3):
        if step == 2:
            state = it.state_dict()
            checkpoint.save(folder, 2, state.tensors, state.meta)
        update(it, step, [2, 2])
        it.step(LR)
    again = make(*how, **keys)
    state = again.state_dict()
    again.load_state_dict(checkpoint.load(folder, state.tensors))
    update(again, 2, [2, 2])
    again.step(LR)
    return all(
        torch.equal(a, b)
        for kind in ("weights", "exp_avg", "exp_avg_sq")
        for a, b in zip(copies(it, kind).values(), copies(again, kind).values(), strict=True)
    )


@pytest.mark.parametrize(
    "layout,precision", [("dp2.zero0", "fp32"), ("dp2.zero1", "bf16"), ("dp2.zero3", "bf16")]
)
def test_a_resume_is_bitwise(ranks: RankPool, layout: str, precision: str, tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    assert all(ranks.run(resumes, saved, deepspeed, layout, precision=precision, world=2))


# --- roles, adapters, refusals ------------------------------------------------------------------


def of_a_role(layout: str) -> bool:
    return isinstance(deepspeed(layout, setup={"optimizer": None}), NativeEngine)


def test_what_is_not_trained_is_the_native_engines(ranks: RankPool) -> None:
    assert all(ranks.run(of_a_role, "dp2.zero3", world=2))


def of_an_adapter(layout: str) -> dict[str, Any]:
    trained = Trained(adapter=LoraConfig(kind="lora", rank=2))
    it = deepspeed(layout, setup={"trained": trained})
    it.start_adapter()
    out = {"metrics": [], "norms": []}
    for step in range(2):
        out["metrics"].append(update(it, step, [2, 2]))
        out["norms"].append(it.step(LR))
    names = {n.removeprefix("model.") for n in it.state_dict().tensors if n.startswith("model.")}
    return out | {"weights": copies(it, "weights"), "saved": names}


@pytest.mark.parametrize("layout", ["dp2.zero1", "dp2.zero3"])
def test_an_adapter_is_trained_alone(ranks: RankPool, layout: str) -> None:
    oracle = plain(MODEL, trained=Trained(adapter=LoraConfig(kind="lora", rank=2)))
    oracle.start_adapter()
    norms = []
    for step in range(2):
        update(oracle, step)
        norms.append(oracle.step(LR))
    wanted = copies(oracle, "weights")
    for mine in ranks.run(of_an_adapter, layout, world=2):
        assert mine["norms"] == pytest.approx(norms, rel=2e-5)
        assert_near(mine["weights"], wanted, 1e-4)
        assert mine["saved"] == {n for n in wanted if is_adapter(n)}


def refused(layout: str, keys: dict[str, Any], setup: dict[str, Any]) -> None:
    deepspeed(layout, setup=setup, **keys)


@pytest.mark.parametrize(
    "layout,keys,setup,message",
    [
        ("dp1", {}, {"optimizer": AdafactorConfig(kind="adafactor")}, "adafactor looks at whole"),
        ("dp1", {"precision": "fp64"}, {}, "trains in bf16 or fp32"),
        ("zero0", {"precision": "bf16"}, {}, "sums bf16 gradients in bf16.*write zero1"),
        (
            "dp1",
            {"precision": "bf16"},
            {"trained": Trained(adapter=LoraConfig(kind="lora"))},
            "adapter: .*would be rounded",
        ),
        ("dp1", {}, {"ranks": [3]}, "takes all ranks of the world"),
    ],
)
def test_what_would_not_be_right_is_refused(
    ranks: RankPool, layout: str, keys: dict[str, Any], setup: dict[str, Any], message: str
) -> None:
    with pytest.raises(RankError, match=message):
        ranks.run(refused, layout, keys, setup, world=1)


def passed_on() -> list[Any]:
    config = {
        "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000},
        "wall_clock_breakdown": False,
    }
    it = deepspeed("zero2", config=config)
    [bucket] = {it.engine.zero_reduce_bucket_size()}  # type: ignore[attr-defined]
    return [bucket, it.events(), it.events()]


def test_keys_that_are_not_ours_reach_the_library_and_are_listed(ranks: RankPool) -> None:
    [[bucket, first, second]] = ranks.run(passed_on, world=1)
    assert bucket == 1000 and second == []
    [(kind, text)] = first
    assert kind == "deepspeed" and "zero_optimization.reduce_bucket_size" in text
    assert "wall_clock_breakdown" in text and "stage" not in text
