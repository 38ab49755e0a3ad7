"""A GRPO step beside TRL's, on the same weights and the same token work.

    python benchmarks/grpo_step.py [--turns 15]

A byte-level Llama of 4.2M parameters in fp32, two prompts with eight completions of exactly 64
tokens each (end-of-text is switched off for both), one trivial reward, one update. Ours is the
`grpo` stage itself: generation, scoring, advantages, loss, engine. First both replay the same
stored completions and rewards and must agree on log-probabilities, advantages and gradient norm;
then they take turns, each in a process of its own, warm-up not counted.
"""

from __future__ import annotations

import argparse
import sys
from functools import cached_property, partial
from typing import Any

import torch
from common import stage_context
from contest import Contest, Lap
from peers.trl_grpo import Replayed, TrlGrpo
from rl import (
    OURS,
    EndlessTokenizer,
    Replay,
    accept,
    conclude,
    exchange,
    parse,
    take_turns,
    text_of,
)

from shardwise.data.chat import encode_chat
from shardwise.losses.logprobs import valid_logprobs
from shardwise.rewards import RewardConfig, RewardItem, Scorer, build_reward, prompt_messages
from shardwise.stages.groups import Group
from shardwise.stages.grpo import GrpoStage

TARGET = 2.0
TRL = "TRL"
LR = 1e-6
NUM_PROMPTS, GROUP, LENGTH = 2, 8, 64


def our_stage(hidden: int, layers: int, length: int) -> GrpoStage:
    """The stage as a run would build it; for 256 and 4, a model of 4.2M parameters."""
    tokenizer = EndlessTokenizer()
    model = {
        "family": "llama",
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": hidden,
        "num_layers": layers,
        "num_heads": hidden // 64,
        "num_kv_heads": hidden // 64,
        "ffn_size": 4 * hidden,
        "max_seq_len": 512,
    }
    stage = {
        "kind": "grpo",
        "steps": 1,
        "batch": {"global_batch": NUM_PROMPTS, "micro_batch": NUM_PROMPTS},
        "samples_per_prompt": GROUP,
        "sampling": {"max_new_tokens": length},
        "reward": {"parts": [{"kind": "language", "language": "en"}]},
        "loss": {"preset": "trl_default"},
        "optimizer": {"lr": LR, "beta2": 0.999, "weight_decay": 0.0},
        "engine": {"precision": "fp32", "device": "cpu"},
    }
    return GrpoStage(stage_context(model, stage, tokenizer))


class Score:
    """The stage's reward as TRL wants it; made where it is first called."""

    def __init__(self, config: RewardConfig, length: int) -> None:
        self.config, self.length = config, length

    @cached_property
    def scorer(self) -> Scorer:
        """See `build_reward`."""
        return build_reward(self.config)

    def __call__(self, texts: list[str]) -> list[float]:
        """Rewards of completions; an unscorable one has 0."""
        items = [RewardItem("", text, "", {}, self.length) for text in texts]
        return [float(r.value or 0.0) for r in self.scorer.score(items)]


def trl_arguments(stage: GrpoStage, length: int) -> dict[str, Any]:
    """What `TrlGrpo` takes: the stage's weights, prompts and reward."""
    return {
        "config": stage.ctx.run.model,
        "weights": list(stage.engine.weights()),
        "tokenizer": stage.ctx.tokenizer,
        "prompts": [text_of(stage, p) for p in stage.problems],
        "num_completions": NUM_PROMPTS * GROUP,
        "group_size": GROUP,
        "length": length,
        "lr": LR,
        "score": Score(stage.config.reward, length),
    }


