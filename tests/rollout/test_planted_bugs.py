"""The engine's tests tested: lines that are wrong make one of them fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.rollout import test_engine, test_sequences
from tests.verify.edits import Edit, applied


def deadlines() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_engine.test_deadlines(patch)


def company() -> None:
    test_engine.test_few_slots_and_few_pages_change_nothing("everything", False)


def new_weights() -> None:
    test_engine.test_nothing_that_old_weights_left_is_read_again(False)


def forks() -> None:
    test_engine.test_it_is_the_oracle(False)


BUGS: dict[str, tuple[Callable[[], None], Edit]] = {
    "a_shared_page_is_written": (
        forks,
        Edit(
            "rollout/pages.py",
            "return item.length % self.page_size != 0 and self.holders[item.table[-1]] > 1",
            "return False",
        ),
    ),
    "a_page_that_is_shared_has_one_holder": (
        company,
        Edit("rollout/pages.py", "self.holders[page] += 1", "self.holders[page] += 0"),
    ),
    "what_other_weights_cached_is_read": (
        new_weights,
        Edit("rollout/generator.py", "        self.scheduler.forget_all()\n", ""),
    ),
    "what_other_weights_cached_of_a_held_sequence_is_read": (
        new_weights,
        Edit(
            "rollout/scheduler.py",
            "for sequence in self.all():\n            self._forget(sequence)",
            "for sequence in self.running.values():\n            self._forget(sequence)",
        ),
    ),
    "the_policy_is_off_by_one": (
        new_weights,
        Edit(
            "rollout/sequences.py",
            "            self.policies.append((policy, 1))",
            "            if self.policies:\n"
            "                self.policies[-1] = self.policies[-1][0], self.policies[-1][1] + 1\n"
            "            self.policies.append((policy, 0 if self.policies else 1))",
        ),
    ),
    "a_fork_takes_more_than_stands_before_it": (
        forks,
        Edit(
            "rollout/generator.py",
            "min(parent.length, end, len(tokens) - 1)",
            "min(parent.length, len(tokens) - 1)",
        ),
    ),
    "a_deadline_is_called_a_stop": (
        deadlines,
        Edit("rollout/generator.py", 's.completion("deadline")', 's.completion("stop")'),
    ),
    "a_deadline_is_for_those_in_flight_alone": (
        deadlines,
        Edit(
            "rollout/generator.py",
            "bound = [s for s in self.scheduler.all() if s.deadline",
            "bound = [s for s in self.scheduler.running.values() if s.deadline",
        ),
    ),
    "a_stop_string_that_begins_before_is_missed": (
        test_sequences.test_words_have_spaces_between_them_and_none_before,
        Edit("rollout/sequences.py", "max(map(len, self.strings)) - 1", "0"),
    ),
    "who_gives_up_its_pages_is_not_computed_again": (
        company,
        Edit(
            "rollout/scheduler.py",
            "            sequence.group.waiting.add(sequence.number)\n\n    def _forget_prompt",
            "            pass\n\n    def _forget_prompt",
        ),
    ),
    "windows_end_where_the_cache_begins": (
        company,
        Edit(
            "rollout/cache.py",
            "allowed_by_position(positions_BT, key_S, window)",
            "allowed_by_position(positions_BT, key_S)",
        ),
    ),
}


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_caught(name: str) -> None:
    check, edit = BUGS[name]
    with applied([edit]), pytest.raises(BaseException):  # noqa: B017
        check()
