"""How long a run will take on this machine: said when it starts, compared when it ends.

A stage's seconds are its model FLOPs (convention of `metrics.flops`) over the machine's GEMM rate
for its dtype, measured a moment before, times an efficiency by the sort of work; and what does not
hang on FLOPs (start, compiler, saves) on top. The efficiencies are those of small models on two CPU
cores (docs/results/quickstart.md), where most first runs are; wider models and GPUs come closer to
their GEMM rate, so that there the estimate is rather too long. Another package's stage or
evaluation joins by ``work_of.register``; what is not known is said to be, never guessed.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.config.run import RunConfig
from shardwise.config.schema import StageConfig
from shardwise.data.chat import encode_chat
from shardwise.data.source import DataSource
from shardwise.data.tokenizer import Tokenizer
from shardwise.errors import UserError
from shardwise.metrics.progress import duration
from shardwise.models.common.config import DecoderConfig
from shardwise.optim.schedules import consumed_before
from shardwise.parallel import blocks
from shardwise.parallel.mesh import pick_device
from shardwise.rewards import TaskConfig
from shardwise.rewards.task_configs import FileTaskConfig
from shardwise.rewards.tasks import count, messages, prompt_messages
from shardwise.stages.arithmetic import TRAINED, roles_in_use
from shardwise.stages.base import ACTOR, SCORERS, evaluations_of, role_layout, role_of
from shardwise.stages.bits import data_of
from shardwise.stages.distill_config import DistillConfig
from shardwise.stages.dpo_config import DpoConfig
from shardwise.stages.evaluation_configs import (
    BitsConfig,
    ContinuationsConfig,
    LmEvalConfig,
    MultipleChoiceConfig,
    ProblemsConfig,
)
from shardwise.stages.grpo_config import GrpoConfig
from shardwise.stages.loop import flops_per_token
from shardwise.stages.online_dpo_config import OnlineDpoConfig
from shardwise.stages.ppo_config import PpoConfig
from shardwise.stages.pretrain_config import PretrainConfig
from shardwise.stages.process_reward_config import ProcessRewardConfig
from shardwise.stages.reward_config import RewardModelConfig
from shardwise.stages.sft_config import SftConfig

# Of the GEMM rate. A pass over rows (training, scoring) is made of products; a decode step of a
# small model is made of everything else.
ROWS, DECODE = 0.45, 0.15
STAGE_SECONDS = 4.0  # engine, first step, checkpoints, result
COMPILE_SECONDS = 20.0  # on a CPU
TEXT_BYTES_A_SECOND = 2e6  # read, tokenised and stored
SAMPLED = 64  # problems from whose lengths those of a task are told
SAMPLED_BYTES = 1 << 16  # of a text, from whose tokens those of all are told


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs of passes over rows and of decoding, and seconds of what is neither."""

    rows: float = 0.0
    decode: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.rows + other.rows, self.decode + other.decode, self.seconds + other.seconds
        )

    def times(self, factor: float) -> Work:
        """As often."""
        return Work(self.rows * factor, self.decode * factor, self.seconds * factor)

    def on(self, flops: float) -> float:
        """Seconds on a machine whose GEMM rate is ``flops`` FLOP/s."""
        return (self.rows / ROWS + self.decode / DECODE) / flops + self.seconds


@dataclasses.dataclass(frozen=True)
class Looked:
    """What somebody who has read a stage's files says of them: rows, and mean tokens of one."""

    rows: int
    tokens: float


@dataclasses.dataclass(frozen=True)
class Case:
    """What the work of a part follows from, beside its own settings."""

    run: RunConfig
    stage: StageConfig
    tokenizer: Tokenizer
    done: int = 0  # steps of the stage that stand in a checkpoint
    looked: Looked | None = None

    def train(self, tokens: float, seq_len: int, head: str = "vocabulary") -> float:
        """FLOPs of a forward and a backward pass; a forward pass is a third of it."""
        model = self.run.model
        assert isinstance(model, DecoderConfig)
        return tokens * flops_per_token(model.as_scalar() if head == "scalar" else model, seq_len)


@functools.singledispatch
def work_of(part: Any, case: Case) -> Work | None:
    """What is left to do of a stage, or what an evaluation takes; None: not known."""
    return None


@work_of.register
def _pretrain(stage: PretrainConfig, case: Case) -> Work | None:
    work = _rows(stage, case)
    if (case.run.directory / "cache").is_dir():
        return work
    return work + Work(seconds=_bytes(stage.data.sources) / TEXT_BYTES_A_SECOND)


@work_of.register(SftConfig)
def _rows(stage: PretrainConfig | SftConfig | DistillConfig, case: Case) -> Work:
    batch = stage.batch
    rows = consumed_before(batch, stage.steps) - consumed_before(batch, case.done)
    return Work(rows=case.train(rows * batch.seq_len, batch.seq_len))


