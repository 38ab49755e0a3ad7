"""A generator cut among ranks, against one process: the same tokens, whatever happens to it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import CheckpointError, ConfigError, UserError
from shardwise.models import registry
from shardwise.rollout.config import Sampling
from shardwise.rollout.generator import Generator
from shardwise.rollout.sequences import Completion, Request
from shardwise.rollout.sharded import check_tp, cut, group_mesh
from shardwise.rollout.weights import stream_checksum
from tests.rollout import support
from tests.rollout.oracle import drain
from tests.support import toy
from tests.support.pool import RankPool

CPU = torch.device("cpu")
CUT = Sampling(max_new_tokens=7, temperature=1.2, top_k=9, top_p=0.9)
FREE = Sampling(max_new_tokens=11, stop_ids=tuple(range(9)))


def weights(name: str, scale: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    return ((n, t.detach() * scale) for n, t in support.hf_weights(name))


def engine(name: str, tp: int, **options: Any) -> Generator:
    mesh = group_mesh(tp, CPU)
    made = Generator(support.CONFIGS[name], torch.float64, accelerate=False, mesh=mesh, **options)
    made.update_weights(weights(name))
    return made


def story(name: str, tp: int) -> tuple[dict[int, Completion], Any, str, int]:
    """Few slots and pages, requests at any time, forks, other weights in flight, a release."""
    made = engine(name, tp, max_slots=3, max_cache_tokens=96)
    for request in support.requests(3):
        made.submit(request, FREE, 5, hold=True)
    done: dict[int, Completion] = {}
    for i in range(6):
        done |= {p.sequence: p.completion for p in made.step() if p.completion}
        if i == 2:
            made.submit(Request(50, [3, 1, 4, 1, 5], 2), CUT, 6)
    made.update_weights(weights(name, 0.9))
    done |= drain(made)
    first = min(done)
    made.fork(first, Request(60, [2], 3), FREE, 7, at=1)
    forks = made.fork(first, Request(61, [], 2), CUT, 8)
    made.step()
    made.release(forks[0])
    done |= drain(made)
    checksum = stream_checksum(support.CONFIGS[name], weights(name, 0.9), torch.float64)
    assert made.checksum == checksum, "of whole tensors"
    return (
        done,
        made.counts,
        made.backend_note,
        sum(v.nbytes for v in made.backend.served().values()),
    )


@pytest.mark.parametrize("name", ["llama", "everything", "gpt2"])
def test_two_ranks_write_what_one_process_does(ranks: RankPool, name: str) -> None:
    """``llama`` has one key head: both ranks have it."""
    alone, counts, _, whole = story(name, 1)
    assert len({t for c in alone.values() for t in c.token_ids}) > 8
    for done, others, note, size in ranks.run(story, name, 2, world=2):
        assert others == counts and "cut among 2 ranks" in note
        assert size < 0.7 * whole
        assert done.keys() == alone.keys()
        for number, theirs in done.items():
            ours = alone[number]
            for field in ("prompt_tokens", "token_ids", "kept_ids", "policies", "finish_reason"):
                assert getattr(theirs, field) == getattr(ours, field)
            assert theirs.logprobs == pytest.approx(ours.logprobs, abs=2e-6)
            assert theirs.behavior_logprobs == pytest.approx(ours.behavior_logprobs, abs=2e-6)


def groups_of_two() -> list[list[int]]:
    """Other groups are asked for other things."""
    made = engine("everything", 2, max_slots=2)
    own = dist.get_rank() // 2
    asked = support.requests(6)[own::2]
    cache = made.backend.cache.k
    assert cache.shape[1] == 1  # of two key heads
    return [c.token_ids for c in made.generate(asked, FREE, 5)]


def test_groups_write_apart(ranks: RankPool) -> None:
    made = engine("everything", 1)
    found = ranks.run(groups_of_two, world=4)
    for own in (0, 1):
        alone = made.generate(support.requests(6)[own::2], FREE, 5)
        assert found[2 * own] == found[2 * own + 1] == [c.token_ids for c in alone]


def late() -> list[tuple[str, int]]:
    """The second rank's clock is an hour ahead."""
    made = engine("gpt2", 2, max_slots=2)
    clock = time.monotonic
    ahead = mock.patch("time.monotonic", lambda: clock() + 3600.0 * dist.get_rank())
    with ahead:
        made.submit(Request(0, [1, 2]), Sampling(max_new_tokens=5), deadline=clock() + 600.0)
        made.submit(Request(1, [1, 2]), Sampling(max_new_tokens=5), deadline=clock() - 1.0)
        done = drain(made)
    return [(done[n].finish_reason, len(done[n].token_ids)) for n in sorted(done)]


def test_the_first_ranks_clock_ends_sequences(ranks: RankPool) -> None:
    assert ranks.run(late, world=2) == [[("length", 5), ("deadline", 0)]] * 2


def spoilt(how: str) -> str:
    made = engine("gpt2", 2)
    name = next(n for n in made.backend.parameters if n.endswith("down.weight"))
    stream, served = list(weights("gpt2", 0.5)), made.backend.served
    if how == "shape":
        stream[0] = (stream[0][0], stream[0][1][:-1])
    else:  # of this rank's part, not all is where it belongs
        made.backend.served = lambda: served() | {name: served()[name].flip(1)}  # type: ignore[method-assign]
    with pytest.raises(CheckpointError) as error:
        made.update_weights(stream)
    with pytest.raises(UserError, match="no weights"):
        made.submit(Request(0, [1]), FREE)
    return str(error.value)


@pytest.mark.parametrize(
    ("how", "says"), [("shape", "has shape"), ("part", "served otherwise than it was received")]
)
def test_what_is_served_is_what_came(ranks: RankPool, how: str, says: str) -> None:
    for text in ranks.run(spoilt, how, world=2):
        assert says in text


@pytest.mark.parametrize(
    ("tp", "world", "sizes", "says"),
    [
        (3, 4, {}, "rollout.tp: 3: it does not divide the 4 ranks of this run; nearest: "),
        (4, 4, {"num_heads": 6, "num_kv_heads": 2, "head_dim": 8}, "num_heads 6; nearest: 2"),
        (
            4,
            8,
            {"num_heads": 12, "num_kv_heads": 6, "head_dim": 8},
            "multiple of num_kv_heads 6; nearest: 2",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused(
    tp: int, world: int, sizes: dict[str, int], says: str
) -> None:
    with pytest.raises(ConfigError) as error:
        check_tp(tp, toy.llama(**sizes), world)
    assert says in str(error.value)
    check_tp(2, toy.llama(num_heads=4, num_kv_heads=1), 4)


def unknown_family() -> str:
    mesh = group_mesh(2, CPU)
    assert mesh is not None
    with torch.device("meta"):
        model = registry.build(support.CONFIGS["gpt2"])
    with (
        mock.patch.object(registry, "sharding", lambda config: ()),
        pytest.raises(ConfigError) as error,
    ):
        cut(model, mesh)
    return str(error.value)


def test_a_family_without_a_table_is_refused(ranks: RankPool) -> None:
    for text in ranks.run(unknown_family, world=2):
        assert (
            "no row of the tensor-parallel table names this module" in text
            and "set rollout.tp to 1" in text
        )
