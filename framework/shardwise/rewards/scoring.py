"""From a config to a scorer: verifiers and user functions, weighted and summed."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

from pydantic import Field, model_validator

from shardwise.config.schema import NonNegativeFloat, PositiveInt, Seconds, Section, Weight
from shardwise.rewards import math_answers, reasoning, verifiers
from shardwise.rewards.countdown import countdown_match
from shardwise.rewards.scored import Scored, scored
from shardwise.rewards.user import UserReward, UserRewardConfig


class ExactConfig(Section):
    """1 when the extracted answer equals the reference."""

    kind: Literal["exact"] = "exact"
    weight: Weight = Field(1.0, description="in the sum of the parts")
    extract: verifiers.Extract = Field(
        "whole", description="which part of a completion is the answer"
    )
    ignore_case: bool = Field(False, description="A is a")


class NumericConfig(Section):
    """1 when the extracted answer is the reference's number."""

    kind: Literal["numeric"] = "numeric"
    weight: Weight = Field(1.0, description="in the sum of the parts")
    extract: verifiers.Extract = Field(
        "last_number", description="which part of a completion is the answer"
    )
    rel_tol: NonNegativeFloat = Field(
        1e-6, description="allowed difference, relative to the reference"
    )
    abs_tol: NonNegativeFloat = Field(0.0, description="allowed difference", examples=[0.01])


class AnswerConfig(Section):
    """1 when the completion gives the reference, a number or a text, marked in whichever way."""

    kind: Literal["answer"] = "answer"
    weight: Weight = Field(1.0, description="in the sum of the parts")


class CountdownRewardConfig(Section):
    """1 when the extracted answer is an expression of task countdown's numbers, of its value."""

    kind: Literal["countdown"] = "countdown"
    weight: Weight = Field(1.0, description="in the sum of the parts")
    extract: verifiers.Extract = Field(
        "whole", description="which part of a completion is the answer"
    )


class FormatConfig(Section):
    """1 when the completion has the template's form."""

    kind: Literal["format"] = "format"
    weight: Weight = Field(1.0, description="in the sum of the parts")
    template: str = Field(
        "<think>{}</think><answer>{}</answer>", description="fixed pieces, {} for any text"
    )


class LanguageConfig(Section):
    """Share of the letters in the language's script."""

    kind: Literal["language"] = "language"
    weight: Weight = Field(1.0, description="in the sum of the parts")
    language: str = Field("en", description="language code, e.g. en, zh, ru", examples=["ru"])

    @model_validator(mode="after")
    def _known(self) -> LanguageConfig:
        if self.language not in verifiers.SCRIPTS:
            known = ", ".join(sorted(verifiers.SCRIPTS))
            raise ValueError(f"language {self.language!r} is not known; known: {known}")
        return self


class LengthConfig(Section):
    """From 0 down to -1 as a completion nears ``max_tokens``."""

    kind: Literal["length"] = "length"
    weight: Weight = Field(1.0, description="in the sum of the parts")
    max_tokens: PositiveInt = Field(description="where the penalty is 1", examples=[256])
    buffer_tokens: PositiveInt = Field(
        description="tokens before it over which the penalty grows", examples=[64]
    )

    @model_validator(mode="after")
    def _buffer_fits(self) -> LengthConfig:
        if self.buffer_tokens > self.max_tokens:
            raise ValueError("buffer_tokens must not exceed max_tokens")
        return self


class _LibraryConfig(Section):
    """Keys of the kinds that a library scores, in the sandbox; see `UserRewardConfig`."""

    weight: Weight = Field(1.0, description="in the sum of the parts")
    timeout_s: Seconds = Field(20.0, description="seconds for one completion")
    batch_timeout_s: Seconds | None = Field(
        None,
        description="seconds for all completions of a call, the rest become unscorable; "
        "null: timeout_s for each that a worker gets, at least 60",
    )
    num_workers: Annotated[int, Field(ge=1, le=1024, description="processes of each rank")] = 4


