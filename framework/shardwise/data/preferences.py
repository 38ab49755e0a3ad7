"""Rankings of answers to one prompt: what reward models and preference losses learn from.

A row of a source of preferences is one of

    {"prompt": P, "chosen": A, "rejected": A, "margin": 1.5}
    {"prompt": P, "answers": [A, A, A], "ratings": [2, 1, 0.5]}
    {"prompt": P, "completion": A, "label": true}    unpaired (KTO), where the reader asks for it

where P is a text or a list of chat messages and A a text, a message, or a list of messages that
ends with the assistant's. A list may begin with the prompt's own messages; without a prompt it is
what ``chosen`` and ``rejected`` begin with alike (TRL's implicit prompt). The prompt may be called
``messages``, ``question``, ``instruction`` or ``input``, the answers ``chosen_response`` and
``rejected_response``, and a ``system`` text may stand beside it (axolotl's formats). Messages may
be of {from, value}, the prompt ``conversations`` of them, and ``input`` a second part of an
``instruction`` (LLaMA-Factory's). Answers
without ratings stand best first. ``margin`` (default 1) is by how much the chosen one is better.
``tools``, ``documents`` and ``chat_template_kwargs`` reach the template. Other fields that mean
something in formats of preferences are refused.

A text is what a turn of a chat says; read as ``raw`` (`Reading`) it stands as it is, without a
template, as TRL's standard format has it.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from shardwise.data import left_out
from shardwise.data.batch import MicroBatch
from shardwise.data.chat import check_use, encode_chat
from shardwise.data.config import Reading
from shardwise.data.conversation import MEDIA, Message, check_messages, take_variables
from shardwise.data.conversions import from_sharegpt
from shardwise.data.formats import PREFERENCES
from shardwise.data.groups import collate_groups
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer
from shardwise.data.unused import Unused, warn_once
from shardwise.errors import DataError


@dataclasses.dataclass(frozen=True)
class Ranking:
    """Answers to one prompt as token ids, each with its end token; a higher rating is better.

    An unpaired answer stands alone: rated 1 if it is desirable, else 0.
    """

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
_Parsed = tuple[Any, list[Answer], list[float], dict[str, Any], list[str]]

AS_THEY_ARE = Reading()

# Names that others give to what we call otherwise.
_ALIASES = {
    **dict.fromkeys(("messages", "conversations", "question", "instruction", "input"), "prompt"),
    "chosen_response": "chosen",
    "rejected_response": "rejected",
}
_REFUSED = {
    **dict.fromkeys(("images", "image", "videos", "video", "audio", "audios"), MEDIA),
    **dict.fromkeys(
        ("score_chosen", "score_rejected", "chosen_score", "rejected_score", "chosen_rating",
         "rejected_rating", "chosen-rating", "rejected-rating", "scores"),
        "write margin (the difference), or answers and ratings",
    ),
    **dict.fromkeys(("weight", "train"), "rankings have no weight; repeat the row"),
    **dict.fromkeys(
        ("completion", "label"),
        "unpaired rows are for a stage dpo with loss.kind kto; write chosen and rejected",
    ),
    **dict.fromkeys(_ALIASES, "the row says the same twice under two names; keep one"),
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


def encode_raw(
    tokenizer: Tokenizer, prompt: str, answers: Sequence[str], ratings: Sequence[float]
) -> Ranking:
    """Texts as they stand, each answer with EOS behind it; what begins a document is no part.

    A token that reaches from the prompt into the answer is the answer's.
    """
    head = tokenizer.encode(prompt)
    rows = [[*tokenizer.encode(prompt + a), tokenizer.eos_id] for a in answers]
    shared = sum(1 for _ in itertools.takewhile(lambda s: len(set(s)) == 1, zip(head, *rows)))
    if not shared:
        raise DataError("the prompt is empty; an answer needs at least a token before it")
    return Ranking(head[:shared], [row[shared:] for row in rows], [float(r) for r in ratings])


def _whole(prompt: Sequence[Message], answer: Answer) -> list[Message]:
    """The conversation that ends with an answer."""
    if isinstance(answer, str):
        return [*prompt, {"role": "assistant", "content": answer}]
    begun = list(answer[: len(prompt)]) == list(prompt)
    return list(answer) if begun else [*prompt, *answer]


def read_rankings(
    sources: Sequence[DataSource], tokenizer: Tokenizer, how: Reading = AS_THEY_ARE
) -> Iterator[Ranking]:
    """The rankings of sources of preferences.

    Every DataError names file and row: of a row that is too long, too, and of one whose answers
    are of different worth and the same tokens.
    """
    for given in sources:
        source = given.told(PREFERENCES)
        unused, cut, dropped = Unused(source.label, how.strict, source.ignore), 0, 0
        for where, row in source.rows():
            try:
                parsed = _parse(row, how)
                if not how.part.has(parsed[0]):
                    continue
                ranking, rest = _encoded(parsed, tokenizer)
                _check_difference(ranking)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            unused.add(where, rest)
            if how.max_prompt is not None and len(ranking.prompt) > how.max_prompt:
                ranking = dataclasses.replace(ranking, prompt=ranking.prompt[-how.max_prompt :])
                cut += 1
            if how.max_tokens is not None and ranking.longest > how.max_tokens:
                dropped += 1
                if how.drop:
                    left_out.leave_out(left_out.too_long(how.max_tokens), where)
                    continue
                raise DataError(
                    f"{where}: the prompt with its longest answer has {ranking.longest} tokens, "
                    f"batch.seq_len is {how.max_tokens}; raise it, or drop the line"
                )
            yield ranking
        unused.say()
        if cut:
            warn_once(f"{source.label}: {cut} prompts cut from the left to {how.max_prompt} tokens")
        if dropped:
            warn_once(f"{source.label}: {dropped} rows of over {how.max_tokens} tokens left out")


def _encoded(parsed: _Parsed, tokenizer: Tokenizer) -> tuple[Ranking, list[str]]:
    """A row's ranking, and the fields that nothing reads."""
    prompt, answers, ratings, variables, rest = parsed
    if isinstance(prompt, str):
        texts = [a for a in answers if isinstance(a, str)]
        return encode_raw(tokenizer, prompt, texts, ratings), rest
    redundant = check_use(tokenizer, _whole(prompt, answers[0]), variables)
    ranking = encode_ranking(tokenizer, prompt, answers, ratings, **variables)
    return ranking, [*rest, *redundant]


