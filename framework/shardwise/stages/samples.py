"""Reads every sample of a run's data before anything depends on it.

A row that cannot be learned from is then known before a process is started and before a watcher is
opened, not when its stage begins, hours later.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardwise.config.artifacts import artifacts_of
from shardwise.config.run import RunConfig
from shardwise.config.schema import JobConfig, StageConfig
from shardwise.data.chat import CHATML, encode_chat
from shardwise.data.config import ChatDataConfig, DataConfig
from shardwise.data.datasets import build_chat_examples, build_pretrain_dataset, pack_examples
from shardwise.data.preferences import read_rankings
from shardwise.data.steps import read_solutions
from shardwise.data.tokenizer import Tokenizer, load_tokenizer
from shardwise.errors import DataError
from shardwise.rewards import FileTaskConfig, prompt_messages
from shardwise.rewards.task_configs import Split
from shardwise.stages.evaluation_configs import ProblemsConfig
from shardwise.stages.process_reward_config import ProcessRewardConfig
from shardwise.stages.ranking_config import RankingStageConfig
from shardwise.stages.results import RESULT_FILE


def pending_stages(run: RunConfig) -> Iterator[tuple[int, JobConfig]]:
    """Stages that are still to run, and their numbers; the data of finished ones may be gone."""
    for i, stage in enumerate(run.stages):
        if not (run.directory / "stages" / stage.name / RESULT_FILE).exists():
            yield i, stage


def pending_parts(run: RunConfig) -> Iterator[tuple[str, Any]]:
    """Evaluations and stages that are still to run, and their keys."""
    for i, evaluation in enumerate(run.evaluations):
        yield f"evaluations.{i}", evaluation
    for i, stage in pending_stages(run):
        yield f"stages.{i}", stage


def ready_tokenizer(run: RunConfig) -> Tokenizer | None:
    """The tokenizer of a run; None if it is trained on the run's own text."""
    if run.tokenizer.kind == "bpe" and run.tokenizer.path is None:
        return None
    tokenizer = load_tokenizer(run.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template or CHATML
    return tokenizer


def check_conversations(run: RunConfig, tokenizer: Tokenizer) -> None:
    """Raise DataError, with file and line, for a row that a stage of the run cannot learn from."""
    for _, stage in pending_stages(run):
        if any(artifacts_of(stage)):  # read when they are there
            continue
        data = getattr(stage, "data", None)
        if isinstance(data, ChatDataConfig) and isinstance(stage, StageConfig):
            seq_len = stage.batch.seq_len
            for sources, part in (data.training(), data.measured()):
                how = data.turns, data.strict_fields, data.texts, part
                if examples := build_chat_examples(sources, tokenizer, *how):
                    pack_examples(examples, data, seq_len, tokenizer.pad_id)
        elif isinstance(stage, RankingStageConfig):
            sources = [*stage.data.sources, *stage.data.validation]
            for _ in read_rankings(sources, tokenizer, stage.reading()):
                pass
        elif isinstance(stage, ProcessRewardConfig):
            sources = [*stage.data.sources, *stage.data.validation]
            for _ in read_solutions(sources, tokenizer, stage.reading()):
                pass
    for _, part in pending_parts(run):
        task = getattr(part, "task", None)
        if isinstance(task, FileTaskConfig) and task.from_ is None:
            _check_prompts(task, part, run.model.max_seq_len, tokenizer)


def _check_prompts(task: FileTaskConfig, part: Any, longest: int, tokenizer: Tokenizer) -> None:
    """Refuse prompts that cannot be written, or that leave an answer no room in the model."""
    room = getattr(getattr(part, "sampling", part), "max_new_tokens", 0)
    splits: list[Split] = ["held_out"]
    if not isinstance(part, ProblemsConfig):
        splits.append("train_rl")
    for problem in (p for split in splits for p in task.problems(split)):
        try:
            asked = prompt_messages(problem, task)
            ids, _ = encode_chat(tokenizer, asked, add_generation_prompt=True)
        except DataError as error:
            raise DataError(f"{task.path}: {problem.id}: {error}") from error
        if len(ids) + room > longest:
            raise DataError(
                f"{task.path}: {problem.id}: the prompt has {len(ids)} tokens and its answer may "
                f"have {room}, model.max_seq_len is {longest}; raise it, ask for shorter answers, "
                "or drop the row"
            )


def check_documents(run: RunConfig, tokenizer: Tokenizer, cache: Path) -> None:
    """Build the token stores that the stages will open; DataError as of `check_conversations`."""
    for _, stage in pending_stages(run):
        data = getattr(stage, "data", None)
        if isinstance(data, DataConfig) and isinstance(stage, StageConfig):
            if any(artifacts_of(data)):
                continue
            build_pretrain_dataset(data, tokenizer, stage.batch.seq_len, run.seed, cache)
