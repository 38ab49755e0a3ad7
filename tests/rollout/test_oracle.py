"""The oracle draws what the generator draws, and forks go on where they left."""

from __future__ import annotations

import time

import pytest
import torch

from shardwise.errors import UserError
from shardwise.ops import rng
from shardwise.rollout.config import Sampling
from shardwise.rollout.sequences import Request
from tests.rollout import support
from tests.rollout.oracle import Oracle, drain


def oracle(dtype: torch.dtype = torch.float32) -> Oracle:
    made = Oracle(support.CONFIGS["llama"], dtype, lambda ids: " ".join(map(str, ids)))
    made.update_weights(support.hf_weights("llama"))
    return made


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=9, greedy=True),
        Sampling(max_new_tokens=9, stop_ids=tuple(range(12))),
        Sampling(max_new_tokens=9, top_k=7, top_p=0.9, temperature=1.3, stop_strings=("1 ",)),
    ],
    ids=["greedy", "stop", "filtered"],
)
def test_it_draws_what_the_generator_draws(sampling: Sampling) -> None:
    engine, asked = oracle(), support.requests()
    numbers = [n for r in asked for n in engine.submit(r, sampling, rng.key(3))]
    found = drain(engine)
    generator = support.generator("llama", decode_text=engine.decode_text, accelerate=False)
    assert engine.checksum == generator.checksum
    expected = generator.generate(asked, sampling, rng.key(3))
    for number, theirs in zip(numbers, expected, strict=True):
        ours = found[number]
        assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-5)
        assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
        assert (ours.prompt_id, ours.sample_id) == (theirs.prompt_id, theirs.sample_id)


def test_in_fp64_nothing_is_narrowed() -> None:
    engine, sampling = oracle(torch.float64), Sampling(max_new_tokens=4, top_p=0.9)
    numbers = engine.submit(Request(0, [5, 6]), sampling, rng.key(3))
    found = drain(engine)[numbers[0]]
    generator = support.generator("llama", torch.float64)
    [expected] = generator.generate([Request(0, [5, 6])], sampling, rng.key(3))
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-12)
    assert found.behavior_logprobs == pytest.approx(expected.behavior_logprobs, abs=1e-12)


def test_a_fork_goes_on_where_it_left() -> None:
    engine, sampling = oracle(), Sampling(max_new_tokens=6, greedy=True)
    [first] = engine.submit(Request(0, [5, 6]), sampling, hold=True)
    whole = drain(engine)[first]
    [branch] = engine.fork(first, Request(1, []), sampling, at=4)
    [behind] = engine.fork(first, Request(1, [8]), sampling, hold=True)
    found = drain(engine)
    assert found[branch].prompt_tokens == (5, 6, *whole.token_ids[:4])
    assert found[branch].token_ids[:2] == whole.token_ids[4:]
    assert found[behind].prompt_tokens == (5, 6, *whole.token_ids, 8)
    engine.release(first)
    for number in (first, branch):  # released, never held
        with pytest.raises(UserError, match="not held"):
            engine.fork(number, Request(1, []), sampling)
    engine.release(behind)
    assert not engine.held


def test_ends() -> None:
    engine = oracle()
    [late] = engine.submit(Request(0, [5]), Sampling(), deadline=time.monotonic() - 1)
    [gone] = engine.submit(Request(1, [5]), Sampling())
    engine.release(gone)
    [full] = engine.submit(Request(2, [5] * 62), Sampling())
    found = drain(engine)
    assert (found[late].token_ids, found[late].finish_reason) == ([], "deadline")
    assert (len(found[full].token_ids), found[full].finish_reason) == (2, "length")
    assert gone not in found and engine.step() == []