class ReasoningGymConfig(_LibraryConfig):
    """reasoning-gym's own score of the extracted answer, computed in the sandbox."""

    kind: Literal["reasoning_gym"] = "reasoning_gym"
    extract: verifiers.Extract = Field(
        "whole", description="which part of a completion is the answer"
    )


class MathConfig(_LibraryConfig):
    """1 when the extracted answer is the reference's mathematics, by math-verify in the sandbox."""

    kind: Literal["math"] = "math"
    extract: verifiers.Extract = Field(
        "boxed", description="which part of a completion is the answer"
    )


PartConfig = Annotated[
    ExactConfig
    | NumericConfig
    | AnswerConfig
    | CountdownRewardConfig
    | FormatConfig
    | LanguageConfig
    | LengthConfig
    | ReasoningGymConfig
    | MathConfig
    | UserRewardConfig,
    Field(discriminator="kind"),
]


class RewardConfig(Section):
    """A reward is the weighted sum of its parts."""

    parts: list[PartConfig] = Field(
        [ExactConfig()],
        min_length=1,
        description="what is added up",
        examples=[[{"kind": "exact"}, {"kind": "format", "weight": 0.2}]],
    )


@dataclasses.dataclass(frozen=True)
class RewardItem:
    """One completion to score. ``num_tokens`` counts its tokens, for a length penalty.

    ``others``: answers that are as right as ``answer``.
    """

    question: str
    completion_text: str
    answer: str
    meta: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    num_tokens: int | None = None
    others: tuple[str, ...] = ()

    def each(self) -> Iterator[RewardItem]:
        """The item with each of its right answers."""
        for answer in (self.answer, *self.others):
            yield dataclasses.replace(self, answer=answer, others=())


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """``value`` None: unscorable, for the ``reason`` given; ``parts`` are unweighted, by name."""

    value: float | None
    parts: Mapping[str, float | None]
    reason: str = ""


class _Part(Protocol):
    def __call__(self, items: Sequence[RewardItem]) -> list[Scored]: ...


def _pure(part: Any) -> _Part:
    """The verifier of one part as a function of a batch."""

    def one(item: RewardItem) -> float | None:
        text = item.completion_text
        match part:
            case ExactConfig():
                got = verifiers.extract_answer(text, part.extract)
                return verifiers.exact_match(got, item.answer, ignore_case=part.ignore_case)
            case NumericConfig():
                got = verifiers.extract_answer(text, part.extract)
                return verifiers.numeric_match(
                    got, item.answer, rel_tol=part.rel_tol, abs_tol=part.abs_tol
                )
            case AnswerConfig():
                return verifiers.answer_match(text, item.answer)
            case CountdownRewardConfig():
                return countdown_match(verifiers.extract_answer(text, part.extract), item.meta)
            case FormatConfig():
                return verifiers.template_match(text, part.template)
            case LanguageConfig():
                return verifiers.language_consistency(text, verifiers.SCRIPTS[part.language])
            case LengthConfig():
                return verifiers.overlong_penalty(
                    item.num_tokens, part.max_tokens, part.buffer_tokens
                )
        raise AssertionError(part)

    why = {
        "numeric": "the reference answer is not a number",
        "countdown": "the problem gives no numbers and target as integers",
        "length": "the completion's token count is not given",
    }.get(part.kind, "")

    def batch(items: Sequence[RewardItem]) -> list[Scored]:
        scores = [one(each) for item in items for each in item.each()]
        return _best(items, [Scored(s, "" if s is not None else why) for s in scores])

    return batch


def _best(items: Sequence[RewardItem], scores: Sequence[Scored]) -> list[Scored]:
    """Of the scores by each right answer, every item's highest; one without, if it has no other."""
    left = iter(scores)
    parts = ([next(left) for _ in item.each()] for item in items)
    return [max(part, key=lambda s: -math.inf if s.value is None else s.value) for part in parts]


