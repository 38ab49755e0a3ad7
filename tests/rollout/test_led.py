"""Calls that one rank makes and the others follow: the same tokens as one rank's alone."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import CheckpointError, UserError
from shardwise.models import registry
from shardwise.models.common.init import init_weights
from shardwise.rollout import led
from shardwise.rollout.api import shared_mesh
from shardwise.rollout.config import Sampling
from shardwise.rollout.engine import RolloutEngine
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Request
from tests.support import toy
from tests.support.pool import RankPool

MODEL = toy.llama(vocab_size=32, max_seq_len=64)
SAMPLING = Sampling(max_new_tokens=5, top_p=0.9, stop_ids=(3,))


def weights(seed: int) -> list[tuple[str, Tensor]]:
    model = registry.build(MODEL)
    init_weights(model, seed)
    return list(model.named_parameters())


def broken_off() -> Iterator[tuple[str, Tensor]]:
    """A stream of weights whose file cannot be read to its end."""
    yield from weights(0)[:3]
    raise CheckpointError("the file ends early")


def drawn(engine: RolloutEngine) -> list[list[int]]:
    """The tokens of all that is in flight, when it has ended."""
    found: dict[int, list[int]] = {}
    while moved := engine.step():
        for progress in moved:
            found.setdefault(progress.sequence, []).extend(progress.token_ids)
    return [found[number] for number in sorted(found)]


def all_calls(one: RolloutEngine, other: RolloutEngine) -> list[Any]:
    """What two engines answer to every call of the protocol, wrong ones in between."""
    said: list[Any] = []
    for engine, seed in ((one, 0), (other, 1)):
        said.append(engine.update_weights(weights(seed), hf_names=False))
    for engine in (one, other):
        held, _ = engine.submit(Request(0, [5, 6, 7], 2), SAMPLING, 4, hold=True)
        said.append(drawn(engine))
        with pytest.raises(UserError, match="vocabulary"):
            engine.submit(Request(1, [99]), SAMPLING)
        engine.fork(held, Request(2, [8], 2), SAMPLING, 1, at=2)
        said.append(drawn(engine))
        engine.release(held)
        [late] = engine.submit(Request(3, [5]), SAMPLING, deadline=time.monotonic() - 1)
        said.append([p.completion.finish_reason for p in engine.step() if p.completion])
        [gone] = engine.submit(Request(4, [6]), SAMPLING)
        said.append([late, gone])
        engine.release(gone)
        said += [engine.step(), engine.checksum, engine.counts.drawn]
    wrong = [("nobody", weights(0)[0][1])]
    for stream, words in (
        (broken_off(), "ends early"),
        (wrong, "no parameter"),
        ([], "not arrive"),
    ):
        with pytest.raises(CheckpointError, match=words):
            one.update_weights(stream, hf_names=False)
        said.append(one.checksum)
    said.append(one.update_weights(weights(2), hf_names=False))
    one.submit(Request(5, [9, 9]), SAMPLING)
    return json.loads(json.dumps([*said, drawn(one)]))  # type: ignore[no-any-return]


def together() -> list[Any] | None:
    mesh = shared_mesh(MODEL, dist.get_world_size(), "cpu")
    line = led.line()
    engines = {name: Generator(MODEL, torch.float64, mesh=mesh) for name in ("one", "other")}
    if dist.get_rank() > 0:
        led.follow(engines, line)
        return None
    one, other = (led.Leader(name, engine, line) for name, engine in engines.items())
    said = all_calls(one, other)
    led.end(line)
    return said


def alone() -> list[Any]:
    return all_calls(*(Generator(MODEL, torch.float64) for _ in range(2)))


def test_ranks_that_follow_answer_as_one_alone(ranks: RankPool) -> None:
    [expected] = ranks.run(alone, world=1)
    said, nothing = ranks.run(together, world=2)
    assert said == expected and nothing is None


def one_fails() -> str:
    """A step fails on the first rank alone."""
    line, lost = led.line(), list[str]()
    if dist.get_rank() > 0:
        led.follow({"one": Generator(MODEL, torch.float64)}, line)
        return "ended"
    engine = Generator(MODEL, torch.float64)
    leader = led.Leader("one", engine, line, lambda: lost.append("lost"))
    leader.update_weights(weights(0), hf_names=False)
    engine.step = None  # type: ignore[assignment, method-assign]
    with pytest.raises(TypeError):
        leader.step()
    with pytest.raises(led.BrokenError, match="is gone"):
        leader.submit(Request(0, [1]), SAMPLING)
    leader.release(0)
    led.end(line)
    return lost.pop()


def test_what_fails_on_one_rank_alone_ends_all_calls(ranks: RankPool) -> None:
    assert ranks.run(one_fails, world=2) == ["lost", "ended"]
