"""Answers in steps, each with a label: what process reward models learn from.

A row of a source of steps is one of

    {"prompt": P, "steps": ["2 + 2 = 4", "4 + 1 = 6"], "labels": [true, false]}
    {"prompt": P, "steps": "2 + 2 = 4\\n4 + 1 = 6", "labels": [1.0, 0.25]}
    {"prompt": P, "completion": "So 4, then 6.", "spans": [[3, 4], [11, 12]], "labels": [1, 0]}

where P is a text or a list of chat messages, a text of steps is cut at the separator, and a label
is a number, or true or false. The steps of a list are written with the separator between them. TRL
calls them ``completions``; PRM800K and Math-Shepherd can be written so. Spans are of characters
(Unicode), from the first to behind the last, in order; words outside of them have no label.

A step ends with the token with which its text and the separator behind it are complete; the last
one with the answer's end token. A span ends with the token with which its text is complete, one at
the very end of the answer with the end token, too. There, and nowhere else, a score is read: of
data that is learnt from and of what a policy writes (`step_ends`) alike.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from shardwise.data import left_out
from shardwise.data.batch import MicroBatch
from shardwise.data.chat import check_use
from shardwise.data.config import StepReading
from shardwise.data.conversation import Message, take_variables
from shardwise.data.formats import STEPS
from shardwise.data.groups import collate_groups
from shardwise.data.preferences import asked, encode_ranking
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer
from shardwise.data.unused import Unused, warn_once
from shardwise.errors import DataError


@dataclasses.dataclass(frozen=True)
class Solution:
    """An answer to a prompt as token ids, with its end token; ``ends``: the last of each step."""

    prompt: list[int]
    answer: list[int]
    ends: list[int]
    labels: list[float]

    @property
    def num_tokens(self) -> int:
        """Tokens of its row, which are those of the prompt and the answer."""
        return len(self.prompt) + len(self.answer)

    @property
    def longest(self) -> int:
        """The same: it is one answer."""
        return self.num_tokens


def step_ends(tokenizer: Tokenizer, ids: Sequence[int], separator: str) -> list[int]:
    """The number of the token that ends each step of what was written; the last token ends one.

    Nothing but space between two separators is no step of its own. An empty ``separator``: each
    token is a step.
    """
    if not separator:
        return list(range(len(ids)))
    pieces = tokenizer.decode(ids).split(separator)
    reached = itertools.accumulate(len(piece) + len(separator) for piece in pieces)
    ends = [end for end, piece in zip(reached, pieces) if piece.strip()]
    return sorted({*_tokens_at(tokenizer, ids, ends[:-1]), len(ids) - 1})


def _tokens_at(tokenizer: Tokenizer, ids: Sequence[int], reached: Sequence[int]) -> list[int]:
    """The first token with which so many characters are written, for each of ``reached``."""
    text = tokenizer.decode(ids)

    def has(n: int, number: int) -> bool:
        # Compared, not counted: a character may be of several tokens.
        return tokenizer.decode(ids[: n + 1]).startswith(text[:number])

    return [
        bisect.bisect_left(range(len(ids)), True, key=lambda n, number=number: has(n, number))  # type: ignore[misc]
        for number in reached
    ]


_Marked = tuple[str, list[int]]  # a text, and the number of characters behind which labels stand


def _joined(steps: Sequence[str], separator: str) -> _Marked:
    """Steps as one text, and where each ends in it, behind its separator. Raises DataError."""
    if not steps or not all(step.strip() for step in steps):
        raise DataError("there is an answer without steps, or a step without words")
    if separator and any(separator in step for step in steps):
        raise DataError(f"a step holds data.separator {separator!r}; mend one of them")
    text = separator.join(steps)
    ends = itertools.accumulate(len(step) + len(separator) for step in steps)
    return text, [min(end, len(text)) for end in ends]


def encode_solution(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    steps: Sequence[str],
    labels: Sequence[float],
    separator: str,
    **variables: Any,
) -> Solution:
    """Token ids as the policy would write them, and where steps end in them.

    Raises DataError where a step cannot be told from its neighbours.
    """
    text, ends = _joined(steps, separator)
    return _encode(tokenizer, prompt, text, ends, labels, **variables)


def _encode(
    tokenizer: Tokenizer,
    prompt: Sequence[Message],
    text: str,
    reached: Sequence[int],
    labels: Sequence[float],
    **variables: Any,
) -> Solution:
    """An answer with a label behind each of so many characters; at its end, behind the end token.

    Raises DataError where two labels stand at one token.
    """
    [ids] = (ranking := encode_ranking(tokenizer, prompt, [text], [0.0], **variables)).answers
    start = tokenizer.decode(ids).find(text)
    if start < 0:
        raise DataError("the chat template, or the tokenizer, does not write the steps as they are")
    inside = [start + end for end in reached if end < len(text)]
    ends = [*_tokens_at(tokenizer, ids, inside), *([len(ids) - 1] * (len(inside) < len(reached)))]
    if len(set(ends)) != len(reached):
        raise DataError(
            "two steps end in one token; write a separator that the tokenizer does not merge with "
            "what follows, or spans that are further apart"
        )
    return Solution(ranking.prompt, ids, ends, [float(x) for x in labels])


def read_solutions(
    sources: Sequence[DataSource], tokenizer: Tokenizer, how: StepReading
) -> Iterator[Solution]:
    """The solutions of sources of steps. Every DataError names file and row."""
    for given in sources:
        source = given.told(STEPS)
        unused, too_long = Unused(source.label, how.strict, source.ignore), 0
        for where, row in source.rows():
            try:
                prompt, (text, ends), labels, variables, rest = _parse(row, how)
                if not how.part.has(prompt):
                    continue
                said = [*prompt, {"role": "assistant", "content": text}]
                rest += check_use(tokenizer, said, variables)
                made = _encode(tokenizer, prompt, text, ends, labels, **variables)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            unused.add(where, rest)
            fitting: Solution | None = made
            if how.max_tokens is not None and made.num_tokens > how.max_tokens:
                too_long += 1
                if not how.drop and not how.truncate:
                    raise DataError(
                        f"{where}: the prompt with its answer has {made.num_tokens} tokens, "
                        f"batch.seq_len is {how.max_tokens}; raise it, or set data.too_long"
                    )
                fitting = truncated(made, how.max_tokens) if how.truncate else None
            if fitting is None:
                left_out.leave_out(left_out.too_long(how.max_tokens or 0), where)
            else:
                yield fitting
        unused.say()
        if too_long:
            done = "cut behind the last step that fits" if how.truncate else "left out"
            warn_once(f"{source.label}: {too_long} rows of over {how.max_tokens} tokens {done}")


def truncated(solution: Solution, longest: int) -> Solution | None:
    """As many of its steps as fit into a row of ``longest`` tokens; None if none does."""
    room = longest - len(solution.prompt)
    number = bisect.bisect_left(solution.ends, room)
    if not number:
        return None
    ends = solution.ends[:number]
    return Solution(
        solution.prompt, solution.answer[: ends[-1] + 1], ends, solution.labels[:number]
    )


def _parse(
    row: dict[str, Any], how: StepReading
) -> tuple[list[dict[str, Any]], _Marked, list[float], dict[str, Any], list[str]]:
    """(prompt, marked text, labels, variables of the template, fields that nothing reads)."""
    said = {k: v for k, v in row.items() if v not in (None, [], {})}
    variables = take_variables(said)
    if "spans" in said and "steps" in said:
        raise DataError("a row has 'steps', or 'completion' with 'spans'; not both")
    take = _spans if "spans" in said else _steps
    marked, labels = take(said, how.separator), said.pop("labels", None)
    if not isinstance(labels, list) or not all(
        isinstance(x, int | float) and math.isfinite(x) for x in labels
    ):
        raise DataError("field 'labels' is no list of numbers, or of true and false")
    if len(labels) != (number := len(marked[1])):
        what = "spans" if take is _spans else "steps"
        raise DataError(f"{number} {what} and {len(labels)} labels; each needs one")
    if how.hard_above is not None:
        labels = [float(x > how.hard_above) for x in labels]
    elif not all(0.0 <= x <= 1.0 for x in labels):
        raise DataError(
            f"labels {labels} are no chances (0 to 1); set data.hard_above to say which are right"
        )
    prompt = asked(said.pop("prompt", None), said, [])
    return prompt, marked, [float(x) for x in labels], variables, sorted(said)


def _steps(said: dict[str, Any], separator: str) -> _Marked:
    """The text of a row's steps, and where each ends."""
    steps = said.pop("steps", None)
    if isinstance(steps, str):
        if not separator:
            raise DataError("steps are one text, and data.separator is empty; write a list")
        steps = [step for step in steps.split(separator) if step.strip()]
    if not isinstance(steps, list) or not all(isinstance(step, str) for step in steps):
        raise DataError("field 'steps' is neither a text nor a list of texts")
    return _joined(steps, separator)


