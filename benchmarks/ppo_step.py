"""A PPO update beside TRL's, on the same weights and the same token work.

    python benchmarks/ppo_step.py [--turns 10] [--precision fp32]

A byte-level Llama of 4.2M parameters as actor and reference, its body with a scalar head as critic
and reward model; two prompts with eight completions of exactly 64 tokens each (nothing ends a
completion, on either side), four epochs over the rollout. Ours is the `ppo` stage itself. First
both replay the same stored completions in fp32 and must agree on log-probabilities, values,
advantages (that is, on rewards too) and on the gradient norms of actor and critic; then they take
turns, each in a process of its own, warm-up not counted: both with bf16 products and fp32 weights
where the processor multiplies bf16 (TRL by ``ACCELERATE_MIXED_PRECISION``, its faster setting
there), else both in fp32.

TRL dropped PPO after 1.12, and the other benchmarks need a newer one: 1.12.0 is installed for this
script alone, into a folder of its own (``--trl``).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import stage_context
from contest import Contest, Lap
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
from shardwise.precision.policy import resolve
from shardwise.rewards import prompt_messages
from shardwise.stages.base import StageContext
from shardwise.stages.groups import Group
from shardwise.stages.ppo import PpoStage

TARGET = 2.0
TRL = "TRL 1.12"
LR = 1e-6
NUM_PROMPTS, GROUP, LENGTH, EPOCHS = 2, 8, 64, 4
FOLDER = Path.home() / ".cache" / "shardwise" / "trl-1.12.0"


def provide_trl(folder: Path) -> None:
    """Make ``import trl`` find 1.12.0, installed into ``folder`` on the first use."""
    if not (folder / "trl").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(folder)]
        subprocess.run([*pip, "trl==1.12.0"], check=True)
    sys.path.insert(0, str(folder))


class FreshContext(StageContext):
    """All roles start from their initial weights."""

    def initial_checkpoint(self, role: str) -> Path | None:
        """Nowhere."""
        return None


def our_stage(hidden: int, layers: int, length: int, precision: str) -> PpoStage:
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
        "kind": "ppo",
        "steps": 1,
        "batch": {"global_batch": NUM_PROMPTS, "micro_batch": NUM_PROMPTS},
        "samples_per_prompt": GROUP,
        "sampling": {"max_new_tokens": length},
        "verifier_weight": 0.0,
        "reward_model_weight": 1.0,
        "epochs_per_rollout": EPOCHS,
        "loss": {"preset": "trl_default"},
        "optimizer": {"lr": LR, "beta2": 0.999, "weight_decay": 0.0},
        "engine": {"precision": precision, "device": "cpu", "max_grad_norm": 0.0},
    }
    ctx = stage_context(model, stage, tokenizer)
    return PpoStage(FreshContext(**vars(ctx)))


def trl_arguments(stage: PpoStage, length: int) -> dict[str, Any]:
    """What `TrlPpo` takes: the stage's weights and prompts."""
    assert stage.reference is not None and stage.reward_model is not None
    problems = [stage.problems[int(i)] for i in stage.order.batch(0, NUM_PROMPTS)]
    return {
        "config": stage.ctx.run.model,
        "policy": list(stage.engine.weights()),
        "reference": list(stage.reference.weights()),
        "critic": list(stage.critic.weights()),
        "reward": list(stage.reward_model.weights()),
        "tokenizer": stage.ctx.tokenizer,
        "prompts": [text_of(stage, p) for p in problems],
        "group_size": GROUP,
        "length": length,
        "lr": LR,
        "epochs": EPOCHS,
    }


def stored_rollout(stage: PpoStage, length: int) -> list[Group]:
    """Groups of step 0 with random tokens."""
    generator = torch.Generator().manual_seed(1)
    groups = []
    for index in stage.order.batch(0, NUM_PROMPTS):
        problem = stage.problems[int(index)]
        messages = prompt_messages(problem, stage.config.task)
        prompt, _ = encode_chat(stage.ctx.tokenizer, messages, add_generation_prompt=True)
        tokens = torch.randint(256, (GROUP, length), generator=generator).tolist()
        blank = [[0.0] * length] * GROUP
        texts, rewards = [""] * GROUP, [0.0] * GROUP
        stopped = [False] * GROUP
        groups.append(
            Group(problem, int(index), prompt, tokens, blank, stopped, texts, rewards, "stored")
        )
    return groups


