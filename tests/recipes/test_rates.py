"""What the field takes: figures of papers come out where they were measured."""

from __future__ import annotations

import pytest

from shardwise.config import registry
from shardwise.recipes.rates import STEPS, USUAL, global_batch, rate


def test_every_stage_is_one_of_ours() -> None:
    registry.discover()
    assert set(USUAL) <= set(registry.STAGE_CONFIGS)


@pytest.mark.parametrize(
    "stage,width,adapts,expected",
    [
        ("sft", 2000, False, 5e-5),
        ("sft", 4096, True, 3e-4),  # QLoRA's 2e-4 for 7B
        ("sft", 576, True, 1e-3),  # configs/smollm2
        ("sft", 576, False, 1e-4),
        ("dpo", 4096, False, 5e-7),
        ("dpo", 4096, True, 5e-6),  # Zephyr's with LoRA
        ("reward", 4096, False, 1e-5),
        ("grpo", 4096, False, 1e-6),
    ],
)
def test_rates(stage: str, width: int, adapts: bool, expected: float) -> None:
    found, why = rate(USUAL[stage], width, adapts)
    assert found == expected
    assert ("LoRA (" in why) == adapts


def test_batches_grow_with_the_data_up_to_the_usual() -> None:
    usual = USUAL["sft"]
    sizes = [global_batch(usual, rows, 2, 1)[0] for rows in (1, 3, 50, 400, 4_000, 10_000, 10**6)]
    assert sizes == [1, 2, 4, 8, 64, 128, 128]
    assert global_batch(usual, 10**6, 2, 1)[1] == f"as usual ({usual.source})"
    for rows in (400, 4_000, 10_000):
        batch, why = global_batch(usual, rows, 2, 1)
        assert rows * 2 / batch >= STEPS and (batch == usual.batch or f"{rows:,} rows" in why)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_every_data_rank_has_a_row(ranks: int) -> None:
    for rows in (1, 50, 4_000):
        batch, _ = global_batch(USUAL["sft"], rows, 2, ranks)
        assert batch % ranks == 0
