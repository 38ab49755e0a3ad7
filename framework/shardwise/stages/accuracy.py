"""Evaluation: greedy accuracy on held-out problems, beside the majority-answer baseline."""

from __future__ import annotations

from typing import Any

import torch

from shardwise.engines.base import Engine
from shardwise.rewards import ProblemSet, build_reward, majority_baseline
from shardwise.rollout.config import Sampling
from shardwise.stages.base import StageContext
from shardwise.stages.evaluation_configs import ProblemsConfig
from shardwise.stages.rollout_worker import RolloutWorker


def evaluate(config: ProblemsConfig, ctx: StageContext, engine: Engine) -> dict[str, Any]:
    """``accuracy``, ``num_problems``, ``majority_baseline`` and some ``samples``.

    Decoding is greedy and in fp32, so that the figure does not hang on how a batch was cut.
    """
    problems = ProblemSet(config.task, "held_out", config.num_problems)
    sampling = Sampling(greedy=True, max_new_tokens=config.max_new_tokens)
    with build_reward(config.reward) as scorer:
        rollout_worker = RolloutWorker(ctx, config.task, scorer, torch.float32)
        rollout_worker.sync(engine)
        groups = rollout_worker.rollout(problems, sampling, 1, 0, range(len(problems)))
        best = scorer.maximum if scorer.maximum is not None else 1.0
    right = [g.rewards[0] is not None and g.rewards[0] >= best - 1e-9 for g in groups]
    return {
        "accuracy": sum(right) / len(problems),
        "num_problems": len(problems),
        "majority_baseline": majority_baseline(problems),
        "answer_length": sum(len(g.tokens[0]) for g in groups) / len(problems),
        "samples": [
            {
                "stage": ctx.stage.name,
                "prompt": g.problem.question,
                "completion": g.texts[0],
                "answer": g.problem.answer,
                "correct": ok,
            }
            for g, ok in list(zip(groups, right, strict=True))[: config.num_samples_shown]
        ],
    }