def our_replay(stage: PpoStage, groups: list[Group]) -> dict[str, Any]:
    """The stored groups through the stage, with a learning rate of zero; by (prompt, tokens)."""
    rollout_worker = stage.rollout_worker
    stage.rollout_worker = Replay(groups)  # type: ignore[assignment]
    try:
        metrics = stage.train_step(0, 0.0)
    finally:
        stage.rollout_worker = rollout_worker
    found: dict[str, Any] = {
        "policy": metrics["grad_norm"],
        "value": metrics["critic_grad_norm"],
    }
    for name in ("old_logprobs_BT", "values_BT", "advantages_BT"):
        found[name] = torch.stack([torch.as_tensor(v) for g in groups for v in g.per_token[name]])
    return found


def agreement(ours: dict[str, Any], theirs: dict[str, Any], order: list[int]) -> dict[str, float]:
    """Largest differences; the gradient norms' are relative. ``order``: ours for each of theirs."""

    def worst(name: str, other: torch.Tensor) -> float:
        return float((ours[name][order] - other).abs().max())

    return {
        "log-probabilities": worst("old_logprobs_BT", theirs["logprobs"]),
        "values": worst("values_BT", theirs["values"]),
        "advantages": worst("advantages_BT", theirs["advantages"]),
        "policy gradient norm": abs(ours["policy"] / theirs["policy_norm"] - 1.0),
        "value gradient norm": abs(ours["value"] / theirs["value_norm"] - 1.0),
    }


def our_side(hidden: int, layers: int, length: int, precision: str, lap: Lap) -> None:
    """Our process: says what TRL is to do and what the replay gave, then takes its turns."""
    stage = our_stage(hidden, layers, length, "fp32")
    groups = stored_rollout(stage, length)
    replayed = our_replay(stage, groups)
    lap.pipe.send((trl_arguments(stage, length), [(g.prompt, g.tokens) for g in groups], replayed))
    racing = our_stage(hidden, layers, length, precision)
    take_turns(lambda step: racing.train_step(step, LR), lap)


def trl_side(folder: Path, precision: str, lap: Lap) -> None:
    """TRL's process: the same from what ours has sent."""
    provide_trl(folder)
    from peers.trl_ppo import TrlPpo

    arguments, completions = lap.pipe.recv()
    trl = TrlPpo(**arguments, precision="fp32")
    lap.pipe.send(vars(trl.replay({tuple(prompt): tokens for prompt, tokens in completions})))
    racing = TrlPpo(**arguments, precision=precision)
    lap.start()
    racing.train(lap)


def check(completions: list[Any], ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Compare the replays, each completion with its like; see `accept`."""
    left = {
        tuple(prompt): list(range(i * GROUP, (i + 1) * GROUP))
        for i, (prompt, _) in enumerate(completions)
    }
    order = [left[tuple(p)].pop(0) for p in theirs["prompt_ids"]]
    differences = agreement(ours, theirs, order)
    accept(differences)
    return differences


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, check, race; returns what was printed, as data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trl", type=Path, default=FOLDER, help="where TRL 1.12.0 is, or goes")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    options = parse(parser, argv)
    provide_trl(options.trl)
    precision = resolve(options.precision, torch.device("cpu"))
    hidden, layers, length = (64, 2, 8) if options.tiny else (256, 4, LENGTH)
    sides = {
        OURS: partial(our_side, hidden, layers, length, precision),
        TRL: partial(trl_side, options.trl, precision),
    }
    contest = Contest(sides, options.threads)
    arguments, completions, ours, theirs = exchange(contest, TRL)
    differences = check(completions, ours, theirs)
    laps = contest.run(options.turns, options.warmup)
    title = (
        f"{arguments['config'].num_parameters() / 1e6:.1f}M parameters a role, {precision}, "
        f"{NUM_PROMPTS * GROUP} completions x {length} tokens, {EPOCHS} epochs"
    )
    return conclude(title, laps, TRL, TARGET, differences, options)


if __name__ == "__main__":
    main(sys.argv[1:])