def _sandboxed(reward: UserReward) -> _Part:
    """A user's function; of several right answers it gets the first, all as ``meta["answers"]``."""

    def batch(items: Sequence[RewardItem]) -> list[Scored]:
        return reward.score([_asked(i, i.completion_text) for i in items])

    return batch


def _by_each(reward: UserReward, extract: verifiers.Extract) -> _Part:
    """A library's function, asked about each right answer."""

    def batch(items: Sequence[RewardItem]) -> list[Scored]:
        asked = [
            _asked(each, verifiers.extract_answer(item.completion_text, extract) or "")
            for item in items
            for each in item.each()
        ]
        return _best(items, reward.score(asked))

    return batch


def _asked(item: RewardItem, completion: str) -> dict[str, Any]:
    every = {"answers": [item.answer, *item.others]} if item.others else {}
    return {
        "question": item.question,
        "completion": completion,
        "answer": item.answer,
        "meta": {**item.meta, **every},
    }


class Scorer:
    """Scores batches; owns the sandboxes of its parts. Close it, or use it in a ``with``."""

    def __init__(self, config: RewardConfig) -> None:
        self.config = config
        self.sandboxes: list[UserReward] = []
        self.parts: list[tuple[str, float, _Part]] = []
        for part in config.parts:
            name: str = part.kind
            n = sum(p.kind == part.kind for p in config.parts)
            if isinstance(part, UserRewardConfig):
                name = part.function.rpartition(":")[2]
            if n > 1:
                name = f"{name}_{len(self.parts)}"
            self.parts.append((name, part.weight, self._open(part)))

    def _open(self, part: Any) -> _Part:
        if isinstance(part, UserRewardConfig):
            self.sandboxes.append(UserReward(part))
            return _sandboxed(self.sandboxes[-1])
        if isinstance(part, ReasoningGymConfig):
            return self._by_library(part, f"{reasoning.__file__}:score", "reasoning_gym")
        if isinstance(part, MathConfig):
            math_answers.require()
            return self._by_library(part, f"{math_answers.__file__}:score", "math_verify")
        return _pure(part)

    def _by_library(
        self, part: ReasoningGymConfig | MathConfig, function: str, library: str
    ) -> _Part:
        limits = part.model_dump(include={"timeout_s", "batch_timeout_s", "num_workers"})
        config = UserRewardConfig(function=function, reads=True, preload=[library], **limits)
        self.sandboxes.append(UserReward(config))
        return _by_each(self.sandboxes[-1], part.extract)

    def score(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """One result an item, in order. A part without a value makes its item unscorable."""
        columns = [(name, weight, part(items)) for name, weight, part in self.parts]
        results = []
        for row in range(len(items)):
            found = {name: column[row] for name, _, column in columns}
            bad = [f"{k}: {s.reason}" for k, s in found.items() if s.value is None]
            total = scored(sum(w * (c[row].value or 0.0) for _, w, c in columns), "the sum is")
            results.append(
                RewardResult(
                    value=None if bad else total.value,
                    parts={k: s.value for k, s in found.items()},
                    reason="; ".join(bad) or total.reason,
                )
            )
        return results

    @functools.cached_property
    def maximum(self) -> float | None:
        """The highest reward that can be earned; None when a user function has no bound."""
        if any(isinstance(p, UserRewardConfig) for p in self.config.parts):
            return None
        return math.fsum(
            max(p.weight * bound for bound in ((-1.0, 0.0) if p.kind == "length" else (0.0, 1.0)))
            for p in self.config.parts
        )

    def close(self) -> None:
        """End the sandboxes."""
        for sandbox in self.sandboxes:
            sandbox.close()

    def __enter__(self) -> Scorer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def build_reward(config: RewardConfig) -> Scorer:
    """Make the scorer of a config; `ConfigError` when a user function cannot be loaded."""
    return Scorer(config)
