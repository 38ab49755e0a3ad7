"""From a log to what can be learned of it: votes, and what is done with those that are not to be
trusted. Pure functions of the log's records.

Whatever a client says is a vote: a rating for or against a text as an answer to a prompt, a
correction for the corrected text and against the one that was answered. A client has one vote on
a text, however often it speaks, and at most ``per_client`` in all.
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import xxhash

from shardwise.config.redact import HIDDEN

Messages = tuple[tuple[str, str], ...]  # (role, content)


@dataclasses.dataclass(frozen=True)
class Filter:
    """``per_client``: votes of one client that count, its newest. ``max_chars``: of a prompt with
    its answer. ``majority``: share of a text's voters that must agree.
    """

    per_client: int = 1000
    max_chars: int = 16_000
    majority: float = 0.75


@dataclasses.dataclass(frozen=True)
class Task:
    """A prompt, and the texts that were found good and bad answers to it."""

    prompt: Messages
    good: tuple[str, ...]
    bad: tuple[str, ...]

    @property
    def messages(self) -> list[dict[str, str]]:
        """As a chat template takes them."""
        return [{"role": role, "content": content} for role, content in self.prompt]

    @property
    def hash(self) -> str:
        """xxh3-128 of all of it."""
        text = json.dumps([self.prompt, self.good, self.bad], ensure_ascii=False)
        return xxhash.xxh3_128_hexdigest(text.encode())


@dataclasses.dataclass(frozen=True)
class _Vote:
    prompt: Messages
    text: str
    client: str
    good: bool
    corrected: bool = False  # the text is a correction


def tasks_of(
    records: Iterable[Mapping[str, Any]], rules: Filter | None = None
) -> tuple[list[Task], dict[str, int]]:
    """What can be learned, in the order of its first vote, and how much was dropped, by reason."""
    rules = rules or Filter()
    dropped: Counter[str] = Counter()
    votes = _quota(_votes(records, rules, dropped), rules, dropped)
    by_prompt: dict[Messages, list[_Vote]] = {}
    for vote in votes:
        by_prompt.setdefault(vote.prompt, []).append(vote)
    tasks = []
    for prompt, own in by_prompt.items():
        good, bad = _judged(own, rules, dropped)
        if good or bad:
            tasks.append(Task(prompt, tuple(good), tuple(bad)))
    return tasks, dict(sorted(dropped.items()))


def _votes(
    records: Iterable[Mapping[str, Any]], rules: Filter, dropped: Counter[str]
) -> list[_Vote]:
    """The last word of each client on each answer, as votes."""
    answers: dict[str, Mapping[str, Any]] = {}
    last: dict[tuple[str, int, str], Mapping[str, Any]] = {}  # a rating and a correction are two
    for record in records:
        if record["kind"] == "answer":
            answers[record["id"]] = record
            continue
        answer = answers.get(record["id"])
        if answer is None or record["choice"] not in range(len(answer["choices"])):
            dropped["of no answer in the log"] += 1
        elif answer["client"] != record["client"]:
            dropped["of another client's answer"] += 1
        elif isinstance(answer["prompt"], str):
            dropped["of a text that is no chat"] += 1
        else:
            key = (record["id"], record["choice"], "rating" if "rating" in record else "text")
            dropped["said again"] += key in last
            last.pop(key, None)  # the newest stands last
            last[key] = record
    votes = []
    for record in last.values():
        answer = answers[record["id"]]
        prompt = tuple((m["role"], m["content"]) for m in answer["prompt"])
        said = answer["choices"][record["choice"]]["text"]
        client, correction = record["client"], record.get("correction")
        if correction is None:
            own = [_Vote(prompt, said, client, record["rating"] > 0)]
        else:
            own = [_Vote(prompt, correction, client, True, corrected=True)]
            own += (
                [_Vote(prompt, said, client, False)] if said.strip() != correction.strip() else []
            )
        for vote in own:
            if reason := _unfit(vote, rules):
                dropped[reason] += 1
            else:
                votes.append(dataclasses.replace(vote, text=vote.text.strip()))
    dropped += Counter()  # without zeros
    return votes


def _unfit(vote: _Vote, rules: Filter) -> str:
    """Why a vote is not used; empty: it is."""
    texts = [vote.text, *(content for _, content in vote.prompt)]
    if any(HIDDEN in text for text in texts):
        return "redacted"
    if not vote.text.strip():
        return "empty"
    return "too long" if sum(map(len, texts)) > rules.max_chars else ""


def _quota(votes: Sequence[_Vote], rules: Filter, dropped: Counter[str]) -> list[_Vote]:
    """One vote of a client on a text, the newest; and of each client the newest so many."""
    newest: dict[tuple[Messages, str, str], _Vote] = {}
    for vote in votes:
        key = (vote.prompt, vote.text, vote.client)
        dropped["repeated"] += key in newest
        newest.pop(key, None)
        newest[key] = vote
    counts: Counter[str] = Counter()
    kept = []
    for vote in reversed(newest.values()):
        counts[vote.client] += 1
        if counts[vote.client] <= rules.per_client:
            kept.append(vote)
        else:
            dropped["beyond the client's quota"] += 1
    dropped += Counter()
    return kept[::-1]


def _judged(
    votes: Sequence[_Vote], rules: Filter, dropped: Counter[str]
) -> tuple[list[str], list[str]]:
    """The texts that were found good, and bad, by a majority of those who voted on them."""
    by_text: dict[str, list[_Vote]] = {}
    for vote in votes:
        by_text.setdefault(vote.text, []).append(vote)
    good, bad, corrections = [], [], {}
    for text, own in by_text.items():
        share = sum(v.good for v in own) / len(own)
        if max(share, 1 - share) < rules.majority:
            dropped["contradicted"] += len(own)
        elif share < 0.5:
            bad.append(text)
        else:
            good.append(text)
            corrections[text] = sum(v.corrected for v in own)
    # Who corrects to different texts contradicts each other: the text that most of them want.
    wanted = {text: count for text, count in corrections.items() if count}
    if len(wanted) > 1:
        most = max(wanted.values())
        best = [text for text, count in wanted.items() if count == most]
        for text in wanted:
            if text not in best or len(best) > 1:
                good.remove(text)
                dropped["contradicted"] += len(by_text[text])
    return good, bad


def split(tasks: Iterable[Task], share: float) -> tuple[list[Task], list[Task]]:
    """Tasks to learn, and those that nothing is trained on: by the prompt's hash, for ever."""
    learn: list[Task] = []
    held: list[Task] = []
    for task in tasks:
        text = json.dumps(task.prompt, ensure_ascii=False)
        at = xxhash.xxh3_64_intdigest(text.encode()) / 2**64
        (held if at < share else learn).append(task)
    return learn, held


def rows_of(tasks: Iterable[Task]) -> dict[str, list[dict[str, Any]]]:
    """Rows by the method that learns from them, in the data room's formats.

    sft: prompt and completion. dpo: prompt, chosen, rejected. kto: prompt, completion, label.
    """

    def said(text: str) -> list[dict[str, str]]:
        return [{"role": "assistant", "content": text}]

    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "dpo": [], "kto": []}
    for task in tasks:
        prompt = task.messages
        rows["sft"] += [{"prompt": prompt, "completion": said(g)} for g in task.good]
        rows["dpo"] += [
            {"prompt": prompt, "chosen": said(g), "rejected": said(b)}
            for g in task.good
            for b in task.bad
        ]
        labelled: list[tuple[str, bool]] = [(t, True) for t in task.good]
        labelled += [(t, False) for t in task.bad]
        rows["kto"] += [
            {"prompt": prompt, "completion": said(text), "label": label} for text, label in labelled
        ]
    return rows