def _check_difference(ranking: Ranking) -> None:
    by_tokens: dict[tuple[int, ...], float] = {}
    for answer, rating in zip(ranking.answers, ranking.ratings, strict=True):
        if by_tokens.setdefault(tuple(answer), rating) != rating:
            raise DataError(
                "a better and a worse answer are the same tokens; nothing is preferred. Drop the "
                "line, or mend its answers"
            )


def _parse(row: dict[str, Any], how: Reading) -> _Parsed:
    """(prompt, answers, ratings, variables of the template, fields that nothing reads).

    The prompt is a text where all of the row is to be read as it stands.
    """
    said = {k: v for k, v in row.items() if v not in (None, [], {})}
    if said.get("messages") == row.get("chosen"):  # UltraFeedback says it twice
        said.pop("messages", None)
    if "instruction" in said and isinstance(said.get("input"), str):
        said["instruction"] = "\n".join(filter(None, (said["instruction"], said.pop("input"))))
    for name, ours in _ALIASES.items():
        if name in said and ours not in said:
            said[ours] = said.pop(name)
    variables = take_variables(said)
    answers, ratings = _rated(said, how)
    answers = [a if isinstance(a, str) else _spoken(a) for a in answers]
    prompt = from_sharegpt(said.pop("prompt", None))
    plain = all(isinstance(a, str) for a in answers) and isinstance(prompt, str | None)
    if how.raw and plain:
        if variables or "system" in said:
            raise DataError("texts that stand as they are have no template to take more than them")
        if prompt is None:
            prompt, answers = _implicit(answers)
    else:
        prompt = asked(prompt, said, answers)
    for name in said:
        if name in _REFUSED:
            raise DataError(
                f"field {name!r} cannot be used: {_REFUSED[name]}, or list it under the source's "
                "ignore"
            )
    _check_ratings(ratings, len(answers))
    return prompt, answers, ratings, variables, sorted(said)