def stored_rollout(stage: GrpoStage, length: int) -> list[Group]:
    """Groups of step 0 with random tokens and rewards."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for index in stage.order.batch(0, NUM_PROMPTS):
        problem = stage.problems[int(index)]
        messages = prompt_messages(problem, stage.config.task)
        prompt, _ = encode_chat(stage.ctx.tokenizer, messages, add_generation_prompt=True)
        tokens = torch.randint(256, (GROUP, length), generator=generator).tolist()
        rewards = torch.rand(GROUP, generator=generator).tolist()
        blank = [[0.0] * length] * GROUP
        groups.append(
            Group(
                problem,
                int(index),
                prompt,
                tokens,
                blank,
                [False] * GROUP,
                [""] * GROUP,
                rewards,
                "stored",
            )
        )
    return groups


def as_lists(stage: GrpoStage, groups: list[Group]) -> tuple[list[str], list[Any], list[float]]:
    """A rollout as `TrlGrpo.replay` takes it: prompts, completions and rewards."""
    texts = [text_of(stage, g.problem) for g in groups]
    completions = [t for g in groups for t in g.tokens]
    return texts, completions, [float(r or 0.0) for g in groups for r in g.rewards]


def our_replay(stage: GrpoStage, groups: list[Group]) -> Replayed:
    """The stored groups through the stage: one update, with a learning rate of zero."""
    rollout_worker, forward_backward = stage.rollout_worker, stage.engine.forward_backward
    seen: list[Any] = []

    def watch(batches: Any, loss: Any, lr: float) -> dict[str, float]:
        seen.extend(batches)
        return forward_backward(batches, loss, lr)

    stage.rollout_worker, stage.engine.forward_backward = Replay(groups), watch  # type: ignore
    try:
        metrics = stage.train_step(0, 0.0)
    finally:
        stage.rollout_worker, stage.engine.forward_backward = rollout_worker, forward_backward  # type: ignore
    values = stage.engine.forward(seen, lambda z, b: valid_logprobs(z, b)[b.loss_mask_BT])
    return Replayed(
        [g.prompt for g in groups for _ in range(GROUP)],
        torch.cat(values).view(-1, len(groups[0].tokens[0])),
        torch.tensor([a for g in groups for a in g.per_token["advantages_BT"]]),
        metrics["grad_norm"],
    )


def agreement(ours: Replayed, theirs: Replayed) -> dict[str, float]:
    """Largest differences; the gradient norm's is relative. ValueError for other prompts."""
    if ours.prompt_ids != theirs.prompt_ids:
        raise ValueError("the two trainers read different prompt tokens")
    return {
        "log-probabilities": float((ours.logprobs - theirs.logprobs).abs().max()),
        "advantages": float((ours.advantages - theirs.advantages).abs().max()),
        "gradient norm": abs(ours.grad_norm / theirs.grad_norm - 1.0),
    }


def our_side(hidden: int, layers: int, length: int, lap: Lap) -> None:
    """Our process: says what TRL is to do and what the replay gave, then takes its turns."""
    stage = our_stage(hidden, layers, length)
    groups = stored_rollout(stage, length)
    lap.pipe.send(
        (trl_arguments(stage, length), as_lists(stage, groups), our_replay(stage, groups))
    )
    take_turns(lambda step: stage.train_step(step, LR), lap)


def trl_side(lap: Lap) -> None:
    """TRL's process: the same from what ours has sent."""
    arguments, stored = lap.pipe.recv()
    trl = TrlGrpo(**arguments)
    lap.pipe.send(trl.replay(*stored))
    lap.start()
    trl.train(lap)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, check, race; returns what was printed, as data."""
    options = parse(argparse.ArgumentParser(description=__doc__.splitlines()[0]), argv)
    hidden, layers, length = (64, 2, 8) if options.tiny else (256, 4, LENGTH)
    contest = Contest(
        {OURS: partial(our_side, hidden, layers, length), TRL: trl_side}, options.threads
    )
    arguments, _, ours, theirs = exchange(contest, TRL)
    differences = agreement(ours, theirs)
    accept(differences)
    laps = contest.run(options.turns, options.warmup)
    title = (
        f"{arguments['config'].num_parameters() / 1e6:.1f}M parameters, fp32, "
        f"{NUM_PROMPTS * GROUP} completions x {length} tokens in groups of {GROUP}"
    )
    return conclude(title, laps, TRL, TARGET, differences, options)


if __name__ == "__main__":
    main(sys.argv[1:])
