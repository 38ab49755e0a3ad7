"""ZeRO-Infinity: masters, moments and parameters on a disk. Slow: the library builds its reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shardwise.engines.deepspeed.engine import DeepSpeedEngine
from tests.engines.deepspeed.test_engine import deepspeed, resumes, written_from_outside
from tests.support import toy
from tests.support.engines import assert_same, plain, train
from tests.support.pool import RankError, RankPool

pytest.importorskip("deepspeed")

# Under a megabyte a rank, nothing leaves memory: two groups of more, and a small one.
MODEL = toy.llama(hidden_size=256, ffn_size=512, num_layers=3)
SMALL = {"sub_group_size": 700_000, "stage3_param_persistence_threshold": 0}
# Without a limit its pinned buffers take gigabytes, and all parameters stay in memory.
AWAY = {"offload_param": {"buffer_size": 1_000_000, "max_in_cpu": 0}}
BUILD_S = 900.0


def engine(folder: Path, params: bool, **keys: Any) -> DeepSpeedEngine:
    where = {"offload_optimizer": "nvme", "nvme_path": folder}
    where |= {"offload_param": "nvme"} if params else {}
    zero = SMALL | (AWAY if params else {})
    it = deepspeed("dp2.zero3", MODEL, config={"zero_optimization": zero}, **where, **keys)
    assert isinstance(it, DeepSpeedEngine)
    assert len(it.swapped.numbers) >= 1, "nothing was large enough to leave memory"
    return it


def on_rank(folder: Path, params: bool) -> dict[str, Any]:
    it = engine(folder, params)
    flats = list(it.swapped.numbers)
    assert all(flat.numel() == 0 for flat in flats), "masters lie on the disk"
    return train(it, [2, 2])


@pytest.mark.slow
@pytest.mark.parametrize("params", [False, True])
def test_updates_equal_the_plain_engines(ranks: RankPool, tmp_path: Path, params: bool) -> None:
    wanted = train(plain(MODEL))
    for mine in ranks.run(on_rank, tmp_path, params, world=2, timeout=BUILD_S):
        assert_same(mine, wanted, 2e-5)
    assert not list(tmp_path.iterdir()), "what was offloaded is removed at the end"


@pytest.mark.slow
@pytest.mark.parametrize("params,precision", [(False, "fp32"), (True, "bf16")])
def test_a_resume_is_bitwise(ranks: RankPool, tmp_path: Path, params: bool, precision: str) -> None:
    how = (tmp_path / "saved", engine, tmp_path, params)
    assert all(ranks.run(resumes, *how, precision=precision, world=2, timeout=BUILD_S))


@pytest.mark.slow
def test_what_is_written_into_masters_computes(ranks: RankPool, tmp_path: Path) -> None:
    how = (engine, tmp_path, True)
    assert all(ranks.run(written_from_outside, *how, world=2, timeout=BUILD_S))


def nowhere(folder: Path) -> None:
    engine(folder / "none", False)


def test_a_folder_that_is_not_there_is_refused(ranks: RankPool, tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"nvme_path: .*none|missing; apt-get install libaio"):
        ranks.run(nowhere, tmp_path)
