"""Admission: groups whole, slots never overfull, everything served once, in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwise.errors import UserError
from shardwise.rollout import scheduler
from shardwise.rollout.scheduler import Request, Scheduler, check_requests


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 5)), min_size=1, max_size=12),
    st.integers(1, 6),
    st.data(),
)
def test_every_completion_is_admitted_once(
    groups: list[tuple[int, int]], num_slots: int, data: st.DataObject
) -> None:
    requests = [Request(i, [1] * size, num) for i, (size, num) in enumerate(groups)]
    made = Scheduler(requests, num_slots)
    owner = [i for i, (_, num) in enumerate(groups) for _ in range(num)]
    active, seen, prefills = 0, [], []
    while True:
        admission = made.admit(active)
        if admission is None:
            if not active:
                break
            active -= data.draw(st.integers(1, active))
            continue
        active += len(admission.completions)
        assert active <= num_slots
        for source, completion in zip(admission.source, admission.completions, strict=True):
            assert admission.requests[source].prompt_id == owner[completion]
        assert admission.source == sorted(admission.source)
        seen += admission.completions
        prefills += [r.prompt_id for r in admission.requests]
    assert seen == list(range(made.num_completions))
    for i, (_, num) in enumerate(groups):
        assert prefills.count(i) == -(-num // num_slots)


def test_a_prefill_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduler, "MAX_PREFILL_TOKENS", 10)
    made = Scheduler([Request(0, [1] * 4), Request(1, [1] * 5), Request(2, [1] * 20)], 8)
    found = [made.admit(0), made.admit(0), made.admit(0)]
    assert [[r.prompt_id for r in a.requests] if a else None for a in found] == [[0, 1], [2], None]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request(5, []), "prompt 5 has no tokens"),
        (Request(5, [1] * 8), "has 8 tokens, the model takes 8"),
        (Request(5, [11]), "outside the vocabulary of 10"),
        (Request(5, [-1]), "outside the vocabulary"),
        (Request(5, [1], 0), "num_samples"),
        (Request(4, [1], 1, 1), "sample 1 is asked for twice"),
    ],
)
def test_impossible_requests(request_: Request, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_requests([Request(4, [1], 2), request_], 10, 8)
