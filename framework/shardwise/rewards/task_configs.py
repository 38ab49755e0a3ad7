"""Tasks as a recipe names them: a kind, and the keys of that kind alone.

No ``kind`` means count_letters. A task gives the problems of a split, in a fixed order and each
once; `tasks.ProblemSet` takes as many as a stage wants.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import xxhash
from pydantic import BeforeValidator, Field, model_validator

from shardwise.config.artifacts import ArtifactName
from shardwise.config.schema import DataSection, Fraction, PositiveFloat, Section, Seed, shown
from shardwise.data.streams import MAX_EXPANSION
from shardwise.errors import DataError
from shardwise.rewards import families, problem_files, reasoning, sudoku
from shardwise.rewards.countdown import Operator, countdown
from shardwise.rewards.families import Operation, Problem
from shardwise.rewards.rules import ANSWER_OF, COUNTDOWN, SUDOKU, Rules, Style
from shardwise.rewards.scoring import (
    AnswerConfig,
    CountdownRewardConfig,
    ExactConfig,
    RewardConfig,
)

Split = Literal["train_sft", "train_rl", "held_out"]
# Which tenths of the hash space a split owns.
_TENTHS: dict[Split, range] = {
    "held_out": range(0, 2),
    "train_sft": range(2, 5),
    "train_rl": range(5, 10),
}
_PATIENCE = 20_000  # candidates in a row without a new problem: the family is exhausted
# The keys that all kinds had when they were one section; recipes that runs keep still have them.
_ONCE_SHARED: dict[str, Any] = {
    "kind": "count_letters", "seed": 0, "style": "answer", "system": None, "min_length": 6,
    "max_length": 14, "letters": "abc", "targets": "",
    "operations": ["add", "subtract", "multiply", "compare", "chain"], "min_digits": 1,
    "max_digits": 2, "chain_length": 3, "name": "", "options": {},
}  # fmt: skip


def split_of(question: str) -> Split:
    """The split that owns a generated question, a pure function of its text."""
    tenth = xxhash.xxh3_64_intdigest(f"split/{question}".encode()) % 10
    return next(split for split, tenths in _TENTHS.items() if tenth in tenths)


class TaskConfig(DataSection):
    """A source of problems and how they are written; what every kind has.

    ``rules``: what judges a text from its question alone; None: that takes the right answer.
    """

    rules: ClassVar[Rules | None] = None

    kind: str = Field("count_letters", description="which problems")
    style: Style = Field(
        "answer",
        description="of solutions; answer: the bare answer; steps: steps, then 'Answer: x'; "
        "tags: <think>steps</think><answer>x</answer>",
    )
    system: str | None = Field(
        None,
        description="system message of every conversation that brings none",
        examples=["Answer with a number."],
    )

    def problems(self, split: Split) -> Iterator[Problem]:
        """The problems of a split, each once; another split has none of them."""
        raise NotImplementedError

    def identity(self) -> Any:
        """What decides its problems, as plain JSON: a part of a run's lineage."""
        raise NotImplementedError

    def too_few(self, split: Split, found: int, wanted: int) -> str:
        """What to say where a stage wants more than there are."""
        raise NotImplementedError


class GeneratedConfig(TaskConfig):
    """Problems without end, of a seed."""

    seed: Seed = Field(0, description="of the problems")

    def candidates(self) -> Iterator[Problem]:
        """All problems in order, splits mixed, duplicates included."""
        raise NotImplementedError

    def problems(self, split: Split) -> Iterator[Problem]:
        """See `TaskConfig.problems`; ends when no new one has come for long."""
        seen: set[str] = set()
        fruitless = 0
        for problem in self.candidates():
            fruitless += 1
            if problem.question not in seen and split_of(problem.question) == split:
                seen.add(problem.question)
                yield problem
                fruitless = 0
            if fruitless == _PATIENCE:
                return

    def identity(self) -> Any:
        """See `TaskConfig.identity`; as it was while all kinds shared their keys."""
        return {**_ONCE_SHARED, **self.model_dump(mode="json")}

    def too_few(self, split: Split, found: int, wanted: int) -> str:
        """See `TaskConfig.too_few`."""
        return (
            f"task {self.kind!r} has only {found} distinct problems in its split {split!r}, "
            f"{wanted} were asked for: ask for fewer, or widen the task (lengths, letters, "
            "digits, options)"
        )


