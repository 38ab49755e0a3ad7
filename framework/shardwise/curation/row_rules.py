"""Rules of a row by itself: each says why it goes, or nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Self

from shardwise.curation import words
from shardwise.curation.config import (
    FilterRules,
    FormatRule,
    LanguageRule,
    LengthRule,
    RowRule,
    ThresholdRule,
    VerifierRule,
)
from shardwise.curation.rows import Row, lines, references
from shardwise.errors import DataError, UserError
from shardwise.rewards import verifiers
from shardwise.rewards.scoring import RewardItem, Scorer, build_reward

CountTokens = Callable[[str], int]
Judged = tuple[Row, str]  # the row, perhaps with a new field, and why it goes


class RowRules:
    """The rules of rows of a config, and the sandboxes of its verifiers; use it in a ``with``."""

    def __init__(self, config: FilterRules, count_tokens: CountTokens | None = None) -> None:
        """``count_tokens``: of a text, for rules that count tokens."""
        self.config, self.count_tokens = config, count_tokens
        self._open = contextlib.ExitStack()
        self._scorers: dict[int, Scorer] = {}
        for rule in config.rules:
            if isinstance(rule, VerifierRule):
                scorer = self._open.enter_context(build_reward(rule.reward))
                self._scorers[id(rule)] = scorer

    def judge(self, rule: RowRule, rows: Sequence[Row]) -> list[Judged]:
        """Each row with why the rule drops it; an empty text: it stays."""
        if isinstance(rule, VerifierRule):
            return list(self._verified(rule, rows))
        return [(row, self._why(rule, row)) for row in rows]

    def _why(self, rule: RowRule, row: Row) -> str:
        match rule:
            case FormatRule():
                fits = (verifiers.template_match(a, rule.template) for a in row.answers)
                return "" if all(fits) else f"has not the form {rule.template}"
            case LengthRule():
                return self._too_long_or_short(rule, row)
            case LanguageRule():
                scripts = verifiers.SCRIPTS[rule.language]
                texts = row.texts(rule.of)
                share = min(verifiers.language_consistency(t, scripts) for t in texts)
                few = share < rule.min_share
                return f"{share:.2f} of its letters are of {rule.language}" if few else ""
            case ThresholdRule():
                return _outside(rule, row, rule.field or self.config.score_field)
        raise AssertionError(rule)

    def _too_long_or_short(self, rule: LengthRule, row: Row) -> str:
        """Each answer for itself; a row is its prompt with an answer."""
        if rule.unit == "steps" and row.steps is not None and rule.of == "answer":
            sizes = [len(row.steps)]
        else:
            sizes = [self._size(rule.unit, text) for text in row.texts(rule.of)]
            if rule.of == "row":
                sizes = [sizes[0] + size for size in sizes[1:]]
        for size in sizes:
            if size < rule.min or (rule.max is not None and size > rule.max):
                bound = f"at least {rule.min}" if size < rule.min else f"at most {rule.max}"
                return f"{size} {rule.unit}, {bound} allowed"
        return ""

    def _size(self, unit: str, text: str) -> int:
        if unit == "characters":
            return len(text)
        if unit == "words":
            return len(words.words(text))
        return len(lines(text)) if unit == "steps" else self._num_tokens(text)

    def _num_tokens(self, text: str) -> int:
        if self.count_tokens is None:
            raise UserError("a rule counts tokens, and there is no tokenizer; count words")
        return self.count_tokens(text)

    def _verified(self, rule: VerifierRule, rows: Sequence[Row]) -> Iterator[Judged]:
        results = self._scorers[id(rule)].score([self._item(rule, row) for row in rows])
        for row, result in zip(rows, results, strict=True):
            if rule.write is not None:
                row = dataclasses.replace(row, data={**row.data, rule.write: result.value})
            if result.value is None:
                yield row, f"cannot be scored: {result.reason}"
            else:
                low = result.value < rule.min
                yield row, f"earns {result.value:g}, at least {rule.min:g} allowed" if low else ""

    def _item(self, rule: VerifierRule, row: Row) -> RewardItem:
        answers = references(row.field(rule.answer_field))
        if not answers:
            raise DataError(
                f"{row.where}: no field {rule.answer_field!r} to verify the answer with; name it "
                f"in the verifier's answer_field (fields: {', '.join(row.data)})"
            )
        counted = any(part.kind == "length" for part in rule.reward.parts)
        return RewardItem(
            question=row.prompt,
            completion_text=row.answer,
            answer=answers[0],
            meta=row.data,
            num_tokens=self._num_tokens(row.answer) if counted else None,
            others=tuple(answers[1:]),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def _outside(rule: ThresholdRule, row: Row, field: str) -> str:
    score = row.score(field)
    if score is None:  # NaN is below nothing and above nothing: a comparison would keep it
        return f"{field} is {row.field(field)!r}, no finite number"
    if rule.min is not None and score < rule.min:
        return f"{field} {score:g}, at least {rule.min:g} allowed"
    if rule.max is not None and score > rule.max:
        return f"{field} {score:g}, at most {rule.max:g} allowed"
    return ""
