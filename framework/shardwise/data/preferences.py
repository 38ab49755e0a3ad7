"""Rankings of answers to one prompt: what reward models learn from.

A line of a preference-jsonl source is one of

    {"prompt": P, "chosen": A, "rejected": A, "margin": 1.5}
    {"prompt": P, "answers": [A, A, A], "ratings": [2, 1, 0.5]}

where P is a text or a list of chat messages and A a text. Answers without ratings stand best
first. ``margin`` (default 1) is by how much the chosen one is better.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shardwise.data import readers
from shardwise.data.batch import MicroBatch
from shardwise.data.chat import encode_chat
from shardwise.data.groups import collate_groups
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer
from shardwise.errors import DataError


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Answers to one prompt as token ids, each with its end token; a higher rating is better."""

    prompt: list[int]
    answers: list[list[int]]
    ratings: list[float]

    @property
    def num_tokens(self) -> int:
        """Tokens of its row."""
        return len(self.prompt) - 1 + sum(len(a) + 1 for a in self.answers)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with the longest answer."""
        return len(self.prompt) + max(map(len, self.answers))


def encode_ranking(
    tokenizer: Tokenizer,
    prompt: Sequence[dict[str, str]],
    answers: Sequence[str],
    ratings: Sequence[float],
) -> Ranking:
    """Token ids as the policy would write them: the chat's prompt, then answer and end token.

    A token that reaches from the prompt into the answer is the answer's.
    """
    head, _ = encode_chat(tokenizer, prompt, add_generation_prompt=True)
    rows = []
    for answer in answers:
        said = [*prompt, {"role": "assistant", "content": answer}]
        ids, mask = encode_chat(tokenizer, said, learn=[False] * len(prompt) + [True])
        rows.append(ids[: len(mask) - mask[::-1].index(True)])  # its end token is the last
    shared = sum(1 for _ in itertools.takewhile(lambda s: len(set(s)) == 1, zip(head, *rows)))
    return Ranking(head[:shared], [row[shared:] for row in rows], [float(r) for r in ratings])


def read_rankings(sources: Sequence[DataSource], tokenizer: Tokenizer) -> Iterator[Ranking]:
    """The rankings of preference-jsonl sources; DataError names file and line."""
    for source in sources:
        for where, row in readers.read_json_rows(source.files()):
            try:
                prompt, answers, ratings = _parse(row)
                yield encode_ranking(tokenizer, prompt, answers, ratings)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error


def _parse(row: dict[str, Any]) -> tuple[list[dict[str, str]], list[str], list[float]]:
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        raise DataError("field 'prompt' is neither a text nor a list of messages")
    if "answers" in row:
        answers = row["answers"]
        number = len(answers) if isinstance(answers, list) else 0
        ratings = row.get("ratings", list(range(number, 0, -1)))
    else:
        answers = [row.get("chosen"), row.get("rejected")]
        ratings = [row.get("margin", 1.0), 0.0]
    if not isinstance(answers, list) or len(answers) < 2:
        raise DataError("give 'chosen' and 'rejected', or at least two 'answers'")
    if not all(isinstance(a, str) for a in answers):
        raise DataError("an answer is not a text")
    numbers = isinstance(ratings, list) and all(
        isinstance(r, int | float) and not isinstance(r, bool) and np.isfinite(r) for r in ratings
    )
    if not numbers or len(ratings) != len(answers):
        raise DataError("'ratings' needs one finite number for each answer ('margin': a number)")
    if max(ratings) == min(ratings):
        raise DataError("all answers have one rating; nothing is preferred")
    return prompt, answers, ratings


def collate_rankings(
    rankings: Sequence[Ranking],
    row_ids: Sequence[int],
    pad_id: int,
    *,
    num_real: int,
    pad_multiple: int = 16,
) -> MicroBatch:
    """One row a ranking; the mask marks where each answer's end token is the *input*.

    That is where a score is read. Rows from ``num_real`` on carry no loss.
    """
    return collate_groups(
        [r.prompt for r in rankings],
        # One more target, so that the end token is read too. Nobody predicts it.
        [[[*a, pad_id] for a in r.answers] for r in rankings],
        np.asarray(row_ids),
        pad_id,
        pad_multiple=pad_multiple,
        per_token={"rating_BT": [r.ratings for r in rankings]},
        keep=[[b < num_real] * len(r.answers) for b, r in enumerate(rankings)],
        last_only=True,
        dtype=np.float64,
    )