def _spans(said: dict[str, Any], separator: str) -> _Marked:
    """The text of a row's completion, and where each of its spans ends."""
    text, spans = said.pop("completion", None), said.pop("spans")
    if not isinstance(text, str):
        raise DataError("field 'completion' is no text, of which spans could be parts")
    pairs = isinstance(spans, list) and all(
        isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)
        for span in spans
    )
    if not pairs:
        raise DataError("field 'spans' is no list of pairs [first, end] of whole numbers")
    reached = 0
    for first, end in spans:
        if not reached <= first < end <= len(text) or not text[first:end].strip():
            raise DataError(
                f"span [{first}, {end}] is blank, before the one in front of it, or beyond the "
                f"completion's {len(text)} characters"
            )
        reached = end
    return text, [end for _, end in spans]


def collate_solutions(
    solutions: Sequence[Solution],
    row_ids: Sequence[int],
    pad_id: int,
    *,
    num_real: int,
    pad_multiple: int = 16,
) -> MicroBatch:
    """One row a solution; the mask marks where a step's last token is the *input*.

    ``label_BT`` (float64) stands there, in the extras. Rows from ``num_real`` on carry no loss.
    """
    labels = []
    for s in solutions:
        labels.append(np.zeros(len(s.answer) + 1))
        labels[-1][np.asarray(s.ends) + 1] = s.labels
    return collate_groups(
        [s.prompt for s in solutions],
        [[[*s.answer, pad_id]] for s in solutions],  # one more target: the end token is read, too
        np.asarray(row_ids),
        pad_id,
        pad_multiple=pad_multiple,
        per_token={"label_BT": [[row] for row in labels]},
        keep=[[b < num_real] for b in range(len(solutions))],
        valid=[[[end + 1 for end in s.ends]] for s in solutions],
        dtype=np.float64,
    )
