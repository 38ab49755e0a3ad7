"""Every number of a recipe through a list of extreme values: taken, or refused with its key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from shardwise.config.export import leaves
from shardwise.config.load import load_config
from shardwise.config.source import dotted
from shardwise.errors import UserError
from shardwise.stages.run import preflight
from tests.support.daily import daily

BASE: dict[str, Any] = {
    "model": {
        "family": "llama", "hidden_size": 32, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1,
        "ffn_size": 32, "max_seq_len": 128,
        "rope_scaling": {"kind": "llama3", "factor": 8.0},
    },
    "engine": {"fp8": {}},
    "stages": [
        {"kind": "pretrain", "steps": 2, "batch": {"seq_len": 16, "ramp_start": 1}},
        {"kind": "sft", "steps": 2, "batch": {"seq_len": 16}, "task": {"kind": "arithmetic"}},
        {"kind": "reward", "steps": 2, "batch": {"seq_len": 16}, "task": {}},
        {"kind": "ppo", "steps": 2, "batch": {"seq_len": 16}},
        {"kind": "grpo", "steps": 2, "batch": {"seq_len": 16}, "reward": {"parts": [
            {"kind": "length", "max_tokens": 9, "buffer_tokens": 2}, {"kind": "numeric"},
            {"kind": "user", "function": "x.py:f"},
        ]}},
    ],
    "evaluations": [{"kind": "problems"}, {"kind": "bits_per_byte"}],
}  # fmt: skip
EXTREMES = [
    "0", "-1", "1", "1.0", "1e-300", "5e-324", "-1e308", "1e308", ".inf", "-.inf", ".nan",
    "2147483648", "9223372036854775808", "1000000000000", "-9223372036854775809", "1" + "0" * 30,
    "1" + "0" * 5000, "1e400", "0x" + "f" * 64, "'7'", "[]", "null", "1e30",
]  # fmt: skip
# No model, batch or wait is ever so large, and these would be 0 or infinite in fp32.
NEVER = {"1e308", ".inf", ".nan", "9223372036854775808", "1" + "0" * 30, "1e30", "1e400", "-1e308"}


def numbers() -> Iterator[str]:
    """The dotted key of every number that a recipe of all stages has."""
    config = load_config(BASE).config.model_dump(mode="json")
    for path, value in leaves(config):
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield dotted(path)


@pytest.mark.parametrize("part", daily(range(6), 0, 3))
def test_extreme_numbers(part: int) -> None:
    keys = list(numbers())
    assert len(keys) > 150
    for key in keys[part::6]:
        for value in EXTREMES:
            override = f"{key}={value}"
            try:
                loaded = load_config(BASE, [override])
                assert value not in NEVER, override
                preflight(loaded.config, 1, loaded.provenance)
            except UserError as error:
                assert error.exit_code == 2 and len(str(error)) < 4000, override


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_layers=1000000000", "at most 10000"),
        ("stages.0.batch.seq_len=1000000000000", "at most 67108864"),
        ("stages.0.steps=9223372036854775808", "at most 2147483647"),
        ("engine.timeout_s=1e30", "at most 2e+06"),
        ("stages.0.optimizer.beta1=1.0", "below 1"),
        ("stages.0.optimizer.beta2=-0.1", "at least 0"),
        ("stages.0.optimizer.eps=1e-300", "0 in fp32"),
        ("stages.0.optimizer.lr=.inf", "at most 1e"),
        ("model.dropout=1.0", "below 1"),
        ("model.rope_scaling.low_freq_factor=4.0", "must exceed low_freq_factor"),
    ],
)
def test_what_cannot_be_is_named(override: str, said: str) -> None:
    with pytest.raises(UserError) as told:
        load_config(BASE, [override])
    key = override.partition("=")[0].rpartition(".")[0]
    assert key in str(told.value) and said in str(told.value)


def test_sizes_beyond_the_machine_are_refused_before_anything_is_made() -> None:
    simple = {"model": BASE["model"], "stages": [{"kind": "pretrain", "steps": 1}]}
    for override, key in (
        (["model.hidden_size=1048576", "model.num_layers=10000"], "model: its weights take"),
        (["stages.0.batch.micro_batch=16777216"], "stages.0.batch: micro_batch"),
    ):
        loaded = load_config(simple, [*override, "model.max_seq_len=1024"])
        with pytest.raises(UserError, match=key):
            preflight(loaded.config, 1, loaded.provenance)
