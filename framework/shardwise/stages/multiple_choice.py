"""Evaluation: questions with choices, each scored as a continuation of its question.

Brown et al. 2020, "Language Models are Few-Shot Learners", section 2.4: the likeliest choice is the
answer. Reported as lm-eval does, by the summed log-probability and by the same over the characters
of a choice, since long choices are less likely for their length alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from shardwise.data.chat import encode_chat
from shardwise.data.tokenizer import Tokenizer
from shardwise.engines.base import Engine
from shardwise.stages.base import StageContext
from shardwise.stages.evaluation_configs import MultipleChoiceConfig, Question
from shardwise.stages.scoring import Pair, TextEncoder, score

log = logging.getLogger(__name__)


def evaluate(config: MultipleChoiceConfig, ctx: StageContext, engine: Engine) -> dict[str, Any]:
    """``choice_accuracy`` (of the likeliest choice), ``choice_accuracy_norm`` (of the likeliest a
    character), ``choice_chance`` (of guessing) and ``num_questions``.

    ``num_cut``: choices whose question lost its beginning, since the model takes no more tokens.
    """
    questions = config.questions()
    pairs = [pair for q in questions for pair in _pairs(q, config, ctx.tokenizer)]
    longest = ctx.run.model.max_seq_len
    scores = iter(score(engine, pairs, config.micro_batch, longest))
    right = np.zeros(2)
    for question in questions:
        sums = np.array([next(scores)[0] for _ in question.choices])
        lengths = np.array([len(c) for c in question.choices])
        right += [int(np.argmax(x)) == question.answer for x in (sums, sums / lengths)]
    plain, norm = (right / len(questions)).tolist()
    num_cut = sum(len(a) + len(b) > longest + 1 for a, b in pairs)
    if num_cut and ctx.is_main:
        log.warning("%s: %d choices lost the beginning of their question", config.name, num_cut)
    return {
        "choice_accuracy": plain,
        "choice_accuracy_norm": norm,
        "choice_chance": float(np.mean([1 / len(q.choices) for q in questions])),
        "num_questions": len(questions),
        **({"num_cut": num_cut} if num_cut else {}),
    }


def _pairs(
    question: Question, config: MultipleChoiceConfig, tokenizer: Tokenizer
) -> Sequence[Pair]:
    text = config.prompt.replace("{question}", question.text)
    if config.texts == "raw":
        encoder = TextEncoder(tokenizer)
        return [encoder.pair(text, f"{config.delimiter}{c}") for c in question.choices]
    asked = [{"role": "user", "content": text}]
    context, _ = encode_chat(tokenizer, asked, add_generation_prompt=True)
    return [(context, tokenizer.encode(c)) for c in question.choices]
