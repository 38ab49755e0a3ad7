"""Rankings of answers to one prompt: what reward models learn from.

A line of a preference-jsonl source is one of

    {"prompt": P, "chosen": A, "rejected": A, "margin": 1.5}
    {"prompt": P, "answers": [A, A, A], "ratings": [2, 1, 0.5]}

where P is a text or a list of chat messages and A a text, or a list of messages that ends with the
assistant's. A list may begin with the prompt's own messages; without a prompt it is what ``chosen``
and ``rejected`` begin with alike (TRL's implicit prompt). Answers without ratings stand best first.
``margin`` (default 1) is by how much the chosen one is better. ``tools``, ``documents`` and
``chat_template_kwargs`` reach the template. Other fields that mean something in formats of
preferences are refused.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shardwise.data.batch import MicroBatch
from shardwise.data.chat import check_use, encode_chat
from shardwise.data.conversation import MEDIA, Message, check_messages, take_variables
from shardwise.data.groups import collate_groups
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer
from shardwise.data.unused import Unused
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


Answer = str | Sequence[Message]

_REFUSED = {
    **dict.fromkeys(("images", "image", "videos", "video", "audio", "audios"), MEDIA),
    **dict.fromkeys(
        ("score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen_rating",
         "rejected_rating", "chosen-rating", "rejected-rating", "scores"),
        "write margin (the difference), or answers and ratings",
    ),
    **dict.fromkeys(("weight", "train"), "rankings have no weight; repeat the row"),
    **dict.fromkeys(("completion", "label"), "write a pair of chosen and rejected"),
    "messages": "write prompt, chosen and rejected",
    "system": "write it as the prompt's first message, with the role system",
    "functions": "write them as tools",
}  # fmt: skip


def encode_ranking(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    answers: Sequence[Answer],
    ratings: Sequence[float],
    **variables: Any,
) -> Ranking:
    """Token ids as the policy would write them: the chat's prompt, then answer and end token.

    A token that reaches from the prompt into the answer is the answer's.
    """
    head, _ = encode_chat(tokenizer, prompt, add_generation_prompt=True, **variables)
    rows = []
    for answer in answers:
        said = _whole(prompt, answer)
        learn = [False] * (len(said) - 1) + [True]
        ids, mask = encode_chat(tokenizer, said, learn=learn, **variables)
        rows.append(ids[: len(mask) - mask[::-1].index(True)])  # its end token is the last
    shared = sum(1 for _ in itertools.takewhile(lambda s: len(set(s)) == 1, zip(head, *rows)))
    return Ranking(head[:shared], [row[shared:] for row in rows], [float(r) for r in ratings])


def _whole(prompt: Sequence[Message], answer: Answer) -> list[Message]:
    """The conversation that ends with an answer."""
    if isinstance(answer, str):
        return [*prompt, {"role": "assistant", "content": answer}]
    begun = list(answer[: len(prompt)]) == list(prompt)
    return list(answer) if begun else [*prompt, *answer]


def read_rankings(
    sources: Sequence[DataSource],
    tokenizer: Tokenizer,
    *,
    strict: bool = False,
    max_tokens: int | None = None,
) -> Iterator[Ranking]:
    """The rankings of preference-jsonl sources.

    Every DataError names file and line, that of a prompt which with its longest answer has more
    than ``max_tokens``, too. Fields that nothing reads are named once, or with ``strict`` refused.
    """
    for source in sources:
        unused = Unused(source.label, strict, source.ignore)
        for where, row in source.rows():
            try:
                prompt, answers, ratings, variables, rest = _parse(row, source.ignore)
                redundant = check_use(tokenizer, _whole(prompt, answers[0]), variables)
                ranking = encode_ranking(tokenizer, prompt, answers, ratings, **variables)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            unused.add(where, [*rest, *redundant])
            if max_tokens is not None and ranking.longest > max_tokens:
                raise DataError(
                    f"{where}: the prompt with its longest answer has {ranking.longest} tokens, "
                    f"batch.seq_len is {max_tokens}; raise it, or drop the line"
                )
            yield ranking
        unused.say()


def _parse(
    row: dict[str, Any], ignore: Sequence[str]
) -> tuple[list[dict[str, Any]], list[Answer], list[float], dict[str, Any], list[str]]:
    """(prompt, answers, ratings, variables of the template, fields that nothing reads)."""
    said = {k: v for k, v in row.items() if v not in (None, [], {}) and k not in ignore}
    variables = take_variables(said)
    listed = "answers" in said
    for name in ("chosen", "rejected", "margin") if listed else ("ratings",):
        if name in said:
            goes = "with chosen and rejected" if listed else "with answers"
            raise DataError(f"field {name!r} goes {goes}, and the row has the other form")
    answers = said.pop("answers") if listed else [said.pop(k, None) for k in ("chosen", "rejected")]
    if not isinstance(answers, list) or len(answers) < 2:
        raise DataError("give 'chosen' and 'rejected', or at least two 'answers'")
    answers = [a if isinstance(a, str) else _spoken(a) for a in answers]
    prompt = said.pop("prompt", None)
    if isinstance(prompt, str):
        prompt = [{"role": "user", "content": prompt}]
    elif prompt is None and not any(isinstance(a, str) for a in answers):
        alike = itertools.takewhile(lambda turns: all(t == turns[0] for t in turns), zip(*answers))
        prompt = [turns[0] for turns in alike]
    if not isinstance(prompt, list) or not prompt:
        raise DataError("field 'prompt' is neither a text nor a list of messages")
    prompt = check_messages(prompt)
    if said.get("messages") == row.get("chosen"):  # UltraFeedback says it twice
        said.pop("messages", None)
    default = list(range(len(answers), 0, -1))
    ratings = said.pop("ratings", default) if listed else [said.pop("margin", 1.0), 0.0]
    for name in said:
        if name in _REFUSED:
            raise DataError(
                f"field {name!r} cannot be used: {_REFUSED[name]}, or list it under the source's "
                "ignore"
            )
    _check_ratings(ratings, len(answers))
    return prompt, answers, ratings, variables, sorted(said)


def _spoken(answer: Any) -> list[dict[str, Any]]:
    if not isinstance(answer, list) or not answer:
        raise DataError("an answer is not a text, nor a list of messages")
    messages = check_messages(answer)
    if messages[-1]["role"] != "assistant":
        raise DataError("an answer must end with the assistant's message")
    return messages


def _check_ratings(ratings: Any, number: int) -> None:
    numbers = isinstance(ratings, list) and all(
        isinstance(r, int | float) and not isinstance(r, bool) and np.isfinite(r) for r in ratings
    )
    if not numbers or len(ratings) != number:
        raise DataError("'ratings' needs one finite number for each answer ('margin': a number)")
    if max(ratings) == min(ratings):
        raise DataError("all answers have one rating; nothing is preferred")


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
