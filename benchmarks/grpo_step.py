"""A GRPO step beside TRL's, on the same weights and the same token work.

    python benchmarks/grpo_step.py [--turns 15]

A byte-level Llama of 4.2M parameters in fp32, two prompts with eight completions of exactly 64
tokens each (end-of-text is switched off for both), one trivial reward, one update. Ours is the
`grpo` stage itself: generation, scoring, advantages, loss, engine. First both replay the same
stored completions and rewards and must agree on log-probabilities, advantages and gradient norm;
then they take turns in one process, warm-up not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch
from common import Laps, clock, load, stage_context, table, use_threads, verdict
from peers.trl_grpo import Replayed, TrlGrpo
from rl import EndlessTokenizer, Replay, text_of

from shardwise.data.chat import encode_chat
from shardwise.losses.logprobs import valid_logprobs
from shardwise.rewards import RewardItem, prompt_messages
from shardwise.stages.grpo import GrpoStage
from shardwise.stages.play import Group

TARGET = 2.0
TOLERANCE = 1e-4
OURS, TRL = "shardwise", "TRL"
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


def trl_trainer(stage: GrpoStage, length: int) -> TrlGrpo:
    """TRL on the stage's weights, prompts and reward."""

    def score(texts: list[str]) -> list[float]:
        items = [RewardItem("", text, "", {}, length) for text in texts]
        return [float(r.value or 0.0) for r in stage.player.scorer.score(items)]

    return TrlGrpo(
        stage.ctx.run.model,  # type: ignore[arg-type]
        stage.engine.weights(),
        stage.ctx.tokenizer,
        [text_of(stage, p) for p in stage.problems],
        num_completions=NUM_PROMPTS * GROUP,
        group_size=GROUP,
        length=length,
        lr=LR,
        score=score,
    )


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


def our_replay(stage: GrpoStage, groups: list[Group], length: int) -> Replayed:
    """The stored groups through the stage: one update, with a learning rate of zero."""
    player, forward_backward = stage.player, stage.engine.forward_backward
    seen: list[Any] = []

    def watch(batches: Any, loss: Any) -> dict[str, float]:
        seen.extend(batches)
        return forward_backward(batches, loss)

    stage.player, stage.engine.forward_backward = Replay(groups), watch  # type: ignore
    try:
        metrics = stage.train_step(0, 0.0)
    finally:
        stage.player, stage.engine.forward_backward = player, forward_backward  # type: ignore
    values = stage.engine.forward(seen, lambda z, b: valid_logprobs(z, b)[b.loss_mask_BT])
    return Replayed(
        [g.prompt for g in groups for _ in range(GROUP)],
        torch.cat(values).view(-1, length),
        torch.tensor([a for g in groups for a in g.tracks["advantages_BT"]]),
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


def check(stage: GrpoStage, trl: TrlGrpo, length: int) -> dict[str, float]:
    """Replay on both sides, print and return the differences; SystemExit if they are too large."""
    groups = stored_rollout(stage, length)
    ours = our_replay(stage, groups, length)
    texts = [text_of(stage, g.problem) for g in groups]
    completions = [t for g in groups for t in g.tokens]
    rewards = [float(r or 0.0) for g in groups for r in g.rewards]
    differences = agreement(ours, trl.replay(texts, completions, rewards))
    for name, value in differences.items():
        print(f"replay: {name} differ by {value:.1e} at most")
    if max(differences.values()) > TOLERANCE:
        raise SystemExit(f"the two trainers disagree by more than {TOLERANCE}: nothing was timed")
    return differences


def race(stage: GrpoStage, trl: TrlGrpo, turns: int, warmup: int) -> Laps:
    """TRL's trainer drives; after each of its steps ours takes one."""
    laps = Laps()
    began = clock.now()
    step = 0

    def turn() -> bool:
        nonlocal began, step
        theirs = clock.now() - began
        began = clock.now()
        stage.train_step(step, LR)
        if step >= warmup:
            laps.add(TRL, theirs)
            laps.add(OURS, clock.now() - began)
        step += 1
        began = clock.now()
        return step < warmup + turns

    trl.train(turn)
    return laps


def main(argv: list[str] | None = None) -> dict[str, Any]:
    """Parse the command line, check, race; returns what was printed, as data."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15, help="counted steps of each")
    parser.add_argument("--warmup", type=int, default=4, help="steps that are not counted")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--tiny", action="store_true", help="a toy model, 8 tokens: a self-check")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON, too")
    options = parser.parse_args(argv)
    use_threads(options.threads)
    clock.kind = options.clock
    hidden, layers, length = (64, 2, 8) if options.tiny else (256, 4, LENGTH)
    before = load()
    stage = our_stage(hidden, layers, length)
    trl = trl_trainer(stage, length)
    differences = check(stage, trl, length)
    laps = race(stage, trl, options.turns, options.warmup)
    millions = stage.ctx.run.model.num_parameters() / 1e6  # type: ignore[attr-defined]
    print(
        f"\n{millions:.1f}M parameters, fp32, {NUM_PROMPTS * GROUP} completions x {length} tokens "
        f"in groups of {GROUP}, {options.threads} threads, {options.clock} clock, "
        f"load {before} before and {load()} after"
    )
    ratio = laps.ratio(OURS, TRL)
    rows = [[n, f"{laps.median(n):.3f}", f"{laps.ratio(n, TRL):.2f}"] for n in (OURS, TRL)]
    print(table(["", "s/step", "times TRL"], rows))
    print(f"against TRL: {verdict(ratio, TARGET)}")
    seconds = {n: laps.median(n) for n in (OURS, TRL)}
    result = {"replay": differences, "seconds": seconds, "ratio": ratio}
    if options.json:
        print(json.dumps(result))
    return result


if __name__ == "__main__":
    main(sys.argv[1:])
