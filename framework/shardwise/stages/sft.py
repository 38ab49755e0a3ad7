"""Supervised fine-tuning on conversations: from files, from a family of problems, or both."""

from __future__ import annotations

import json

import xxhash

from shardwise.data.chat import encode_chat
from shardwise.data.datasets import build_chat_examples, pack_examples
from shardwise.data.packing import Example, PackedExamples
from shardwise.data.sampler import Sampler
from shardwise.rewards.tasks import ProblemSet, messages
from shardwise.stages.base import StageContext
from shardwise.stages.sft_config import ChatStageConfig
from shardwise.stages.supervised import SupervisedStage


class SftStage(SupervisedStage):
    """See `SftConfig`."""

    def __init__(self, ctx: StageContext) -> None:
        self.packed = ctx.stage.data.pack
        train, validation, data_hash = chat_rows(ctx)
        order = Sampler(train.num_rows, ctx.run.seed, ctx.stage.name)
        super().__init__(ctx, train, order, validation, data_hash)


def chat_rows(ctx: StageContext) -> tuple[PackedExamples, PackedExamples | None, str]:
    """What a stage learns from, what it is measured on, and a hash of the former."""
    config: ChatStageConfig = ctx.stage
    tokenizer = ctx.tokenizer
    how = config.data.turns, config.data.strict_fields, config.data.texts
    examples, held_out = (
        build_chat_examples(sources, tokenizer, *how, part)
        for sources, part in (config.data.training(), config.data.measured())
    )
    if config.task is not None:
        problems = ProblemSet(config.task, "train_sft", config.num_problems)
        examples += [Example(*encode_chat(tokenizer, messages(p, config.task))) for p in problems]
    seq_len = config.batch.seq_len
    train = pack_examples(examples, config.data, seq_len, tokenizer.pad_id)
    validation = (
        pack_examples(held_out, config.data, seq_len, tokenizer.pad_id) if held_out else None
    )
    return train, validation, examples_hash(examples, seq_len)


def examples_hash(examples: list[Example], seq_len: int) -> str:
    """xxh3-128 of the token ids and masks, and of the row length."""
    state = xxhash.xxh3_128(str(seq_len).encode())
    for example in examples:
        said = [list(example.ids), [bool(m) for m in example.loss_mask]]
        state.update(json.dumps(said).encode())
    return state.hexdigest()