@work_of.register
def _rankings(stage: RewardModelConfig, case: Case) -> Work | None:
    if (looked := _rows_of(stage, case)) is None:
        return None
    row = looked.tokens
    rankings = consumed_before(stage.batch, stage.steps) - consumed_before(stage.batch, case.done)
    return Work(rows=case.train(rankings * row, int(row), "scalar"))


def _rows_of(stage: RewardModelConfig | DpoConfig, case: Case) -> Looked | None:
    """All rows that a stage of rankings reads: those of files if somebody has looked, or a task's.

    Lengths that stand in files are not read for an estimate.
    """
    if stage.data.sources or stage.task is None:
        return case.looked
    prompt, answer = lengths(stage.task, case.tokenizer)
    rows = count(stage.task, "train_sft", stage.num_problems)
    rows += count(stage.task, "held_out", stage.num_held_out)
    return Looked(rows, prompt + stage.answers_per_problem * answer)


@work_of.register
def _solutions(stage: ProcessRewardConfig, case: Case) -> Work | None:
    """An answer a row."""
    if stage.data.sources or stage.task is None:
        return None
    row = sum(lengths(stage.task, case.tokenizer))
    rows = consumed_before(stage.batch, stage.steps) - consumed_before(stage.batch, case.done)
    return Work(rows=case.train(rows * row, int(row), "scalar"))


@work_of.register
def _preferences(stage: DpoConfig, case: Case) -> Work | None:
    """Of unpaired answers, a forward pass more of each role: the baseline's."""
    if (looked := _rows_of(stage, case)) is None:
        return None
    flops = case.train(looked.tokens, int(looked.tokens))
    rows = consumed_before(stage.batch, stage.steps) - consumed_before(stage.batch, case.done)
    if stage.reference_in_use == "precomputed":
        return Work(rows=flops * (rows + looked.rows / 3))
    reads = (1 + (not stage.loss.paired)) * (stage.reference_in_use == "model")
    return Work(rows=flops * rows * (1 + (reads + (not stage.loss.paired)) / 3))


@work_of.register
def _distilled(stage: DistillConfig, case: Case) -> Work | None:
    """The teacher reads, too. One that this run does not train may be of any size."""
    teacher, own = stage.roles.teacher, {s.name for s in case.run.training}
    if teacher is not None and teacher.init_from is not None and teacher.init_from not in own:
        return None
    share = stage.on_policy_fraction
    work = _rows(stage, case).times((1 - share) * 4 / 3)
    if share and stage.task is not None:
        prompt, answer = _written(stage, stage.task, case)
        row = prompt + stage.samples_per_prompt * answer
        flops = case.train(row, int(row))
        steps = (stage.steps - case.done) * stage.batch.global_batch
        work += Work(decode=flops / 3, rows=flops * 4 / 3).times(share * steps)
    return work


def _written(stage: Any, task: TaskConfig, case: Case) -> tuple[float, float]:
    """Tokens of a prompt and of what is written to it."""
    prompt, answer = lengths(task, case.tokenizer)
    most = stage.sampling.max_new_tokens
    # A file has bare answers; how much a model thinks before it is not in it.
    return prompt, most if isinstance(task, FileTaskConfig) else min(answer, most)


@work_of.register(GrpoConfig)
@work_of.register(OnlineDpoConfig)
@work_of.register(PpoConfig)
def _rollouts(stage: GrpoConfig | OnlineDpoConfig | PpoConfig, case: Case) -> Work:
    """Decoding, a forward pass of every role that is read, epochs of those that are trained."""
    prompt, answer = _written(stage, stage.task, case)
    row = prompt + stage.samples_per_prompt * answer
    read_first = getattr(stage, "needs_old_logprobs", isinstance(stage, PpoConfig))
    work = Work(decode=case.train(row, int(row)) / 3)
    for role in roles_in_use(stage):
        passes = (role not in TRAINED or read_first) / 3 + stage.epochs_per_rollout * (
            role in TRAINED
        )
        head = "scalar" if role in SCORERS else "vocabulary"
        work += Work(rows=passes * case.train(row, int(row), head))
    return work.times((stage.steps - case.done) * stage.batch.global_batch)


@work_of.register
def _problems(evaluation: ProblemsConfig, case: Case) -> Work:
    prompt, answer = lengths(evaluation.task, case.tokenizer)
    number = count(evaluation.task, "held_out", evaluation.num_problems)
    tokens = number * (prompt + min(answer, evaluation.max_new_tokens))
    return Work(decode=case.train(tokens, int(prompt)) / 3)


