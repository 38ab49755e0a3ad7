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
from shardwise.stages.row_holders import first_rank
from shardwise.stages.unscored import new_kinds


def evaluate(config: ProblemsConfig, ctx: StageContext, engine: Engine) -> dict[str, Any]:
    """``accuracy`` and mean ``score`` of those ``num_problems`` that could be scored, and some
    ``samples``.

    ``num_unscorable`` counts the others; without any score there is no accuracy.
    ``majority_baseline`` is that of always giving the most common answer.

    Decoding is greedy and in fp32, so that the figure does not hang on how a batch was cut.
    """
    problems = ProblemSet(config.task, "held_out", config.num_problems)
    sampling = Sampling(greedy=True, max_new_tokens=config.max_new_tokens)
    with build_reward(config.reward) as scorer:
        rollout_worker = RolloutWorker(ctx, config.task, scorer, torch.float32, config.rollout)
        rollout_worker.sync(engine)
        shown = first_rank(range(min(config.num_samples_shown, len(problems))))
        numbers = range(len(problems))
        groups = rollout_worker.rollout(problems, sampling, 1, 0, numbers, need=shown)
        best = scorer.maximum if scorer.maximum is not None else 1.0
    right = [None if g.rewards[0] is None else g.rewards[0] >= best - 1e-9 for g in groups]
    scored = [r for r in right if r is not None]
    rewards = [g.rewards[0] for g in groups if g.rewards[0] is not None]
    reasons = [reason for g in groups for reason in g.unscored()]
    return {
        # Of the problems whose answer could be scored.
        **(
            {"accuracy": sum(scored) / len(scored), "score": sum(rewards) / len(rewards)}
            if scored
            else {}
        ),
        **({"num_unscorable": len(right) - len(scored)} if len(scored) < len(right) else {}),
        "events": new_kinds(reasons, []),
        "num_problems": len(scored),
        "majority_baseline": majority_baseline(problems),
        "answer_length": sum(g.sizes[1] for g in groups) / len(problems),
        "samples": [
            {
                "stage": ctx.stage.name,
                "prompt": g.problem.question,
                "completion": g.texts[0],
                "answer": g.problem.answer,
                "correct": ok,
            }
            for g, ok in list(zip(groups, right, strict=True))[: config.num_samples_shown]
            if g.here
        ],
    }
