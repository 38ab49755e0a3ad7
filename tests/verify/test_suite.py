"""The built-in suite: a part of its layouts every day, all of them in the slow proofs."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardwise.parallel.layout import SCHEDULES, parse_layout
from shardwise.verify import suite
from shardwise.verify.roles import world_of
from shardwise.verify.verifier import Verifier
from tests.support.pool import RankPool

SPLIT = "dp2.zero3.pp2.zbv"
Verifiers = dict[str, Verifier]


@pytest.fixture(scope="module")
def verifiers(ranks: RankPool) -> Iterator[Verifiers]:
    made = {model: Verifier(suite.recipe(model), ranks) for model in suite.MODELS}
    yield made
    for verifier in made.values():
        verifier.close()


def _check(verifiers: Verifiers, model: str, stage: str, layout: str, **options: bool) -> None:
    verdict = verifiers[model].check(stage, layout, **options)  # type: ignore[arg-type]
    assert verdict.passed, verdict.sentence()


# Every day, on two cores: every second one of two ranks, every fifth of four.
ELSEWHERE = {  # by tests of their own, or beside another one of the kind
    ("gpt2", "grpo", "tp2"),
    ("llama", "ppo", "cp2.ring"),
    ("gpt2", "ppo", "pp2.zbv"),
    ("gpt2", "process_reward", "pp4.interleaved.v2"),
    ("llama-untied-odd", "distill", "dp2.zero1.cp2.ring"),
    ("llama", "dpo", "dp2.zero2.pp2.interleaved.v2"),
    ("gpt2", "sft", "tp2.pp2.zbv"),
    ("llama-untied-odd", "dpo", "pp2.gpipe"),
    ("llama", "grpo", "dp2.zero2"),
    ("llama", "sft", "tp2.sp.cp2.ulysses"),
    ("llama", "reward", "cp4.ulysses"),
}
DAILY = [
    case
    for world, every in ((2, 2), (4, 5))
    for case in [case for case in suite.subset() if world_of(case[-1]) == world][::every]
    if case not in ELSEWHERE
]
SUBSET = [
    pytest.param(*case, marks=[] if case in DAILY else [pytest.mark.slow])
    for case in suite.subset()
]


@pytest.mark.parametrize("model,stage,layout", SUBSET)
def test_layout(verifiers: Verifiers, model: str, stage: str, layout: str) -> None:
    _check(verifiers, model, stage, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", suite.COMPILED)
def test_compiled(verifiers: Verifiers, layout: str) -> None:
    verdict = verifiers["llama"].check("pretrain", layout, "fp32", compiled=True)
    assert verdict.passed, verdict.sentence()


@pytest.mark.slow
@pytest.mark.parametrize("model,stage", suite.PAIRS)
def test_bf16(verifiers: Verifiers, model: str, stage: str) -> None:
    for layout in ("dp2.zero2", "tp2.sp", "pp2.zbv", "cp2.ring", "cp2.ulysses"):
        verdict = verifiers[model].check(stage, layout, "bf16")
        assert verdict.passed, verdict.sentence()


@pytest.mark.slow
def test_split_backward_under_zero_reduces_one_dtype(verifiers: Verifiers) -> None:
    """Gradients that a hook made bf16 and those that the weight pass added meet in fp32."""
    verdict = verifiers["llama"].check("pretrain", SPLIT, "bf16")
    assert verdict.passed, verdict.sentence()


def test_subset_covers_what_it_promises() -> None:
    cases = suite.subset()
    assert len(suite.LAYOUTS) == len(set(suite.LAYOUTS)) >= 60
    assert Counter(layout for _, _, layout in cases) == dict.fromkeys(suite.LAYOUTS, 1)
    assert min(Counter((model, stage) for model, stage, _ in cases).values()) >= 2
    parsed = [parse_layout(x, world_of(x)) for x in suite.LAYOUTS]
    assert max(x.world for x in parsed) == 8
    assert {x.schedule for x in parsed if x.pp > 1} == set(SCHEDULES)


def _resources() -> tuple[int, int]:
    gc.collect()  # a reference's file stays open as long as one of its values lives
    here = Path("/proc/self")
    return len(list((here / "task").iterdir())), len(list((here / "fd").iterdir()))


@pytest.mark.slow
def test_threads_and_descriptors_stay_flat(verifiers: Verifiers, ranks: RankPool) -> None:
    """Groups are cached by rank tuple: the second round of layouts makes none."""
    layouts = ("dp2.zero2", "tp2.sp", "pp2.zbv", "cp2.ring")
    counts = []
    for _ in range(3):
        for layout in layouts:
            _check(verifiers, "llama", "pretrain", layout)
        counts.append(ranks.run(_resources, world=2))
    assert counts[1] == counts[2]
