"""Configs of the evaluations."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from shardwise.config.metrics import Metric, Plot
from shardwise.config.schema import (
    EvaluationConfig,
    NonNegativeInt,
    PositiveInt,
    Rows,
    SeqLen,
    SmallSizes,
    StageConfig,
)
from shardwise.data import folders, readers
from shardwise.data.config import DataConfig
from shardwise.errors import DataError, UserError
from shardwise.rewards import (
    AnyTask,
    CountLettersConfig,
    RewardConfig,
    fill_for_file,
)
from shardwise.rollout.config import RolloutConfig, Sampling
from shardwise.stages.policy_config import small_reward

ROLLOUT: Any = Field(
    None,
    description="how the model is served; null: as the stage's own section says, else whole on "
    "each rank",
    examples=[{"tp": 2}],
)


class BitsConfig(EvaluationConfig):
    """Summed loss in bits over the UTF-8 bytes of the validation documents."""

    kind: Literal["bits_per_byte"]
    data: DataConfig | None = Field(
        None, description="default: of the stage, else of the first that has documents"
    )
    seq_len: SeqLen = Field(256, description="tokens of context at most")
    stride: NonNegativeInt = Field(
        0,
        description="0: rows side by side; else rows start this far apart and score their last "
        "``stride`` tokens, so that every token has seq_len - stride of context",
        examples=[128],
    )
    micro_batch: Rows = Field(16, description="rows that a rank computes at once")

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `Logs.metrics`."""
        unit, size = "bits per byte", ("gzip_bits_per_byte", "xz_bits_per_byte")
        return (
            Metric(
                "val_bits_per_byte",
                "held-out bits per byte",
                unit,
                better="lower",
                format=".3f",
                line="validation",
                plot=Plot(
                    "Validation, bits per byte",
                    "Learning",
                    across=True,
                    caption="Lower is better. gzip and xz compress each held-out file alone.",
                ),
                summary="first",
                references=size,
                source="val_source",
            ),
            Metric(size[0], "gzip -9", unit, format=".3f", summary="first"),
            Metric(size[1], "xz", unit, format=".3f", summary="first"),
            Metric("val_bytes", "bytes of validation", format="short"),
            Metric("val_documents", "documents of validation", format="short"),
        )

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> Self:
        """See `EvaluationConfig.shrunk`.

        Rows that overlap if the recipe's do, and of a number that no ranks share evenly: if it can
        be, the last one is alone, so that 2 ranks and 4 have one without a row.
        """
        own = getattr(stage, "data", None)
        if isinstance(own, DataConfig) and self.data is None:
            data = own
        else:  # of an earlier stage, or the standard library
            data = (self.data or DataConfig()).shrunk(folder, small.seq_len)
        documents = (d for s in data.validation_sources() for d in s.documents())
        tokens = sum(len(d.raw) + 1 for d in documents)
        longest = min(self.seq_len, small.seq_len)
        sizes = [(n, self.stride and max(1, self.stride * n // self.seq_len))
                 for n in range(longest, max(1, longest // 2), -1)]  # fmt: skip
        micro = min(self.micro_batch, 2)

        def shared_evenly(size: tuple[int, int]) -> tuple[int, bool]:
            rows = _rows(tokens, *size)
            alone = [rows % n == 1 for n in (4 * micro, 2 * micro, 2)]
            return [*alone, True].index(True), rows % 3 == 0

        seq_len, stride = min(sizes, key=shared_evenly)
        update = {"data": data, "seq_len": seq_len, "stride": stride}
        return self.model_copy(update=update | {"micro_batch": micro})


def _rows(tokens: int, seq_len: int, stride: int) -> int:
    return 1 + max(0, -(-(tokens - seq_len) // (stride or seq_len)))


class ProblemsConfig(EvaluationConfig):
    """The first ``num_problems`` of the task's held-out split, which nothing trains on."""

    small_seq_len = 160

    kind: Literal["problems"]
    task: AnyTask = Field(default_factory=CountLettersConfig)
    num_problems: Rows | None = Field(512, description="how many; null: all of a file, its default")
    max_new_tokens: SeqLen = Field(16, description="of an answer")
    reward: RewardConfig = Field(
        default_factory=RewardConfig,
        description="an answer is right when it earns the maximum; default: exact, or answer for a "
        "file's problems",
    )
    num_samples_shown: NonNegativeInt = Field(6, description="generations kept for the report")
    rollout: RolloutConfig | None = ROLLOUT

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `Logs.metrics`."""
        return (
            Metric(
                "accuracy",
                "held-out accuracy",
                "share of problems solved",
                better="higher",
                format=".3f",
                line="accuracy",
                plot=Plot("Held-out accuracy", "Learning"),
                summary="stages",
                count="num_problems",
                references=("majority_baseline",),
            ),
            Metric("majority_baseline", "majority answer", format=".3f", summary="first"),
            Metric("num_problems", "problems", format=".0f", summary="first"),
            Metric("num_unscorable", "answers without a score", format=".0f", better="lower"),
            Metric("score", "mean score of held-out answers", better="higher"),
            Metric("answer_length", "length of held-out answers", "tokens"),
        )

    @model_validator(mode="after")
    def _all_of_a_file(self) -> Self:
        fill_for_file(self, "num_problems")
        return self

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> Self:
        """See `EvaluationConfig.shrunk`; an untrained model is right here and there."""
        return self.model_copy(
            update={
                "task": self.task.shrunk(folder, small.seq_len),
                "num_problems": min(self.num_problems or 11, 11),
                "max_new_tokens": min(self.max_new_tokens, 4),
                "reward": small_reward(folder),
            }
        )


class ContinuationsConfig(EvaluationConfig):
    """Texts to go on from, as documents (no chat template)."""

    small_seq_len = 64

    kind: Literal["continuations"]
    prompts: list[str] = Field(
        min_length=1, description="beginnings", examples=[["def read(self, "]]
    )
    sampling: Sampling = Field(default_factory=Sampling)
    rollout: RolloutConfig | None = ROLLOUT

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> Self:
        """See `EvaluationConfig.shrunk`."""
        length = min(self.sampling.max_new_tokens, 6)
        sampling = self.sampling.model_copy(update={"max_new_tokens": length})
        return self.model_copy(update={"prompts": self.prompts[:3], "sampling": sampling})


@dataclasses.dataclass(frozen=True)
class Question:
    """A question with its choices; ``answer``: the index of the right one."""

    text: str
    choices: tuple[str, ...]
    answer: int


_COLUMNS = ("question", "choices", "answer")


class MultipleChoiceConfig(EvaluationConfig):
    """Questions with choices, from a file: which one does the model find likeliest?"""

    kind: Literal["multiple_choice"]
    path: Path = Field(
        description="rows of question, choices (a list) and answer (an index from 0, or a letter): "
        "a jsonl, json, parquet or arrow file, a data set's folder, or hf:org/name",
        examples=["data/questions.jsonl"],
    )
    split: str = Field("train", description="of a data set that has several", examples=["test"])
    columns: dict[Literal["question", "choices", "answer"], str] = Field(
        default_factory=dict,
        description="our name of a field to the file's, where they differ",
        examples=[{"question": "query", "answer": "gold"}],
    )
    texts: Literal["raw", "chat"] = Field(
        "raw", description="a choice goes on with the text, or answers a user's message"
    )
    prompt: str = Field(
        "{question}",
        description="what stands before a choice",
        examples=["Question: {question}\nAnswer:"],
    )
    delimiter: str = Field(" ", description="between prompt and choice, in raw texts")
    micro_batch: Rows = Field(16, description="choices that a rank computes at once")

    @classmethod
    def metrics(cls) -> tuple[Metric, ...]:
        """See `Logs.metrics`."""
        share, right = "share of questions", "choices that are right"
        likeliest, by_character = "choice_accuracy", "choice_accuracy_norm"
        return (
            *(
                Metric(
                    name,
                    words,
                    share,
                    better="higher",
                    format=".3f",
                    count="num_questions",
                    references=("choice_chance",),
                )
                for name, words in (
                    (likeliest, right),
                    (by_character, f"{right}, by their likelihood a character"),
                )
            ),
            Metric("choice_chance", "guessing", share, format=".3f"),
            Metric("num_questions", "questions", format=".0f"),
            Metric("num_cut", "choices that lost their question's beginning", format=".0f"),
        )

    def questions(self) -> list[Question]:
        """Every question of the file. Raises DataError with file and line."""
        rows = readers.read_rows(folders.row_files(self.path, self.split))
        return [self._question(row, where) for where, row in rows]

    def check(self) -> None:
        """See `EvaluationConfig.check`."""
        self.questions()

    def _question(self, row: Mapping[str, Any], where: str) -> Question:
        names = [self.columns.get(name, name) for name in _COLUMNS]  # type: ignore[call-overload]
        if missing := [name for name in names if name not in row]:
            raise DataError(
                f"{where}: no field {', '.join(map(repr, missing))}; fields: {', '.join(row)}; "
                f"name the file's own in columns, e.g. {{question: {next(iter(row), 'text')}}}"
            )
        text, said, answer = (row[name] for name in names)
        labels = [chr(ord("A") + i) for i in range(26)]
        if isinstance(said, dict):  # as ARC has them
            labels = [str(x) for x in said.get("label") or ()]
            said = said.get("text")
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: {names[0]} must be a text")
        whole = isinstance(said, list) and len(said) > 1
        if not whole or not all(isinstance(c, str) and c for c in said):
            raise DataError(f"{where}: {names[1]} must be a list of at least two texts")
        if isinstance(answer, str):
            label = answer.strip().upper()
            answer = labels.index(label) if label in labels else label
            if isinstance(answer, str) and answer.isdigit():
                answer = int(answer)
        if type(answer) is not int or not 0 <= answer < len(said):
            raise DataError(
                f"{where}: {names[2]} is {row[names[2]]!r}; allowed: an index from 0 to "
                f"{len(said) - 1}, or a letter from A to {labels[len(said) - 1]}"
            )
        return Question(text, tuple(said), answer)

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> Self:
        """See `EvaluationConfig.shrunk`."""
        update = {"path": _small_questions(folder), "columns": {}, "prompt": "{question}"}
        return self.model_copy(update=update | {"micro_batch": min(self.micro_batch, 2)})


class LmEvalConfig(EvaluationConfig):
    """Tasks of lm-eval, EleutherAI's evaluation harness."""

    kind: Literal["lm_eval"]
    tasks: list[str] = Field(
        min_length=1,
        description="names of tasks or groups, or paths of tasks of your own (.yaml)",
        examples=[["arc_easy", "hellaswag"]],
    )
    num_fewshot: NonNegativeInt | None = Field(
        None, description="examples before each question; None: as the task says", examples=[5]
    )
    limit: PositiveInt | None = Field(
        None, description="questions of each task; None: all", examples=[100]
    )
    texts: Literal["raw", "chat"] = Field(
        "raw", description="as the task writes them, or by the model's chat template"
    )
    micro_batch: Rows = Field(16, description="continuations that a rank computes at once")
    rollout: RolloutConfig | None = ROLLOUT

    def check(self) -> None:
        """See `EvaluationConfig.check`."""
        if importlib.util.find_spec("lm_eval") is None:
            raise UserError("lm-eval is not installed: pip install 'shardwise[lm-eval]'")
        for task in self.tasks:
            if task.endswith((".yaml", ".yml")) and not Path(task).is_file():
                raise UserError(f"tasks: {task}: no such file (from {Path.cwd()})")

    def shrunk(self, stage: StageConfig, small: SmallSizes, folder: Path) -> EvaluationConfig:
        """See `EvaluationConfig.shrunk`: what tasks ask of a model, without the library."""
        return MultipleChoiceConfig(
            kind="multiple_choice", name=self.name, path=_small_questions(folder), micro_batch=2
        )


def _small_questions(folder: Path) -> Path:
    """A file of questions whose choices differ in length, of a number that no ranks share."""
    path = folder / "questions.jsonl"
    words = ("one", "three", "thirteen")
    rows = [
        {"question": f"{'so ' * i}how many?", "choices": words[: 2 + i % 2], "answer": i % 2}
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