class CountLettersConfig(GeneratedConfig):
    """How often a letter occurs."""

    kind: Literal["count_letters"] = Field("count_letters", description="which problems")
    min_length: Annotated[int, Field(ge=1, le=100_000)] = Field(6, description="fewest letters")
    max_length: Annotated[int, Field(ge=1, le=100_000)] = Field(14, description="most letters")
    letters: str = Field("abc", min_length=1, description="the alphabet")
    targets: str = Field("", description="letters asked for; empty: the alphabet", examples=["a"])

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_length > self.max_length:
            raise ValueError("min_length must not exceed max_length")
        return self

    def candidates(self) -> Iterator[Problem]:
        """See `GeneratedConfig.candidates`."""
        return (families.count_letters(self, self.seed, i) for i in itertools.count())


def _as_tuple(value: Any) -> Any:
    """A recipe has lists alone, and a strict tuple takes none once `_filled` has seen it."""
    return tuple(value) if isinstance(value, list) else value


class ArithmeticConfig(GeneratedConfig):
    """Sums, differences, products, comparisons and chains of them."""

    kind: Literal["arithmetic"] = Field("arithmetic", description="which problems")
    operations: Annotated[tuple[Operation, ...], BeforeValidator(_as_tuple)] = Field(
        ("add", "subtract", "multiply", "compare", "chain"),
        min_length=1,
        description="drawn uniformly",
    )
    min_digits: Annotated[int, Field(ge=1, le=1000)] = Field(
        1, description="digits of the shortest operand"
    )
    max_digits: Annotated[int, Field(ge=1, le=1000)] = Field(
        2, description="digits of the longest operand"
    )
    chain_length: Annotated[int, Field(ge=1, le=1000)] = Field(
        3, description="operations of a chain"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_digits > self.max_digits:
            raise ValueError("min_digits must not exceed max_digits")
        return self

    def candidates(self) -> Iterator[Problem]:
        """See `GeneratedConfig.candidates`."""
        return (families.arithmetic(self, self.seed, i) for i in itertools.count())


class CountdownConfig(GeneratedConfig):
    """The numbers game: an expression of all the given numbers that has a given value."""

    rules: ClassVar[Rules | None] = COUNTDOWN

    kind: Literal["countdown"] = Field("countdown", description="which problems")
    min_numbers: Annotated[int, Field(ge=2, le=20)] = Field(3, description="fewest numbers")
    max_numbers: Annotated[int, Field(ge=2, le=20)] = Field(4, description="most numbers")
    max_number: Annotated[int, Field(ge=1, le=10_000)] = Field(
        20, description="the largest number; the smallest is 1"
    )
    max_target: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        100, description="what no step exceeds"
    )
    operators: Annotated[tuple[Operator, ...], BeforeValidator(_as_tuple)] = Field(
        ("+", "-", "*"), min_length=1, description="drawn uniformly", examples=[["+", "-"]]
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_numbers > self.max_numbers:
            raise ValueError("min_numbers must not exceed max_numbers")
        return self

    def candidates(self) -> Iterator[Problem]:
        """See `GeneratedConfig.candidates`."""
        return (countdown(self, self.seed, i) for i in itertools.count())


class SudokuConfig(GeneratedConfig):
    """Sudokus of four by four, each with one solution."""

    rules: ClassVar[Rules | None] = SUDOKU

    kind: Literal["sudoku"] = Field("sudoku", description="which problems")
    min_clues: Annotated[int, Field(ge=sudoku.FEWEST, le=16)] = Field(
        5, description="fewest numbers that are given"
    )
    max_clues: Annotated[int, Field(ge=sudoku.FEWEST, le=16)] = Field(
        8, description="most numbers that are given"
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.min_clues > self.max_clues:
            raise ValueError("min_clues must not exceed max_clues")
        return self

    def candidates(self) -> Iterator[Problem]:
        """See `GeneratedConfig.candidates`."""
        return (sudoku.sudoku(self, self.seed, i) for i in itertools.count())


class ReasoningGymTaskConfig(GeneratedConfig):
    """A data set of reasoning-gym, made on demand."""

    model_config = shown(kind="reasoning_gym", name="letter_counting")

    kind: Literal["reasoning_gym"] = Field("reasoning_gym", description="which problems")
    name: str = Field("", description="name of the dataset", examples=["letter_counting"])
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="settings of the dataset",
        examples=[{"max_words": 8}],
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not self.name:
            raise ValueError("name: say which reasoning-gym dataset, e.g. 'letter_counting'")
        if self.style != "answer":
            raise ValueError("style: reasoning_gym has no steps; use 'answer'")
        return self

    def candidates(self) -> Iterator[Problem]:
        """See `GeneratedConfig.candidates`."""
        source = reasoning.open_source(self.name, self.options, self.seed)
        return (
            reasoning.problem(source, self.name, self.options, self.seed, i)
            for i in itertools.count()
        )


class FileTaskConfig(TaskConfig):
    """Problems of your own, a row each: a prompt (a text or messages) and its answer.

    An answer is a text, a number, or a list of those that are right alike. Whatever else a row has
    reaches the verifier as ``meta``. Stages ``sft`` and those that reinforce learn from the same
    rows; what is held out, none of them sees.
    """

    model_config = shown(kind="file", path="problems.jsonl")

    kind: Literal["file"] = Field(description="which problems")
    path: Path | None = Field(
        None,
        description="file, folder (of datasets, too), glob or hf:org/name with a row a problem",
        examples=["problems.jsonl"],
    )
    from_: ArtifactName = None
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="our name of a column (prompt, answer, system): its name in the rows",
        examples=[{"prompt": "question"}],
    )
    split: str = Field("train", description="of a data set, by its name", examples=["train"])
    subset: str | None = Field(
        None, description="of a data set that has several", examples=["main"]
    )
    held_out: Fraction | Path = Field(
        0.2,
        description="what nothing trains on: a share, by hash of the prompt (1.0: all, to measure "
        "only); or another file; or another split of the data set, by its name",
        examples=["held_out.jsonl"],
    )
    answer_after: str | None = Field(
        None,
        min_length=1,
        description="mark in the answer's text behind which the answer stands; what stands before "
        "it are its steps",
        examples=["####"],
    )
    ignore: list[str] = Field(
        default_factory=list,
        description="fields of its rows that do not reach the verifier",
        examples=[["url"]],
    )
    max_expansion: PositiveFloat = Field(
        MAX_EXPANSION, description="what a compressed file may expand to, times its size"
    )

    @model_validator(mode="after")
    def _columns_are_ours(self) -> Self:
        problem_files.check_columns(self)
        if (self.path is None) == (self.from_ is None):
            raise ValueError("kind file needs a path, or from: <job>.<artifact>; one of the two")
        return self

    @property
    def file(self) -> Path:
        """Where its rows are. Raises DataError for what an earlier job is still to write."""
        if self.path is None:
            raise DataError(f"{self.from_}: an earlier job is still to write it")
        return self.path

    def problems(self, split: Split) -> Iterator[Problem]:
        """See `TaskConfig.problems`. Raises DataError with file and row for what is none."""
        train, held_out = problem_files.read_splits(self)
        return iter(held_out if split == "held_out" else train)

    def check(self) -> None:
        """Raise DataError, with file and row, unless all of its problems can be learned from."""
        problem_files.read_splits(self)

    def identity(self) -> Any:
        """See `TaskConfig.identity`: of the file, what it says."""
        said = self.model_dump(mode="json", exclude={"path"} if self.from_ else None)
        return [said, problem_files.contents_hash(self)]

    def too_few(self, split: Split, found: int, wanted: int) -> str:
        """See `TaskConfig.too_few`."""
        part = "held out" if split == "held_out" else "to train on"
        return (
            f"{self.path or self.from_}: has {found} problems {part} (held_out: {self.held_out}), "
            f"{wanted} were asked for: ask for fewer, or leave num_problems out to take all"
        )

    def shrunk(self, folder: Path, seq_len: int) -> Self:
        """See `DataSection.shrunk`: seeded problems of the same form."""
        file = problem_files.write_stand_in(folder)
        updates: dict[str, Any] = {
            "path": file,
            "from_": None,
            "columns": {},
            "held_out": 0.25,
            "answer_after": None,
        }
        return self.model_copy(update={**updates, "split": "train", "subset": None, "ignore": []})


_Kinds = (
    CountLettersConfig
    | ArithmeticConfig
    | CountdownConfig
    | SudokuConfig
    | ReasoningGymTaskConfig
    | FileTaskConfig
)
KINDS: Mapping[str, type[TaskConfig]] = {
    "count_letters": CountLettersConfig,
    "arithmetic": ArithmeticConfig,
    "countdown": CountdownConfig,
    "sudoku": SudokuConfig,
    "reasoning_gym": ReasoningGymTaskConfig,
    "file": FileTaskConfig,
}


def _filled(data: Any) -> Any:
    """No kind is count_letters; keys of other kinds as old recipes resolved them are left out."""
    if not isinstance(data, dict):
        return data
    data = {"kind": "count_letters", **data}
    kind = KINDS.get(data["kind"]) if isinstance(data["kind"], str) else None
    if kind is None:
        return data
    return {k: v for k, v in data.items() if k in kind.by_key() or not _is_default(k, v)}


def _is_default(key: str, value: Any) -> bool:
    """Whether a key was once shared and has the value that it had where nobody set it."""
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        value = list(value)
    return key in _ONCE_SHARED and bool(value == _ONCE_SHARED[key])


AnyTask = Annotated[Annotated[_Kinds, Field(discriminator="kind")], BeforeValidator(_filled)]


def fill_for_file(stage: Section, *numbers: str) -> None:
    """Say what is left out beside a task of kind file, in a stage that was just read.

    ``numbers``: keys that say how many problems: all of a file's. A ``reward`` is for answers of
    any sort. Beside other tasks, the default reward reads the answer where the task's style has it:
    the whole text of a solution with steps never equals an answer. Of countdown, all right answers
    count. Raises ValueError where all
    problems are asked for of a task that has no end.
    """
    task: TaskConfig | None = stage.task  # type: ignore[attr-defined]
    if isinstance(task, FileTaskConfig):
        filled: dict[str, Any] = {
            name: 0 if name == "num_held_out" and task.held_out == 0.0 else None for name in numbers
        }
        if "reward" in type(stage).model_fields:
            filled["reward"] = RewardConfig(parts=[AnswerConfig()])
        given = stage.model_fields_set
        stage.__dict__.update({k: v for k, v in filled.items() if k not in given})
    elif task is not None:
        for name in numbers:
            if getattr(stage, name) is None:
                raise ValueError(f"{name}: task {task.kind} has no end; say how many")
        rewarded = "reward" in type(stage).model_fields and "reward" not in stage.model_fields_set
        how, game = ANSWER_OF[task.style], isinstance(task, CountdownConfig)
        if rewarded and (game or how != "whole"):
            kind = CountdownRewardConfig if game else ExactConfig
            part = kind.model_validate({"extract": how})
            stage.__dict__["reward"] = RewardConfig(parts=[part])
