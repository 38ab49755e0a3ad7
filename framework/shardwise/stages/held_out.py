"""What a run keeps for measuring, as texts: nothing that it makes for training may say them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from shardwise.config.artifacts import artifacts_of
from shardwise.config.run import RunConfig
from shardwise.config.schema import EvaluationConfig, JobConfig
from shardwise.curation import HeldOutText, Row, read_source
from shardwise.data.config import DataConfig, RowsConfig
from shardwise.data.conversation import read_conversation
from shardwise.data.conversions import as_conversation
from shardwise.data.datasets import is_held_out
from shardwise.data.formats import CONVERSATIONS
from shardwise.data.parts import Part
from shardwise.data.preferences import asked
from shardwise.rewards import FileTaskConfig, TaskConfig
from shardwise.stages.evaluation_configs import MultipleChoiceConfig, ProblemsConfig


def held_out_texts(run: RunConfig) -> Iterator[HeldOutText]:
    """The problems, questions, rows and documents that stages and evaluations measure on.

    Not what a library brings (lm-eval's tasks), what is stored as tokens alone (indexed), and what
    a job of the run is still to write: of that, name files in ``contamination.sources``.
    """
    parts: list[EvaluationConfig | JobConfig] = [*run.evaluations, *run.stages]
    for part in parts:
        task, data = getattr(part, "task", None), getattr(part, "data", None)
        if isinstance(task, TaskConfig) and not any(artifacts_of(task)):
            measured = "num_problems" if isinstance(part, ProblemsConfig) else "num_held_out"
            yield from _problems(part.name, task, getattr(part, measured, 0))
        if isinstance(part, MultipleChoiceConfig):
            for i, question in enumerate(part.questions()):
                yield HeldOutText(f"{part.name}: {i}", question.text, question.choices)
        if any(artifacts_of(data)):
            continue
        if isinstance(data, DataConfig):
            yield from _documents(part.name, data)
        elif isinstance(data, RowsConfig):
            yield from _rows(part.name, data)


def _problems(name: str, task: TaskConfig, number: int | None) -> Iterator[HeldOutText]:
    """Of a file all; of a generator ``number``, as are measured on: it makes others without end."""
    if isinstance(task, FileTaskConfig):
        for problem in task.problems("held_out"):
            answers = (problem.answer, *problem.others)
            yield HeldOutText(f"{name}: {problem.id}", problem.question, answers)
        return
    for problem in itertools.islice(task.problems("held_out"), number):
        yield HeldOutText(f"{name}: {problem.id}", problem.question, exact=True)


def _documents(name: str, data: DataConfig) -> Iterator[HeldOutText]:
    for source in data.validation_sources():
        if source.kind == "indexed":
            continue
        for document in source.documents():
            if not data.held_out or is_held_out(document, data.held_out):
                place = document.name.rpartition("/")[2]
                yield HeldOutText(f"{name}: {place}", "", (document.text,))


def _rows(name: str, data: RowsConfig) -> Iterator[HeldOutText]:
    sources, part = data.measured()
    for row in (row for source in sources for row in read_source(source)):
        if _is_in(part, row, raw=getattr(data, "texts", "chat") == "raw"):
            yield HeldOutText(f"{name}: {row.where}", row.prompt, row.answers)


def _is_in(part: Part, row: Row, raw: bool) -> bool:
    """Whether a row is on this side, by what its reader says that it asks."""
    if not part.share:
        return True
    prompt = row.data.get("prompt")
    if raw and isinstance(prompt, str):
        return part.has(prompt)
    if row.format not in CONVERSATIONS:
        answers = [row.data[k] for k in ("chosen", "rejected") if k in row.data]
        return part.has(asked(prompt, dict(row.data), answers))
    said = read_conversation(as_conversation(row.format, row.data))
    return part.has(
        said.messages[: said.learn.index(True)] if True in said.learn else said.messages
    )