def _rated(said: dict[str, Any], how: Reading) -> tuple[list[Any], Any]:
    """The answers of a row and their ratings, in whichever form it has; taken out of ``said``."""
    if "completion" in said and "chosen" not in said:
        if not how.unpaired:
            raise DataError(f"field 'completion' cannot be used: {_REFUSED['completion']}")
        label = said.pop("label", None)
        if not isinstance(label, bool):
            raise DataError(f"field 'label' must be true or false, not {label!r}")
        for name in ("rejected", "answers"):
            if name in said:
                raise DataError(f"field {name!r} beside a completion with its label: keep one form")
        return [said.pop("completion")], [float(label)]
    listed = "answers" in said
    for name in ("chosen", "rejected", "margin") if listed else ("ratings",):
        if name in said:
            goes = "with chosen and rejected" if listed else "with answers"
            raise DataError(f"field {name!r} goes {goes}, and the row has the other form")
    answers = said.pop("answers") if listed else [said.pop(k, None) for k in ("chosen", "rejected")]
    if not isinstance(answers, list) or len(answers) < 2:
        raise DataError("give 'chosen' and 'rejected', or at least two 'answers'")
    default = list(range(len(answers), 0, -1))
    return answers, said.pop("ratings", default) if listed else [said.pop("margin", 1.0), 0.0]


def asked(prompt: Any, said: dict[str, Any], answers: Sequence[Answer]) -> list[dict[str, Any]]:
    """The prompt's messages; a system text beside a text is taken out of ``said``."""
    if isinstance(prompt, str):
        system = said.pop("system", None)
        prompt = [{"role": "user", "content": prompt}]
        if system is not None:
            prompt.insert(0, {"role": "system", "content": system})
    elif prompt is None and not any(isinstance(a, str) for a in answers):
        alike = itertools.takewhile(lambda turns: all(t == turns[0] for t in turns), zip(*answers))
        prompt = [turns[0] for turns in alike]
    if not isinstance(prompt, list) or not prompt:
        raise DataError("field 'prompt' is neither a text nor a list of messages")
    return check_messages(prompt)


def _implicit(answers: Sequence[Any]) -> tuple[str, list[Any]]:
    """What texts begin with alike, as TRL parts it: a space before the difference is theirs."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*answers))
    prompt = "".join(letters[0] for letters in same).removesuffix(" ")
    return prompt, [a[len(prompt) :] for a in answers]


def _spoken(answer: Any) -> list[dict[str, Any]]:
    answer = from_sharegpt(answer)
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
    if number > 1 and max(ratings) == min(ratings):
        raise DataError("all answers have one rating; nothing is preferred")


def collate_rankings(
    rankings: Sequence[Ranking],
    row_ids: Sequence[int],
    pad_id: int,
    *,
    num_real: int,
    pad_multiple: int = 16,
    scored: bool = True,
    per_token: Mapping[str, Sequence[Sequence[Any]]] | None = None,
) -> MicroBatch:
    """One row a ranking, with ``rating_BT`` and what ``per_token`` names in its extras (float64).

    ``scored``: the mask marks where each answer's end token is the *input*; that is where a score
    is read. Else it marks every token of the answers as a target, their end tokens too. Rows from
    ``num_real`` on carry no loss.
    """
    # One more target, so that the end token is read too. Nobody predicts it.
    end = [pad_id] if scored else []
    return collate_groups(
        [r.prompt for r in rankings],
        [[[*a, *end] for a in r.answers] for r in rankings],
        np.asarray(row_ids),
        pad_id,
        pad_multiple=pad_multiple,
        per_token={"rating_BT": [r.ratings for r in rankings], **(per_token or {})},
        keep=[[b < num_real] * len(r.answers) for b, r in enumerate(rankings)],
        valid=[[[len(a)] for a in r.answers] for r in rankings] if scored else None,
        dtype=np.float64,
    )
