"""Told to stop anywhere, a run saves one step on all ranks, and goes on as if it had not been."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shardwise.config.schema import ResilienceConfig
from shardwise.errors import ExitCode, Stopped
from shardwise.resilience import stop
from shardwise.resilience.gate import CONCLUDED, NEXT, Gate, Point
from shardwise.resilience.stop import Stop, decide
from tests.launch.test_local import Launcher
from tests.resilience import places
from tests.resilience.places import run_signalled
from tests.stages.recipes import metrics, recipe, run, weights
from tests.support.pool import RankPool


def run_and_stop(*args: Any) -> tuple[str, int]:
    """The message and the exit code of a run that is told to stop."""
    try:
        run_signalled(*args)
    except Stopped as stopped:
        return str(stopped), stopped.exit_code
    raise AssertionError


@pytest.mark.parametrize("world", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_stopped_anywhere_and_gone_on_as_if_nothing_had_been(
    ranks: RankPool, tmp_path: Path, world: int
) -> None:
    clean, broken = tmp_path / "clean", tmp_path / "broken"
    kinds = ("pretrain", "grpo")
    configs = [recipe(folder, *kinds) for folder in (clean, broken)]
    for config in configs:
        for stage in config["stages"]:
            stage["checkpoint"] = {"every": 2, "keep": 9, "asynchronous": world == 1}
    ranks.run(run, configs[0], world=world)
    for place, call, number, hangs, said in (
        # Of two ranks one may be a step ahead: which step is saved is the ranks' to agree on.
        ("step", 1, signal.SIGTERM, False, "step"),
        ("validation", 1, signal.SIGUSR1, True, "pretrain"),
        ("save", 1, signal.SIGTERM, False, "pretrain"),
        ("rollout", 2, signal.SIGHUP, True, "saved grpo step 1"),
        ("evaluation", 1, signal.SIGTERM, True, "saved"),
    ):
        args = (str(broken), configs[1], place, call, number, hangs)
        if world == 1:
            [(text, code)] = ranks.run(run_and_stop, *args, world=1)
        else:  # peers of a rank that hangs wait in a group that the pool would go on using
            launcher = Launcher("run_signalled", tmp_path, *args[1:], module=places.__name__)
            code, _, text = launcher.finish()
        assert code == ExitCode.REQUEUE and said in text, (place, text)
        assert signal.Signals(number).name in text
        assert (broken / "exit.json").read_text().startswith('{"exit_code": 85, "reason": "stopped')
    ranks.run(run, configs[1], world=world)
    for name in kinds:
        a, b = weights(clean, name), weights(broken, name)
        assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a), name
    assert metrics(clean) == metrics(broken)
    assert (broken / "exit.json").read_text().startswith('{"exit_code": 0')


def test_an_ignored_signal_stays_ignored_and_an_echo_is_no_second_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    old = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Stop(ResilienceConfig(), Gate()):
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, old)
    told: list[str] = []
    monkeypatch.setattr(stop, "ECHO_SECONDS", 60.0)
    monkeypatch.setattr(Stop, "_stop", lambda _: None)
    monkeypatch.setattr(Stop, "_give_up", lambda _, why: told.append(why))
    alone = Stop(ResilienceConfig(), Gate())
    alone._signalled(signal.SIGHUP)
    alone._signalled(signal.SIGHUP)
    assert not told
    alone._signalled(signal.SIGTERM)
    assert "second signal" in told[0]


POSITIONS = st.tuples(st.integers(0, 9), st.sampled_from((0, CONCLUDED, NEXT)))


@given(st.integers(0, 3), st.lists(POSITIONS, min_size=1, max_size=5), st.booleans())
def test_the_ranks_are_cut_at_one_place_that_all_can_reach(
    stage: int, places: list[tuple[int, int]], finish: bool
) -> None:
    reports = [[stage, number, begun, True] for number, begun in places]
    target = decide(reports, finish=finish)
    assert target is not None and target[0] == stage
    assert target[1] % 2 == 0, "between two updates and outside of a save"
    furthest = max(number for number, _ in places)
    assert furthest <= target[1] <= furthest + 4, "at most the step in progress"
    if not finish:
        assert target[1] <= furthest + 1


def test_nothing_to_save_needs_no_place() -> None:
    assert decide([[0, 4, False, False], [0, 2, False, False]], finish=True) is None
    assert decide([[0, 4, NEXT, False]], finish=True) == (0, 8)  # the step begun is finished
    assert decide([[0, 4, NEXT, False]], finish=False) is None


def test_nobody_stands_before_a_validation_that_others_are_in() -> None:
    """Its collectives would keep their device from what is to be saved."""
    reports = [[0, 4, 0, True], [0, 3, NEXT, True], [0, 4, CONCLUDED, True]]
    assert decide(reports, finish=True) == (0, 6)
    assert decide(reports, finish=False) == (0, 4)  # it takes too long


@pytest.mark.parametrize("begin", [Gate.step, Gate.validating])
def test_nothing_begins_once_it_was_said_that_nothing_has(begin: Callable[[Gate], None]) -> None:
    gate = Gate()
    gate.stage(0, Point("sft", 0, Path))
    assert gate.close() == (0, 0) and gate.begun == 0
    thread = threading.Thread(target=begin, args=(gate,))
    thread.start()
    with gate._changed:
        assert gate._changed.wait_for(lambda: gate._parked, 60)
    assert gate.begun == 0
    gate.open_to((0, 4))
    thread.join()
    assert gate.begun
