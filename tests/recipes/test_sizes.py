"""What fits where, by the formulas of `shardwise.memory`."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from shardwise.config.load import load_config
from shardwise.config.run import RunConfig
from shardwise.recipes.machine import BASE, GIB, USABLE, Machine, find_machine
from shardwise.recipes.sizes import TOKENS, _ways, choose, least, occupied, sized
from shardwise.stages.run import check_stage

SEVEN_B = {
    "family": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "num_layers": 32,
    "num_heads": 32,
    "num_kv_heads": 32,
    "ffn_size": 11008,
    "max_seq_len": 4096,
    "tie_embeddings": False,
}


def run_of(batch: int = 64, seq_len: int = 2048, **stage: Any) -> RunConfig:
    sizes = {"global_batch": batch, "micro_batch": 1, "seq_len": seq_len}
    stages = [{"kind": "pretrain", "steps": 10, "batch": sizes, **stage}]
    return load_config({"model": SEVEN_B, "stages": stages}).config


def with_budget(machine: Machine, budget: float) -> Machine:
    memory = (budget + BASE[machine.device]) / USABLE
    return dataclasses.replace(machine, bytes_a_rank=memory)


def test_a_budget_is_what_a_rank_may_fill() -> None:
    assert with_budget(find_machine(1, 80.0), 12e9).budget == pytest.approx(12e9)


def test_seven_billion_weights_in_16_bytes_each_need_more_than_one_gpu() -> None:
    run = run_of()
    assert choose(run, find_machine(1, 80.0), 2048) is None
    assert least(run, find_machine(1, 80.0), 2048) > 16 * 6.7e9
    size = choose(run, find_machine(8, 80.0), 2048)
    assert size is not None and size.layout == "zero2", "gradients of 27 GB are divided"
    assert size.micro_batch * 2048 <= TOKENS["cuda"]
    frugal = choose(run, find_machine(8, 24.0), 2048)
    assert frugal is not None and frugal.layout == "zero3"


def test_fewer_trained_weights_need_less() -> None:
    found = {}
    for name, adapter in {
        "all": None,
        "lora": {"kind": "lora"},
        "qlora": {"kind": "lora", "quantise": "nf4"},
    }.items():
        found[name] = least(run_of(adapter=adapter), find_machine(1, 80.0), 2048)
    assert found["all"] > 2 * found["lora"] > 4 * found["qlora"] / 2
    one = choose(run_of(adapter={"kind": "lora", "quantise": "nf4"}), find_machine(1, 24.0), 2048)
    assert one is not None and one.layout == "auto"


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_what_is_chosen_fits_and_what_is_less_does_not(ranks: int) -> None:
    run = run_of()
    machine = find_machine(ranks, 80.0)
    need = least(run, machine, 2048)
    before = None
    for budget in (need - 1, need, 1.2 * need, 2 * need, 8 * need):
        size = choose(run, with_budget(machine, budget + 1e-3), 2048)
        assert (size is None) == (budget < need)
        if size is None:
            continue
        assert occupied(sized(run, size), machine, 2048) == size.bytes_a_rank <= budget + 1
        if before is not None:
            assert size.micro_batch >= before.micro_batch or size.recompute == "none"
        before = size
    assert before is not None and before.recompute == "none" and before.layout == "auto"


def test_one_long_row_is_cut_by_tensor_parallelism_where_nothing_else_helps() -> None:
    run, machine = run_of(batch=8, seq_len=4096), find_machine(8, 80.0)
    whole = min(
        occupied(sized(run, dataclasses.replace(s, micro_batch=1)), machine, 4096)
        for s in _untensored(run, machine)
    )
    size = choose(run, with_budget(machine, whole - 1), 4096)
    assert size is not None and size.layout.startswith("tp")


@pytest.mark.parametrize(
    ("adapter", "seq_len", "cut"),
    [
        (None, 4096, "cp"),
        pytest.param({"kind": "lora", "quantise": "nf4"}, 2048, "pp", marks=pytest.mark.slow),
    ],
)
def test_rows_or_layers_are_cut_where_tensor_parallelism_and_zero_do_not_help(
    adapter: Any, seq_len: int, cut: str
) -> None:
    run, machine = run_of(batch=8, seq_len=seq_len, adapter=adapter), find_machine(8, 80.0)
    need = min(occupied(sized(run, way), machine, seq_len) for way in _ways(run, machine))
    fits = choose(run, with_budget(machine, need + 1), seq_len)
    assert fits is not None and "cp" not in fits.layout and "pp" not in fits.layout
    size = choose(run, with_budget(machine, need - 1), seq_len)
    assert size is not None and cut in size.layout and size.bytes_a_rank < need
    check_stage(sized(run, size), sized(run, size).training[0], 8, here=False)


def _untensored(run: RunConfig, machine: Machine) -> list[Any]:
    return [w for w in _ways(run, machine) if not w.layout.startswith("tp")]


def test_short_rows_share_a_micro_batch_and_a_rank_takes_no_more_than_its_share() -> None:
    machine = find_machine(8, 640.0)
    short = choose(run_of(batch=4096, seq_len=64), machine, 64)
    assert short is not None and short.micro_batch * 64 == TOKENS["cuda"]
    few = choose(run_of(batch=32, seq_len=64), machine, 64)
    assert few is not None and few.micro_batch == 4
    assert few.bytes_a_rank < GIB * 640