@work_of.register
def _bits(evaluation: BitsConfig, case: Case) -> Work | None:
    """A token is computed in every window that it stands in."""
    data = data_of(evaluation, case.run, case.stage)
    sources = data.validation_sources()
    if any(s.kind == "indexed" for s in sources):
        return None
    text = next(iter(sources[0].documents())).text[:SAMPLED_BYTES]
    share = 1.0 if data.validation else data.held_out or 1.0
    tokens = share * _bytes(sources) * len(case.tokenizer.encode(text)) / max(len(text.encode()), 1)
    windows = evaluation.seq_len / (evaluation.stride or evaluation.seq_len)
    return Work(rows=case.train(tokens * windows, evaluation.seq_len) / 3)


@work_of.register
def _continuations(evaluation: ContinuationsConfig, case: Case) -> Work:
    tokens = len(evaluation.prompts) * evaluation.sampling.max_new_tokens
    return Work(decode=case.train(tokens, evaluation.sampling.max_new_tokens) / 3)


@work_of.register
def _choices(evaluation: MultipleChoiceConfig, case: Case) -> Work:
    """A row for each choice, with the question before it."""
    questions = evaluation.questions()
    sampled = [(q.text, c) for q in questions[:SAMPLED] for c in q.choices]
    tokens = sum(len(case.tokenizer.encode(f"{text} {choice}")) for text, choice in sampled)
    row = tokens / max(1, len(sampled))
    return Work(rows=case.train(sum(len(q.choices) for q in questions) * row, int(row)) / 3)


@work_of.register
def _tasks(evaluation: LmEvalConfig, case: Case) -> None:
    """The library alone knows them."""
    return None


def _bytes(sources: Sequence[DataSource]) -> float:
    """Of text; an indexed source is tokens already."""
    texts = [s for s in sources if s.kind != "indexed"]
    return float(sum(f.stat().st_size for s in texts for f in s.files()))


def lengths(task: TaskConfig, tokenizer: Tokenizer) -> tuple[float, float]:
    """Mean tokens of a task's prompts and of their solutions, ends included."""
    prompts = answers = number = 0
    for problem in itertools.islice(task.problems("train_rl"), SAMPLED):
        asked = prompt_messages(problem, task)
        prompts += len(encode_chat(tokenizer, asked, add_generation_prompt=True)[0])
        answers += sum(encode_chat(tokenizer, messages(problem, task))[1])
        number += 1
    return prompts / max(number, 1), answers / max(number, 1)


def estimate(
    run: RunConfig,
    tokenizer: Tokenizer,
    rates: Mapping[str, float],
    world_size: int,
    done: Mapping[str, int],
    looked: Looked | None = None,
) -> dict[str, float | None]:
    """Seconds that each stage will take, its evaluations included; None where it is not known.

    ``rates``: the GEMM rate in FLOP/s over all ranks, by precision. ``done``: steps of each stage
    that need not be run again; a stage with all of them is left out. ``looked``: at the files of
    the stage, if there is one.
    """
    found: dict[str, float | None] = {}
    for stage in run.training:
        case = Case(run, stage, tokenizer, done.get(stage.name, 0), looked)
        if case.done < stage.steps:
            found[stage.name] = _seconds(stage, case, rates[stage.engine.precision], world_size)
    return found


def _seconds(stage: StageConfig, case: Case, rate: float, world_size: int) -> float | None:
    try:
        work = work_of(stage, case)
        evaluations = [work_of(e, case) for e in evaluations_of(case.run, stage)]
    except (UserError, OSError):
        return None  # whoever reads those files will say it better
    if work is None or None in evaluations:
        return None
    layout = role_layout(role_of(stage, ACTOR), world_size)
    rows = stage.batch.global_batch / getattr(stage, "updates_per_rollout", 1) / layout.dp
    micro_batches = math.ceil(rows / stage.batch.micro_batch)
    bubble = 1 + (layout.pp - 1) / micro_batches  # of a pipeline that fills and drains
    seconds = STAGE_SECONDS + dataclasses.replace(work, rows=work.rows * bubble).on(rate)
    device = pick_device(stage.engine.device)
    if blocks.wants_compile(stage.engine, device):
        seconds += COMPILE_SECONDS
    return seconds + sum(e.on(rate) for e in evaluations if e is not None)


def expectation(expected: Mapping[str, float | None], rates: Mapping[str, float]) -> str:
    """The estimate as one line."""
    known = {name: s for name, s in expected.items() if s is not None}
    rate = ", ".join(f"{flops / 1e9:.0f} GFLOP/s in {name}" for name, flops in rates.items())
    parts = ", ".join(f"{name} {duration(s)}" for name, s in known.items())
    unknown = ", ".join(name for name, s in expected.items() if s is None)
    if not known:
        return f"how long it takes cannot be told in advance, for the work of {unknown}"
    text = f"expected on this machine ({rate}): about {duration(sum(known.values()))}: {parts}"
    return text + (f"; not {unknown}, whose work cannot be told in advance" if unknown else "")
