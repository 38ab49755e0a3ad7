"""The native engine under the protocol: whatever happens around a sequence, it draws the same."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shardwise.errors import CheckpointError, UserError
from shardwise.rollout import backends
from shardwise.rollout.config import Sampling
from shardwise.rollout.engine import RolloutCounts, RolloutEngine
from shardwise.rollout.generator import Generator
from shardwise.rollout.sampling import choose, row_keys, uniform_at
from shardwise.rollout.sequences import Completion, Request
from tests.rollout import support
from tests.rollout.oracle import Oracle, drain

BACKENDS = pytest.mark.parametrize("accelerate", [False, True], ids=["plain", "native"])
SAMPLINGS = [
    Sampling(max_new_tokens=11, stop_ids=tuple(range(9))),
    Sampling(max_new_tokens=7, temperature=1.2, top_k=9, top_p=0.9),
    Sampling(max_new_tokens=9, greedy=True),
]


def weights(name: str, scale: float = 1.0) -> Iterator[tuple[str, Tensor]]:
    """Other weights for another scale."""
    return ((n, t.detach() * scale) for n, t in support.hf_weights(name))


def engine(
    name: str, page: int = 16, dtype: torch.dtype = torch.float32, **options: object
) -> Generator:
    """A loaded one; pages of ``page`` tokens, on the plain backend."""
    with mock.patch.object(backends, "PAGE", page):
        made = Generator(support.CONFIGS[name], dtype, **options)  # type: ignore[arg-type]
    made.update_weights(weights(name))
    if options.get("accelerate", True) and "native" not in made.backend_note:
        pytest.skip(made.backend_note)
    return made


def conforms(made: Generator) -> RolloutEngine:
    return made


@functools.cache
def served(name: str, scale: float, dtype: torch.dtype) -> tuple[str, torch.nn.Module]:
    """A checksum and the plain model that it belongs to."""
    oracle = Oracle(support.CONFIGS[name], dtype)
    return oracle.update_weights(weights(name, scale)), oracle.model


def check(
    name: str,
    done: Completion,
    sampling: Sampling,
    key: int,
    dtype: torch.dtype,
    scales: list[float],
) -> None:
    """Every token is what the weights of its time draw from all that stands before it."""
    models = dict(served(name, scale, dtype) for scale in scales)
    assert sum(n for _, n in done.policies) == len(done.token_ids)
    ids = torch.tensor([[*done.prompt_tokens, *done.token_ids]])
    first = 0
    row = row_keys(key, torch.tensor([done.prompt_id]), torch.tensor([done.sample_id]))
    for policy, count in done.policies:
        with torch.no_grad():
            logits = models[policy](ids, torch.arange(ids.shape[1])[None])[0]
        index = torch.arange(first, first + count)
        at = index + len(done.prompt_tokens) - 1
        token, logp, kept, left = choose(logits[at], sampling, uniform_at(row.expand(count), index))
        assert token.tolist() == done.token_ids[first : first + count]
        assert logp.tolist() == pytest.approx(done.logprobs[first : first + count], abs=3e-5)
        behavior = done.behavior_logprobs[first : first + count]
        assert kept.tolist() == pytest.approx(behavior, abs=3e-5)
        assert left is None or done.kept_ids is not None
        if left is not None and done.kept_ids is not None:
            assert left == done.kept_ids[first : first + count]
        first += count


@given(
    st.sampled_from(["llama", "everything", "gpt2"]),
    st.sampled_from([torch.float32, torch.float64]),
    st.sampled_from([1, 3, 4, 16]),
    st.integers(1, 5),
    st.data(),
)
@settings(max_examples=30, deadline=None)
def test_completions_do_not_depend_on_what_happens_around_them(
    name: str, dtype: torch.dtype, page: int, slots: int, data: st.DataObject
) -> None:
    """Submissions, forks, releases, new weights at any step; pages that run out."""
    room = data.draw(st.sampled_from([None, 64, 90]))
    made = engine(name, page, dtype, max_slots=slots, max_cache_tokens=room, accelerate=False)
    asked: dict[int, Sampling] = {}
    done: dict[int, Completion] = {}
    released: set[int] = set()
    scales = [1.0]
    for prompt_id in range(data.draw(st.integers(1, 14))):
        action = data.draw(st.sampled_from(["submit", "submit", "fork", "step", "step", "other"]))
        sampling = data.draw(st.sampled_from(SAMPLINGS))
        tokens = data.draw(st.lists(st.integers(0, 100), max_size=9))
        held = [n for n in done if n not in released]
        request = Request(prompt_id, tokens or [1], data.draw(st.integers(1, 4)))
        if action == "submit":
            numbers = made.submit(request, sampling, 5, hold=True)
            asked |= dict.fromkeys(numbers, sampling)
        elif action == "fork" and held:
            parent = data.draw(st.sampled_from(held))
            at = data.draw(st.integers(0, len(done[parent].token_ids)))
            request = dataclasses.replace(request, prompt_tokens=tokens)
            if len(done[parent].prompt_tokens) + at + len(tokens) < 50:
                numbers = made.fork(parent, request, sampling, 5, at=at, hold=True)
                asked |= dict.fromkeys(numbers, sampling)
        elif action == "other" and asked:
            if data.draw(st.booleans()):
                scales.append(1.0 - 0.1 * len(scales))
                made.update_weights(weights(name, scales[-1]))
            else:
                gone = data.draw(st.sampled_from(sorted(asked)))
                made.release(gone)
                released.add(gone)
        else:
            for progress in made.step():
                if progress.completion:
                    done[progress.sequence] = progress.completion
    done |= drain(made)
    assert set(done) | released == set(asked)
    for number in done:
        check(name, done[number], asked[number], 5, dtype, scales)
    for number in asked:
        made.release(number)
    pool = made.scheduler.pool
    assert pool.num_used == 0 and sorted(pool.free) == list(range(len(pool.holders)))
    assert room is None or len(pool.holders) * page <= room


@BACKENDS
@pytest.mark.parametrize("name", support.CONFIGS)
def test_few_slots_and_few_pages_change_nothing(name: str, accelerate: bool) -> None:
    """Pages run out, and what gave its own up is computed again; on the native backend, bitwise."""
    for sampling in SAMPLINGS:
        found = []
        for slots, room, page in ((64, None, 16), (3, None, 4), (64, 64, 4)):
            options = {"max_slots": slots, "max_cache_tokens": room, "accelerate": accelerate}
            made = engine(name, page, **options)
            found.append(made.generate(support.requests(), sampling, key=5))
            for done in found[-1]:
                check(name, done, sampling, 5, torch.float32, [1.0])
        assert not accelerate or found[0] == found[1] == found[2]


@BACKENDS
def test_it_is_the_oracle(accelerate: bool) -> None:
    made, oracle = (
        engine("everything", accelerate=accelerate),
        Oracle(support.CONFIGS["everything"]),
    )
    oracle.update_weights(weights("everything"))
    ends = []
    for one in (conforms(made), oracle):
        numbers = [n for r in support.requests() for n in one.submit(r, SAMPLINGS[0], 3, hold=True)]
        first = drain(one)
        forks = [
            n
            for i, parent in enumerate(numbers)
            for n in one.fork(parent, Request(90 + i, [i] * (i % 3), 2), SAMPLINGS[1], 4, at=i % 2)
        ]
        both = first | drain(one)
        ends.append([both[n] for n in (*numbers, *forks)])
    for ours, theirs in zip(*ends, strict=True):
        same = {f.name for f in dataclasses.fields(ours)} - {"logprobs", "behavior_logprobs"}
        assert all(getattr(ours, f) == getattr(theirs, f) for f in same)
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=2e-5)


@BACKENDS
def test_a_tree_costs_its_distinct_tokens(accelerate: bool) -> None:
    """64 leaves, four children a node: what stands before a fork is computed once, for all."""
    made = engine("llama", accelerate=accelerate)
    sampling, prompt = Sampling(max_new_tokens=5), [7] * 21
    level = made.submit(Request(0, prompt, 4), sampling, 1, hold=True)
    drawn, name = 4 * 5, 1
    done = drain(made)
    for _ in range(2):
        children = []
        for parent in level:
            children += made.fork(parent, Request(name, [], 4), sampling, 1, hold=True)
            name += 1
        level = children
        done |= drain(made)
        drawn += len(level) * 5
    assert len(level) == 64
    paths = {
        (*done[n].prompt_tokens, *done[n].token_ids)[:end]
        for n in level
        for end in range(1, len(done[n].prompt_tokens) + 5)
    }
    assert drawn == made.counts.drawn == (4 + 16 + 64) * 5
    # Of the drawn tokens, all are computed but the last of each leaf.
    assert made.counts.computed == len(prompt) + drawn - 64
    assert made.counts.computed >= len(paths)  # equal words of two branches are two tokens
    # What the others would have computed: each child's whole prompt, less what forks add.
    assert made.counts.shared == 3 * 21 + (16 * 26 - 4) + (64 * 31 - 16)
    for number in done:
        made.release(number)
    assert made.scheduler.pool.num_used == 0


@BACKENDS
def test_nothing_that_old_weights_left_is_read_again(accelerate: bool) -> None:
    made = engine("llama", accelerate=accelerate, max_slots=5)
    for request in support.requests():
        made.submit(request, SAMPLINGS[1], 5, hold=True)
    done: dict[int, Completion] = {}
    scales = [1.0]
    for _ in range(3):
        for _ in range(4):
            done |= {p.sequence: p.completion for p in made.step() if p.completion}
        scales.append(scales[-1] * 0.8)
        made.update_weights(weights("llama", scales[-1]))
    parent = min(done)  # of other weights than its fork
    [branch] = made.fork(parent, Request(77, []), SAMPLINGS[1], 5)
    done |= drain(made)
    assert {len(d.policies) for d in done.values()} > {1, 2}
    for completion in done.values():
        check("llama", completion, SAMPLINGS[1], 5, torch.float32, scales)
    assert done[branch].prompt_tokens[-7:] == tuple(done[parent].token_ids)


def test_a_failed_update_serves_nothing() -> None:
    made = engine("llama", accelerate=False)
    [number] = made.submit(Request(0, [1, 2]), SAMPLINGS[2])
    made.step()
    with pytest.raises(CheckpointError, match="missing from"):
        made.update_weights(list(weights("llama", 0.5))[1:])
    with pytest.raises(UserError, match="no weights"):
        made.step()
    made.update_weights(weights("llama"))
    check("llama", drain(made)[number], SAMPLINGS[2], 0, torch.float32, [1.0])


def test_a_step_gives_each_sequence_a_token_and_takes_new_ones() -> None:
    made = engine("llama", accelerate=False, max_slots=2)
    sampling = Sampling(max_new_tokens=2)
    first = made.submit(Request(0, [1], 3), sampling)
    assert [(p.sequence, len(p.token_ids)) for p in made.step()] == [(0, 1), (1, 1)]
    ended = made.step()
    assert [p.sequence for p in ended if p.completion] == first[:2]
    second = made.submit(Request(1, [2]), sampling)
    assert [p.sequence for p in made.step()] == [first[2], *second]
    with pytest.raises(UserError, match="in flight"):
        made.generate([Request(0, [1])], sampling)
    made.release(first[2])
    assert [p.sequence for p in made.step()] == second
    assert made.step() == []
    assert made.counts == RolloutCounts(1 + 2 + 2, 4 + 1 + 2, 2)


def test_deadlines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sequence ends with what it has, in flight or not; one that is held can be forked."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    made = engine("llama", accelerate=False, max_slots=1)
    [runs] = made.submit(Request(0, [1, 2]), SAMPLINGS[2], deadline=101.0, hold=True)
    [waits] = made.submit(Request(1, [1, 2]), SAMPLINGS[2], deadline=101.0)
    [later] = made.submit(Request(2, [3]), SAMPLINGS[2], deadline=200.0)
    made.step()
    made.step()
    now[0] = 101.0
    ended = {p.sequence: p.completion for p in made.step() if p.completion}
    assert {n: (c.finish_reason, len(c.token_ids)) for n, c in ended.items()} == {
        runs: ("deadline", 2), waits: ("deadline", 0)
    }  # fmt: skip
    [branch] = made.fork(runs, Request(3, []), SAMPLINGS[2])
    done = drain(made)
    assert done[later].finish_reason == "length"
    whole = made.generate([Request(0, [1, 2])], SAMPLINGS[2])[0]
    assert done[branch].token_ids[:7] == whole.token_ids[2:]


def test_refusals() -> None:
    made = engine("llama", accelerate=False, max_cache_tokens=32)
    with pytest.raises(UserError, match="take 40 tokens of the cache, which has 32"):
        made.submit(Request(0, [1] * 10), Sampling(max_new_tokens=30))
    [number] = made.submit(Request(0, [1]), Sampling(max_new_tokens=4), hold=True)
    with pytest.raises(UserError, match="not held"):
        made.fork(number, Request(1, []), Sampling())
    drain(made)
    with pytest.raises(UserError, match="has 4 tokens; there is no fork at 5"):
        made.fork(number, Request(1, []), Sampling(), at=5)
    with pytest.raises(UserError, match="outside the vocabulary"):
        made.fork(number, Request(1, [101]), Sampling())
    with pytest.raises(UserError, match="the model takes 64"):
        made.fork(number, Request(1, [1] * 60), Sampling())
    made.release(number)
    made.release(number)
